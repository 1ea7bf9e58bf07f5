"""The declared normalizations of text: none unless the recipe asks, and recorded in the manifest."""

import unicodedata
from typing import Literal

from lmjax.data.config import PrepareConfig

_FORMS: dict[str, Literal["NFC", "NFKC"]] = {"nfc": "NFC", "nfkc": "NFKC"}


def clean(text: str, cfg: PrepareConfig) -> str:
    """`text` in the recipe's newline convention and Unicode form."""
    if cfg.newlines == "unix":
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if cfg.normalize != "none":
        text = unicodedata.normalize(_FORMS[cfg.normalize], text)
    return text


def describe(cfg: PrepareConfig) -> dict[str, str]:
    """What `clean` does, for the manifest."""
    return {"unicode": cfg.normalize, "newlines": cfg.newlines, "invalid_utf8": cfg.invalid_utf8}
