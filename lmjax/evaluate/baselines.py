"""What a compressor makes of the validation text."""

import logging
from collections.abc import Mapping

from lmjax.data.store.dataset import Dataset
from lmjax.data.store.shards import TokenSplit
from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.errors import DataError
from lmjax.evaluate import compression

logger = logging.getLogger(__name__)


def check_compressible(datasets: Mapping[str, Dataset]) -> None:
    """Raises DataError now, rather than after training, for validation text that is too long for xz."""
    most = compression.LARGEST - _PRIMING_BYTES
    for name, dataset in datasets.items():
        valid = dataset.manifest.splits.get("valid")
        if valid is not None and valid.scored_tokens is None and valid.text_bytes > most:
            raise DataError(
                f"the validation text of data source '{name}' has {valid.text_bytes:,} bytes, more than the {most:,} "
                "that xz can be given; set train.compression_baseline=False"
            )


_PRIMING_BYTES = 1 << 27  # of training text that xz reads first: it takes 22 times as much memory


def compression_baselines(datasets: Mapping[str, Dataset], tokenizer: Tokenizer) -> dict[str, float]:
    """What xz makes of each validation set, alone and after reading the training text, in bits per byte.

    Of a long training text it reads the first 128 MiB. A set without validation text, or of
    conversations, whose bits per byte are of what is scored alone, is left out with a warning.
    """
    baselines = {}
    for name, dataset in datasets.items():
        if "valid" not in dataset.manifest.splits:
            logger.warning("train.compression_baseline is left out for %s, which has no validation text", name)
            continue
        if dataset.manifest.splits["valid"].scored_tokens is not None:
            logger.warning("train.compression_baseline is left out for %s, of which only a part is scored", name)
            continue
        train = split_text(dataset.split("train"), tokenizer, limit=_PRIMING_BYTES)
        valid = split_text(dataset.split("valid"), tokenizer)
        baselines[f"val_full/{name}/xz_bpb"] = compression.xz_bits_per_byte(valid)
        baselines[f"val_full/{name}/xz_primed_bpb"] = compression.primed_xz_bits_per_byte(train, valid)
    return baselines


def split_text(split: TokenSplit, tokenizer: Tokenizer, limit: int | None = None) -> bytes:
    """The text of a whole split, its documents end to end, or its first `limit` bytes."""
    text = bytearray()
    for ids in split.documents():
        text += tokenizer.decode_bytes(ids.tolist())
        if limit is not None and len(text) >= limit:
            break
    return bytes(text[:limit])
