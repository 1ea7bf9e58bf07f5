"""A run that stands on frozen weights: started, stopped, resumed, evaluated, merged, and refused another base."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from lmjax import config as configs
from lmjax.__main__ import parse
from lmjax.data.config import PrepareConfig, TokenizerConfig
from lmjax.data.prepare.prepare import prepare
from lmjax.errors import DONE, PREEMPTED, CheckpointError, ConfigError
from lmjax.finetune.adapters import ADAPTERS
from lmjax.process import faults as fault_hooks
from lmjax.record.inspect import inspect
from lmjax.record.tracking import read_jsonl
from lmjax.registry import with_data
from lmjax.run import assemble, run
from lmjax.run.adapters import load_adapters
from lmjax.run.merge import merge, to_hf
from lmjax.run.peft import to_peft
from lmjax.run.trained import evaluate_trained, load_trained
from tests.finetune.test_adapters import IN_FRONT
from tests.tasks.test_start import load

pytestmark = pytest.mark.usefixtures("quick_compilation", "compile_cache")

SHAPE = ("layers=2", "embed=16", "heads=2", "mlp=24", "gated=True", "tied=False")
LORA = ("tune.adapter.rank=2", "tune.adapter.dropout=0.1", "tune.store=bfloat16", "tune.train=('final_norm/*',)")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tune")
    for number in range(12):
        words = np.random.default_rng(number).choice(["stone", "river", "cloud", "grass"], 40)
        (directory / f"{number}.txt").write_text(" ".join(words))
    recipe = PrepareConfig(
        inputs=(f"{directory}/*.txt",), tokenizer=TokenizerConfig(kind="bytes"), valid_fraction=0.3, workers=1
    )
    prepare(recipe, str(directory / "prepared"))
    return directory


Train = Callable[..., int]


@pytest.fixture
def train(place: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    def train(workdir: str, *settings: str, faults: str = "") -> int:
        monkeypatch.setenv("LMJAX_FAULTS", faults)
        monkeypatch.setattr(fault_hooks, "_calls", {})
        return run.run(config(place, *settings), place / workdir, run.Options())

    return train


def config(place: Path, *settings: str) -> configs.Config:
    given = [f"data.sources.own.path={place}/prepared", "data.seq_len=16", "train.batch=4", "train.steps=6"]
    given += [f"model.{one}" for one in SHAPE] + ["checkpoint.every=2", "train.sample.tokens=3", "train.log_every=1"]
    given += ["optimizer.schedule.warmup=1", "optimizer.learning_rate=0.02"]
    return load(place, [*given, *settings])


@pytest.fixture
def base(place: Path, train: Train) -> Path:
    if not (place / "base").exists():
        assert train("base") == DONE
    return place / "base"


@pytest.fixture
def tuned(place: Path, train: Train, base: Path) -> Path:
    if not (place / "tuned").exists():
        assert train("tuned", f"train.init_from={base}", *LORA) == DONE
    return place / "tuned"


def test_it_is_stopped_and_resumed_to_the_same_bits(tuned: Path, train: Train, base: Path) -> None:
    given = (f"train.init_from={base}", *LORA)
    assert train("stopped", *given, faults="terminate@step:3") == PREEMPTED and train("stopped", *given) == DONE
    whole, stopped = (inspect(path, hashes=True) for path in (tuned, tuned.parent / "stopped"))
    assert whole["hashes"] == stopped["hashes"] and whole["step"] == 6
    rows = [row for row in read_jsonl(tuned / "metrics.jsonl") if "train/loss" in row]
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind == "dora" else pytest.param(kind, marks=pytest.mark.slow)
        for kind in ADAPTERS
        if kind not in IN_FRONT
    ],
)
def test_after_a_kill_it_ends_with_the_same_bits(kind: str, train: Train, base: Path) -> None:
    """A kill after step 5 leaves the checkpoints up to step 4, whatever else was written."""
    whole, killed = (base.parent / f"{kind}-{name}" for name in ("whole", "killed"))
    given = (f"train.init_from={base}", f"tune.adapter.name={kind}", "train.sample.prompts=()")
    assert train(whole.name, *given) == DONE
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "checkpoints" / "6")
    (killed / "summary.json").unlink()
    assert train(killed.name, *given) == DONE
    hashes = [inspect(path, hashes=True)["hashes"] for path in (whole, killed)]
    assert hashes[0] == hashes[1]


def test_its_checkpoints_hold_what_is_trained_alone(tuned: Path, base: Path) -> None:
    seal = json.loads((tuned / "checkpoints" / "6" / "LMJAX_MANIFEST.json").read_text())
    params = [path.removeprefix("params/") for path in seal["leaves"] if path.startswith("params/")]
    assert {path for path in params if not path.startswith("adapter/")} == {"final_norm/scale"}
    assert all(path.endswith(("/down", "/up")) for path in params if path.startswith("adapter/"))
    cfg = configs.from_json(tuned / "config.json")
    assert cfg.train.init_from == f"{base}@6" and seal["meta"]["base"] == with_data(cfg).start.digest() is not None


def test_frozen_weights_are_the_bases_to_the_bit(tuned: Path, base: Path) -> None:
    """As they are rounded: what a step is given is what it leaves."""
    experiment = assemble.assemble(with_data(configs.from_json(tuned / "config.json")))
    frozen, params = assemble.frozen_params(experiment)["base"], load_trained(base).params
    assert "final_norm" not in frozen

    def same(held: jax.Array, w: jax.Array) -> None:
        np.testing.assert_array_equal(held, w.astype(held.dtype))

    jax.tree.map(same, frozen["segments"], params["segments"])


def test_it_is_evaluated_sampled_merged_and_exported(tuned: Path, place: Path, tmp_path: Path) -> None:
    said = json.loads((tuned / "summary.json").read_text())["val_full/own/loss"]
    merge(str(tuned), str(tmp_path / "merged"))
    for workdir in (tuned, tmp_path / "merged"):
        scored = evaluate_trained(load_trained(workdir), [f"{place}/prepared"], split="valid", batch=4, seq_len=16)
        np.testing.assert_allclose(next(iter(scored.values())).loss, said, rtol=1e-5)
    assert (tuned / "samples" / "6.txt").exists()
    with pytest.raises(CheckpointError, match=r"--out=.* holds a run already"):
        merge(str(tuned), str(tmp_path / "merged"))
    with pytest.raises(ConfigError, match=r"has trained final_norm/\*, too"):
        to_peft(str(tuned), str(tmp_path / "peft"))
    files = to_hf(str(tuned), str(tmp_path / "hf"), step=None, dtype="float32", shard_bytes=1 << 30)
    assert "model.safetensors" in files


def test_another_base_is_refused(tuned: Path, base: Path, place: Path, train: Train, tmp_path: Path) -> None:
    """Though it lies in the same place, at the same step."""
    given = (f"train.init_from={base}", *LORA)
    assert train("preempted", *given, faults="terminate@step:3") == PREEMPTED
    assert train("other", "train.seed=5") == DONE
    shutil.move(base, tmp_path / "base")
    shutil.copytree(place / "other", base)
    try:
        with pytest.raises(CheckpointError, match=r"stands on the weights with the hash .* give it those") as caught:
            train("preempted", *given)
        assert "\n" not in str(caught.value)
        with pytest.raises(CheckpointError, match="stands on the weights with the hash"):
            load_trained(tuned)
    finally:
        shutil.rmtree(base)
        shutil.move(tmp_path / "base", base)
    assert train("preempted", *given) == DONE


def test_a_base_of_other_shapes_or_with_adapters_is_refused(tuned: Path, base: Path, train: Train) -> None:
    with pytest.raises(ConfigError, match="has other weights than this model"):
        train("wider", f"train.init_from={base}", "model.mlp=32", *LORA)
    with pytest.raises(ConfigError, match="has other weights than this model"):
        train("again", f"train.init_from={tuned}", *LORA)


def test_several_adapters_answer_on_one_base(
    tuned: Path, train: Train, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each as it would by itself, and so does what PEFT has of one; the base is read once."""
    train("second", f"train.init_from={base}", "tune.adapter.name=dora", "optimizer.learning_rate=0.2")
    to_peft(str(base.parent / "second"), str(tmp_path / "peft"))
    names = [str(tuned), str(base.parent / "second"), str(tmp_path / "peft")]
    given = ["--prompt=stone", "--prompt=river", "--tokens=12", "--temperature=0", "--ignore-endoftext"]
    alone = [_said(capsys, f"--workdir={name}", *given) for name in names[:2]]
    together = _said(capsys, f"--workdir={base}", *(f"--adapter={name}" for name in names), *given)
    begins, *answers = together.split("=== ")
    assert begins.count("train.init_from: the weights of") == 1 and "the weights of" not in "".join(answers)
    assert [answer.partition("\n")[0] for answer in answers] == names
    found = [answer.partition("\n")[2] for answer in answers]
    assert found[:2] == [text[text.index("---") :] for text in alone] and found[0] != found[1] == found[2]


