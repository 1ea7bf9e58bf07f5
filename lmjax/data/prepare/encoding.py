"""Documents to token ids in parallel processes.

A worker is a plain subprocess (`python -m lmjax.data.prepare.encoding TOKENIZER UNKNOWN CHAT`) that answers requests on
its standard input and ends with it. It starts quickly, whatever the caller's main module imports, and outlives nobody.
Requests go round robin and answers are awaited in that order, so the result does not depend on the number of workers.
"""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Literal, NamedTuple, cast

import numpy as np

from lmjax.data.chat.rendering import Renderer
from lmjax.data.chat.scoring import encode_conversation
from lmjax.data.chat.templates import load_template
from lmjax.data.config import ChatConfig
from lmjax.data.store.shards import ONE, token_dtype
from lmjax.data.tokenizers.load import load_tokenizer
from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.errors import DataError
from lmjax.record import buckets
from lmjax.schema import validated

Unknown = Literal["error", "replace", "skip"]
"""What becomes of a text that the tokenizer cannot represent: see `PrepareConfig.unknown`."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Some documents, encoded, each closed by endoftext."""

    tokens: np.ndarray
    """Documents end to end."""
    weights: np.ndarray
    """uint8 per token: how much it counts as one that a model is trained on to write, in hundredths."""
    n_tokens: np.ndarray
    """int64 per document, endoftext included."""
    n_bytes: np.ndarray
    """int64 per document, of its text in UTF-8, of a conversation of what is scored."""
    exact: np.ndarray
    """bool per document: it decodes to the text that was encoded. Nothing is said of conversations, whose symbols have
    no spelling."""
    unknown: np.ndarray
    """bool per document: the tokenizer cannot represent all of it. If it is left out for that, it has no token."""
    truncated: np.ndarray
    """bool per document: it was cut to the longest length."""


class One(NamedTuple):
    """One document, encoded: see Encoded."""

    tokens: np.ndarray
    weights: np.ndarray
    n_bytes: int
    exact: bool = True
    unknown: bool = False
    truncated: bool = False


Encode = Callable[[str], One]


class DocumentError(DataError):
    """A document that cannot be encoded."""

    def __init__(self, index: int, reason: str):
        super().__init__(reason)
        self.index = index


def encode_documents(encode: Encode, texts: Sequence[str]) -> Encoded:
    """Encode the texts. Raises DocumentError, naming a text by its index, for one that `encode` refuses."""
    encoded = []
    for index, text in enumerate(texts):
        try:
            encoded.append(encode(text))
        except DataError as error:
            raise DocumentError(index, str(error)) from error
    tokens, weights, n_bytes, exact, unknown, truncated = zip(*encoded, strict=True)
    return Encoded(
        tokens=np.concatenate(tokens),
        weights=np.concatenate(weights),
        n_tokens=np.array([len(document) for document in tokens], np.int64),
        n_bytes=np.array(n_bytes, np.int64),
        exact=np.array(exact, bool),
        unknown=np.array(unknown, bool),
        truncated=np.array(truncated, bool),
    )


@contextlib.contextmanager
def encoder(directory: os.PathLike[str] | str, unknown: Unknown, chat: ChatConfig | None) -> Iterator[Encode]:
    """What encodes documents by the tokenizer saved in `directory`: texts, or conversations as the config has them."""
    tokenizer = load_tokenizer(directory)
    if chat is None:
        yield functools.partial(encode_text, tokenizer, unknown)
        return
    with Renderer(load_template(directory), clock=False) as renderer:
        yield functools.partial(_encode_conversation, tokenizer, renderer, chat)


def encode_text(tokenizer: Tokenizer, unknown: Unknown, text: str) -> One:
    """A text whose tokens all count in full, checked by decoding it.

    Raises DataError for one that the tokenizer cannot represent, unless `unknown` says to replace what it does not
    know, or to skip the text.
    """
    tokenizer.replaces_unknown = unknown == "replace"
    n_bytes, dtype = len(text.encode("utf-8")), token_dtype(tokenizer.vocab_size)
    try:
        tokens, exact = tokenizer.tokens(text, dtype)
    except DataError:
        if unknown != "skip":
            raise
        return One(np.zeros(0, dtype), np.zeros(0, np.uint8), n_bytes, unknown=True)
    unknown_tokens = bool((tokens == tokenizer.unknown_id).any())
    return One(tokens, np.full(len(tokens), ONE, np.uint8), n_bytes, exact, unknown_tokens)


def _encode_conversation(tokenizer: Tokenizer, renderer: Renderer, chat: ChatConfig, line: str) -> One:
    found = encode_conversation(line, tokenizer, renderer, chat)
    tokens = np.array(found.tokens, token_dtype(tokenizer.vocab_size))
    return One(tokens, found.weights, found.n_bytes, truncated=found.truncated)


