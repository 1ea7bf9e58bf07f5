"""Does the best learning rate stay where it is as a model gets wider or deeper? The study behind docs/mup.md.

    python -m analysis.bench.transfer --out=DIR [--optimizers adamw muon] [--seeds 3] [--report]

Small decoders read the source code of Python's standard library, byte by byte. At each width and each depth every rate
of a grid of powers of two is trained with every seed, under each parametrization; runs of one shape share a compiled
step, since rate and seed are traced. DIR/runs.csv gets a line as each run ends, and a run that is there is not trained
again, so the command can be stopped and started. With --report it trains nothing: it prints the tables and draws the
figures of what is there.
"""

import argparse
import csv
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lmjax.config import Config
from lmjax.coordinates import at_depth, at_width
from lmjax.data.config import DataConfig, PrepareConfig, SourceConfig, TokenizerConfig
from lmjax.data.loader import Loader
from lmjax.models import architectures
from lmjax.models.config import BaseConfig, ModelConfig
from lmjax.optim.config import OptimizerConfig, ScheduleConfig
from lmjax.process import start_up
from lmjax.run.assemble import all_scalars, assemble, jitted_step
from lmjax.tasks.pretrain import pretrain
from lmjax.train.config import SampleConfig, TrainConfig
from lmjax.train.state import TrainState, zero_counters

WIDTH, LAYERS, HEAD_DIM = 64, 2, 32  # of the base
WIDTHS, DEPTHS = (64, 128, 256), (2, 4, 8)
STEPS, BATCH, SEQ_LEN = 300, 8, 64
EXPONENTS = {"adamw": range(-11, -4), "muon": range(-9, -2)}
"""Learning rates are two to these powers."""
EVALUATED_BATCHES = 64
LOGIT_SCALE = 8.0
"""Tuned at the base beside the learning rate. At 1 the base learns its tied head so slowly that wider models gain
most by what the standard parametrization does to them, larger steps of the logits, which muP keeps from growing."""
FIELDS = ("optimizer", "logit_scale", "parametrization", "width", "layers", "exponent", "seed", "loss")


class Shape(NamedTuple):
    parametrization: str
    width: int
    layers: int

    @property
    def is_base(self) -> bool:
        return (self.width, self.layers) == (WIDTH, LAYERS)


SHAPES = [
    *(Shape(name, width, LAYERS) for name in ("standard", "mup") for width in WIDTHS),
    *(Shape(name, WIDTH, layers) for name in ("standard", "mup", "completep") for layers in DEPTHS),
]
STUDIES = {
    "width": ("standard", "mup"),
    "depth": ("standard", "mup", "completep"),
}


class Run(NamedTuple):
    optimizer: str
    shape: Shape
    exponent: int
    seed: int


# Training ---------------------------------------------------------------------------------------------------------