def _said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    parsed = parse(["generate", *arguments])
    assert parsed.function(parsed) == DONE
    return capsys.readouterr().out


def test_what_is_no_adapter_of_this_base_is_said_in_one_line(
    tuned: Path, train: Train, base: Path, tmp_path: Path
) -> None:
    assert train("elsewhere", "train.seed=7", "train.steps=2") == DONE
    assert train("wide", "model.mlp=32", "train.steps=2") == DONE
    (tmp_path / "empty").mkdir()
    cases = [
        (base.parent / "elsewhere", tuned, CheckpointError, "stands on the weights with the hash"),
        (
            base.parent / "wide",
            tuned,
            ConfigError,
            f"--adapter={tuned} is for another model: model.mlp is 24 there, 32",
        ),
        (base, base, ConfigError, f"--adapter={base} is a model of its own"),
        (base, tmp_path / "empty", ConfigError, "empty is no work directory: it has no config.json"),
        (tuned, tuned, CheckpointError, "stands on the weights with the hash"),
    ]
    for workdir, adapter, error, message in cases:
        with pytest.raises(error, match=re.escape(message)) as caught:
            list(load_adapters(str(workdir), [str(adapter)]))
        assert "\n" not in str(caught.value)


def test_what_stands_on_weights_that_were_drawn_anew_is_no_adapter_of_the_base(base: Path, train: Train) -> None:
    """There is no knowing them from the base."""
    given = (f"train.init_from={base}", "tune.adapter.rank=2", "tune.fresh=('unembed',)", "train.steps=2")
    assert train("redrawn", *given) == DONE
    workdir = base.parent / "redrawn"
    with pytest.raises(
        ConfigError, match=r"has unembed drawn anew \(tune\.fresh\), not of the base; give it as --workdir"
    ):
        list(load_adapters(str(base), [str(workdir)]))
    with pytest.raises(ConfigError, match=r"has unembed drawn anew \(tune\.fresh\), which PEFT's file has no place"):
        to_peft(str(workdir), str(base.parent / "redrawn-peft"))


