"""Clean passages, and what may be wrong with text, planted in them: for `analysis.bench.curation`."""

import html
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lmjax.data.config import PrepareConfig
from lmjax.data.prepare.sources import list_inputs, read_documents, read_records

PASSAGE_CHARACTERS = 2000
SHINGLE = 5


class Case(NamedTuple):
    """A document, and what is wanted of it: its text afterwards, or None where it is to be dropped."""

    text: str
    wanted: str | None


def clean(*texts: str) -> list[Case]:
    """Documents that are to stay as they are."""
    return [Case(text, text) for text in texts]


def passages(path: Path, count: int, rng: random.Random) -> list[str]:
    """So many passages of whole paragraphs of the documents of a file, drawn at random."""
    found = []
    for document in read_documents(list_inputs((str(path),)), PrepareConfig(), lambda n_bytes: None):
        paragraphs, size = [], 0
        for paragraph in re.split(r"\n\s*\n", (document.text or "").strip()):
            paragraphs.append(paragraph)
            size += len(paragraph)
            if size >= PASSAGE_CHARACTERS:
                found.append("\n\n".join(paragraphs))
                paragraphs, size = [], 0
    found = [text for text in dict.fromkeys(found) if len(text.split()) >= 200]
    return rng.sample(found, min(count, len(found)))


def verse(folder: Path, count: int, rng: random.Random) -> list[str]:
    """So many passages of 20 lines of the poets."""
    found = []
    for document in read_documents(list_inputs((f"{folder}/*.txt.gz",)), PrepareConfig(), lambda n_bytes: None):
        lines = (document.text or "").splitlines()[2:]
        found += ["\n".join(lines[start : start + 20]) for start in range(0, len(lines) - 20, 20)]
    return rng.sample(found, min(count, len(found)))


def items(path: Path) -> list[str]:
    """The first long string of each item of an evaluation set: 13 words or more."""
    texts = []
    for record in read_records(list_inputs((str(path),)), PrepareConfig()):
        strings = [value for value in record.values() if isinstance(value, str)]
        texts += [text for text in strings[:1] if len(re.findall(r"\w+", text)) >= 13]
    return texts


# What may be wrong ----------------------------------------------------------------------------------------------------


def mojibake(text: str) -> Case:
    """UTF-8 read as Windows-1252."""
    return Case(text.encode("utf-8").decode("cp1252"), text)


def is_cp1252(text: str) -> bool:
    """Whether `mojibake` can be made of the text."""
    try:
        return mojibake(text).text != text
    except UnicodeDecodeError:
        return False


def page(text: str, rng: random.Random) -> str:
    """A web page with the text, and around it what pages have."""
    links = "".join(f'<li><a href="/{n}">Section {n}</a></li>' for n in range(rng.randint(4, 12)))
    body = "".join(f"<p>{html.escape(part)}</p>" for part in text.split("\n\n"))
    return (
        f"<!DOCTYPE html><html><head><title>Page</title><script>var a = {rng.random()};</script></head><body>"
        f"<nav><ul>{links}</ul></nav><article><h1>A passage</h1>{body}</article><aside>Subscribe to our newsletter"
        f"</aside><footer><p>All rights reserved. Privacy policy. {rng.randint(1990, 2026)}</p></footer></body></html>"
    )


def private(text: str, what: str, rng: random.Random) -> Case:
    """One of PRIVATE between two of its words."""
    kind, value = PRIVATE[what](rng)
    before, after = _cut(text, rng)
    return Case(f"{before} ({value}) {after}", f"{before} (<{kind}>) {after}")


def public(text: str, rng: random.Random) -> Case:
    """What looks private and is not between two of its words."""
    before, after = _cut(text, rng)
    digits = "".join(rng.choice("0123456789") for _ in range(15))
    wrong = next(d for d in "0123456789" if not _luhn(f"4{digits[:14]}{d}"))
    value = rng.choice((
        f"192.168.1.{rng.randint(1, 254)}", "127.0.0.1", f"version {digits[0]}.{digits[1:3]}.{digits[3:5]}",
        f"4{digits[:14]}{wrong}", f"978-3-16-{digits[:6]}-{digits[6]}", f"{digits[:3]},{digits[3:6]}",
        f"{rng.randint(1700, 2026)}-0{rng.randint(1, 9)}-12", f"{rng.randint(1, 9)}:{rng.randint(10, 59)}", "@name",
    ))  # fmt: skip
    return clean(f"{before} ({value}) {after}")[0]


def _cut(text: str, rng: random.Random) -> tuple[str, str]:
    """The text before a blank between two of its words, and after it."""
    place = rng.choice([match.start() for match in re.finditer(r"(?<=[a-z]) (?=[a-z])", text)])
    return text[:place], text[place + 1 :]


def _email(rng: random.Random) -> tuple[str, str]:
    name = rng.choice(["jane.doe", "x_1", "info", "bob+list", "a-b"]) + str(rng.randint(0, 99))
    host = rng.choice(["mail.", ""]) + rng.choice(["example", "a-firm", "uni2"])
    return "email", f"{name}@{host}.{rng.choice(['com', 'org', 'co.uk', 'museum'])}"


