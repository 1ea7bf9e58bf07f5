"""What a benchmark is: a file of questions, how a line becomes text, and how an answer is judged."""

import gzip
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from lmjax.errors import ConfigError, DataError, one_line
from lmjax.evaluate.tasks.forms import Form
from lmjax.evaluate.tasks.prompt import Item, Prompt
from lmjax.record import files


class Benchmark(NamedTuple):
    """Questions of one kind."""

    file: str
    """JSON lines in the directory of the data, `.jsonl` or `.jsonl.gz`."""
    item: Callable[[Mapping[str, Any]], Item]
    """What a line asks."""
    form: Form
    """How it is asked and judged."""
    delimiter: str = " "
    """Stands between a question and its answer."""
    between: str = "\n\n"
    """Ends each example."""
    shots: int = 0
    """Examples before each question."""
    rewordings: tuple[Callable[[Mapping[str, Any]], Item], ...] = ()
    """Other ways to ask the same: robustness is tested with them."""
    examples: str | None = None
    """A file that examples come from, the first ones of the question's category; default: drawn from the questions."""


def prompts(
    benchmark: Benchmark,
    directory: epath.PathLike,
    *,
    shots: int | None = None,
    seed: int = 1234,
    limit: int | None = None,
) -> list[Prompt]:
    """The questions of a benchmark as a model reads them, in the order of the file.

    Examples that are drawn depend on the seed and the place in the file alone, and never hold the question itself; they
    are those of EleutherAI's harness, whose seed is 1234. A `limit` chooses by the hash of each line, so that a smaller
    one is a part of a larger, in whatever order the file is.

    Raises DataError for a file that is missing or holds something else, ConfigError for more examples than there are.
    """
    lines = read_lines(files.locate(directory) / benchmark.file)
    items = [_item(benchmark, line, where) for where, line in lines]
    shots = benchmark.shots if shots is None else shots
    if shots and not all(item.choices for item in items):
        raise ConfigError(f"--shots={shots}: {benchmark.file} is asked for no answers that examples could show; use 0")
    drawn = _drawn(items, shots, seed) if benchmark.examples is None else _first(benchmark, directory, items, shots)
    chosen = subset([line for _, line in lines], limit)
    return [
        Prompt(number, items[number], _context(benchmark, items[number], drawn[number]), benchmark.delimiter)
        for number in chosen
    ]


def subset(lines: Sequence[bytes], limit: int | None) -> list[int]:
    """The numbers of those lines that have the lowest hashes, at most `limit`, in order."""
    ranked = sorted(range(len(lines)), key=lambda n: (hashlib.blake2b(lines[n].strip(), digest_size=16).digest(), n))
    return sorted(ranked[:limit])


def read_lines(path: epath.Path) -> list[tuple[str, bytes]]:
    """(where, line) of a file of lines that is not empty. Raises DataError."""
    content = files.read_bytes(path)
    if path.name.endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError) as error:
            raise DataError(f"{path}: not a gzip file ({one_line(error)}); fetch it again") from None
    lines = [(f"{path}:{n}", line) for n, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path} is empty; fetch it again")
    return lines


def _item(benchmark: Benchmark, line: bytes, where: str) -> Item:
    try:
        item = benchmark.item(json.loads(line))
        texts = (item.context, item.category, *item.choices, *item.references, *item.patterns)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a text is no string")
        if not 0 <= item.gold < max(1, len(item.choices)):
            raise ValueError(f"the answer {item.gold} is none of {len(item.choices)} choices")
    except KeyError as error:
        raise DataError(f"{where}: there is no field {error}; is it another data set's file?") from None
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise DataError(f"{where}: {one_line(error, 200)}; is it another data set's file?") from None
    return item


def _context(benchmark: Benchmark, item: Item, examples: Sequence[Item]) -> str:
    shown = (f"{one.context}{benchmark.delimiter}{one.choices[one.gold]}{benchmark.between}" for one in examples)
    return "".join((item.description, *shown, item.context))


def _drawn(items: Sequence[Item], shots: int, seed: int) -> list[Sequence[Item]]:
    """Examples for every question, from all others."""
    if shots >= len(items):
        raise ConfigError(f"--shots={shots} examples need more than the {len(items)} questions of the file; lower it")

    def draw(rng: random.Random, item: Item) -> Sequence[Item]:
        found = [one for one in rng.sample(items, shots + 1) if one != item][:shots]
        return found if len(found) == shots else rng.sample([one for one in items if one != item], shots)

    rng = random.Random(seed)
    return [draw(rng, item) if shots else () for item in items]


def _first(benchmark: Benchmark, directory: epath.PathLike, items: Sequence[Item], shots: int) -> list[Sequence[Item]]:
    assert benchmark.examples is not None
    path = files.locate(directory) / benchmark.examples
    pool: dict[str, list[Item]] = {}
    for one in _items(benchmark, path):
        pool.setdefault(one.category, []).append(one)
    for category in {item.category for item in items}:
        if len(pool.get(category, [])) < shots:
            raise ConfigError(f"--shots={shots}: {path} has {len(pool.get(category, []))} of '{category}'; lower it")
    return [pool[item.category][:shots] if shots else () for item in items]


def _items(benchmark: Benchmark, path: epath.Path) -> Iterator[Item]:
    return (_item(benchmark, line, where) for where, line in read_lines(path))
