"""Which documents are for validation: drawn before anything is learned from the corpus."""

import hashlib
from collections.abc import Callable

from lmjax.data.curate.document import Changed, Document, Outcome
from lmjax.data.curate.step import Arrays, DocumentStep
from lmjax.schema import Fraction, Seed, config_class


@config_class
class HeldOut(DocumentStep):
    """Draw documents for validation, by a hash of their text: equal documents fall to the same side, and no document's
    side depends on another."""

    fraction: Fraction = 0.01
    """Of the documents of each source."""
    sources: tuple[str, ...] = ()
    """Sources that are for validation as a whole."""
    seed: Seed = 0

    def start(self, arrays: Arrays) -> Callable[[Document], Outcome]:
        def draw(document: Document) -> Outcome:
            key = f"{self.seed} {document.text}".encode()
            drawn = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big") / 2**56
            held = document.source in self.sources or drawn < self.fraction
            split = "valid" if held else "train"
            return Changed(document.labelled(split=split), found=(split,))

        return draw
