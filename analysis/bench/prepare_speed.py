"""How many megabytes of text a CPU-second of preparing encodes, beside the sentencepiece library alone.

    python -m analysis.bench.prepare_speed [--inputs GLOB...] [--workers=2]

Without --inputs it takes the standard library's source code, and trains a tokenizer of each kind on it. Convention:
megabytes are of UTF-8; "sentencepiece, whole documents" is its `encode` of each document, which is what most scripts
do, in this process; "lmjax" is the same by what encodes in `prepare`, with a tokenizer that is loaded anew and has seen
no word, each document checked. Medians of three runs, taken in turn, by CPU time. The whole command reads, divides,
encodes and writes shards with a tokenizer that is there already, by wall time, with one process and with several.
"""

import argparse
import dataclasses
import functools
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lmjax.data.config import PrepareConfig, TokenizerConfig
from lmjax.data.prepare.encoding import encode_documents, encode_text
from lmjax.data.prepare.prepare import prepare
from lmjax.data.prepare.sources import list_inputs, read_documents
from lmjax.data.tokenizers.load import load_tokenizer
from lmjax.data.tokenizers.pieces import SentencePieceTokenizer

RUNS = 3
TOKENIZERS = (TokenizerConfig(kind="bpe", vocab=2048), TokenizerConfig(kind="unigram", vocab=8192))
MEGABYTE = 1e6


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def measure(cfg: PrepareConfig, workers: int, folder: Path) -> None:
    """Print the figures of one tokenizer."""
    trained = folder / cfg.tokenizer.kind
    prepare(dataclasses.replace(cfg, workers=1), str(trained))
    tokenizer = load_tokenizer(trained / "tokenizer")
    assert isinstance(tokenizer, SentencePieceTokenizer)
    documents = read_documents(list_inputs(cfg.inputs), cfg, lambda *_: None)
    texts = [document.text for document in documents if document.text is not None]
    size = sum(len(text.encode()) for text in texts) / MEGABYTE

    def by_lmjax() -> object:
        return encode_documents(functools.partial(encode_text, load_tokenizer(trained / "tokenizer"), "error"), texts)

    ways: dict[str, Callable[[], object]] = {
        "sentencepiece, whole documents": lambda: [tokenizer.processor.encode(text) for text in texts],
        "lmjax": by_lmjax,
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(RUNS):
        for name, work in ways.items():
            found[name].append(size / cpu_seconds(work))
    print(f"{cfg.tokenizer.kind}, vocabulary {cfg.tokenizer.vocab:,}, {len(texts):,} documents, {size:.1f} MB")
    for name, rates in found.items():
        print(f"  {name:32} {statistics.median(rates):6.2f} MB per CPU-second")
    given = TokenizerConfig(kind="file", path=str(trained / "tokenizer" / "tokenizer.model"))
    for n in sorted({1, workers}):
        started = time.perf_counter()
        prepare(dataclasses.replace(cfg, tokenizer=given, workers=n), str(folder / f"{cfg.tokenizer.kind}-{n}"))
        took = time.perf_counter() - started
        print(f"  {f'the whole command, {n} process' + 'es' * (n > 1):32} {size / took:6.2f} MB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", nargs="+", default=["stdlib:"])
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as folder:
        for tokenizer in TOKENIZERS:
            cfg = PrepareConfig(inputs=tuple(arguments.inputs), tokenizer=tokenizer)
            measure(cfg, arguments.workers, Path(folder))


if __name__ == "__main__":
    main()
