"""Licence expressions of SPDX (ISO/IEC 5962), as they stand behind `SPDX-License-Identifier:`.

The grammar is that of SPDX 2.3, annex D, where AND binds tighter than OR, and WITH than both; operators are in capitals
or, from SPDX 3.0 on, in small letters:

    either     = both *( "OR" both )
    both       = simple *( "AND" simple )
    simple     = "(" either ")" / licence [ "WITH" exception ]

An exception permits something more, and a `+` behind an identifier allows later versions too, so neither takes anything
away: both are as good as the licence itself.
"""

import re
from collections.abc import Collection
from typing import Literal, NamedTuple

_TOKEN = re.compile(r"[()]|[\w.:+-]+")
_OPERATORS = ("AND", "OR", "WITH")
_DEEPEST = 20
"""Parentheses in each other."""


class Licence(NamedTuple):
    """One licence, with its exception if it has one."""

    name: str
    exception: str = ""

    def __str__(self) -> str:
        return f"{self.name} WITH {self.exception}" if self.exception else self.name

    def refused(self, keep: Collection[str]) -> str:
        """The licence if it is none of those that are kept, in small letters; else nothing."""
        names = {self.name.lower(), self.name.lower().removesuffix("+"), str(self).lower()}
        return str(self) if names.isdisjoint(keep) else ""


class Combined(NamedTuple):
    """Licences that all hold, or of which one may choose."""

    operator: Literal["AND", "OR"]
    parts: "tuple[Expression, ...]"

    def __str__(self) -> str:
        inside = (f"({part})" if isinstance(part, Combined) else str(part) for part in self.parts)
        return f" {self.operator} ".join(inside)

    def refused(self, keep: Collection[str]) -> str:
        """The first licence for which the whole is not kept; nothing if it is."""
        refused = [part.refused(keep) for part in self.parts]
        if self.operator == "OR" and not all(refused):
            return ""
        return next(filter(None, refused), "")


Expression = Licence | Combined


def parse(text: str) -> Expression:
    """The expression at the beginning of a text, up to a parenthesis that it does not open; what is none is a licence
    of its own, by its spelling."""
    tokens = _TOKEN.findall(text)[::-1]
    try:
        found = _either(tokens, 0)
        whole = not tokens or tokens[-1] == ")"
    except (IndexError, ValueError):
        whole = False
    return found if whole else Licence(" ".join(text.split()))


def _either(tokens: list[str], depth: int) -> Expression:
    """Tokens are taken from the end of the list. Raises IndexError where they end too early, and ValueError where
    another is expected."""
    parts = [_both(tokens, depth)]
    while _takes(tokens, "OR"):
        parts.append(_both(tokens, depth))
    return Combined("OR", tuple(parts)) if len(parts) > 1 else parts[0]


def _both(tokens: list[str], depth: int) -> Expression:
    parts = [_simple(tokens, depth)]
    while _takes(tokens, "AND"):
        parts.append(_simple(tokens, depth))
    return Combined("AND", tuple(parts)) if len(parts) > 1 else parts[0]


def _simple(tokens: list[str], depth: int) -> Expression:
    name = tokens.pop()
    if name == "(" and depth < _DEEPEST:
        inside = _either(tokens, depth + 1)
        if tokens.pop() != ")":
            raise ValueError
        return inside
    if name in "()" or name.upper() in _OPERATORS:
        raise ValueError
    if not _takes(tokens, "WITH"):
        return Licence(name)
    exception = tokens.pop()
    if exception in "()":
        raise ValueError
    return Licence(name, exception)


def _takes(tokens: list[str], operator: str) -> bool:
    """Whether the next token is the operator, which is then taken."""
    if tokens and tokens[-1].upper() == operator:
        tokens.pop()
        return True
    return False
