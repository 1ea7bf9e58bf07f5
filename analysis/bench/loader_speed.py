"""How many tokens a CPU-second of data loading gives: straight from the memory map and through Grain, beside numpy.

    python -m analysis.bench.loader_speed [--data=PREPARED_DIRECTORY] [--seq_len=256] [--batches=2000]

Without --data it prepares the standard library's source code as bytes (about 11 million tokens) in a temporary folder.
Convention: tokens are the inputs of a batch, B x T; CPU-seconds are `time.process_time`, which counts every thread;
everything is in the page cache; each figure is the median of three runs, taken in turn. What lmjax makes is a whole
batch (inputs, targets, weights, ids) of verified tokens in the order of an epoch; what numpy makes is one array of
B x (T + 1) tokens at random. "Raw" asks for several batches a call, without Grain.
"""

import argparse
import itertools
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np

from lmjax.data.config import DataConfig, PrepareConfig, SourceConfig, TokenizerConfig
from lmjax.data.loader import Loader
from lmjax.data.prepare.prepare import prepare
from lmjax.data.store.dataset import open_dataset
from lmjax.process import start_up

RUNS = 3
BATCH_SIZES = (64, 8)
ROWS_PER_CALL = 1024


def numpy_rows(tokens: np.ndarray, batch: int, seq_len: int) -> Iterator[np.ndarray]:
    """What most training scripts do: random rows out of one memory map, stacked one by one."""
    rng = np.random.default_rng(0)
    while True:
        starts = rng.integers(0, len(tokens) - seq_len, batch)
        yield np.stack([tokens[start : start + seq_len + 1].astype(np.int32) for start in starts])


def numpy_gather(tokens: np.ndarray, batch: int, seq_len: int) -> Iterator[np.ndarray]:
    """The upper bound: random rows by one gather, no documents, no epochs."""
    rng = np.random.default_rng(0)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)
    while True:
        yield windows[rng.integers(0, len(windows), batch)].astype(np.int32)


def tokens_per_cpu_second(batches: Iterator[object], count: int, tokens_per_batch: int) -> float:
    """The rate over `count` batches, after as many again to read every page once."""
    for _ in itertools.islice(batches, count):
        pass
    started = time.process_time()
    for _ in itertools.islice(batches, count):
        pass
    return count * tokens_per_batch / (time.process_time() - started)


def measure(path: str, seq_len: int, count: int) -> None:
    """Print the table."""
    shard = open_dataset(path).split("train").shards[0].tokens
    sources = {"data": SourceConfig(path=path)}

    def loader(batch: int, documents: str) -> Loader:
        return Loader(DataConfig(sources=sources, seq_len=seq_len, documents=documents), batch_size=batch)  # type: ignore[arg-type]

    def raw(batch: int, documents: str) -> Iterator[object]:
        batches, count = loader(batch, documents).batches, ROWS_PER_CALL // batch
        return itertools.chain.from_iterable(batches(call * ROWS_PER_CALL, count) for call in itertools.count())

    makers: dict[str, Callable[[int], Iterator[object]]] = {
        "numpy, row by row": lambda batch: numpy_rows(shard, batch, seq_len),
        "numpy, one gather": lambda batch: numpy_gather(shard, batch, seq_len),
        "lmjax, joined, raw": lambda batch: raw(batch, "joined"),
        "lmjax, joined, through Grain": lambda batch: iter(loader(batch, "joined")),
        "lmjax, separate, raw": lambda batch: raw(batch, "separate"),
        "lmjax, separate, through Grain": lambda batch: iter(loader(batch, "separate")),
    }
    print(
        f"{'millions of tokens per CPU-second':34}" + "".join(f"{f'{batch} x {seq_len}':>12}" for batch in BATCH_SIZES)
    )
    found: dict[tuple[str, int], list[float]] = {}
    for _, (name, make), batch in itertools.product(range(RUNS), makers.items(), BATCH_SIZES):
        n = count * max(BATCH_SIZES) // batch  # the same number of tokens for every batch size
        found.setdefault((name, batch), []).append(tokens_per_cpu_second(make(batch), n, batch * seq_len))
    for name in makers:
        print(f"{name:34}" + "".join(f"{statistics.median(found[name, batch]) / 1e6:12.1f}" for batch in BATCH_SIZES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a prepared directory")
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--batches", type=int, default=2000, help="batches of 64 per run")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.data or folder + "/stdlib"
        if arguments.data is None:
            prepare(PrepareConfig(tokenizer=TokenizerConfig(kind="bytes")), path)
        measure(path, arguments.seq_len, arguments.batches)


if __name__ == "__main__":
    start_up.tune_allocator()  # as every training process does
    main()
