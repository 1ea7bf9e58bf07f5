"""Metrics, the ledger and the views of them."""

import dataclasses
import json
import logging
import math
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lmjax.config import Config
from lmjax.data.config import DataConfig, PrepareConfig, SourceConfig, TokenizerConfig
from lmjax.errors import CheckpointError
from lmjax.process.redact import REDACTED, redact
from lmjax.record import config, jsonl
from lmjax.record.config import TrackingConfig
from lmjax.record.console import ConsoleTracker
from lmjax.record.jsonl import JsonLines, read_lines
from lmjax.record.ledger import Ledger, check_ledger, effective_history, joined_crc, read_ledger, row_crcs
from lmjax.record.tracking import JsonlTracker, Trackers, read_events, read_jsonl
from lmjax.record.wandb_tracker import WandbTracker


def bits(x: float) -> bytes:
    return struct.pack("<d", x)


# metrics.jsonl --------------------------------------------------------------------------------------------------------


def test_values_read_back_to_the_same_bits(tmp_path: Path) -> None:
    @given(st.lists(st.floats(allow_nan=False)))
    def check(values: list[float]) -> None:
        path = tmp_path / "metrics.jsonl"
        path.unlink(missing_ok=True)
        lines = JsonLines(path)
        for value in values:
            lines.write({"x": value})
        lines.close()
        assert [bits(record["x"]) for record in read_lines(path)] == [bits(value) for value in values]

    check()


def test_array_scalars_big_integers_and_non_finite_numbers(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    values = {"a": np.float32(0.1), "b": jnp.float32(0.1), "c": 10**30, "d": math.nan, "e": math.inf, "f": -math.inf}
    tracker.log(np.int64(3), values)  # type: ignore[arg-type]
    [row] = read_jsonl(tmp_path / "metrics.jsonl")
    assert row["a"] == row["b"] == float(np.float32(0.1)) and row["c"] == 10**30
    assert math.isnan(row["d"]) and (row["e"], row["f"], row["step"]) == (math.inf, -math.inf, 3)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (line["d"], line["e"], line["f"]) == ("NaN", "Infinity", "-Infinity")


def test_every_line_is_there_when_the_process_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os, sys; from lmjax.record.tracking import JsonlTracker; tracker = JsonlTracker(sys.argv[1])\n"
        "for step in range(100): tracker.log(step, {'loss': step / 7})\n"
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -9
    assert [row["loss"] for row in read_jsonl(path)] == [step / 7 for step in range(100)]


def test_a_torn_line_is_tolerated_and_cut_off_when_writing_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1.0 / step})
    whole = path.read_bytes()
    for cut in range(whole.rindex(b"\n", 0, -1) + 1, len(whole)):  # everywhere in the last line
        path.write_bytes(whole[:cut])
        assert [row["step"] for row in read_jsonl(path)] in ([1, 2], [1, 2, 3])  # whole but for its newline
        JsonlTracker(path).log(4, {"loss": 0.0})
        assert [row["step"] for row in read_jsonl(path)] == [1, 2, 4]


