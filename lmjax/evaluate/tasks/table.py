"""Results as a table for the terminal."""

import math
from collections.abc import Iterator, Mapping, Sequence

from lmjax.evaluate.statistics import Difference, Estimate, McNemar
from lmjax.evaluate.tasks.results import ALL, MACRO, Result


def table(results: Mapping[str, Result], against: Mapping[str, Result] | None = None) -> list[str]:
    """A line for each benchmark and metric, over all items and as the mean over categories.

    With `against`, the same items answered by another model: its number, the difference with its 95% interval, and
    McNemar's p where answers are right or wrong.
    """
    head = ["benchmark", "metric", "", "value", "+-", "items"]
    if against is not None:
        head += ["other", "+-", "difference", "95% interval", "McNemar p"]
    rows = [
        row
        for name, result in results.items()
        for row in _rows(name, result, None if against is None else against[name])
    ]
    return [*aligned([head, *rows]), *_not_read(results)]


def _not_read(results: Mapping[str, Result]) -> Iterator[str]:
    for name, result in results.items():
        if result.unread:
            yield (
                f"{name}: {result.unread} of {len(result.answers)} questions are longer than what the model reads at "
                "once, and lost their beginnings"
            )


def _rows(name: str, result: Result, other: Result | None) -> Iterator[list[str]]:
    numbers = result.numbers()
    theirs = other.numbers() if other is not None else {}
    differences = result.less(other) if other is not None else {}
    tests = result.disagreements(other) if other is not None else {}
    for metric, by in numbers.items():
        for category in (ALL, MACRO):
            if category not in by:
                continue
            row = [name, metric, category, *_shown(by[category]), str(by[category].items)]
            if other is not None:
                difference = differences.get(metric, {}).get(category)
                test = tests.get(metric) if category == ALL else None
                row += [*_shown(theirs[metric][category]), *_compared(difference, test)]
            yield row


def _shown(one: Estimate) -> list[str]:
    return [number(one.value), number(one.stderr)]


def number(value: float) -> str:
    """Nothing for what there is none of, such as the standard error of one item."""
    return "" if math.isnan(value) else f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4g}"


def _compared(one: Difference | None, test: McNemar | None) -> list[str]:
    if one is None:
        return ["", "", ""]
    interval = f"[{one.low:+.4f}, {one.high:+.4f}]"
    return [f"{one.value:+.4f}", interval, "" if test is None else f"{test.p:.3g}"]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first three columns to the left, numbers to the right; a column without anything is left out."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cell for cell, width in zip(cells, widths, strict=True) if width).rstrip()

    return [line(row) for row in rows]
