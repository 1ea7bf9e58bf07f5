"""What a model says of continuations given contexts: their log-likelihoods, or continuations of its own.

Requests are sorted by length and scored in batches of a few shapes, so programs are few and little is padding. Rows are
independent of each other and sums are taken on the host in float64, so a result depends neither on the batch size nor
on the requests beside it, but for the rounding of float32 products. Requests that differ in their last token alone, as
choices by a letter do, share a row.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np

from lmjax.data.batch import Batch
from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.devices.mesh import shards
from lmjax.devices.place import local_rows, on_host, shard_batch, use_mesh
from lmjax.devices.rows import axes
from lmjax.errors import ConfigError, DataError
from lmjax.evaluate.likelihood import token_scores
from lmjax.generate.config import GenerateConfig
from lmjax.generate.decode import before_stop, stop_tokens
from lmjax.generate.writer import Writer, check_ids
from lmjax.models.model import Model
from lmjax.process.group import wait_on_cpu
from lmjax.weights import Params

_CHUNK = 256  # positions of a row whose logits exist at a time
_LEAST = 16  # tokens of the shortest rows


class Scorer(NamedTuple):
    """A language model that answers requests, and how."""

    model: Model
    """Computing in float32: what every reported number is measured with."""
    params: Params
    tokenizer: Tokenizer
    context: int
    """Most tokens that it reads at once. Of a longer row the first ones are left out."""
    batch: int = 16
    """Rows at a time: changes speed, not results."""
    mesh: jax.sharding.Mesh | None = None
    on_batch: Callable[[], None] = lambda: None
    """Called as each batch begins; it may raise to leave off."""


class Request(NamedTuple):
    """A continuation and what comes before it, as token ids; neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]
    bytes: int
    """Of the continuation's text."""


class Likelihood(NamedTuple):
    """How probable a model finds a continuation."""

    logprob: float
    """The sum of log p over its tokens, nats."""
    greedy: bool
    """Whether each of its tokens is the most probable one, so that greedy decoding would write it; ties count."""
    tokens: int
    bytes: int
    unread: int = 0
    """Tokens of the context that did not fit into what the model reads."""


# Text to requests -------------------------------------------------------------------------------------------------


def read(tokenizer: Tokenizer, text: str) -> list[int]:
    """What a model reads before it goes on with `text`: its begin symbol, if it has one; endoftext for an empty one."""
    begin = [] if tokenizer.begin_id is None else [tokenizer.begin_id]
    return (begin + tokenizer.encode(text)) or [tokenizer.endoftext_id]


def request(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """Two texts, cut where the tokens of both together part from those of the context alone.

    That is the rule of EleutherAI's harness: spaces that end the context belong to the continuation, since tokens carry
    the space before a word. Where a token would span the cut, the continuation begins with that token.

    Raises DataError for a continuation without tokens, and what encoding does.
    """
    stripped = context.rstrip()
    both, alone = tokenizer.encode(context + continuation), tokenizer.encode(stripped) if stripped else []
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(both, alone, strict=False)))
    begin = [] if tokenizer.begin_id is None else [tokenizer.begin_id]
    if not continuation or shared == len(both):
        raise DataError(f"the continuation {continuation!r} of {context[-40:]!r} has no tokens; give it some text")
    return Request((begin + both[:shared]) or [tokenizer.endoftext_id], both[shared:], len(continuation.encode()))


def windows(tokenizer: Tokenizer, text: str, *, context: int, stride: int) -> list[Request]:
    """A whole text as requests that score each of its tokens once, in rows of at most `context` tokens.

    The first window reads the begin symbol (or endoftext) and scores `context` tokens; each later one scores the next
    `stride`, with as many before them as fit. A smaller stride leaves more context to each token and takes more rows;
    stride = context is what EleutherAI's harness does. The first request counts the bytes of the text.
    """
    begin_id = tokenizer.endoftext_id if tokenizer.begin_id is None else tokenizer.begin_id
    ids = tokenizer.encode(text)
    if not ids:
        raise DataError("an empty text has no token to score; leave it out")
    return _windows(Request([begin_id], ids, len(text.encode())), context, stride)


def _windows(one: Request, context: int, stride: int) -> list[Request]:
    """A request cut so that each part fits into `context` tokens; the first counts the bytes."""
    assert 0 < stride <= context, (stride, context)
    ids, begin = [*one.context, *one.continuation], len(one.context)
    ends = [*range(max(context + 1, begin + stride), len(ids), stride), len(ids)]
    starts, sizes = [begin, *ends[:-1]], [one.bytes, *itertools.repeat(0, len(ends) - 1)]
    reads = [ids[max(0, end - 1 - context) : start] for start, end in zip(starts[1:], ends[1:], strict=True)]
    return [
        Request(read, ids[start:end], size)
        for read, start, end, size in zip([one.context, *reads], starts, ends, sizes, strict=True)
    ]


# Likelihoods ------------------------------------------------------------------------------------------------------