def encode_batches(
    directory: os.PathLike[str],
    batches: Iterator[list[str]],
    workers: int,
    unknown: Unknown,
    chat: ChatConfig | None = None,
) -> Iterator[Encoded]:
    """`encode_documents` of each batch, in order, by the `encoder` of the other arguments.

    One worker means this process. Raises DocumentError as soon as its batch is due, DataError if a worker dies.
    """
    if workers == 1:
        with encoder(directory, unknown, chat) as encode:
            for batch in batches:
                yield encode_documents(encode, batch)
        return
    pool: list[_Worker] = []
    try:
        first = 0  # the oldest request still unanswered
        for number, batch in enumerate(batches):
            if number < workers:
                pool.append(_Worker(directory, unknown, chat))
            else:
                yield pool[first % workers].receive()
                first += 1
            pool[number % workers].send(batch)
        for number in range(first, first + len(pool)):
            yield pool[number % workers].receive()
    finally:
        for worker in pool:
            worker.stop()


class _Worker:
    """A subprocess that encodes; one request at a time, so neither side ever waits on a full pipe."""

    def __init__(self, directory: os.PathLike[str], unknown: Unknown, chat: ChatConfig | None):
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "TOKENIZERS_PARALLELISM": "0",
        }
        settings = json.dumps(None if chat is None else dataclasses.asdict(chat))
        command = [sys.executable, "-m", "lmjax.data.prepare.encoding", os.fspath(directory), unknown, settings]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def send(self, texts: list[str]) -> None:
        assert self._process.stdin is not None
        try:
            _write_request(self._process.stdin, texts)
        except BrokenPipeError:
            raise self._died() from None

    def receive(self) -> Encoded:
        assert self._process.stdout is not None
        try:
            return _read_response(self._process.stdout)
        except EOFError:
            raise self._died() from None

    def _died(self) -> DataError:
        code = self._process.wait()
        return DataError(f"an encoding process died with exit code {code} (-9: out of memory?); run the command again")

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):  # an unsent rest of a request to a worker that died
                stream.close()


# The wire: a JSON line that gives the sizes, then the bytes -----------------------------------------------------------


def _write_request(stream: IO[bytes], texts: Sequence[str]) -> None:
    encoded = [text.encode("utf-8") for text in texts]
    _write_frame(stream, {"sizes": [len(text) for text in encoded]}, *encoded)


def _read_request(stream: IO[bytes]) -> list[str]:
    return [_read_exactly(stream, size).decode("utf-8") for size in _read_header(stream)["sizes"]]


def _write_response(stream: IO[bytes], result: Encoded) -> None:
    header = {"documents": len(result.n_tokens), "tokens": len(result.tokens), "dtype": result.tokens.dtype.name}
    arrays = (getattr(result, field.name) for field in dataclasses.fields(Encoded))
    _write_frame(stream, header, *(array.tobytes() for array in arrays))


def _read_response(stream: IO[bytes]) -> Encoded:
    header = _read_header(stream)
    if "error" in header:
        raise DocumentError(header["document"], header["error"])

    def array(count: int, dtype: str) -> np.ndarray:
        return np.frombuffer(_read_exactly(stream, count * np.dtype(dtype).itemsize), dtype)

    documents, tokens = header["documents"], header["tokens"]
    return Encoded(  # in the order in which they were sent
        tokens=array(tokens, header["dtype"]),
        weights=array(tokens, "uint8"),
        n_tokens=array(documents, "int64"),
        n_bytes=array(documents, "int64"),
        exact=array(documents, "bool"),
        unknown=array(documents, "bool"),
        truncated=array(documents, "bool"),
    )


def _write_frame(stream: IO[bytes], header: dict[str, object], *parts: bytes) -> None:
    stream.write(json.dumps(header).encode() + b"\n")
    for part in parts:
        stream.write(part)
    stream.flush()


def _read_header(stream: IO[bytes]) -> dict:
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    return json.loads(line)


def _read_exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError
    return data


def _serve(directory: str, unknown: Unknown, chat: ChatConfig | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, and it stops its workers
    buckets.register()
    with contextlib.suppress(EOFError, BrokenPipeError), encoder(directory, unknown, chat) as encode:
        while True:  # until the parent is gone
            texts = _read_request(sys.stdin.buffer)
            try:
                _write_response(sys.stdout.buffer, encode_documents(encode, texts))
            except DocumentError as error:
                _write_frame(sys.stdout.buffer, {"error": str(error), "document": error.index})


if __name__ == "__main__":
    given = json.loads(sys.argv[3])
    _serve(sys.argv[1], cast(Unknown, sys.argv[2]), None if given is None else validated(ChatConfig, given))