def test_damaged_lines_are_left_out_with_a_warning(tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\0\n{"step": \xff}\n[1]\n{"step": 2}\n')
    assert [row["step"] for row in read_jsonl(path)] == [1, 2]
    assert [record.message.split(": ")[1] for record in caplog.records] == [
        "line 3 is damaged or torn and is left out",
        "line 4 is damaged or torn and is left out",
    ]


def test_later_attempts_win(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonlTracker(path)
    first.start({"step": 0, "steps": 50})
    for step in (10, 20, 30, 40):
        first.log(step, {"loss": float(step), "attempt": 0})
    first.log(20, {"val/x/loss": 9.0})
    second = JsonlTracker(path)
    second.start({"step": 20, "steps": 50})
    second.log(30, {"loss": 0.5})
    second.summary({"final": 0.5})
    second.close("finished")
    rows = read_jsonl(path)
    assert [(row["step"], row["loss"], row.get("attempt"), row.get("val/x/loss")) for row in rows] == [
        (10, 10.0, 0, None),
        (20, 20.0, 0, 9.0),
        (30, 0.5, None, None),
    ]
    assert [event["event"] for event in read_events(path)] == ["start", "start", "summary", "end"]
    assert read_events(path)[-1]["status"] == "finished"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_stops_training(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker._lines._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(CheckpointError, match=r"storage: cannot write .*metrics.jsonl: No space left"):
        Trackers([tracker]).log(1, {"loss": 1.0})


def test_an_object_store_gets_the_whole_file_at_each_sync(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(jsonl, "is_remote", lambda path: True)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste')
    tracker = JsonlTracker(path)
    tracker.log(2, {})
    assert [row["step"] for row in read_jsonl(path)] == [1]
    tracker.sync()
    assert [row["step"] for row in read_jsonl(path)] == [1, 2]
    tracker.log(3, {})
    tracker.close("finished")
    assert [row["step"] for row in read_jsonl(path)] == [1, 2, 3]


def test_an_unwritable_place_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"storage: cannot write .*: "):
        JsonlTracker(tmp_path / "file" / "metrics.jsonl")


# The ledger -----------------------------------------------------------------------------------------------------------


def written(path: Path, entries: list[Any]) -> Path:
    ledger = Ledger(path)
    for entry in entries:
        ledger.record(*entry)
    ledger.close()
    return path


def test_an_uninterrupted_run_checks(tmp_path: Path) -> None:
    path = written(tmp_path / "ledger.jsonl", [(0, step, 8 * (step - 1), 8, step * 77) for step in range(1, 6)])
    assert check_ledger(path) == []
    assert effective_history(path) == read_ledger(path)


@given(kills=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 4)), max_size=5), total=st.integers(1, 30))
def test_replays_count_once_whatever_the_kills(tmp_path_factory: Any, kills: list[tuple[int, int]], total: int) -> None:
    """Each attempt does some steps, then dies; the next one starts from a checkpoint some steps back."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    entries, start = [], 1
    for attempt, (steps, lost) in enumerate([*kills, (total, 0)]):
        end = min(start + steps, total + 1) if attempt < len(kills) else total + 1
        entries += [(attempt, step, 4 * (step - 1), 4, step % 5) for step in range(start, end)]
        start = max(1, end - lost)
    written(path, entries)
    assert check_ledger(path) == []
    history = effective_history(path)
    assert [entry.step for entry in history] == list(range(1, total + 1))
    assert [s for e in history for s in range(e.first_sample, e.first_sample + e.count)] == list(range(4 * total))


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ([(0, 1, 0, 4, 1), (0, 2, 4, 4, 2), (1, 2, 4, 4, 3)], "step 2 read samples 4 to 7 (crc 00000003) in attempt 1"),
        ([(0, 1, 0, 4, 1), (0, 2, 4, 4, 2), (1, 2, 8, 4, 3)], "step 2 read samples 8 to 11"),
        ([(0, 1, 0, 4, 1, "a"), (1, 1, 0, 4, 2, "a")], "step 1 read samples 0 to 3"),
        ([(0, 1, 0, 4, 1), (0, 3, 4, 4, 3)], "step 3 follows step 1"),
        ([(0, 1, 0, 4, 1), (0, 2, 8, 4, 2)], "step 2 read samples 8 to 11 (crc 00000002) in attempt 0 after samples 0"),
        ([(0, 1, 0, 4, 1), (0, 2, 2, 4, 2)], "step 2 read samples 2 to 5"),
        ([(0, 5, 16, 4, 1)], "the first step, 5, starts at sample 16"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, entries: list[Any], problem: str) -> None:
    problems = check_ledger(written(tmp_path / "ledger.jsonl", entries))
    assert len(problems) == 1 and problems[0].startswith(problem)


@pytest.mark.parametrize(
    "replay",
    [
        [(1, 2, 4, 8, 5, "a"), (1, 3, 12, 8, 6, "a")],  # in batches twice as large
        [(1, 2, 4, 4, 5, "b"), (1, 3, 8, 4, 6, "b")],  # of another stream
    ],
)
def test_a_replay_may_be_of_another_batch_size_or_stream(tmp_path: Path, replay: list[Any]) -> None:
    before = [(0, 1, 0, 4, 1, "a"), (0, 2, 4, 4, 2, "a"), (0, 3, 8, 4, 3, "a")]
    assert check_ledger(written(tmp_path / "ledger.jsonl", [*before, *replay])) == []


def test_a_ledger_reaches_as_far_as_the_checkpoints(tmp_path: Path) -> None:
    path = written(tmp_path / "ledger.jsonl", [(0, step, 4 * (step - 1), 4, step) for step in range(1, 6)])
    assert check_ledger(path, {2: 8, 5: 20}) == []
    assert check_ledger(path, {6: 24}) == ["the ledger does not have step 6, whose checkpoint is sealed"]
    assert len(check_ledger(path, {4: 20})) == 1
    path.write_bytes(b"")
    assert len(check_ledger(path, {2: 8, 5: 20})) == 2


@given(tokens_BT=arrays(np.int32, st.tuples(st.integers(1, 9), st.integers(1, 70))))
def test_the_crc_of_a_batch_follows_from_those_of_its_rows(tokens_BT: np.ndarray) -> None:
    assert joined_crc(row_crcs(tokens_BT), 4 * tokens_BT.shape[1]) == zlib.crc32(tokens_BT.tobytes())


# Secrets --------------------------------------------------------------------------------------------------------------


def test_redaction(monkeypatch: Any) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-0123456789")
    info = {
        "config": {"api_key": "a", "hf_token": "b", "nested": {"my_secret": ["c", {"x": "d"}]}, "DB_PASSWORD": "e"},
        "tokens": 10**12,
        "tokens_per_sec": 5.0,
        "tokenizer": "data/tokenizer.model",
        "command": [
            "lmjax",
            "--config.x.token=f",
            "--api-key g",
            "--config.tokenizer=spm",
            "use canary-0123456789 now",
        ],
    }
    clean = redact(info)
    assert clean["config"] == {
        "api_key": REDACTED,
        "hf_token": REDACTED,
        "nested": {"my_secret": [REDACTED, {"x": REDACTED}]},
        "DB_PASSWORD": REDACTED,
    }
    assert (clean["tokens"], clean["tokens_per_sec"], clean["tokenizer"]) == (10**12, 5.0, "data/tokenizer.model")
    assert clean["command"] == [
        "lmjax",
        f"--config.x.token={REDACTED}",
        f"--api-key {REDACTED}",
        "--config.tokenizer=spm",
        f"use {REDACTED} now",
    ]
    assert info["config"]["api_key"] == "a"  # type: ignore[index]


def settings(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of a config object, a source with a recipe among them, by its path."""
    if not dataclasses.is_dataclass(value) and not isinstance(value, dict):
        yield path, value
        return
    children = value if isinstance(value, dict) else {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    for name, child in children.items():
        yield from settings(child, f"{path}.{name}" if path else name)


RECIPE = PrepareConfig(text_key="body", tokenizer=TokenizerConfig(kind="file", path="spm.model", endoftext="</s>"))
WHOLE = Config(data=DataConfig(sources={"text": SourceConfig(path="data/text", prepare=RECIPE)}))


def test_no_setting_of_ours_is_taken_for_a_secret() -> None:
    cfg = dataclasses.asdict(WHOLE)
    assert json.dumps(redact(cfg)) == json.dumps(cfg)
    for path, value in settings(WHOLE):
        for flag in (f"--config.{path}={value}", f"--config.{path} {value}", f"--{path.rpartition('.')[2]} {value}"):
            command = f"lmjax train {flag} --api_key=canary"
            assert redact({"command": command})["command"] == command.replace("canary", REDACTED)
            dashed = command.replace("_", "-")
            assert redact({"command": dashed})["command"] == dashed.replace("canary", REDACTED)


@pytest.mark.parametrize("name", ["HF_TOKEN", "GITHUB_TOKENS", "MY_TEXT_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD"])
def test_secrets_of_the_environment_are_hidden_wherever_they_occur(name: str, monkeypatch: Any) -> None:
    monkeypatch.setenv(name, "canary-0123456789")
    clean = redact({"config": {"data": {"text_key": "canary-0123456789"}}, "command": "x --tokens=canary-0123456789"})
    assert "canary" not in json.dumps(clean)


@pytest.mark.parametrize("flag", ["--hf-token", "--api_key", "--config.x.secret_key", "--password", "--keys", "-token"])
def test_secret_flags_are_hidden(flag: str) -> None:
    for between in "= ":
        assert redact({"command": f"x {flag}{between}canary y"})["command"] == f"x {flag}{between}{REDACTED} y"


def test_secrets_reach_no_file(tmp_path: Path) -> None:
    trackers = Trackers([JsonlTracker(tmp_path / "metrics.jsonl")])
    trackers.start({"step": 0, "steps": 1, "config": {"secret": "canary"}})
    trackers.summary({"my_key": "canary"})
    assert "canary" not in (tmp_path / "metrics.jsonl").read_text()


# Views ----------------------------------------------------------------------------------------------------------------


class Broken:
    def __init__(self) -> None:
        self.calls = 0

    def start(self, info: Any) -> None:
        pass

    def log(self, step: int, values: Any) -> None:
        self.calls += 1
        raise ConnectionResetError("gone")

    def summary(self, values: Any) -> None:
        raise AssertionError("was dropped")

    def close(self, status: Any) -> None:
        raise AssertionError("was dropped")


def test_a_view_that_fails_is_dropped_with_one_warning(tmp_path: Path, caplog: Any) -> None:
    broken = Broken()
    trackers = Trackers([broken, JsonlTracker(tmp_path / "metrics.jsonl")])
    trackers.start({"step": 0, "steps": 3})
    for step in (1, 2, 3):
        trackers.log(step, {"loss": 1.0})
    trackers.summary({})
    trackers.close("finished")
    assert broken.calls == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 3


def test_the_console_writes_plain_lines_into_a_log(capsys: Any) -> None:
    console = ConsoleTracker()
    console.start({"step": 0, "steps": 200, "attention": "cudnn"})
    values = {"tokens": 1, "train/loss": 2.5, "optim/lr": 1e-3, "perf/tokens_per_sec": 12345.6, "perf/mfu": 0.312}
    console.log(100, values)
    console.log(200, {"val/main/loss": 2.25, "val/main/bpb": 1.5})
    console.close("finished")
    attention, first, second = capsys.readouterr().out.splitlines()
    assert attention == "attention: cudnn"
    assert first == "step 100/200  loss 2.5000  lr 1.00e-03  12.3k tok/s  MFU 31.2%"
    assert second == "step 200  val/main/loss 2.2500  val/main/bpb 1.5000"


def test_the_time_left_does_not_count_what_was_before_the_first_line(capsys: Any, monkeypatch: Any) -> None:
    clock = iter([1000.0, 1030.0])
    monkeypatch.setattr("lmjax.record.console.time.monotonic", lambda: next(clock))
    console = ConsoleTracker()
    console.start({"step": 0, "steps": 100})
    console.log(10, {"train/loss": 2.5, "perf/step_time": 2.0})
    console.log(20, {"train/loss": 2.5, "perf/step_time": 2.0})  # ten steps in thirty seconds, a save among them
    left = [line.rpartition("ETA ")[2] for line in capsys.readouterr().out.splitlines()]
    assert left == ["0:03:00", "0:04:00"]


def test_the_console_keeps_one_line_on_a_terminal(tmp_path: Path) -> None:
    code = (
        "import time; from lmjax.record.console import ConsoleTracker; console = ConsoleTracker()\n"
        "console.start({'step': 0, 'steps': 3})\n"
        "for step in (1, 2, 3): console.log(step, {'train/loss': 1 / step}); time.sleep(0.3)\n"
        "console.log(3, {'val/main/loss': 0.25}); console.close('finished')"
    )
    (tmp_path / "code.py").write_text(code)
    run = ["script", "-qec", f"{sys.executable} {tmp_path / 'code.py'}", "/dev/null"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    try:
        out = subprocess.run(run, capture_output=True, text=True, timeout=60, env=environment).stdout
    except FileNotFoundError:
        pytest.skip("needs script(1)")
    assert "3/3" in out and "loss 0.3333" in out and "step 3  val/main/loss 0.2500" in out
    assert "\x1b[2K" in out  # the line is drawn over


# wandb ----------------------------------------------------------------------------------------------------------------


def wandb_tracker(tmp_path: Path, mode: Any = "offline") -> WandbTracker:
    return WandbTracker(TrackingConfig(wandb=mode, tags=("t",), group="g"), "run123", "d12-s0", tmp_path)


def test_wandb_records_offline(tmp_path: Path, caplog: Any) -> None:
    tracker = wandb_tracker(tmp_path)
    tracker.start(redact({"step": 0, "steps": 3, "config": {"lr": 0.1, "api_key": "canary"}}))
    for step in (1, 2, 3):
        tracker.log(step, {"tokens": 8 * step, "train/loss": 1.0 / step})
    tracker.summary({"val/main/loss": 0.5})
    tracker.close("finished")
    [record] = [record for record in caplog.records if record.name == "lmjax.record.wandb_tracker"]
    assert "wandb sync" in record.message
    [recorded] = tmp_path.glob("wandb/offline-run-*-run123/*.wandb")
    data = recorded.read_bytes()
    assert b"train/loss" in data and b"d12-s0" in data and b"finished" in data
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"canary" in path.read_bytes()]
    assert not list(tmp_path.rglob("wandb-metadata.json"))


class FakeWandb:
    """Stands in for the module: `init` and `log` do what a test wants."""

    class Error(Exception):
        pass

    Settings = staticmethod(lambda **settings: settings)

    def __init__(self, init: Any = None, log: Any = None) -> None:
        self.modes: list[str] = []
        self.tears = 0
        self._init, self._log = init, log

    def init(self, *, mode: str, **_: Any) -> Any:
        self.modes.append(mode)
        if self._init is not None:
            self._init(mode)
        return FakeRun(self._log)

    def teardown(self) -> None:
        self.tears += 1


class FakeRun:
    def __init__(self, log: Any) -> None:
        self.settings = type("Settings", (), {"sync_dir": "DIR"})
        self.summary: dict[str, Any] = {}
        self.logged: list[int] = []
        self._log = log

    def define_metric(self, name: str, **_: Any) -> None:
        pass

    def log(self, values: Any, step: int) -> None:
        self._log(step)

    def finish(self, exit_code: int) -> None:
        pass


def run_with(fake: FakeWandb, monkeypatch: Any, tmp_path: Path, mode: str = "online") -> float:
    """Seconds that training spent in the tracker."""
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = wandb_tracker(tmp_path, mode)
    clock = time.monotonic()
    tracker.start({"step": 0, "steps": 5})
    for step in range(1, 6):
        tracker.log(step, {"tokens": step})
    spent = time.monotonic() - clock
    tracker.close("finished")
    return spent


def test_without_a_network_or_a_key_wandb_goes_offline(monkeypatch: Any, tmp_path: Path, caplog: Any) -> None:
    def no_network(mode: str) -> None:
        if mode == "online":
            time.sleep(0.5)
            raise FakeWandb.Error("Timed out\nwhile retrying")

    logged: list[int] = []
    fake = FakeWandb(no_network, logged.append)
    assert run_with(fake, monkeypatch, tmp_path) < 0.2  # training does not wait
    assert (fake.modes, logged) == (["online", "offline"], [1, 2, 3, 4, 5])
    assert [record.message for record in caplog.records] == [
        "wandb cannot be reached: Timed out while retrying",
        "wandb records offline; upload with:  wandb sync DIR",
    ]


def test_a_wandb_that_raises_is_off_with_one_warning(monkeypatch: Any, tmp_path: Path, caplog: Any) -> None:
    def log(step: int) -> None:
        if step == 3:
            raise ConnectionResetError("killed")

    fake = FakeWandb(log=log)
    run_with(fake, monkeypatch, tmp_path)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "wandb is off from here on (ConnectionResetError('killed'))" in caplog.records[0].message


def test_a_wandb_that_hangs_holds_up_neither_training_nor_the_end(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(WandbTracker, "_CLOSE_SECONDS", 0.5)
    release = threading.Event()
    clock = time.monotonic()
    assert run_with(FakeWandb(log=lambda step: release.wait(30)), monkeypatch, tmp_path) < 0.2
    assert time.monotonic() - clock < 5
    release.set()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_a_real_wandb_service_that_dies_or_hangs(tmp_path: Path, fault: str) -> None:
    code = """
import os, signal, subprocess, sys, time
from lmjax.record.config import TrackingConfig
from lmjax.record.tracking import JsonlTracker, Trackers
from lmjax.record.wandb_tracker import WandbTracker
wandb = WandbTracker(TrackingConfig(wandb="offline"), "run123", "name", sys.argv[1])
wandb._CLOSE_SECONDS = 5
trackers = Trackers([JsonlTracker(sys.argv[1] + "/metrics.jsonl"), wandb])
trackers.start({"step": 0, "steps": 30})
for step in range(1, 31):
    trackers.log(step, {"tokens": step})
    time.sleep(0.2)
    if step == 20:
        service = subprocess.check_output(["pgrep", "-P", str(os.getpid()), "wandb-core"], text=True)
        os.kill(int(service), signal.SIGKILL if sys.argv[2] == "kill" else signal.SIGSTOP)
trackers.close("finished")
print(service)
"""
    run = [sys.executable, "-c", code, str(tmp_path), fault]
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err_file:  # the service keeps them open
        returncode = subprocess.run(run, stdout=out, stderr=err_file, timeout=90).returncode
    if fault == "stop":
        os.kill(int((tmp_path / "out").read_text()), 9)
    err = (tmp_path / "err").read_text()
    assert returncode == 0 and "Traceback" not in err
    assert err.count("wandb is off from here on") == 1
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 30


def test_tracking_imports_neither_wandb_nor_jax() -> None:
    modules = "lmjax.record.tracking, lmjax.record.wandb_tracker"
    code = f"import sys, {modules}; assert not {{'wandb', 'jax', 'orbax'}} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert config.TrackingConfig().wandb == "off"
