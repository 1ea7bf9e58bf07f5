"""A run starts from the weights of a Hugging Face directory as from those of another run: only from such as are its own
model's."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lmjax import config as configs
from lmjax.config import Config, default_config
from lmjax.data.config import PrepareConfig, TokenizerConfig
from lmjax.data.prepare.prepare import prepare
from lmjax.data.tokenizers.alphabets import ByteTokenizer
from lmjax.errors import DONE, CheckpointError, ConfigError
from lmjax.hf.imported import Imported, write_checkpoint
from lmjax.models import decoder
from lmjax.models.config import ModelConfig
from lmjax.record.tracking import read_events
from lmjax.run import run
from lmjax.tasks.pretrain import without_data
from lmjax.tasks.start import directory_of, tokenizer_of
from lmjax.weights import abstract, by_path, initialize
from tests.hf.test_convert import tokenizer_json

pytest.importorskip("safetensors")
pytestmark = pytest.mark.usefixtures("quick_compilation", "compile_cache")

MODEL = ModelConfig(vocab=257, layers=2, embed=16, heads=2, mlp=24, activation="silu", gated=True, tied=False)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("theirs") / "model"
    params = initialize(decoder.weights(MODEL), jax.random.key(7))
    write_checkpoint(directory, Imported(MODEL, params, None, {}))
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    for number in range(8):
        (directory / f"{number}.txt").write_text("over the hills and far away " * 20)
    recipe = PrepareConfig(
        inputs=(f"{directory}/*.txt",), tokenizer=TokenizerConfig(kind="bytes"), valid_fraction=0.3, workers=1
    )
    prepare(recipe, str(directory / "prepared"))
    return directory / "prepared"


def config(theirs: Path, **model: Any) -> Config:
    base = configs.parse(default_config().to_dict())
    train = dataclasses.replace(base.train, init_from=str(theirs))
    return dataclasses.replace(base, model=dataclasses.replace(MODEL, **model), train=train)


def test_weights_are_those_of_the_directory_all_or_some(theirs: Path) -> None:
    task = without_data(config(theirs, context=32))
    task.start.check()
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: single, abstract(task.spec))
    params = task.start(jax.random.key(0), {}, shardings)
    jax.tree.map(np.testing.assert_array_equal, params, initialize(decoder.weights(MODEL), jax.random.key(7)))
    some = task.start(jax.random.key(0), {}, {"final_norm": shardings["final_norm"]})
    assert list(by_path(some)) == ["final_norm/scale"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mlp": 32}, "model.mlp is 24 there, 32 here"),
        ({"norm_epsilon": 1e-5}, "model.norm_epsilon is 1e-06 there, 1e-05 here"),
        ({"tied": True}, "model.tied is False there, True here"),
    ],
)
def test_another_model_is_refused_though_its_shapes_may_fit(
    theirs: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        without_data(config(theirs, **settings)).start.check()


def test_another_tokenizer_is_refused(theirs: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    for path in theirs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|stop|>"}')
    without_data(config(tmp_path)).start.check()
    with pytest.raises(ConfigError, match="another tokenizer than the data's"):
        without_data(config(tmp_path), "0123").start.check()


def test_other_weights_than_a_run_started_from_are_refused(theirs: Path) -> None:
    digest = without_data(config(theirs)).start.digest()
    without_data(config(Path(f"{theirs}@{digest}"))).start.check()
    with pytest.raises(ConfigError, match="no longer holds the weights"):
        without_data(config(Path(f"{theirs}@{'0' * 32}"))).start.check()


def test_a_damaged_directory_is_refused(theirs: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((theirs / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((theirs / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="damaged"):
        without_data(config(tmp_path)).start.check()


def test_a_run_says_what_it_started_from_and_goes_on_without_it(theirs: Path, data: Path, tmp_path: Path) -> None:
    """By the hash of its files, wherever they lie; a restart may name the directory by a relative path."""
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in theirs.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    sources = [f"data.sources.own.path={data}", "data.seq_len=16", "train.steps=2", "train.batch=2"]
    shape = [f"model.{name}={value}" for name, value in dataclasses.asdict(MODEL).items() if name in SHAPE]
    given = [*sources, *shape, "train.sample.prompts=()", "optimizer.schedule.warmup=1", f"train.init_from={moved}"]
    assert run.run(load(tmp_path, given), tmp_path / "run", run.Options()) == DONE
    (started,) = [event for event in read_events(tmp_path / "run" / "metrics.jsonl") if event["event"] == "start"]
    digest = without_data(config(theirs)).start.digest()
    assert started["start"] == digest and started["config"]["train"]["init_from"] == f"{moved}@{digest}"
    for path in moved.iterdir():
        path.unlink()
    (tmp_path / "run" / "summary.json").unlink()
    assert run.run(load(tmp_path, given), tmp_path / "run", run.Options()) == DONE


SHAPE = ("layers", "embed", "heads", "mlp", "activation", "gated", "tied")


def load(directory: Path, overrides: list[str]) -> Config:
    (directory / "config.py").write_text(
        "from lmjax.config import as_config_dict, default_config\nfrom lmjax.data.config import SourceConfig\n"
        "def get_config():\n    config = default_config()\n"
        "    config.data.sources = {'own': as_config_dict(SourceConfig(path='none'))}\n    return config\n"
    )
    return configs.load(str(directory / "config.py"), overrides)


def test_a_directory_may_have_an_at_sign_in_its_name(tmp_path: Path) -> None:
    """What stands behind the last one is a step or a hash, or belongs to the name."""
    workdir = tmp_path / "me@home"
    ByteTokenizer().save(workdir / "tokenizer")
    for named in (f"{workdir}@12", f"{workdir}", f"{workdir}@{'0' * 32}"):
        assert Path(directory_of(named)) == workdir
    tokenizer, files = tokenizer_of(f"{workdir}@12", ModelConfig())
    assert tokenizer is not None and tokenizer.hash == ByteTokenizer().hash and files == {}
