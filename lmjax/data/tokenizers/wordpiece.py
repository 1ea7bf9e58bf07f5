"""WordPiece (Schuster and Nakajima, Japanese and Korean voice search, 2012), learned by the library tokenizers.

As in BERT (Devlin et al., arXiv:1810.04805, appendix A.2), a piece inside of a word begins with ##, and a word is cut
into the longest pieces from its beginning on. Unlike BERT's it is lossless: words are those of GPT-2, spelled in bytes,
so that nothing is unknown and white space is kept; and # is a piece of its own, so that no text is taken for the mark.
"""

from collections.abc import Iterable

from lmjax.data.config import TokenizerConfig
from lmjax.data.tokenizers.huggingface import HuggingFaceTokenizer, byte_of_character
from lmjax.data.tokenizers.pieces import VocabularyError
from lmjax.data.tokenizers.sections import sections
from lmjax.data.tokenizers.tokenizer import ENDOFTEXT, NO_TEXT
from lmjax.errors import DataError

INSIDE = "##"
UNKNOWN = "[UNK]"
_LONGEST_WORD = 64  # bytes: to find the longest piece of a longer one would take long


def train_wordpiece(cfg: TokenizerConfig, texts: Iterable[str]) -> HuggingFaceTokenizer:
    """A lossless tokenizer of `cfg.vocab` tokens: bytes, ## and bytes, and what joining the most valuable pairs gives.

    The same texts in the same order give the same bits. Raises VocabularyError if the texts cannot give so many tokens,
    DataError if they are not enough for the bytes, there is no text, or the library is not installed.
    """
    try:
        import tokenizers
        from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise DataError("tokenizer.kind=wordpiece needs an extra, install lmjax[data]") from error

    letters = sorted(byte_of_character())
    first = [ENDOFTEXT, UNKNOWN, *letters, *(INSIDE + letter for letter in letters if letter != "#")]
    if cfg.vocab < len(first):
        raise DataError(f"tokenizer.vocab={cfg.vocab} is too small for the bytes of wordpiece: at least {len(first)}")
    learner = tokenizers.Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    learner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("#", "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Split(Regex(f".{{{_LONGEST_WORD}}}"), "isolated"),
    ])  # fmt: skip
    # Given as special tokens, the bytes have their numbers before the first word is read, in whatever order that is.
    trainer = trainers.WordPieceTrainer(
        vocab_size=cfg.vocab, special_tokens=first, continuing_subword_prefix=INSIDE, show_progress=False
    )
    learner.train_from_iterator((part for text in texts for part in sections(text)), trainer)
    vocabulary = learner.get_vocab()
    if len(vocabulary) == len(first):
        raise DataError(NO_TEXT)
    if len(vocabulary) < cfg.vocab:
        raise VocabularyError(cfg.vocab, len(vocabulary))
    model = models.WordPiece(vocabulary, unk_token=UNKNOWN, continuing_subword_prefix=INSIDE)
    learned = tokenizers.Tokenizer(model)
    learned.pre_tokenizer = learner.pre_tokenizer
    learned.decoder = decoders.Sequence([decoders.Replace(Regex(f"^{INSIDE}"), ""), decoders.ByteLevel()])
    learned.add_special_tokens([ENDOFTEXT])
    return HuggingFaceTokenizer(learned.to_str().encode(), ENDOFTEXT)
