"""`curation.html`: what became of the documents, for people, in one file that needs nothing else.

People look before they believe: every reason comes with examples of what it dropped or changed, drawn at random,
with masks over what is private.
"""

import html
from collections.abc import Iterator, Mapping, Sequence

from lmjax.data.curate.account import Account, Count
from lmjax.data.curate.result import Curation
from lmjax.record.files import in_words

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


def page(curation: Curation) -> str:
    """The page."""
    first, last = curation.steps[0], curation.steps[-1]
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Curation</title><style>{_STYLE}</style></head><body>",
        "<h1>Curation</h1>",
        f'<p class="quiet">{_words(first.kept)} were read, {_words(last.kept)} are left '
        f"({_share(last.kept[1], first.kept[1])} of the bytes). Bytes are those of the text in UTF-8. "
        f"Fingerprint {curation.fingerprint[:16]}.</p>",
        "<h2>Step by step</h2>",
        *_funnel(curation.steps),
        "<h2>Sources</h2>",
        *_mixture(first, last),
        "<h2>Lengths of documents</h2>",
        *_lengths(first, last),
        *(part for account in curation.steps for part in _step(account)),
        "<h2>Files</h2>",
        *_table(
            ("file", "documents", "text"),
            [(shard.name, f"{shard.documents:,}", in_words(shard.text_bytes)) for shard in curation.shards],
        ),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _funnel(steps: Sequence[Account]) -> Iterator[str]:
    total = max(1, steps[0].kept[1])
    rows = [
        (account.step, f"{account.kept[0]:,}", in_words(account.kept[1]), _share(account.kept[1], total),
         _Bar(account.kept[1] / total), _share(account.read[1] - account.kept[1], max(1, account.read[1])))
        for account in steps
    ]  # fmt: skip
    yield from _table(("after", "documents", "bytes", "of all", "", "taken away here"), rows)


def _mixture(first: Account, last: Account) -> Iterator[str]:
    rows = []
    for source, before in first.sources.items():
        after = last.sources.get(source, [0, 0])
        rows.append((source, _words(before), _share(before[1], first.kept[1]), _words(after),
                     _share(after[1], last.kept[1]), _share(after[1], before[1])))  # fmt: skip
    yield from _table(("source", "before", "share", "after", "share", "kept"), rows)


def _lengths(first: Account, last: Account) -> Iterator[str]:
    lengths = sorted({*first.lengths, *last.lengths}, key=int)
    most = max([1, *first.lengths.values(), *last.lengths.values()])
    rows = [
        (f"from {in_words(int(length))}", f"{first.lengths.get(length, 0):,}",
         _Bar(first.lengths.get(length, 0) / most), f"{last.lengths.get(length, 0):,}",
         _Bar(last.lengths.get(length, 0) / most))
        for length in lengths
    ]  # fmt: skip
    yield from _table(("length", "documents before", "", "after", ""), rows)


def _step(account: Account) -> Iterator[str]:
    if not (account.dropped or account.changed or account.found or account.facts):
        return
    yield f"<h2>{_escape(account.step)}</h2>"
    for why, count in sorted(account.dropped.items(), key=lambda item: -item[1][0]):
        yield from _examples(account, why, f"Dropped: {why}: {_words(count)}")
    for what, (documents, times) in sorted(account.changed.items(), key=lambda item: -item[1][0]):
        yield from _examples(account, what, f"Changed: {what}: {_documents(documents)}, {times:,} times")
    if sets := account.facts.get("sets"):
        yield from _contamination(sets, account.found)
    elif account.found:
        most = max(account.found.values())
        ordered = sorted(account.found.items(), key=lambda item: (-item[1], item[0]))[:40]
        yield from _table(("seen", "times", ""), [(what, f"{n:,}", _Bar(n / most)) for what, n in ordered])
    if sizes := account.facts.get("cluster_sizes"):
        most = max(sizes.values())
        ordered = sorted(sizes.items(), key=lambda item: int(item[0]))[:40]
        alike = "documents with the same part" if account.step == "repeated_parts" else "documents alike"
        yield from _table(
            (alike, "how often", ""),
            [(size, f"{count:,}", _Bar(count / most)) for size, count in ordered],
        )
    plain = {name: value for name, value in account.facts.items() if name not in ("sets", "cluster_sizes")}
    if plain:
        yield from _table(("", ""), [(name.replace("_", " "), str(value)) for name, value in plain.items()])


def _contamination(sets: Mapping[str, Mapping[str, int]], found: Mapping[str, int]) -> Iterator[str]:
    rows = []
    for name, counts in sets.items():
        hits = [times for item, times in found.items() if item.rpartition(": item ")[0] == name]
        rows.append((name, f"{counts['items']:,}", f"{len(hits):,}", _share(len(hits), counts["items"]),
                     f"{counts['too_short']:,}"))  # fmt: skip
    yield from _table(("evaluation set", "items", "found in the corpus", "", "too short to look for"), rows)


def _examples(account: Account, why: str, title: str) -> Iterator[str]:
    yield f"<details><summary>{_escape(title)}</summary>"
    for _, name, text in account.examples.get(why, []):
        yield f'<div class="name">{_escape(name)}</div><pre dir="auto">{_escape(text)}</pre>'
    yield "</details>"


class _Bar(float):
    """A cell of a table that shows a share by its length."""


def _table(head: Sequence[str], rows: Sequence[Sequence[str | _Bar]]) -> Iterator[str]:
    kinds = ["", *map(_kind, rows[0][1:])] if rows else [""] * len(head)
    titles = "".join(f"<th{kind}>{_escape(title)}</th>" for kind, title in zip(kinds, head, strict=True))
    yield "<table>" + (f"<tr>{titles}</tr>" if any(head) else "")
    for row in rows:
        yield f"<tr><td>{_escape(str(row[0]))}</td>" + "".join(map(_cell, row[1:])) + "</tr>"
    yield "</table>"


def _cell(value: str | _Bar) -> str:
    if isinstance(value, _Bar):
        return f'<td class="bar"><div><div style="width:{100 * value:.2f}%"></div></div></td>'
    return f"<td{_kind(value)}>{_escape(value)}</td>"


def _kind(value: str | _Bar) -> str:
    return ' class="number"' if isinstance(value, str) and value.lstrip("-")[:1].isdigit() else ""


def _words(count: Count) -> str:
    return f"{_documents(count[0])}, {in_words(count[1])}"


def _documents(count: int) -> str:
    return f"{count:,} document{'s' * (count != 1)}"


def _share(part: int, total: int) -> str:
    return f"{part / total:.1%}" if total else ""


def _escape(text: str) -> str:
    return html.escape(text)
