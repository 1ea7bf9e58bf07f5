"""Steps that mend text: what was decoded wrongly, HTML around it, and the many spellings of the same letters."""

import re
import unicodedata
from collections.abc import Callable
from typing import Literal

from lmjax.data.curate import packages
from lmjax.data.curate.document import Changed, Document, Dropped, Outcome
from lmjax.data.curate.step import Arrays, DocumentStep
from lmjax.schema import config_class


def replaced(document: Document, text: str, what: str) -> Outcome:
    """The document with another text, dropped where nothing is left of it."""
    if text == document.text:
        return document
    return Changed(document._replace(text=text), (what,)) if text.strip() else Dropped("nothing is left")


@config_class
class Extract(DocumentStep):
    """The main text of HTML pages, by trafilatura; documents that are not HTML go through as they are."""

    favor: Literal["balance", "precision", "recall"] = "balance"
    """What to do with passages that may be text or may be boilerplate."""
    tables: bool = True
    """Keep what stands in tables."""

    def start(self, arrays: Arrays) -> Callable[[Document], Outcome]:
        trafilatura = packages.load("trafilatura", "extract")
        options = {
            "favor_precision": self.favor == "precision",
            "favor_recall": self.favor == "recall",
            "include_tables": self.tables,
            "include_comments": False,
            "deduplicate": False,  # that would depend on the pages before
        }

        def extract(document: Document) -> Outcome:
            if not _HTML.search(document.text[:2000]):
                return document
            text = trafilatura.extract(document.text, **options)
            return replaced(document, text, "HTML") if text else Dropped("HTML without a main text")

        return extract


_HTML = re.compile(r"<(!doctype\s+html|html|head|body)\b", re.IGNORECASE)


@config_class
class Repair(DocumentStep):
    """Mojibake undone by ftfy (UTF-8 that somebody read as Latin-1 or Windows-1252), and nothing else."""

    def start(self, arrays: Arrays) -> Callable[[Document], Outcome]:
        ftfy = packages.load("ftfy", "repair")
        others = dict.fromkeys(
            (
                "remove_terminal_escapes",
                "fix_latin_ligatures",
                "fix_character_width",
                "uncurl_quotes",
                "fix_line_breaks",
                "fix_surrogates",
                "remove_control_chars",
                "unescape_html",
                "explain",
            ),
            False,
        )
        config = ftfy.TextFixerConfig(normalization=None, **others)
        return lambda document: replaced(document, ftfy.fix_text(document.text, config), "mojibake")


@config_class
class Normalize(DocumentStep):
    """One spelling of what reads the same."""

    unicode: Literal["none", "nfc", "nfkc"] = "nfc"
    """Unicode normalization form. NFC keeps what a reader sees, NFKC does not."""
    whitespace: bool = True
    """Line ends become LF, blanks at line ends go, and more than one empty line becomes one."""
    invisible: bool = True
    """Marks without width go: byte order marks, soft hyphens, zero width spaces. Joiners stay, which have a meaning in
    Persian and in the scripts of India."""
    persian: bool = False
    """Arabic yeh and kaf, as Arabic keyboards type them, become the Persian letters."""
    joiners: Literal["keep", "tidy", "space"] = "keep"
    """Of zero width non-joiners (ZWNJ): `tidy` takes away those that do nothing, beside a blank, another one or the
    document's end; `space` puts a blank in place of each."""

    def start(self, arrays: Arrays) -> Callable[[Document], Outcome]:
        def normalize(document: Document) -> Outcome:
            return replaced(document, self.apply(document.text), "spelling")

        return normalize

    def apply(self, text: str) -> str:
        """The text in its one spelling; to apply it again changes nothing."""
        if self.invisible:
            text = _INVISIBLE.sub("", text)
        if self.unicode != "none":
            text = unicodedata.normalize(_FORMS[self.unicode], text)
        if self.joiners != "keep":  # beside what is a blank now
            text = _IDLE.sub("", text) if self.joiners == "tidy" else text.replace(ZWNJ, " ")
        if self.persian:
            text = text.translate(_PERSIAN)
        if self.whitespace:
            text = _LINE_END.sub("\n", text)
            text = _TRAILING.sub("", text)
            text = re.sub(r"\n{3,}", "\n\n", text).strip("\n")
        return text


_FORMS: dict[str, Literal["NFC", "NFKC"]] = {"nfc": "NFC", "nfkc": "NFKC"}
_LINE_END = re.compile("\r\n?|[\x85\u2028\u2029]")
_TRAILING = re.compile(r"[^\S\n]+(?=\n|\Z)")
ZWNJ = "\u200c"
_IDLE = re.compile(f"(?<!\\S){ZWNJ}+|{ZWNJ}+(?=[\\s{ZWNJ}]|\\Z)")
_INVISIBLE = re.compile("[\ufeff\u00ad\u200b\u2060]")
_PERSIAN = str.maketrans({"\u064a": "\u06cc", "\u0649": "\u06cc", "\u0643": "\u06a9"})