def log_likelihoods(scorer: Scorer, requests: Sequence[Request]) -> list[Likelihood]:
    """How probable each continuation is, in the order of the requests. All processes call it together.

    One that is longer than what the model reads at once is scored by windows, each half of that beyond the one before.
    Raises what `check` does.
    """
    check(scorer, requests)
    longest, stride = scorer.context, -(-scorer.context // 2)
    return _by_parts(
        scorer, [_windows(one, longest, stride) if len(one.continuation) > longest else [one] for one in requests]
    )


def rolling(scorer: Scorer, texts: Sequence[str], *, stride: int) -> list[Likelihood]:
    """The likelihood of every text as a whole, by `windows` of what the model reads. Raises what `windows` does."""
    cut = [windows(scorer.tokenizer, text, context=scorer.context, stride=stride) for text in texts]
    check(scorer, [one for parts in cut for one in parts])
    return _by_parts(scorer, cut)


def check(scorer: Scorer, requests: Sequence[Request]) -> None:
    """Raise DataError for an id that the model does not know."""
    assert all(len(one.context) and len(one.continuation) for one in requests)
    check_ids(scorer.model.spec, max((max(*one.context, *one.continuation) for one in requests), default=0))


def _by_parts(scorer: Scorer, cut: Sequence[Sequence[Request]]) -> list[Likelihood]:
    """The likelihood of each list of parts as one."""
    scores = iter(_score(scorer, list(itertools.chain.from_iterable(cut))))
    return [_joined(list(itertools.islice(scores, len(parts)))) for parts in cut]


def _joined(parts: Sequence[Likelihood]) -> Likelihood:
    return Likelihood(
        logprob=math.fsum(part.logprob for part in parts),
        greedy=all(part.greedy for part in parts),
        tokens=sum(part.tokens for part in parts),
        bytes=sum(part.bytes for part in parts),
        unread=max(part.unread for part in parts),
    )


class _Row(NamedTuple):
    """Requests that differ in their last token alone, if at all."""

    places: list[int]
    ends: list[int]
    """Their last tokens, each once."""


def _score(scorer: Scorer, requests: Sequence[Request]) -> list[Likelihood]:
    """The likelihoods of continuations that the model reads at once."""
    model, found = scorer.model, dict[int, Likelihood]()
    score = functools.partial(_scores, hidden=model.hidden, unembed=model.unembed, head=model.head)
    rows = _rows(scorer, requests)
    most = max((len(row.ends) for row in rows), default=1)
    pending: tuple[list[_Row], Any] | None = None
    with use_mesh(scorer.mesh):
        for numbers, batch in _batches(scorer, [requests[row.places[0]] for row in rows]):
            scorer.on_batch()
            some = [rows[number] for number in numbers]
            dispatched = wait_on_cpu(score(scorer.params, _placed(scorer.mesh, batch), _ends(some, batch, most)))
            if pending is not None:  # read the batch before while the device works on this one
                found |= _collected(scorer, requests, *pending)
            pending = some, dispatched
        if pending is not None:
            found |= _collected(scorer, requests, *pending)
    return [found[place] for place in range(len(requests))]


def _rows(scorer: Scorer, requests: Sequence[Request]) -> list[_Row]:
    """Requests by rows. On a mesh, where devices may share the tokens of a row, each has its own."""
    rows: dict[Any, _Row] = {}
    for place, one in enumerate(requests):
        read = (tuple(one.context), tuple(one.continuation[:-1])) if scorer.mesh is None else place
        row = rows.setdefault(read, _Row([], []))
        row.places.append(place)
        if one.continuation[-1] not in row.ends:
            row.ends.append(one.continuation[-1])
    return list(rows.values())


def _ends(rows: Sequence[_Row], batch: Batch, most: int) -> np.ndarray | None:
    """The last tokens of every row, [B, A], filled up with some of them; none where no row has two."""
    if most == 1:
        return None
    ends_BA = np.zeros((len(batch.ids_B), most), np.int32)
    for number, row in enumerate(rows):
        ends_BA[number] = np.resize(row.ends, most)
    return ends_BA


def _placed(mesh: jax.sharding.Mesh | None, batch: Batch) -> Batch:
    size = len(batch.ids_B)
    rows = local_rows(mesh, size)
    return shard_batch(jax.tree.map(lambda x: x[rows], batch), mesh, size)


@flax.struct.dataclass
class _Scores:
    logprobs_BT: Any = axes("batch time")
    correct_BT: Any = axes("batch time")
    end_logprobs_BA: Any = axes("batch choice", default=None)
    end_correct_BA: Any = axes("batch choice", default=None)


@functools.partial(jax.jit, static_argnames=("hidden", "unembed", "head"))
def _scores(params: Params, batch: Batch, ends_BA: jax.Array | None, *, hidden, unembed, head) -> _Scores:
    scores = token_scores(params, batch, hidden=hidden, unembed=unembed, head=head, chunk=_CHUNK, ends_BA=ends_BA)
    return _Scores(*scores)


def _batches(scorer: Scorer, requests: Sequence[Request]) -> Iterator[tuple[list[int], Batch]]:
    """(which requests, their rows): the longest first, so that what does not fit into memory fails at once."""
    lengths = [min(len(one.context) + len(one.continuation) - 1, scorer.context) for one in requests]
    order = sorted(range(len(requests)), key=lambda place: -lengths[place])
    B = _up(scorer.batch, shards("batch"))
    unit = math.lcm(shards("residual_time"), 2 * shards("time") if shards("time") > 1 else 1)
    for low in range(0, len(order), B):
        places = order[low : low + B]
        T = _up(min(_bucket(lengths[places[0]]), scorer.context), unit)
        tokens_BT, targets_BT, weights_BT = (np.zeros((B, T), kind) for kind in (np.int32, np.int32, np.float32))
        for row, place in enumerate(places):
            ids, length = [*requests[place].context, *requests[place].continuation], lengths[place]
            tokens_BT[row, :length], targets_BT[row, :length] = ids[-length - 1 : -1], ids[-length:]
            weights_BT[row, length - len(requests[place].continuation) : length] = 1
        yield places, Batch(tokens_BT, targets_BT, weights_BT, np.arange(B, dtype=np.int32))


def _collected(
    scorer: Scorer, requests: Sequence[Request], rows: Sequence[_Row], scores: _Scores
) -> dict[int, Likelihood]:
    fetched, found = on_host(scorer.mesh, scores), {}
    for number, row in enumerate(rows):
        for place in row.places:
            one = requests[place]
            total = len(one.context) + len(one.continuation) - 1
            end = min(total, scorer.context)
            scored = slice(end - len(one.continuation), end)
            logprobs, correct = fetched.logprobs_BT[number, scored], fetched.correct_BT[number, scored]
            if fetched.end_logprobs_BA is not None:
                choice = row.ends.index(one.continuation[-1])
                logprobs = [*logprobs[:-1], fetched.end_logprobs_BA[number, choice]]
                correct = [*correct[:-1], fetched.end_correct_BA[number, choice]]
            found[place] = Likelihood(
                logprob=float(np.sum(logprobs, dtype=np.float64)),
                greedy=bool(np.all(correct)),
                tokens=len(one.continuation),
                bytes=one.bytes,
                unread=max(0, total - scorer.context),
            )
    return found


def _bucket(length: int) -> int:
    """The next power of two, or 1.5 times one: a few sizes, of which at most a third is padding."""
    power = max(_LEAST, 1 << (length - 1).bit_length())
    return power * 3 // 4 if length <= power * 3 // 4 and power > _LEAST else power


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


# Continuations ----------------------------------------------------------------------------------------------------


def continuations(
    scorer: Scorer,
    prompts: Sequence[str],
    cfg: GenerateConfig,
    *,
    stop: Sequence[str] = (),
    numbers: Sequence[int] | None = None,
) -> list[str]:
    """What the model writes after each prompt, up to the first of the `stop` strings, or to the end of its text.

    A prompt that leaves no room for `cfg.tokens` loses its beginning. `numbers` name the draws of each prompt (default:
    its place), so that what is sampled does not depend on the batch size. Raises what `room` does.
    """
    most, tokenizer = room(scorer, cfg), scorer.tokenizer
    ids: list[list[int]] = [[] for _ in prompts]
    texts = ["" for _ in prompts]
    with use_mesh(scorer.mesh):
        writer = Writer(
            scorer.model,
            scorer.params,
            [read(tokenizer, prompt)[-most:] for prompt in prompts],
            dataclasses.replace(cfg, rows=scorer.batch),
            endoftext=tokenizer.endoftext_id,
            vocab=tokenizer.vocab_size,
            stops=stop_tokens(tokenizer),
            numbers=numbers,
        )
        while writer.is_writing:
            scorer.on_batch()
            for place, new in writer.write(_PIECE):
                ids[place] += before_stop(new, stop_tokens(tokenizer) if cfg.stop_at_endoftext else ())
                spelled = _spelled(scorer, ids[place])
                texts[place] = until(spelled, stop)
                if texts[place] != spelled:
                    writer.end(place)
    return [text.removeprefix(_opening(scorer, prompt)) for text, prompt in zip(texts, prompts, strict=True)]


def room(scorer: Scorer, cfg: GenerateConfig) -> int:
    """Most tokens of a prompt. Raises ConfigError where the new ones leave none."""
    if cfg.tokens >= scorer.context:
        raise ConfigError(
            f"tokens={cfg.tokens} new ones leave no room for a prompt in the {scorer.context} tokens that the model "
            f"reads at once; ask for at most {scorer.context - 1}"
        )
    return scorer.context - cfg.tokens


_PIECE = 16  # tokens between looks for stop strings


def _spelled(scorer: Scorer, ids: Sequence[int]) -> str:
    return scorer.tokenizer.decode_bytes(ids).decode("utf-8", errors="replace")


def _opening(scorer: Scorer, prompt: str) -> str:
    """What decoding takes away from a text that nothing precedes."""
    return "" if prompt else scorer.tokenizer.prefix.decode()


def until(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the `stop` strings."""
    return text[: min((text.index(mark) for mark in stop if mark in text), default=len(text))]
