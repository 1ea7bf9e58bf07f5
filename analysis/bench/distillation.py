"""Does a student learn more from a teacher than from the labels alone? The study behind docs/tuning.md.

    python -m analysis.bench.distillation --out=DIR [--arms labels forward_kl ...] [--seeds 3] [--report]

The teacher is the quickstart's model. The students are smaller and read the same corpus: with one seed all of them
start from the same weights and read the same tokens in the same order, and differ in what they minimize. Each is a run
of its own in DIR, so the command can be stopped and started. With --report it trains nothing: it prints the table of
what is there.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from lmjax import config as configs
from lmjax.process import start_up
from lmjax.run import run

CONFIG = "configs/quickstart.py"
STUDENT = (
    "model.layers=2",
    "model.embed=32",
    "model.mlp=128",
    "train.steps=1000",
    "train.evaluate_every=500",
    "train.compression_baseline=False",
    "train.sample.prompts=()",
)
LABELS, TAUGHT = "labels", "task=distill"
ARMS: dict[str, tuple[str, ...]] = {
    LABELS: (),
    "labels, half the rate": ("optimizer.learning_rate=7.5e-3",),
    "labels, twice the rate": ("optimizer.learning_rate=3e-2",),
    "forward_kl": (TAUGHT,),
    "reverse_kl": (TAUGHT, "train.distill.divergence=reverse_kl"),
    "jensen_shannon": (TAUGHT, "train.distill.divergence=jensen_shannon"),
    "forward_kl, share 0.5": (TAUGHT, "train.distill.share=0.5"),
    "forward_kl, temperature 2": (TAUGHT, "train.distill.temperature=2.0"),
}
"""What sets students apart."""
RESULT = "val_full/stdlib/bpb"


def train(arms: Sequence[str], seeds: int, out: Path) -> None:
    """The teacher, then every student; those that are there are not trained again."""
    where = f"data.sources.stdlib.path={out / 'data'}"
    teacher = configs.load(CONFIG, [where, "train.compression_baseline=False", "train.sample.prompts=()"])
    run.run(teacher, out / "teacher", run.Options())
    for seed in range(seeds):
        for arm in arms:
            settings = [*STUDENT, where, f"train.seed={seed}", f"data.seed={seed}", *ARMS[arm]]
            if TAUGHT in ARMS[arm]:
                settings.append(f"train.distill.teacher={out / 'teacher'}@{teacher.train.steps}")
            run.run(configs.load(CONFIG, settings), student(out, arm, seed), run.Options())


def student(out: Path, arm: str, seed: int) -> Path:
    """Its work directory."""
    return out / f"{arm.replace(',', '').replace(' ', '-')}-{seed}"


def bits_per_byte(workdir: Path) -> float | None:
    """Of the whole validation set at the end of a run; None of one that has not ended."""
    summary = workdir / "summary.json"
    return json.loads(summary.read_text())[RESULT] if summary.exists() else None


def report(seeds: int, out: Path) -> None:
    """Print a table of Markdown: the mean over seeds, and the mean difference of runs with the same seed."""
    print(f"The teacher: {bits_per_byte(out / 'teacher'):.4f} bits per byte.\n")
    print("| | seeds | bits per byte | beside labels alone |\n| --- | --- | --- | --- |")
    found = {arm: [bits_per_byte(student(out, arm, seed)) for seed in range(seeds)] for arm in ARMS}
    for arm, values in found.items():
        pairs = [(a, b) for a, b in zip(values, found[LABELS], strict=True) if a is not None and b is not None]
        if len(pairs) < 2:
            continue
        difference = "" if arm == LABELS else mean_and_error([a - b for a, b in pairs], sign="+")
        print(f"| {arm} | {len(pairs)} | {mean_and_error([a for a, _ in pairs])} | {difference} |")


def mean_and_error(values: Sequence[float], sign: str = "") -> str:
    """The mean, and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):{sign}.4f} ± {error:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="of what has been trained; train nothing")
    arguments = parser.parse_args()
    if not arguments.report:
        start_up.configure_jax()
        train(arguments.arms, arguments.seeds, arguments.out)
    report(arguments.seeds, arguments.out)


if __name__ == "__main__":
    main()
