"""How near texts are to references that people wrote: BLEU, chrF, ROUGE and METEOR, by the libraries that define them.

The numbers are those that the libraries' own command lines print. They compare with others only where the signatures,
which say what was counted, are the same.
"""

import functools
import importlib.metadata
import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmjax.errors import ConfigError
from lmjax.evaluate.statistics import Estimate

_PACKAGES = {"sacrebleu": "sacrebleu", "rouge_score": "rouge-score", "nltk": "nltk"}
_RESAMPLES = 1000  # of texts, for the intervals: sacrebleu's own number, with its own seed


def check() -> None:
    """Raise ConfigError where a package is missing."""
    for module, package in _PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"{package}, by which texts are judged, is missing: install lmjax[eval]")


def of_each(text: str, references: Sequence[str]) -> dict[str, float]:
    """Of one text beside the reference that is nearest to it, from 0 to 1.

    rouge1, rouge2, rougeL  F1 of common words, of pairs of words, of the longest common subsequence (Lin 2004)
    meteor                  of aligned words, stems and synonyms, as nltk has it (Lavie and Agarwal 2007); left out
                            where WordNet's data are not installed
    """
    found = {name: float(score.fmeasure) for name, score in _rouge().score_multi(references, text).items()}
    if has_wordnet():
        from nltk.translate.meteor_score import meteor_score

        found["meteor"] = float(meteor_score([one.split() for one in references], text.split()))
    return found


def of_all(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, tuple[Estimate, str]]:
    """Of all texts together, from 0 to 100: BLEU (Papineni et al. 2002) and chrF (Popović 2015), with their signatures.

    As sacrebleu has them (Post 2018, arXiv:1804.08771), each text with any number of references. Standard errors and
    intervals are those of its 1000 resamples of the texts.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    most = max(map(len, references))
    columns = [[one[k] if k < len(one) else None for one in references] for k in range(most)]
    found = {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        value = float(metric.corpus_score(texts, columns).score)
        found[name] = Estimate(value, *_resampled(metric, texts, columns), len(texts)), str(metric.get_signature())
    return found


def _resampled(metric: Any, texts: Sequence[str], columns: Any) -> tuple[float, float, float]:
    """(standard error, the ends of the 95% interval): what `corpus_score(n_bootstrap=1000)` of sacrebleu 2.6 does, but
    that it fails where resamples without a common word mix Python's numbers with numpy's."""
    from sacrebleu.significance import _bootstrap_resample

    if len(texts) == 1:
        return math.nan, math.nan, math.nan
    _, scores = _bootstrap_resample(metric._extract_corpus_statistics(texts, columns), metric, _RESAMPLES)
    ordered = sorted(float(one.score) for one in scores)
    cut = _RESAMPLES // 40
    return float(np.std(ordered)), ordered[cut], ordered[-cut - 1]


def signatures() -> dict[str, str]:
    """What `of_each` counted, by names that its numbers begin with."""
    found = {"rouge": f"f-measure|stemmer:no|best reference|version:{importlib.metadata.version('rouge-score')}"}
    meteor = f"stemmer:porter|tok:white space|nltk version:{importlib.metadata.version('nltk')}"
    left_out = "left out, since nltk finds no WordNet: python -m nltk.downloader wordnet"
    return found | {"meteor": meteor if has_wordnet() else left_out}


@functools.cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"])


@functools.cache
def has_wordnet() -> bool:
    """Whether nltk finds WordNet's data."""
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except (LookupError, OSError):
        return False
    return True
