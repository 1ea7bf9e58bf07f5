"""`curation.html`: what became of the documents, for people, in one file that needs nothing else.

People look before they believe: every reason comes with examples of what it dropped or changed, drawn at random,
with masks over what is private.
"""

from collections.abc import Iterator, Mapping, Sequence

from lmjax.data.curate.account import Account, Count
from lmjax.data.curate.result import Curation
from lmjax.record.files import in_words
from lmjax.record.page import Bar, escape, html_page, table


def page(curation: Curation) -> str:
    """The page."""
    first, last = curation.steps[0], curation.steps[-1]
    parts = [
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
        *table(
            ("file", "documents", "text"),
            [(shard.name, f"{shard.documents:,}", in_words(shard.text_bytes)) for shard in curation.shards],
        ),
    ]
    return html_page("Curation", parts)


def _funnel(steps: Sequence[Account]) -> Iterator[str]:
    total = max(1, steps[0].kept[1])
    rows: list[list[str | Bar]] = [
        [account.step, f"{account.kept[0]:,}", in_words(account.kept[1]), *_tokens(account),
         _share(account.kept[1], total), Bar(account.kept[1] / total),
         _share(account.read[1] - account.kept[1], max(1, account.read[1]))]
        for account in steps
    ]  # fmt: skip
    counted = ["tokens"] * len(_tokens(steps[0]))
    yield from table(["after", "documents", "bytes", *counted, "of all", "", "taken away here"], rows)


def _tokens(account: Account) -> list[str]:
    """The cell of what was kept, if tokens were counted."""
    return [] if account.tokens is None else [f"{account.tokens[1]:,}"]


def _mixture(first: Account, last: Account) -> Iterator[str]:
    rows = []
    for source, before in first.sources.items():
        after = last.sources.get(source, [0, 0])
        rows.append((source, _words(before), _share(before[1], first.kept[1]), _words(after),
                     _share(after[1], last.kept[1]), _share(after[1], before[1])))  # fmt: skip
    yield from table(("source", "before", "share", "after", "share", "kept"), rows)


def _lengths(first: Account, last: Account) -> Iterator[str]:
    lengths = sorted({*first.lengths, *last.lengths}, key=int)
    most = max([1, *first.lengths.values(), *last.lengths.values()])
    rows = [
        (f"from {in_words(int(length))}", f"{first.lengths.get(length, 0):,}",
         Bar(first.lengths.get(length, 0) / most), f"{last.lengths.get(length, 0):,}",
         Bar(last.lengths.get(length, 0) / most))
        for length in lengths
    ]  # fmt: skip
    yield from table(("length", "documents before", "", "after", ""), rows)


def _step(account: Account) -> Iterator[str]:
    if not (account.dropped or account.changed or account.found or account.facts):
        return
    yield f"<h2>{escape(account.step)}</h2>"
    for why, count in sorted(account.dropped.items(), key=lambda item: -item[1][0]):
        yield from _examples(account, why, f"Dropped: {why}: {_words(count)}")
    for what, (documents, times) in sorted(account.changed.items(), key=lambda item: -item[1][0]):
        yield from _examples(account, what, f"Changed: {what}: {_documents(documents)}, {times:,} times")
    if sets := account.facts.get("sets"):
        yield from _contamination(sets, account.found)
    elif account.found:
        most = max(account.found.values())
        ordered = sorted(account.found.items(), key=lambda item: (-item[1], item[0]))[:40]
        yield from table(("seen", "times", ""), [(what, f"{n:,}", Bar(n / most)) for what, n in ordered])
    if sizes := account.facts.get("cluster_sizes"):
        most = max(sizes.values())
        ordered = sorted(sizes.items(), key=lambda item: int(item[0]))[:40]
        alike = "documents with the same part" if account.step == "repeated_parts" else "documents alike"
        yield from table(
            (alike, "how often", ""),
            [(size, f"{count:,}", Bar(count / most)) for size, count in ordered],
        )
    plain = {name: value for name, value in account.facts.items() if name not in ("sets", "cluster_sizes")}
    if plain:
        yield from table(("", ""), [(name.replace("_", " "), str(value)) for name, value in plain.items()])


def _contamination(sets: Mapping[str, Mapping[str, int]], found: Mapping[str, int]) -> Iterator[str]:
    rows = []
    for name, counts in sets.items():
        hits = [times for item, times in found.items() if item.rpartition(": item ")[0] == name]
        rows.append((name, f"{counts['items']:,}", f"{len(hits):,}", _share(len(hits), counts["items"]),
                     f"{counts['too_short']:,}"))  # fmt: skip
    yield from table(("evaluation set", "items", "found in the corpus", "", "too short to look for"), rows)


def _examples(account: Account, why: str, title: str) -> Iterator[str]:
    yield f"<details><summary>{escape(title)}</summary>"
    for _, name, text in account.examples.get(why, []):
        yield f'<div class="name">{escape(name)}</div><pre dir="auto">{escape(text)}</pre>'
    yield "</details>"


def _words(count: Count) -> str:
    return f"{_documents(count[0])}, {in_words(count[1])}"


def _documents(count: int) -> str:
    return f"{count:,} document{'s' * (count != 1)}"


def _share(part: int, total: int) -> str:
    return f"{part / total:.1%}" if total else ""
