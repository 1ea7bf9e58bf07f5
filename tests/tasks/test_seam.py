"""The seam holds: three kinds of training that no existing file knows of, each trained, stopped, resumed and evaluated
by the same `run`."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmjax import config as configs
from lmjax import registry
from lmjax.config import Config
from lmjax.devices.rows import axes
from lmjax.errors import DONE, PREEMPTED, ConfigError
from lmjax.hf.imported import read_checkpoint
from lmjax.losses import token_logprobs
from lmjax.models import architectures, read
from lmjax.models.flax_model import from_nnx
from lmjax.process import faults as fault_hooks
from lmjax.record.inspect import inspect
from lmjax.record.ledger import read_ledger
from lmjax.record.tracking import read_jsonl
from lmjax.run import run
from lmjax.run.merge import to_hf
from lmjax.run.trained import evaluate_trained, load_trained
from lmjax.tasks.pretrain import open_data, pretrain, with_data, with_tokenizer_vocab, without_data
from lmjax.tasks.start import drawn
from lmjax.tasks.task import Frozen, Language, Task
from lmjax.train.objective import Objective, language_model
from lmjax.weights import Params, Spec, Weight, initialize, map_weights, zeros

pytestmark = pytest.mark.usefixtures("quick_compilation", "compile_cache")

CONFIG = Path(__file__).parents[1] / "tiny_config.py"
SETTINGS = ("train.steps=8", "train.evaluate_every=4", "checkpoint.every=4", "train.sample.tokens=4", "model.layers=2")


# Low-rank adapters on every matrix: Task -> Task ------------------------------------------------------------------


@flax.struct.dataclass
class Adapted:
    """A frozen matrix with a matrix of low rank beside it (Hu et al. 2021, arXiv:2106.09685)."""

    w: Any
    down: Any
    up: Any

    def as_array(self, weight: Weight) -> jax.Array:
        product: Callable[..., jax.Array] = functools.partial(jnp.tensordot, axes=1)
        for _ in weight.batch_axes:
            product = jax.vmap(product)
        return self.w + product(self.down, self.up)


def factors(spec: Spec, rank: int) -> Spec:
    found: Spec = {}
    for name, weight in spec.items():
        if isinstance(weight, dict):
            found[name] = factors(weight, rank)
        elif weight.kind == "matmul":
            batch, into, out = (" ".join(names) for names in (weight.batch_axes, weight.in_axes, weight.out_axes))
            copies, inputs = len(weight.batch_axes), len(weight.batch_axes) + len(weight.in_axes)
            sizes = weight.sizes[:copies], weight.sizes[copies:inputs], weight.sizes[inputs:]
            found[name] = {
                "down": Weight(f"{batch} | {into} -> rank", sizes=(*sizes[0], *sizes[1], rank)),
                "up": Weight(f"{batch} | rank -> {out}", init=zeros, sizes=(*sizes[0], rank, *sizes[2])),
            }
    return found


def adapted(frozen: Params, params: Params) -> Params:
    def one(w: Any, beside: Any) -> Any:
        return adapted(w, beside) if isinstance(w, dict) else Adapted(w, **beside)

    return {name: one(w, params[name]) if params.get(name) else w for name, w in frozen.items()}


def lora(task: Task, rank: int = 2) -> Task:
    def with_adapters(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, frozen, *more, **named: function(adapted(frozen, params), {}, *more, **named)

    spec, frozen = factors(task.spec, rank), Frozen(task.spec, task.start)
    return task._replace(
        spec=spec,
        start=drawn(lambda key, scalars: initialize(spec, key)),
        frozen=frozen,
        objective=task.objective._replace(loss=with_adapters(task.objective.loss)),
        evaluations={name: with_adapters(evaluate) for name, evaluate in task.evaluations.items()},
        sample=task.sample and with_adapters(task.sample),
        language=task.language and task.language._replace(weights=adapted, frozen=frozen),
    )


# Preferences: direct preference optimization on pairs -------------------------------------------------------------


@flax.struct.dataclass
class Pairs:
    better_BT: Any = axes("batch time")
    worse_BT: Any = axes("batch time")
    ids_B: Any = axes("batch")


class MadePairs:
    """Rising rows of letters are better than falling ones."""

    fingerprint = "made pairs"

    def __init__(self, size: int, rows: np.ndarray, at: Mapping[str, Any] | int, allow_data_change: bool = False):
        self.size, self.rows = size, rows
        self.next_sample = at if isinstance(at, int) else at["next_sample"]

    def __iter__(self) -> Iterator[Pairs]:
        first = self.next_sample
        while True:
            ids_B = (first + self.rows).astype(np.int32)
            rising_BT = 97 + (ids_B[:, None] + np.arange(9)) % 20
            yield Pairs(rising_BT.astype(np.int32), rising_BT[:, ::-1].astype(np.int32), ids_B)
            first += self.size

    def state(self, next_sample: int) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "next_sample": next_sample}

    def epoch(self, next_sample: int) -> dict[str, float]:
        return {"made": next_sample / 20}

    def recorded(self, batch: Pairs) -> np.ndarray:
        return np.concatenate([batch.better_BT, batch.worse_BT], axis=1)


def dpo(cfg: Config) -> Task:
    """Rafailov et al. 2023, arXiv:2305.18290, equation 7; the reference is the model as it starts."""
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab=257))
    base, model, size = without_data(cfg), architectures.build(cfg.model), cfg.train.batch

    def logp(params: Params, rows_BT: jax.Array) -> jax.Array:
        x_BTD, _, _ = model.hidden(params, rows_BT[:, :-1])
        logp_BT, _ = token_logprobs(model.unembed, model.head(params), x_BTD, rows_BT[:, 1:], chunk=8)
        return logp_BT.sum(axis=1)

    def loss(params: Params, frozen: Params, batch: Pairs, keys_B: Any, hyper: Any) -> Any:
        gain_B = logp(params, batch.better_BT) - logp(frozen, batch.better_BT)
        margin_B = hyper["beta"] * (gain_B - logp(params, batch.worse_BT) + logp(frozen, batch.worse_BT))
        total, pairs = -jax.nn.log_sigmoid(margin_B).sum(), jnp.float32(len(margin_B))
        return total, {"loss": (total, pairs), "accuracy": ((margin_B > 0).sum(), pairs)}

    def evaluate(
        params: Params, frozen: Params, *, step: int, mesh: Any, last: bool, on_batch: Any
    ) -> dict[str, float]:
        on_batch("pairs")
        batch = next(iter(MadePairs(size, np.arange(size), 1000)))
        total, metrics = loss(params, frozen, batch, None, {"beta": 0.5})
        return {"val/pairs/loss": float(total) / size, "val/pairs/accuracy": float(metrics["accuracy"][0]) / size}

    return base._replace(
        frozen=Frozen(base.spec, base.start),
        objective=Objective(lambda batch: jnp.float32(len(batch.ids_B)), loss, scalars={"beta": 0.5, **model.scalars}),
        source=functools.partial(MadePairs, size),
        evaluations={"pairs": evaluate},
    )


# Another architecture: a Flax nnx module --------------------------------------------------------------------------


class Bigram(nnx.Module):
    def __init__(self, vocab: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocab, 16, rngs=rngs)
        self.head = nnx.Linear(16, vocab, rngs=rngs)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        return self.head(jax.nn.gelu(self.embed(tokens_BT)))


def flax_module(cfg: Config) -> Task:
    data = open_data(cfg)
    cfg = with_tokenizer_vocab(cfg, data.tokenizer)
    model, _ = from_nnx(Bigram(cfg.model.dims["vocab"], nnx.Rngs(0)))
    task = without_data(cfg)._replace(
        spec=model.spec,
        start=drawn(model.start),
        objective=language_model(model, cfg.train.loss),
        language=Language(model, model),
    )
    return with_data(task, data)


# All of them under the same run -----------------------------------------------------------------------------------

TASKS: dict[str, tuple[Callable[[Config], Task], tuple[str, ...]]] = {
    **{
        f"lora under {name}": (lambda cfg: lora(pretrain(cfg)), (f"optimizer.name={name}",))
        for name in ("adamw", "muon", "adafactor")
    },
    "dpo": (dpo, ("train.sample.prompts=()",)),
    "nnx": (flax_module, ()),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    for name in ("a", "b"):
        (directory / name).mkdir()
        for number in range(20):
            words = np.random.default_rng(number).choice(["stone", "river", "cloud", "grass"], 60)
            (directory / name / f"{number}.txt").write_text(" ".join(words))
    return directory


OTHER_OPTIMIZERS = ("lora under adamw", "lora under adafactor")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in OTHER_OPTIMIZERS else name for name in TASKS]
)
def test_it_is_trained_stopped_resumed_and_evaluated(name: str, corpus: Path, tmp_path: Path, monkeypatch: Any) -> None:
    make_task, settings = TASKS[name]
    cfg = configs.load(f"{CONFIG}:{corpus}", [*SETTINGS, "optimizer.learning_rate=0.05", *settings])

    def train(directory: str, faults: str = "") -> int:
        monkeypatch.setenv("LMJAX_FAULTS", faults)
        monkeypatch.setattr(fault_hooks, "_calls", {})
        return run.run(cfg, tmp_path / directory, run.Options(), make_task)

    assert train("whole") == DONE
    assert train("stopped", "terminate@step:6") == PREEMPTED and train("stopped") == DONE
    whole, stopped = (inspect(tmp_path / directory, hashes=True) for directory in ("whole", "stopped"))
    assert whole["hashes"] == stopped["hashes"] and whole["step"] == 8
    assert [entry.step for entry in read_ledger(tmp_path / "stopped" / "ledger.jsonl")] == list(range(1, 9))
    rows = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    scores = [value for row in rows for key, value in row.items() if key.startswith("val/") and key.endswith("/loss")]
    assert losses[-1] < losses[0] and scores[-1] < scores[0]
    assert (tmp_path / "whole" / "report.md").exists()


def test_what_is_frozen_is_neither_saved_nor_moved(corpus: Path, tmp_path: Path) -> None:
    """A checkpoint of adapters holds nothing but them, and at rank 2 they are a small part of the model."""
    cfg = configs.load(f"{CONFIG}:{corpus}", [*SETTINGS, "train.steps=6", "train.sample.prompts=()"])
    task = lora(pretrain(cfg))
    assert run.run(cfg, tmp_path / "run", run.Options(), lambda _: task) == DONE
    leaves = inspect(tmp_path / "run")["leaves"]
    saved = [path for path in leaves if path.startswith("params/")]
    assert saved and all(path.endswith(("/down", "/up")) for path in saved)


def test_adapters_are_read_with_what_they_stand_on(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A work directory of adapters alone scores as the run itself did, and is exported as one dense model."""
    cfg = configs.load(f"{CONFIG}:{corpus}", [*SETTINGS, "model.gated=True", "train.sample.prompts=()"])
    kind = registry.TASKS[cfg.task]._replace(
        task=lambda cfg: lora(pretrain(cfg)), without_data=lambda cfg: lora(without_data(cfg))
    )
    monkeypatch.setitem(registry.TASKS, cfg.task, kind)
    assert run.run(cfg, tmp_path / "run", run.Options(), kind.task) == DONE
    trained, sources = load_trained(tmp_path / "run"), cfg.data.sources
    found = evaluate_trained(trained, [sources["a"].path], split="valid", batch=4, seq_len=cfg.data.seq_len)
    said = json.loads((tmp_path / "run" / "summary.json").read_text())["val_full/a/loss"]
    np.testing.assert_allclose(next(iter(found.values())).loss, said, rtol=1e-6)
    to_hf(str(tmp_path / "run"), str(tmp_path / "out"), step=None, dtype="float32", shard_bytes=1 << 30)
    again = read_checkpoint(tmp_path / "out").params
    dense = map_weights(read.as_array, trained.model.spec, trained.params)
    jax.tree.map(np.testing.assert_array_equal, again, dense)


