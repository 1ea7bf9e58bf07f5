"""Redraw curves.png and print the table of docs/moe.md from its six runs: `python docs/moe/build.py runs/moe`."""

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from analysis.figures.style import COLOURS, RC, new_figure  # noqa: E402
from analysis.records import RunRecord  # noqa: E402
from analysis.sources import read_records  # noqa: E402

LOSS = "val/stdlib/loss"
ARMS = {"dense": COLOURS[0], "mixture": COLOURS[1]}


def main(folder: str) -> None:
    runs: dict[str, list[RunRecord]] = {arm: [] for arm in ARMS}
    for record in sorted(read_records([folder]), key=lambda record: record.final("seed")):
        if record.summary.get("status") != "finished":
            sys.exit(f"{folder}: {record.name} has not finished")
        experts = record.config["model"]["moe"]["experts"]
        runs["dense" if experts is None else "mixture"].append(record)
    with mpl.rc_context(RC):
        draw(runs, Path(__file__).with_name("curves.png"))
    for arm, records in runs.items():
        print(row(arm, records))


def draw(runs: dict[str, list[RunRecord]], path: Path) -> None:
    figure, (curves, ends) = new_figure(2)
    for place, (arm, records) in enumerate(runs.items()):
        for number, record in enumerate(records):
            series = record.series(LOSS)[:-1]  # the last is of the whole set
            label = arm if number == 0 else None
            curves.plot(series["tokens"] / 1e6, series["loss"], color=ARMS[arm], alpha=0.8, label=label)
        finals = [record.final(LOSS) for record in records]
        ends.plot(np.full(len(finals), place), finals, "o", color=ARMS[arm], alpha=0.8)
        ends.hlines(np.mean(finals), place - 0.2, place + 0.2, color=ARMS[arm])
    curves.set(
        xlabel="million bytes trained on", ylabel="nats per byte", title="on the same part of the validation set"
    )
    curves.legend()
    ends.set(xlim=(-0.5, 1.5), ylabel="nats per byte", title="at the end, on the whole set")
    ends.set_xticks(range(len(runs)), list(runs))
    figure.savefig(path)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


def row(arm: str, records: list[RunRecord]) -> str:
    one, losses = records[0], np.array([record.final(LOSS) for record in records])
    flops = one.final("flops_causal") / one.final("tokens")
    bits = np.mean([record.final("val/stdlib/bpb") for record in records])
    shown = ", ".join(f"{loss:.4f}" for loss in losses)
    return (
        f"| {arm} | {one.final('params/total'):,.0f} | {one.final('params/active'):,.0f} | {flops:,.0f} | {shown} | "
        f"{losses.mean():.4f} ± {losses.std(ddof=1):.4f} | {bits:.4f} |"
    )


if __name__ == "__main__":
    main(sys.argv[1])
