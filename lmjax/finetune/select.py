"""Patterns choose weights by their paths, or by their axes.

"unembed"                   the weight of this path
"attention/query"           every weight whose path ends so: a pattern may begin after any slash
"segments/*"                * stands for anything, slashes too
"* -> embed"                with an arrow: every weight with these axes in and out, copies (layers, experts) left out
"""

import difflib
import fnmatch
from collections.abc import Iterable

from lmjax.errors import ConfigError
from lmjax.weights import Spec, Weight, by_path


def matching(spec: Spec, patterns: Iterable[str], setting: str) -> list[str]:
    """The paths that any of the patterns matches, in the spec's order.

    Raises ConfigError for a pattern that matches nothing; the message begins with the setting that holds it.
    """
    weights, found = by_path(spec), set()
    for pattern in patterns:
        matched = {path for path, weight in weights.items() if matches(pattern, path, weight)}
        if not matched:
            raise ConfigError(f"{setting}: '{pattern}' matches no weight; {_hint(pattern, weights)}")
        found |= matched
    return [path for path in weights if path in found]


def matches(pattern: str, path: str, weight: Weight) -> bool:
    if "->" in pattern:
        return fnmatch.fnmatchcase(axes(weight), " ".join(pattern.split()))
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*/{pattern}")


def axes(weight: Weight) -> str:
    """What goes in and what comes out of one copy, as in `embed -> heads head_dim`."""
    return " ".join([*weight.in_axes, "->", *weight.out_axes])


def _hint(pattern: str, weights: dict[str, Weight]) -> str:
    names = dict.fromkeys(map(axes, weights.values()) if "->" in pattern else weights)
    close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.4)
    return f"is '{close[0]}' meant?" if close else f"there is {', '.join(list(names)[:8])}"
