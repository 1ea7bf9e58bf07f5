"""Secrets do not leave the machine: what looks like one is left out of every record, message and traceback."""

import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

REDACTED = "<redacted>"


# Counted tokens and the key under which a text lies are settings. Of the environment, which is not ours, all is hidden.
_SECRET_WORDS = r"(?:token(?!s\b|i[sz])|(?<!text[_-])key|secret|passw|credential)"
_SECRET_NAME = re.compile(_SECRET_WORDS, re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"token(?!i[sz])|key|secret|passw|credential", re.IGNORECASE)
_SECRET_FLAG = re.compile(rf"(-[\w.\-]*{_SECRET_WORDS}[\w.\-]*[= ])([^\s'\";]+)", re.IGNORECASE)
# A flag whose value is hidden wherever else it stands: a part of its name is the word, not a piece of one.
_SECRET_PART = re.compile(rf"-.*?(?:^|[._-]){_SECRET_WORDS}(?:s|word|phrase)?(?:[._-]|$)", re.IGNORECASE)
# The forms in which Hugging Face, OpenAI and Anthropic, GitHub, GitLab, AWS, Google and Slack give theirs; a wandb key
# is 40 hexadecimal digits, as a git commit is, and only its name tells it.
_SECRET_FORM = re.compile(
    r"\b(?:hf_\w{16,}|sk-[\w-]{16,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|(?:AKIA|ASIA)[A-Z0-9]{16}"
    r"|AIza[\w-]{30,}|ya29\.[\w-]{20,}|xox[abprs]-[\w-]{10,})|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)


def redact(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without secrets, for everything that leaves the process.

    Hidden are text under a name with token, key, secret, password or credential in it (numbers there are no secrets,
    nor is what our own settings hold: `tokens`, `text_key`, `tokenizer`), and all that `hide` hides.
    """
    return _clean(values, _known(), names=True)


def hide(value: Any) -> Any:
    """A text, or a tree of them, without secrets: command-line flags whose names say so, and wherever they occur their
    values, those of environment variables so named, and what has the form in which well-known services give theirs."""
    return _clean(value, _known(), names=False)


def _clean(value: Any, known: Iterable[str], *, names: bool, secret: bool = False) -> Any:
    if isinstance(value, Mapping):
        return {
            name: _clean(child, known, names=names, secret=secret or (names and bool(_SECRET_NAME.search(str(name)))))
            for name, child in value.items()
        }
    if isinstance(value, (list, tuple)):
        return type(value)(_clean(child, known, names=names, secret=secret) for child in value)
    if not isinstance(value, (str, bytes)):
        return value
    if secret or isinstance(value, bytes):
        return REDACTED
    for text in known:
        value = value.replace(text, REDACTED)
    return _SECRET_FORM.sub(REDACTED, _SECRET_FLAG.sub(rf"\g<1>{REDACTED}", value))


def _known() -> list[str]:
    """The secrets that this process was given, the longest first: one may be a part of another."""
    values = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name) and len(value) >= 8}
    return sorted(values | set(_given(sys.argv[1:])), key=len, reverse=True)


def _given(words: list[str]) -> Iterator[str]:
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        name, equals, value = word.partition("=")
        if _SECRET_PART.match(name):
            value = value if equals else following
            if len(value) >= 6 and not value.startswith("-"):
                yield value
