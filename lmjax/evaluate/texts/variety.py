"""How much texts repeat themselves and each other. Words are what stands between white space."""

from collections.abc import Sequence

import numpy as np

_MOST_COMPARED = 200  # texts that are compared with each other: self-BLEU takes their number squared


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Every n words that follow each other."""
    words = text.split()
    return list(zip(*(words[k:] for k in range(n)), strict=False))


def distinct(texts: Sequence[str], n: int) -> float:
    """The share of different n-grams among those of all texts (Li et al. 2016, arXiv:1510.03055); 0 where there are
    none. It falls as texts grow in number and length: compare equal numbers of texts of one length."""
    found = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(found)) / max(1, len(found))


def repetition(text: str, n: int) -> float:
    """The share of a text's n-grams that it has written before: seq-rep-n of Welleck et al. 2019, arXiv:1908.04319; 0
    for a text of fewer words."""
    found = ngrams(text, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def self_bleu(texts: Sequence[str]) -> float:
    """The mean BLEU of each text with all others as its references, 0 to 100: high where all say the same (Zhu et al.
    2018, arXiv:1802.01886). Of many texts the first 200."""
    from sacrebleu.metrics.bleu import BLEU

    bleu, some = BLEU(effective_order=True), texts[:_MOST_COMPARED]
    others = ([other for k, other in enumerate(some) if k != place] for place in range(len(some)))
    return float(np.mean([bleu.sentence_score(text, of).score for text, of in zip(some, others, strict=True)]))
