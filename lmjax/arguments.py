"""What the command line takes: a parser with our errors, and the kinds of values that flags have."""

import argparse
import math
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from lmjax.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ours: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


class Version(argparse.Action):
    """Print the version that is installed, and end. It is looked up when it is asked for: that takes a while."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import importlib.metadata

        print(f"{parser.prog} {importlib.metadata.version(parser.prog)}")
        parser.exit()


def step_range(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 2 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"'{text}' is not FIRST:LAST with 2 <= FIRST <= LAST")
    return int(first), int(last)


def count(text: str) -> int:
    """A number of things that arrays are made for."""
    if not (text.isdecimal() and 0 < int(text[:20]) <= 1 << 24):
        raise argparse.ArgumentTypeError(f"'{text[:40]}' is not an integer from 1 to {1 << 24}")
    return int(text)


def whole(text: str) -> int:
    """A number of samples."""
    if not (text.isdecimal() and int(text[:20]) < 1 << 40):
        raise argparse.ArgumentTypeError(f"'{text[:40]}' is not an integer from 0 on")
    return int(text)


def widths(text: str) -> tuple[int, ...]:
    """Two or more sizes, by commas; in their order."""
    found = tuple(sorted(set(map(count, text.split(",")))))
    if len(found) < 2:
        raise argparse.ArgumentTypeError(f"'{text[:40]}' is not two widths or more, as in 64,128,256")
    return found


def prefix_and_tokens(text: str) -> tuple[int, int]:
    """Two numbers of tokens, with a colon between them."""
    first, _, last = text.partition(":")
    return count(first), count(last)


def names(text: str) -> tuple[str, ...]:
    """One or more names, by commas."""
    found = tuple(text.split(","))
    if not all(found) or len({*found}) < len(found):
        raise argparse.ArgumentTypeError(f"'{text[:80]}' is not names by commas, each once")
    return found


def pin(text: str) -> tuple[str, str]:
    """(name of a file or nothing, its SHA-256)."""
    name, _, digest = text.rpartition("=")
    if not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
        raise argparse.ArgumentTypeError(f"'{text[:80]}' is not [FILE=] and 64 hexadecimal digits")
    return name, digest.lower()


def gigabytes(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 < size < math.inf:
        raise argparse.ArgumentTypeError(f"'{text[:40]}' is not a size above 0")
    return size


def classifier_file(text: str) -> str:
    if not text.endswith(".classifier"):
        raise argparse.ArgumentTypeError(f"'{text[:80]}' does not end in .classifier")
    return text


def path(text: str) -> str:
    """Not empty, which would mean the current directory."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("it is empty, or no path")
    return text
