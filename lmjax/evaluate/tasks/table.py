"""Results as a table for the terminal."""

import math
from collections.abc import Iterator, Mapping, Sequence

from lmjax.evaluate.statistics import Difference, Estimate, McNemar
from lmjax.evaluate.tasks.results import ALL, MACRO, Result


def table(results: Mapping[str, Result], against: Mapping[str, Result] | None = None) -> list[str]:
    """A line for each benchmark and metric, as `rows` has them, then what is to be said of them."""
    named = [
        [name, *row]
        for name, result in results.items()
        for row in rows(result, None if against is None else against[name])
    ]
    notes = dict.fromkeys(note for result in results.values() for note in result.together.notes)
    return [*aligned([["benchmark", *head(against is not None)], *named]), *notes, *_not_read(results)]


def head(is_compared: bool) -> list[str]:
    """Of the columns of `rows`."""
    more = ["items", "other", "+-", "difference", "95% interval", "McNemar p"]
    return ["metric", "", "value", "+-", *(more if is_compared else ["95% interval", "items"])]


def _not_read(results: Mapping[str, Result]) -> Iterator[str]:
    for name, result in results.items():
        if result.unread:
            yield (
                f"{name}: {result.unread} of {len(result.answers)} questions are longer than what the model reads at "
                "once, and lost their beginnings"
            )


def rows(result: Result, other: Result | None) -> Iterator[list[str]]:
    """One for each metric, over all items and as the mean over categories, with a 95% interval.

    With `other`, the same items answered by another model, or asked otherwise: its number, the difference with its 95%
    interval, and McNemar's p where answers are right or wrong.
    """
    numbers = result.numbers()
    theirs = other.numbers() if other is not None else {}
    differences = result.less(other) if other is not None else {}
    tests = result.disagreements(other) if other is not None else {}
    for metric, by in numbers.items():
        for category in (ALL, MACRO):
            if category not in by:
                continue
            one = by[category]
            row = [metric, category, *_shown(one)]
            if other is None:
                row += [_interval(one), str(one.items)]
            else:
                difference = differences.get(metric, {}).get(category)
                test = tests.get(metric) if category == ALL else None
                row += [str(one.items), *_shown(theirs[metric][category]), *_compared(difference, test)]
            yield row


def _shown(one: Estimate) -> list[str]:
    return [number(one.value), number(one.stderr)]


def number(value: float) -> str:
    """Nothing for what there is none of, such as the standard error of one item."""
    return "" if math.isnan(value) else f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4g}"


def _interval(one: Estimate) -> str:
    """Nothing where there is none."""
    return "" if math.isnan(one.low) else f"[{number(one.low)}, {number(one.high)}]"


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