def test_eight_devices_merge_to_the_bits_of_one(
    tuned: Path,
    tmp_path: Path,
    on_eight_devices: Callable[..., None],
    with_xla_as_it_is: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And write the same files for transformers."""
    monkeypatch.setenv("XLA_FLAGS", "")  # not the tests' own, whose rounding depends on what a device holds
    monkeypatch.setenv("LMJAX_TUNED", str(tuned))
    monkeypatch.setenv("LMJAX_OUT", str(tmp_path))
    file = Path(__file__).parent / "merge_devices.py"
    with_xla_as_it_is(file, "-k", "test_it_is_written")
    on_eight_devices(file)
    one, eight = (inspect(tmp_path / name, hashes=True)["hashes"] for name in ("one", "eight"))
    assert one == eight
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one-hf", "eight-hf")]
    assert files[0] == files[1]


def test_the_head_alone_is_trained(base: Path, train: Train) -> None:
    workdir = base.parent / "head"
    assert train("head", f"train.init_from={base}", "tune.train=('unembed',)") == DONE
    before, after = load_trained(base).params, load_trained(workdir).params
    assert not np.array_equal(before.pop("unembed"), after.pop("unembed"))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_tuned_run_starts_only_with_the_same_settings(tuned: Path, base: Path, train: Train) -> None:
    (tuned / "summary.json").rename(tuned / "summary.kept")
    try:
        with pytest.raises(ConfigError, match=r"tune\.adapter\.rank was 2, now 3"):
            train("tuned", f"train.init_from={base}", *LORA, "tune.adapter.rank=3")
    finally:
        (tuned / "summary.kept").rename(tuned / "summary.json")


@pytest.mark.parametrize("kind", ["prompt", pytest.param("prefix", marks=pytest.mark.slow)])
def test_what_stands_in_front_is_stopped_resumed_evaluated_and_sampled(
    kind: str, base: Path, place: Path, train: Train, tmp_path: Path
) -> None:
    """Nothing else is trained or saved, and neither merged nor exported."""
    given = (f"train.init_from={base}", f"tune.adapter.name={kind}", "tune.adapter.length=3")
    given += ("data.documents=separate",)
    assert train(kind, *given) == DONE
    assert train(f"{kind}2", *given, faults="terminate@step:3") == PREEMPTED and train(f"{kind}2", *given) == DONE
    whole, stopped = (inspect(place / name, hashes=True) for name in (kind, f"{kind}2"))
    assert whole["hashes"] == stopped["hashes"]
    assert (place / kind / "samples" / "6.txt").exists()
    said = json.loads((place / kind / "summary.json").read_text())["val_full/own/loss"]
    scored = evaluate_trained(load_trained(place / kind), [f"{place}/prepared"], split="valid", batch=4, seq_len=16)
    np.testing.assert_allclose(next(iter(scored.values())).loss, said, rtol=1e-5)
    with pytest.raises(ConfigError, match="cannot be merged"):
        merge(str(place / kind), str(tmp_path / "merged"))
    with pytest.raises(ConfigError, match="cannot be merged"):
        to_hf(str(place / kind), str(tmp_path / "hf"), step=None, dtype="float32", shard_bytes=1 << 30)
    with pytest.raises(ConfigError, match="not written in PEFT's form"):
        to_peft(str(place / kind), str(tmp_path / "peft"))


def test_a_base_that_was_moved_is_found_by_its_hash(
    tuned: Path, base: Path, place: Path, train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the run is told to look, to train; beside the run, to use what was trained."""
    given = (f"train.init_from={base}", *LORA)
    assert train("on", *given, faults="terminate@step:3") == PREEMPTED
    shutil.move(base, tmp_path / "base")
    try:
        with pytest.raises(CheckpointError, match=r"which are not there any more, nor in .*; put them back") as caught:
            load_trained(tuned)
        assert "\n" not in str(caught.value)
        with pytest.raises(ConfigError, match=r"train\.init_from was"):
            train("on", f"train.init_from={tuned}", *LORA)
        assert train("on", f"train.init_from={tmp_path}/base", *LORA) == DONE
        assert configs.from_json(place / "on/config.json").train.init_from == f"{tmp_path}/base@6"
        shutil.move(place / "on", tmp_path / "on")
        shutil.copytree(tuned, tmp_path / "tuned")
        whole = load_trained(tmp_path / "tuned")
        assert "are read from" in caplog.text
        jax.tree.map(np.testing.assert_array_equal, whole.params, load_trained(tmp_path / "on").params)
    finally:
        shutil.move(tmp_path / "base", base)
