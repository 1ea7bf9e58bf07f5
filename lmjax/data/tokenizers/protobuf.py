"""What a protocol buffer says, without the code that is generated from its schema: that works with few versions of the
protobuf library, and once in a process."""

from collections.abc import Iterator

_VARINT, _DELIMITED = 0, 2
_FIXED = {1: 8, 5: 4}  # wire types of so many bytes


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a message, in order; the value of a number that is no varint is its bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire_type == _DELIMITED:
            size, at = _varint(message, at)
        else:
            size = _FIXED[wire_type]
        yield number, message[at : at + size]
        at += size


def submessages(message: bytes, *numbers: int) -> list[dict[int, int | bytes]]:
    """The fields of the messages in these fields of a message; of what is said twice the last counts."""
    found: dict[int, dict[int, int | bytes]] = {number: {} for number in numbers}
    for number, value in fields(message):
        if number in found and isinstance(value, bytes):
            found[number] |= dict(fields(value))
    return [*found.values()]


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The integer that begins there, and where the next field begins."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
