"""What a strong general compressor makes of the same text: the number a language model has to beat.

`xz -9e`, with one difference: the dictionary covers the whole input, so that nothing said before is forgotten however
long the text is (-9e forgets after 64 MiB, and gives the same bytes up to there).
"""

import lzma
from concurrent.futures import ThreadPoolExecutor

from lmjax.errors import DataError

_SMALLEST, LARGEST = 1 << 12, 3 << 29  # dictionaries that the xz format allows, bytes


def xz_bits_per_byte(data: bytes) -> float:
    """Bits per byte of `data` alone. Raises DataError if it is empty."""
    _require(data)
    return 8 * _compressed_size(data) / len(data)


def primed_xz_bits_per_byte(train: bytes, data: bytes) -> float:
    """Bits per byte of `data` to a compressor that has read `train`: what it adds to the size of both together.

    Takes about 11 times the input's size in memory, twice, and two threads. Raises DataError if `data` is empty, or if
    both together are longer than the largest dictionary (1.5 GiB).
    """
    _require(data)
    if len(train) + len(data) > LARGEST:
        raise DataError(f"{len(train) + len(data)} bytes do not fit xz's dictionary ({LARGEST}); prime it with less")
    with ThreadPoolExecutor() as pool:  # lzma releases the interpreter's lock
        both, alone = pool.map(_compressed_size, [train + data, train])
    return 8 * (both - alone) / len(data)


def _require(data: bytes) -> None:
    if not data:
        raise DataError("there is no text to compress; is the validation split empty?")


def _compressed_size(data: bytes) -> int:
    dictionary = min(max(len(data), _SMALLEST), LARGEST)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}]
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, filters=filters))
