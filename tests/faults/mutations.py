"""Seeded damage: to bytes as disks and networks do it, to JSON as bugs, other versions and hostile hands do it."""

import contextlib
import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from lmjax.errors import LmjaxError, one_line

ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 3.5, 2**31, 2**63, -(2**63), 2**200, float("nan"), float("inf")),
    *("", "x", "../../etc/passwd", "/etc/passwd", "a\0b", "\x1b[2J", "x" * 5000, "\ud800"),
    *([], {}, [[]], [1, 2, 3], {"a": 1}, {"": None}, ["float32"], [[1], "float32"]),
]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The content after one accident, which may leave it as it is."""
    low = rng.randrange(len(content) + 1)
    high = min(len(content), low + rng.choice((1, 2, 8, 64, 512, 4096)))
    block = content[low:high]
    elsewhere = rng.randrange(len(content) + 1)
    accidents: list[Callable[[], bytes]] = [
        lambda: _flipped(content, rng),
        lambda: _flipped(_flipped(content, rng), rng),
        lambda: content[:low],
        lambda: content[low:],
        lambda: content[:low] + content[high:],
        lambda: content[:low] + block + content[low:],
        lambda: content[:elsewhere] + block + content[elsewhere:],
        lambda: content[:elsewhere] + block + content[elsewhere + len(block) :],
        lambda: content[:low] + bytes(len(block)) + content[high:],
        lambda: content[:low] + rng.randbytes(len(block)) + content[high:],
        lambda: content + rng.randbytes(rng.choice((1, 2, 100))),
        lambda: rng.randbytes(len(content)),
        lambda: b"",
    ]
    return rng.choice(accidents)()


def _flipped(content: bytes, rng: random.Random) -> bytes:
    if not content:
        return content
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def odd_document(document: Any, rng: random.Random) -> Any:
    """A copy of a JSON document that is not as it should be in one to three places."""
    changed = copy.deepcopy(document)
    if not _places(changed):
        return rng.choice(ODD)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        holder, key = rng.choice(_places(changed))
        match rng.randrange(5):
            case 0 | 1:
                holder[key] = copy.deepcopy(rng.choice(ODD))
            case 2:
                del holder[key]
            case 3 if isinstance(holder, dict):
                holder[str(rng.choice((f"{key}x", "", "../x", 7)))] = holder.pop(key)
            case _:
                other, place = rng.choice(_places(changed))
                holder[key] = copy.deepcopy(other[place])
        if not _places(changed):
            break
    return changed


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(holder, key) of everything in a document."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [place for key in keys for place in ((value, key), *_places(value[key]))]


def as_text(document: Any, rng: random.Random) -> str:
    """It as JSON, now and then with a key twice or nested very deep."""
    text = json.dumps(document)
    match rng.randrange(30):
        case 0 if text.startswith("{"):
            return '{"version": 1, "step": 3, ' + text[1:]
        case 1:
            return "[" * 50_000 + text
        case 2:
            return '{"a": ' * 2000 + text + "}" * 2000
    return text


@contextlib.contextmanager
def refused(number: int) -> Iterator[None]:
    """What a damaged input may do: nothing, or raise an error of ours that makes one short line."""
    try:
        yield
    except LmjaxError as error:
        assert 0 < len(one_line(error)) < 1200, number
    except AssertionError:
        raise
    except BaseException as error:
        raise AssertionError(f"number {number}: {type(error).__name__}: {error}") from error
