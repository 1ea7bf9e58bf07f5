"""Secrets do not leave the machine: what looks like one is left out of every record."""

import os
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "<redacted>"


# Counted tokens and the key under which a text lies are settings. Of the environment, which is not ours, all is hidden.
_SECRET_WORDS = r"(?:token(?!s\b|i[sz])|(?<!text[_-])key|secret|passw|credential)"
_SECRET_NAME = re.compile(_SECRET_WORDS, re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"token(?!i[sz])|key|secret|passw|credential", re.IGNORECASE)
_SECRET_FLAG = re.compile(rf"(-[\w.\-]*{_SECRET_WORDS}[\w.\-]*[= ])(\S+)", re.IGNORECASE)


def redact(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without secrets, for everything that leaves the process.

    Hidden are text under a name with token, key, secret, password or credential in it (numbers there are no secrets,
    nor is what our own settings hold: `tokens`, `text_key`, `tokenizer`), command-line flags of such names, and the
    value of any environment variable so named wherever it occurs.
    """
    known = [value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name) and len(value) >= 8]

    def clean(value: Any, secret: bool) -> Any:
        if isinstance(value, Mapping):
            return {name: clean(child, secret or bool(_SECRET_NAME.search(str(name)))) for name, child in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(child, secret) for child in value]
        if not isinstance(value, (str, bytes)):
            return value
        if secret or isinstance(value, bytes):
            return REDACTED
        for text in known:
            value = value.replace(text, REDACTED)
        return _SECRET_FLAG.sub(rf"\g<1>{REDACTED}", value)

    return clean(values, secret=False)
