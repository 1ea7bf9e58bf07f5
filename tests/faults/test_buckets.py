"""Runs and data in buckets, before real servers of both protocols, in calm and in a storm.

They need gcsfs, gcp-storage-emulator, s3fs and moto[server], and are skipped where these are not installed.
"""

import contextlib
import importlib.util
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults import storm
from tests.faults.black_box import CONFIG, Result, finished, hashes, lmjax, start, train, wait_for
from tests.faults.storm import Storm

SHARE = 0.3


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


google = needs("gcsfs", "gcp_storage_emulator")
amazon = needs("s3fs", "moto", "flask")


@contextlib.contextmanager
def server(*command: str) -> Iterator[str]:
    """The address, `host:port`, of a server that is started by the command and a port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-m", *command, str(port)], **quiet)  # type: ignore[call-overload]
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


class Store(NamedTuple):
    """A bucket named `bucket` behind a storm that has not begun."""

    server: str
    storm: Storm
    environment: dict[str, str]

    def train(self, corpus: Path, *words: str, **faults: str) -> Result:
        return train(corpus, "gs://bucket/run", *words, **self.environment, **faults)

    def objects(self) -> list[str]:
        with urllib.request.urlopen(f"http://{self.server}/storage/v1/b/bucket/o") as reply:
            return [item["name"] for item in json.load(reply).get("items", [])]

    def content(self, name: str) -> bytes:
        quoted = urllib.parse.quote(name, safe="")
        with urllib.request.urlopen(f"http://{self.server}/storage/v1/b/bucket/o/{quoted}?alt=media") as reply:
            return reply.read()

    def put(self, name: str, content: bytes) -> None:
        query = urllib.parse.urlencode({"uploadType": "media", "name": name})
        request = urllib.request.Request(f"http://{self.server}/upload/storage/v1/b/bucket/o?{query}", content)
        urllib.request.urlopen(request).close()


@pytest.fixture
def store() -> Iterator[Store]:
    command = ("gcp_storage_emulator", "start", "--host=127.0.0.1", "--in-memory", "--default-bucket=bucket", "--port")
    with server(*command) as address:
        weather = Storm(address, 0.0)
        with storm.before(weather) as url:
            hosts = {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}
            yield Store(address, weather, {**hosts, "GOOGLE_CLOUD_PROJECT": "p"})


def last_losses(text: str) -> dict[int, float]:
    """By step, as the last attempt has it."""
    lines = map(json.loads, text.splitlines())
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@google
def test_a_run_in_a_bucket_killed_and_resumed_is_the_run_on_disk(store: Store, corpus: Path, whole: Path) -> None:
    killed = store.train(corpus, LMJAX_FAULTS="kill@checkpoint.before_seal:2")
    assert killed.code == -9, killed
    resumed = store.train(corpus).done()
    assert "is in a bucket: no lock keeps a second run out" in resumed.out
    assert "step 5/12" in resumed.out and "step 4/12" not in resumed.out
    assert hashes("gs://bucket/run", **store.environment) == hashes(whole)
    losses = last_losses(store.content("run/metrics.jsonl").decode())
    assert losses == last_losses((whole / "metrics.jsonl").read_text()) and len(losses) == 12


@google
@pytest.mark.slow
def test_a_run_in_a_storm_is_the_run_on_disk(store: Store, corpus: Path, whole: Path) -> None:
    store.storm.share = SHARE
    ended = store.train(corpus).done()
    assert all(store.storm.befallen[fate] > 10 for fate in storm.WEATHER), store.storm.befallen
    assert "Traceback" not in ended.err
    store.storm.share = 0.0
    assert hashes("gs://bucket/run", **store.environment) == hashes(whole)
    lmjax("verify", "gs://bucket/run", **store.environment).done()


@google
@pytest.mark.slow
@pytest.mark.parametrize("only", ["", "LMJAX_MANIFEST"])
def test_a_store_that_does_not_answer_is_not_taken_for_an_empty_one(
    only: str, store: Store, corpus: Path, whole: Path
) -> None:
    """It is an error that names the object; nothing is deleted, set aside or begun from step 0."""
    assert store.train(corpus, LMJAX_FAULTS="kill@checkpoint.before_seal:2").code == -9
    before = store.objects()
    assert "run/checkpoints/4/LMJAX_MANIFEST.json" in before
    store.storm.share, store.storm.fates, store.storm.only = 1.0, storm.OUTAGE, only
    ended = store.train(corpus)
    ended.refused(4, "storage: gs://bucket/run", only)
    assert "step 1/12" not in ended.out
    assert set(before) <= set(store.objects())
    store.storm.share = 0.0
    store.train(corpus).done()
    assert hashes("gs://bucket/run", **store.environment) == hashes(whole)


@google
@pytest.mark.slow
def test_a_damaged_step_is_set_aside_and_made_again(store: Store, corpus: Path, whole: Path) -> None:
    store.train(corpus).done()
    name = next(name for name in store.objects() if name.startswith("run/checkpoints/12/state/d/"))
    content = store.content(name)
    store.put(name, content[:-1] + bytes([content[-1] ^ 1]))
    assert "is damaged" in store.train(corpus).done().err
    aside = [name for name in store.objects() if name.startswith("run/checkpoints/12.corrupt-")]
    assert len(aside) == len([name for name in store.objects() if name.startswith("run/checkpoints/12/")])
    assert hashes("gs://bucket/run", **store.environment) == hashes(whole)


@google
@pytest.mark.slow
def test_of_two_runs_the_later_takes_over(store: Store, corpus: Path) -> None:
    often = [f"--config.{name}=1000000" for name in ("train.steps", "train.evaluate_every", "checkpoint.every")]
    command = ("train", f"--config={CONFIG}:{corpus}", "--workdir=gs://bucket/run", *often)
    earlier = start(*command, **store.environment)
    wait_for(lambda: "run/.lease" in store.objects(), earlier)
    word = store.content("run/.lease")
    later = start(*command, **store.environment)
    wait_for(lambda: store.content("run/.lease") != word, later)
    finished(earlier).refused(6, "another attempt has begun", "gs://bucket/run/.lease")
    assert later.poll() is None
    later.terminate()
    assert finished(later).code == 75


@google
@pytest.mark.slow
def test_data_prepared_in_a_storm_are_those_of_the_disk(store: Store, corpus: Path, tmp_path: Path) -> None:
    text, words = f"{corpus}/a/*.txt", ("--tokenizer=bytes", "--shard-tokens=4000")
    here = lmjax("prepare", text, f"--out={tmp_path / 'data'}", *words).done()
    store.storm.share = SHARE
    there = lmjax("prepare", text, "--out=gs://bucket/data", *words, **store.environment).done()
    fingerprint = here.out.rsplit(maxsplit=1)[-1]
    assert fingerprint == there.out.rsplit(maxsplit=1)[-1]
    assert not [name for name in store.objects() if "preparing" in name]
    for path in (tmp_path / "data").glob("*.tokens"):
        assert store.content(f"data/{path.name}") == path.read_bytes()
    verified = lmjax("verify", "gs://bucket/data", **store.environment).done()
    assert fingerprint in verified.out


@amazon
@pytest.mark.slow
def test_data_in_s3_in_a_storm_are_those_of_the_disk(corpus: Path, tmp_path: Path) -> None:
    text, words = f"{corpus}/a/*.txt", ("--tokenizer=bytes", "--shard-tokens=4000")
    here = lmjax("prepare", text, f"--out={tmp_path / 'data'}", *words).done()
    with server("moto.server", "-p") as address:
        urllib.request.urlopen(urllib.request.Request(f"http://{address}/bucket", method="PUT"))
        with storm.before(Storm(address, SHARE)) as url:
            secrets = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
            environment = {"AWS_ENDPOINT_URL": url, **secrets}
            there = lmjax("prepare", text, "--out=s3://bucket/data", *words, **environment).done()
            assert here.out.rsplit(maxsplit=1)[-1] == there.out.rsplit(maxsplit=1)[-1]
            lmjax("verify", "s3://bucket/data", **environment).done()


def test_a_work_directory_in_s3_is_refused(corpus: Path) -> None:
    train(corpus, "s3://bucket/run").refused(2, "--workdir=s3://bucket/run", "gs://")