# Starting from another run's weights ------------------------------------------------------------------------------


def test_a_run_starts_from_the_weights_of_another(corpus: Path, tmp_path: Path) -> None:
    """With a fresh optimizer and step 0; the first loss is what the other run ended with, not that of a new model."""
    first = configs.load(f"{CONFIG}:{corpus}", [*SETTINGS, "train.steps=12", "optimizer.learning_rate=0.02"])
    assert run.run(first, tmp_path / "first", run.Options()) == DONE
    second = configs.load(f"{CONFIG}:{corpus}", [*SETTINGS, f"train.init_from={tmp_path / 'first'}"])
    assert run.run(second, tmp_path / "second", run.Options()) == DONE
    rows = {name: read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("first", "second")}
    started, ended = rows["second"][0]["train/loss"], rows["first"][-2]["train/loss"]
    assert rows["second"][0]["step"] == 1 and started < 0.5 * (rows["first"][0]["train/loss"] + ended)
    with pytest.raises(ConfigError, match=r"train\.init_from was"):
        run.run(
            dataclasses.replace(second, train=dataclasses.replace(second.train, init_from=None)),
            tmp_path / "second",
            run.Options(allow_config_change=True),
        )


def test_a_restart_starts_from_the_same_weights(corpus: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Whatever the other run has saved meanwhile; and once there is a checkpoint, the other run may be gone."""
    settings = [*SETTINGS, "train.sample.prompts=()", "train.steps=8"]
    base = tmp_path / "base"
    assert run.run(configs.load(f"{CONFIG}:{corpus}", settings), base, run.Options()) == DONE
    cfg = configs.load(f"{CONFIG}:{corpus}", [*settings, f"train.init_from={base}"])
    shutil.move(base / "checkpoints" / "8", tmp_path / "8")
    monkeypatch.setenv("LMJAX_FAULTS", "raise@step:2")
    monkeypatch.setattr(fault_hooks, "_calls", {})
    with pytest.raises(RuntimeError):
        run.run(cfg, tmp_path / "run", run.Options())
    shutil.move(tmp_path / "8", base / "checkpoints" / "8")
    monkeypatch.setenv("LMJAX_FAULTS", "terminate@step:5")
    monkeypatch.setattr(fault_hooks, "_calls", {})
    assert run.run(cfg, tmp_path / "run", run.Options()) == PREEMPTED
    assert configs.from_json(tmp_path / "run" / "config.json").train.init_from == f"{base}@4"
    shutil.rmtree(base)
    monkeypatch.setenv("LMJAX_FAULTS", "")
    assert run.run(cfg, tmp_path / "run", run.Options()) == DONE


@pytest.mark.parametrize(
    ("init_from", "settings", "message"),
    [
        ("", (), "is no WORKDIR or WORKDIR@STEP"),
        ("{base}@", (), "is no WORKDIR or WORKDIR@STEP"),
        ("{base}-not", (), "is not the work directory of a run"),
        ("{base}/checkpoints/8", (), "is not the work directory of a run"),
        ("{base}@7", (), "no sealed checkpoint of step 7"),
        ("{base}", ("model.mlp=96",), "has other weights than this model: .*mlp/down is .* there"),
        ("s4://bucket/run", (), "cannot read s4"),
    ],
)
def test_what_no_run_can_start_from_is_named(
    init_from: str, settings: tuple[str, ...], message: str, corpus: Path, tmp_path: Path
) -> None:
    base = corpus / "base"
    if not base.exists():
        short = [*SETTINGS, "train.sample.prompts=()"]
        assert run.run(configs.load(f"{CONFIG}:{corpus}", short), base, run.Options()) == DONE
    given = f"train.init_from={init_from.format(base=base)}"
    cfg = configs.load(f"{CONFIG}:{corpus}", [*SETTINGS, *settings, given])
    with pytest.raises(ConfigError, match=message):
        run.run(cfg, tmp_path / "run", run.Options())
