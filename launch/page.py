"""`index.html` of a sweep: table, loss curves and the IsoFLOP figure as it fills up, in one file that needs no other.

`launch status` writes it anew. It shows what is there; fits and intervals are those of `python -m analysis report`.
"""

import concurrent.futures
import json
import time
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from launch import status
from launch.manifest import Entry, Manifest
from launch.status import Row
from lmjax.errors import one_line
from lmjax.record import files
from lmjax.record.jsonl import parsed

FILE = "index.html"
MOST_POINTS = 100
SAME_BUDGET = 1.15
"""Cells whose FLOPs are within this factor of each other's are one budget."""


def write(directory: epath.PathLike, sweep: Manifest, rows: Sequence[Row]) -> str:
    """Where it lies, or why it could not be written: a page to look at stops nothing."""
    root = epath.Path(directory)
    with concurrent.futures.ThreadPoolExecutor(32 if files.is_remote(root) else 4) as pool:
        curves = list(pool.map(lambda entry: curve(root / entry.workdir / "metrics.jsonl"), sweep.cells))
    data = {
        "name": sweep.name,
        "config": sweep.config,
        "on": sweep.accelerator or "CPU",
        "headline": status.headline(rows),
        "written": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cells": [
            {
                "index": entry.index,
                "name": entry.name,
                "N": entry.params_active,
                "D": entry.tokens,
                "C": entry.flops,
                "budget": budget,
                "curve": points,
                **{key: getattr(row, key) for key in ("state", "why", "step", "steps", "loss", "loss_name")},
            }
            for entry, row, points, budget in zip(sweep.cells, rows, curves, budgets(sweep.cells), strict=True)
        ],
    }
    page = (Path(__file__).parent / "page.html").read_text()
    try:
        # In a script nothing may look like its end.
        files.write_atomically(root / FILE, page.replace("DATA", json.dumps(data).replace("</", "<\\/")))
    except OSError as error:
        return f"{root / FILE} could not be written: {one_line(error)}"
    return str(root / FILE)


def curve(path: epath.Path) -> list[tuple[float, float, float]]:
    """(tokens, FLOPs, training loss) at most MOST_POINTS times: means of as many lines of metrics each."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return []
    by_step = {row["step"]: row for line in lines if (row := parsed(line)) is not None and "train/loss" in row}
    found = [by_step[step] for step in sorted(by_step)]  # of what was trained again after a restart the last counts
    many = -(-len(found) // MOST_POINTS) or 1
    groups = [found[start : start + many] for start in range(0, len(found), many)]
    return [
        (group[-1]["tokens"], group[-1]["flops"], sum(row["train/loss"] for row in group) / len(group))
        for group in groups
    ]


def budgets(cells: Sequence[Entry]) -> list[float]:
    """The IsoFLOP budget that each cell belongs to: the mean of FLOPs that lie close together."""
    groups: list[list[int]] = []
    for flops in sorted(entry.flops for entry in cells):
        if groups and flops < SAME_BUDGET * groups[-1][0]:
            groups[-1].append(flops)
        else:
            groups.append([flops])
    mean = {flops: sum(group) / len(group) for group in groups for flops in group}
    return [mean[entry.flops] for entry in cells]
