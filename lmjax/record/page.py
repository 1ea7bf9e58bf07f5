"""Pages of HTML for people to look at, each one file that needs nothing else: their style, and tables."""

import html
from collections.abc import Iterable, Iterator, Sequence

_STYLE = """
:root { color-scheme: light dark; --soft: light-dark(#e8eef4, #2a333d); --bar: light-dark(#3b78b5, #6ea8dc);
  --line: light-dark(#d5dbe1, #3d4752); --quiet: light-dark(#5a6570, #9aa5b0); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
p.quiet, td.quiet { color: var(--quiet); }
table { border-collapse: collapse; width: 100%; } th { text-align: left; font-weight: 600; }
th, td { padding: .25rem .75rem .25rem 0; vertical-align: top; border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.bar { width: 25%; } td.bar div { background: var(--soft); }
td.bar div div { background: var(--bar); height: 1.1rem; }
details { margin: .2rem 0; } :is(details, table) + table { margin-top: .8rem; } summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .5rem .75rem; margin: .3rem 0; }
.name { color: var(--quiet); font-size: .85rem; }
"""


class Bar(float):
    """A cell of a table that shows a share by its length."""


def html_page(title: str, parts: Iterable[str]) -> str:
    """The whole page; `parts` are HTML."""
    head = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
    ]
    return "\n".join([*head, *parts, "</body></html>"]) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str | Bar]]) -> Iterator[str]:
    """Plain text in cells, a bar for each `Bar`. What begins with a digit, or a sign or bracket before one, is a number
    and stands to the right, but in the first column."""
    kinds = ["", *map(_kind, rows[0][1:])] if rows else [""] * len(head)
    titles = "".join(f"<th{kind}>{escape(title)}</th>" for kind, title in zip(kinds, head, strict=True))
    yield "<table>" + (f"<tr>{titles}</tr>" if any(head) else "")
    for row in rows:
        yield f"<tr><td>{escape(str(row[0]))}</td>" + "".join(map(_cell, row[1:])) + "</tr>"
    yield "</table>"


def _cell(value: str | Bar) -> str:
    if isinstance(value, Bar):
        return f'<td class="bar"><div><div style="width:{100 * value:.2f}%"></div></div></td>'
    return f"<td{_kind(value)}>{escape(value)}</td>"


def _kind(value: str | Bar) -> str:
    return ' class="number"' if isinstance(value, str) and value.lstrip("+-[")[:1].isdigit() else ""


def escape(text: str) -> str:
    """Text as HTML shows it."""
    return html.escape(text)