def make_config(optimizer: str, shape: Shape, out: Path) -> Config:
    """Its seed and its learning rate are those of each run."""
    recipe = PrepareConfig(inputs=("stdlib:",), tokenizer=TokenizerConfig(kind="bytes"), seed=2)
    standard = shape.parametrization == "standard"
    model = ModelConfig(
        context=SEQ_LEN,
        embed=WIDTH,
        layers=LAYERS,
        heads=WIDTH // HEAD_DIM,
        mlp=4 * WIDTH,
        parametrization=shape.parametrization,
        logit_scale=LOGIT_SCALE,
        base=BaseConfig() if standard else BaseConfig(embed=WIDTH, layers=LAYERS),
    )
    return Config(
        model=at_depth(at_width(model, shape.width), shape.layers),
        data=DataConfig(seq_len=SEQ_LEN, sources={"stdlib": SourceConfig(path=str(out / "data"), prepare=recipe)}),
        optimizer=OptimizerConfig(
            name=optimizer, schedule=ScheduleConfig(name="linear", warmup=STEPS // 10, final_fraction=0.0)
        ),
        train=TrainConfig(
            steps=STEPS, batch=BATCH, evaluate_batches=EVALUATED_BATCHES, sample=SampleConfig(prompts=())
        ),
    )


def losses(optimizer: str, shape: Shape, runs: Sequence[Run], out: Path) -> Iterator[tuple[Run, float]]:
    """Train each of the runs of one shape: the loss on the validation set at the end, nats per byte."""
    task = pretrain(make_config(optimizer, shape, out))
    experiment, model = assemble(task), architectures.build(task.cfg.model)
    step = jitted_step(experiment)
    start = jax.jit(lambda seed: model.start(jax.random.key(seed), model.scalars))
    init = jax.jit(experiment.optimizer.init)
    loader = Loader(task.cfg.data, batch_size=BATCH)
    for run in runs:
        cfg = dataclasses.replace(
            task.cfg,
            optimizer=dataclasses.replace(task.cfg.optimizer, learning_rate=2.0**run.exponent),
            train=dataclasses.replace(task.cfg.train, seed=run.seed),
        )
        params, scalars = start(run.seed), all_scalars(experiment._replace(task=task._replace(cfg=cfg)))
        state = TrainState(params, init(params), scalars, zero_counters())
        for batch in loader.batches(run.seed * STEPS * BATCH, STEPS):
            state, _ = step(state, {}, batch)
        evaluate = task.evaluations["validation"]
        scored = evaluate(state.params, {}, step=STEPS, mesh=None, last=False, on_batch=lambda _: None)
        yield run, scored["val/stdlib/loss"]


def read(path: Path) -> dict[Run, float]:
    """The runs of this LOGIT_SCALE that have ended. At the base shape every parametrization is the standard program."""
    if not path.exists():
        return {}
    found = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            if float(row["logit_scale"]) != LOGIT_SCALE:
                continue
            shape = Shape(row["parametrization"], int(row["width"]), int(row["layers"]))
            found[Run(row["optimizer"], shape, int(row["exponent"]), int(row["seed"]))] = float(row["loss"])
    return found


def train(optimizers: Sequence[str], seeds: int, out: Path) -> None:
    path = out / "runs.csv"
    out.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(",".join(FIELDS) + "\n")
    for optimizer in optimizers:
        for shape in dict.fromkeys(SHAPES):
            if shape.is_base and shape.parametrization != "standard":
                continue
            asked = [Run(optimizer, shape, e, seed) for seed in range(seeds) for e in EXPONENTS[optimizer]]
            done = read(path)
            for run, loss in losses(optimizer, shape, [run for run in asked if run not in done], out):
                print(
                    f"{optimizer:6} {shape.parametrization:9} {shape.width:4} {shape.layers:2} 2^{run.exponent} "
                    f"seed {run.seed}: {loss:.4f}",
                    flush=True,
                )
                with path.open("a") as file:
                    csv.writer(file).writerow([optimizer, LOGIT_SCALE, *shape, run.exponent, run.seed, f"{loss:.6f}"])


# Reporting --------------------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """The loss of one shape over learning rates."""

    exponents: list[int]
    mean: np.ndarray
    spread: np.ndarray
    """Standard error of the mean over seeds; 0 of a single seed."""

    @property
    def best(self) -> int:
        return int(np.argmin(self.mean))

    @property
    def optimum(self) -> str:
        """The rate and the loss there, as two cells of a table."""
        return f"2^{self.exponents[self.best]} | {self.mean[self.best]:.4f} ± {self.spread[self.best]:.4f}"


def curve(runs: dict[Run, float], optimizer: str, shape: Shape) -> Curve | None:
    """None where nothing has been trained. A loss that is not finite counts as infinite."""
    trained = shape._replace(parametrization="standard") if shape.is_base else shape
    losses: dict[int, list[float]] = {}
    for run, loss in runs.items():
        if (run.optimizer, run.shape) == (optimizer, trained):
            losses.setdefault(run.exponent, []).append(loss if np.isfinite(loss) else np.inf)
    if not losses:
        return None
    exponents = sorted(losses)
    spread = [np.std(losses[e], ddof=1) / len(losses[e]) ** 0.5 if len(losses[e]) > 1 else 0.0 for e in exponents]
    return Curve(exponents, np.array([np.mean(losses[e]) for e in exponents]), np.array(spread))


def shapes_of(study: str, parametrization: str) -> dict[int, Shape]:
    """By width or by depth."""
    if study == "width":
        return {width: Shape(parametrization, width, LAYERS) for width in WIDTHS}
    return {layers: Shape(parametrization, WIDTH, layers) for layers in DEPTHS}


def report(runs: dict[Run, float], optimizers: Sequence[str], out: Path) -> None:
    """Print the optimum and the loss there of each shape, as a table of Markdown, and draw each study."""
    print(
        "| optimizer | study | parametrization | size | best rate | loss there |\n| --- | --- | --- | --- | --- | --- |"
    )
    for optimizer in optimizers:
        for study, names in STUDIES.items():
            for name in names:
                for size, shape in shapes_of(study, name).items():
                    if (found := curve(runs, optimizer, shape)) is not None:
                        print(f"| {optimizer} | {study} | {name} | {size} | {found.optimum} |")
            draw(runs, optimizer, study, out / f"{study}-{optimizer}.png")


def draw(runs: dict[Run, float], optimizer: str, study: str, path: Path) -> None:
    """Loss over learning rate, a panel for each parametrization and a line for each size, its optimum marked."""
    from matplotlib.figure import Figure

    names = STUDIES[study]
    page = Figure(figsize=(3.4 * len(names), 3.2), dpi=130, layout="constrained")
    panels: Any = page.subplots(1, len(names), sharey=True)
    lowest = []
    for axes, name in zip(panels, names, strict=True):
        for number, (size, shape) in enumerate(shapes_of(study, name).items()):
            if (found := curve(runs, optimizer, shape)) is None:
                continue
            rates = 2.0 ** np.array(found.exponents)
            axes.errorbar(rates, found.mean, found.spread, color=f"C{number}", marker="o", markersize=3, label=size)
            axes.plot(rates[found.best], found.mean[found.best], "*", color=f"C{number}", markersize=11)
            lowest.append(found.mean[found.best])
        axes.set(xscale="log", xlabel="learning rate", title=name)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if lowest:
        panels[0].set_ylim(min(lowest) - 0.03, min(lowest) + 0.9)
        panels[0].legend(title=study, frameon=False)
    panels[0].set_ylabel("validation loss (nats per byte)")
    page.suptitle(optimizer)
    page.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--optimizers", nargs="+", default=list(EXPONENTS), choices=list(EXPONENTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="of what has been trained; train nothing")
    arguments = parser.parse_args()
    if not arguments.report:
        start_up.configure_jax()
        train(arguments.optimizers, arguments.seeds, arguments.out)
    report(read(arguments.out / "runs.csv"), arguments.optimizers, arguments.out)


if __name__ == "__main__":
    main()