def _ip(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        first, second = rng.choice([8, 23, 151, 203]), rng.randint(64, 112)
        return "ip", f"{first}.{second}.{rng.randint(1, 254)}.{rng.randint(1, 254)}"
    return "ip", f"2606:2800:220:{rng.randint(1, 9999)}::{rng.randint(1, 9999)}"


def _phone(rng: random.Random) -> tuple[str, str]:
    a, b, c = rng.randint(212, 989), rng.randint(200, 999), rng.randint(1000, 9999)
    d = rng.randint(1000, 9999)
    return "phone", rng.choice([f"({a}) {b}-{c}", f"{a}-{b}-{c}", f"+1 {a} {b} {c}", f"+44 20 {c} {d}"])


def _card(rng: random.Random) -> tuple[str, str]:
    digits = rng.choice("45") + "".join(rng.choice("0123456789") for _ in range(14))
    last = next(d for d in "0123456789" if _luhn(digits + d))
    number, gap = digits + last, rng.choice(["", " ", "-"])
    return "card", gap.join(number[start : start + 4] for start in range(0, 16, 4))


def _luhn(digits: str) -> bool:
    values = [int(d) for d in reversed(digits)]
    return (sum(values[::2]) + sum(sum(divmod(2 * value, 10)) for value in values[1::2])) % 10 == 0


PRIVATE: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "e-mail addresses": _email,
    "IP addresses": _ip,
    "telephone numbers": _phone,
    "card numbers": _card,
}


def badly_spaced(text: str, rng: random.Random) -> Case:
    """Line ends of Windows, blanks before some, and spaces without width and soft hyphens in it."""
    before, after = _cut(text, rng)
    spoilt = f"{before}\u200b {after}".replace("ing ", "\u00ading ")
    return Case(spoilt.replace("\n", rng.choice(["\r\n", "  \r\n"])), text)


def on_another_keyboard(text: str) -> Case:
    """Persian with the yeh and the kaf of Arabic."""
    return Case(text.translate({0x06CC: 0x064A, 0x06A9: 0x0643}), text)


def respelled(text: str, rng: random.Random) -> str:
    """The same words, in another case, with other punctuation and white space."""
    text = rng.choice([text.upper(), text.lower(), text])
    return rng.choice(["\n", " ", "  "]).join(re.sub(r"[.,;]", rng.choice([" ", "!"]), text).split())


def shingles(text: str) -> set[tuple[str, ...]]:
    """The runs of five words."""
    words = re.findall(r"\w+", text.lower())
    return set(zip(*(words[place:] for place in range(SHINGLE)), strict=False))


def jaccard(one: str, other: str) -> float:
    """Of the runs of five words."""
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def altered(text: str, similarity: float, rng: random.Random) -> str:
    """The text with words replaced, as many as leave it just above the Jaccard similarity."""
    words = text.split(" ")
    order = rng.sample(range(len(words)), len(words))
    changed = list(words)
    low, high = 0, len(words)
    while low < high:  # the most replacements that still leave it above
        middle = (low + high + 1) // 2
        for n, place in enumerate(order):
            changed[place] = f"word{place}" if n < middle else words[place]
        low, high = (middle, high) if jaccard(text, " ".join(changed)) >= similarity else (low, middle - 1)
    for n, place in enumerate(order):
        changed[place] = f"word{place}" if n < low else words[place]
    return " ".join(changed)


def paraphrased(text: str, every: int) -> str:
    """The text with one word of `every` replaced, so that no run of that many words of it is left."""
    return " ".join(f"so{place}" if place % every == every // 2 else word for place, word in enumerate(text.split()))


def junk(rng: random.Random) -> Iterator[tuple[str, str]]:
    """(what, text): lists of links, tables of numbers, symbols, one thing again and again."""
    names = ["Home", "About us", "Contact", "Shop", "News", "Archive", "Log in", "Sitemap", "Help", "Jobs"]
    while True:
        yield "menus", "\n".join(f"{rng.choice(names)} {rng.randint(1, 99)}" for _ in range(80))
        yield "tables of numbers", "\n".join(" ".join(str(rng.randint(10, 99999)) for _ in range(6)) for _ in range(40))
        yield "symbols", " ".join(rng.choice(["#tag", "###", "…", "the", "and", "of", "word"]) for _ in range(300))
        line = f"Buy the best watch number {rng.randint(1, 999)} and have it with you for a small price today."
        yield "one line again and again", "\n".join([line] * 30)


def notices(rng: random.Random) -> list[str]:
    """Paragraphs that many documents share."""
    kinds = (
        "This page is made available under the terms of licence {}, a copy of which you should have received.",
        "To cite this text, name the archive, the number {} of its collection and the day on which you saw it.",
        "Readers who find a mistake in this text are kindly asked to write to the editors of volume {} of it.",
    )
    return [kind.format(rng.randint(1000, 9999)) for kind in kinds]


def navigation(rng: random.Random) -> list[str]:
    """Lines that many documents share."""
    return [f"Previous chapter | Contents of volume {rng.randint(1, 99)} | {end}" for end in ("Next", "Index", "Notes")]


def write(path: Path, texts: Sequence[str]) -> str:
    """The texts as JSON lines."""
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def borderline(text: str, rng: random.Random) -> str:
    """The text, made worse by more or less of what the rules of quality look for."""
    words, lines = text.split(), text.split("\n")
    kind = rng.randrange(6)
    if kind == 0:
        return text + " " + " ".join(words[: rng.randint(5, 120)])
    if kind == 1:
        menu = next(junk(rng))[1].split("\n")
        return "\n".join(itertools.chain.from_iterable(zip(lines, menu, strict=False)))
    if kind == 2:
        return " ".join(words[: rng.randint(30, 70)])
    if kind == 3:
        share = rng.choice([0.15, 0.2, 0.25])
        return " ".join("123" if rng.random() < share else word for word in words)
    if kind == 4:
        return text + "\n" + "\n".join(["#tag ..."] * rng.randint(0, 40))
    return "\n".join(" ".join(part.split()) for part in text.split("\n\n"))
