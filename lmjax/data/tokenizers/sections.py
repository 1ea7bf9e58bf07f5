"""Long texts cut where a tokenizer would cut them anyway, so that memory stays small however long a document is."""

import re
from collections.abc import Iterator

SECTION_CHARS = 1 << 14  # long enough for the cuts not to matter, short enough to stay in the cache

# No token of the tokenizers cut here holds a newline followed by a word, nor a word followed by a space.
_LINE_END = re.compile(r"\n(?=\S)")  # searched by its first character, which is fast
_WORD_END = re.compile(r"(?<=\S)(?= \S)")


def sections(text: str, limit: int = SECTION_CHARS) -> Iterator[str]:
    """`text` in consecutive parts of `limit` to `2 * limit` characters (the last may be shorter).

    A cut is made before the first line that begins after `limit` characters, else between two words, else anywhere.
    """
    start = 0
    while len(text) - start > 2 * limit:
        low, high = start + limit, start + 2 * limit
        cut = _LINE_END.search(text, low - 1, high) or _WORD_END.search(text, low, high)
        end = cut.end() if cut else high
        yield text[start:end]
        start = end
    yield text[start:] if start else text
