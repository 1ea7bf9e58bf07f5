"""Steps beside datatrove's: do the rules of quality decide alike, and how fast is each: tables of docs/curation.md.

    python -m analysis.bench.curation_peer DATA        (needs datatrove, spacy and nltk)

The texts are passages of books, half of them made worse by more or less, with straight quotation marks, which datatrove
alone knows. Both have the thresholds of the papers, and words are what white space separates, as there; datatrove's own
words, of spaCy, are cut at punctuation. Speed is in CPU time of one process, datatrove's with white space, too. Of
near duplicates it is that of signatures, 21 bands of 6 in both, ours with the set of runs by which pairs are compared.
"""

import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datatrove.data import Document as Peer
from datatrove.pipeline import filters, formatters
from datatrove.pipeline.dedup import MinhashConfig, MinhashDedupSignature
from datatrove.pipeline.filters import gopher_quality_filter, gopher_repetition_filter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from analysis.bench import dirt
from lmjax.data.curate.document import Document, Dropped
from lmjax.data.curate.near_duplicates import NearDuplicates
from lmjax.data.curate.recipe import parse_step
from lmjax.data.curate.step import DocumentStep

TEXTS = 1000
STRAIGHT = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'"})
MARKS = (".", "!", "?", '"', "'")


def peers() -> Iterator[tuple[str, Any]]:
    """datatrove's filters by the names of our steps."""
    gopher_quality_filter.split_into_words = gopher_repetition_filter.split_into_words = _words
    yield "gopher", filters.GopherQualityFilter()
    yield "repetition", filters.GopherRepetitionFilter()
    yield "c4", filters.C4QualityFilter(min_num_sentences=3, min_words_per_line=5)
    yield "fineweb", filters.FineWebQualityFilter(char_duplicates_ratio=0.1, new_line_ratio=1e9, stop_chars=MARKS)


def _words(text: str, language: str) -> list[str]:
    return text.split()


def ours(name: str) -> Callable[[str], bool]:
    """Whether our step drops a text."""
    _, step = parse_step(0, {"step": name})
    assert isinstance(step, DocumentStep)
    function = step.start({})
    return lambda text: isinstance(function(Document(text, "", "")), Dropped)


def by(peer: Any) -> Callable[[str], bool]:
    """Whether datatrove's filter drops a text."""
    return lambda text: peer.filter(Peer(text=text, id="")) is not True


class Words(WordTokenizer):
    """What white space separates."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        raise NotImplementedError


def workers() -> Iterator[tuple[str, Callable[[str], Any], Callable[[str], Any]]]:
    """(name, our step, datatrove's) as functions of a text, of what is no decision."""
    for name, peer in (("repair", formatters.FTFYFormatter()), ("privacy", formatters.PIIFormatter())):
        _, step = parse_step(0, {"step": name})
        assert isinstance(step, DocumentStep)
        yield name, on_text(step.start({})), peer.format
    config = MinhashConfig(num_buckets=21, hashes_per_bucket=6, hash_config=HashConfig(hash_fc="sha1"))
    sign = MinhashDedupSignature("signatures", config, language=Words())
    yield "near_duplicates", on_text(NearDuplicates().keys()), lambda text: sign.get_signature(sign.get_shingles(text))


def on_text(function: Callable[[Document], Any]) -> Callable[[str], Any]:
    return lambda text: function(Document(text, "", ""))


def timed(work: Callable[[str], Any], texts: Sequence[str]) -> tuple[list[Any], float]:
    """What becomes of the texts, and texts per second."""
    work(texts[0])
    began = time.process_time()
    made = [work(text) for text in texts]
    return made, len(texts) / (time.process_time() - began)


def main() -> None:
    rng = random.Random(0)
    books = dirt.passages(Path(sys.argv[1]) / "gutenberg" / "train-00000-of-00010.jsonl.gz", TEXTS, rng)
    half = len(books) // 2
    worse = [dirt.borderline(text, rng) for text in books[half:]]
    texts = [text.translate(STRAIGHT) for text in (*books[:half], *worse)]
    print("| step | dropped | by datatrove | alike | documents/s | datatrove's |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, peer in peers():
        mine, speed = timed(ours(name), texts)
        theirs, peer_speed = timed(by(peer), texts)
        alike = sum(a == b for a, b in zip(mine, theirs, strict=True)) / len(texts)
        speeds = f"{speed:,.0f} | {peer_speed:,.0f}"
        print(f"| `{name}` | {sum(mine)} | {sum(theirs)} | {alike:.1%} | {speeds} |", flush=True)
    for name, own, other in workers():
        print(f"| `{name}` | | | | {timed(own, texts)[1]:,.0f} | {timed(other, texts)[1]:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
