"""Licence expressions mean what their grammar says."""

import itertools

import pytest

from lmjax.data.curate.spdx import parse

KEEP = frozenset({"mit", "isc", "apache-2.0", "gpl-2.0-only with classpath-exception-2.0"})


@pytest.mark.parametrize(
    ("text", "spelled", "refused"),
    [
        ("(MIT OR (Apache-2.0 AND BSD-3-Clause))", "MIT OR (Apache-2.0 AND BSD-3-Clause)", ""),
        ("(GPL-3.0-only OR (MIT AND ISC))", "GPL-3.0-only OR (MIT AND ISC)", ""),
        ("GPL-3.0-only AND (MIT OR ISC)", "GPL-3.0-only AND (MIT OR ISC)", "GPL-3.0-only"),
        ("((MIT)) AND((ISC OR EPL-2.0))", "MIT AND (ISC OR EPL-2.0)", ""),
        ("EPL-2.0 or apache-2.0 and isc", "EPL-2.0 OR (apache-2.0 AND isc)", ""),
        ("MIT AND (EPL-2.0 OR Apache-2.0 WITH LLVM-exception)", None, ""),
        ("GPL-2.0-only WITH Classpath-exception-2.0", None, ""),
        ("GPL-2.0-only WITH Linux-syscall-note", None, "GPL-2.0-only WITH Linux-syscall-note"),
        ("Apache-2.0+", None, ""),
        ("EPL-2.0+ OR LicenseRef-Ours", None, "EPL-2.0+"),
        ("DocumentRef-a:LicenseRef-b", None, "DocumentRef-a:LicenseRef-b"),
        ("MIT) and more", "MIT", ""),
        # What is no expression is a licence of its own, which nobody keeps.
        ("MIT  License", "MIT License", "MIT License"),
        ("(MIT OR ISC", None, "(MIT OR ISC"),
        ("MIT OR", None, "MIT OR"),
        ("MIT ISC", None, "MIT ISC"),
        ("WITH MIT", None, "WITH MIT"),
        ("MIT WITH (ISC)", None, "MIT WITH (ISC)"),
        ("()", None, "()"),
        ("(" * 4000, None, "(" * 4000),
    ],
)
def test_an_expression_is_read_and_spelled(text: str, spelled: str | None, refused: str) -> None:
    found = parse(text)
    assert str(found) == (text if spelled is None else spelled) and found.refused(KEEP) == refused
    assert str(parse(str(found))) == str(found)


def test_what_is_kept_follows_the_operators() -> None:
    """Over all choices of what is kept: AND binds tighter than OR, parentheses tighter than both."""
    names = ("A", "B", "C", "D")
    for kept in itertools.product((False, True), repeat=4):
        a, b, c, d = kept
        keep = {name.lower() for name, is_kept in zip(names, kept, strict=True) if is_kept}
        for text, expected in (
            ("A OR B AND C OR D", a or (b and c) or d),
            ("A AND B OR C AND D", (a and b) or (c and d)),
            ("(A OR B) AND (C OR D)", (a or b) and (c or d)),
            ("A AND (B OR (C AND D))", a and (b or (c and d))),
        ):
            refused = parse(text).refused(keep)
            assert (refused == "") is expected and refused.lower() not in keep
