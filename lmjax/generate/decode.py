"""Text from prompts: prefill and decoding in one compiled program, or in pieces for a terminal.

Prompts are padded to a few lengths, so programs are few, and each is compiled once per model, number of rows and
setting. Rows are independent: a row's text is the same alone and beside any others.
"""

import codecs
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.devices.place import use_mesh, whole
from lmjax.errors import ConfigError, DataError
from lmjax.generate.beam import beam_search
from lmjax.generate.config import GenerateConfig
from lmjax.generate.forward import Functions, Memory, functions, prefill, step
from lmjax.generate.sampling import sample
from lmjax.generate.spread import auto_mesh, decoding_weights, replicate
from lmjax.models.model import Model
from lmjax.process import group
from lmjax.weights import Params, Spec, by_path


@dataclasses.dataclass(frozen=True)
class Generation:
    """What follows one prompt."""

    text: str
    ids: list[int]
    """New tokens, without the one that ended the text."""
    finished: bool
    """The model ended the text; otherwise `tokens` ran out."""


def generate(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    cfg: GenerateConfig,
) -> list[Generation]:
    """Continue every prompt: a text, or ids that are read as they are (a conversation, from hf/chat.py).

    A text is read after the tokenizer's `begin_id`, if it has one; an empty text starts a document. A row ends with one
    of the tokenizer's `stop_ids`, or endoftext where it has none. Under `jax.set_mesh` rows are spread over the
    devices (spread.py), and every process has all texts. Raises ConfigError when a prompt and its new tokens are longer
    than the model's table of positions.
    """
    stops = _stops(tokenizer)
    rows = generate_ids(
        model,
        params,
        [_read(prompt, tokenizer) for prompt in prompts],
        cfg,
        endoftext=tokenizer.endoftext_id,
        vocab=tokenizer.vocab_size,
        stops=stops,
    )

    def generation(prompt: str | Sequence[int], ids: list[int]) -> Generation:
        kept = _until(ids, stops if cfg.stop_at_endoftext else ())
        spelled = tokenizer.decode_bytes(kept)
        if _opens(prompt):
            spelled = spelled.removeprefix(tokenizer.prefix)
        return Generation(spelled.decode("utf-8", errors="replace"), kept, finished=len(kept) < len(ids))

    return [generation(prompt, ids) for prompt, ids in zip(prompts, rows, strict=True)]


def generate_ids(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    cfg: GenerateConfig,
    *,
    endoftext: int,
    vocab: int,
    stops: Sequence[int] = (),
) -> list[list[int]]:
    """`cfg.tokens` new ids for every prompt; those after the first of `stops` (default: endoftext) mean nothing if the
    config stops there."""
    if not prompts:
        return []
    tokens_BT, lengths_B = _pad(prompts, endoftext)
    _check(model.spec, tokens_BT, int(lengths_B.max()), cfg.tokens)
    stop_ids = _stop_array(stops or (endoftext,), cfg)
    parts, program, mesh = functions(model, vocab), _program(cfg), auto_mesh()
    params = decoding_weights(model, params, mesh)
    with use_mesh(mesh):
        if cfg.beams > 1:
            ids_BZ, _ = beam_search(parts, params, tokens_BT, lengths_B, stop_ids, cfg=program)
        else:
            keys_B = row_keys(cfg.seed, range(len(prompts)))
            ids_BZ = _decode(parts, params, tokens_BT, lengths_B, keys_B, stop_ids, cfg=program)
        return np.asarray(group.wait_on_cpu(ids_BZ)).tolist()


def stream(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    cfg: GenerateConfig,
    *,
    chunk: int = 8,
) -> Iterator[str]:
    """The text of `generate(..., [prompt], cfg)` in pieces: after the first token, then every `chunk` tokens.

    Raises ConfigError as `generate`, and for beam search, whose text is known only at the end.
    """
    chunks = stream_ids(model, params, tokenizer, [_read(prompt, tokenizer)], cfg, chunk=chunk)
    return _spell((ids for (ids,) in chunks), tokenizer, tokenizer.prefix if _opens(prompt) else b"")


def stream_ids(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    cfg: GenerateConfig,
    *,
    chunk: int,
    numbers: Sequence[int] | None = None,
) -> Iterator[list[list[int]]]:
    """The new ids of every prompt in pieces, as `generate` finds them: a row that has ended gets no more.

    `numbers` name the rows' random draws (default: their places), so that a row draws the same in any company. Raises
    what `stream` does, before anything is written.
    """
    assert chunk > 0, chunk
    if cfg.beams > 1:
        raise ConfigError(f"beam search (beams={cfg.beams}) cannot stream; set beams=1")
    tokens_BT, lengths_B = _pad(prompts, tokenizer.endoftext_id)
    _check(model.spec, tokens_BT, int(lengths_B.max()), cfg.tokens)
    mesh = auto_mesh()
    params = decoding_weights(model, params, mesh)
    with use_mesh(mesh):
        keys_B = row_keys(cfg.seed, range(len(prompts)) if numbers is None else numbers)
    return _stream_ids(model, params, mesh, tokenizer, (tokens_BT, lengths_B, keys_B), cfg, chunk)


def _stream_ids(
    model: Model,
    params: Params,
    mesh: jax.sharding.Mesh | None,
    tokenizer: Tokenizer,
    rows: tuple[np.ndarray, np.ndarray, jax.Array],
    cfg: GenerateConfig,
    chunk: int,
) -> Iterator[list[list[int]]]:
    parts, program = functions(model, tokenizer.vocab_size), _program(cfg)
    stops = _stops(tokenizer) if cfg.stop_at_endoftext else ()
    stop_ids = _stop_array(stops, cfg)
    with use_mesh(mesh):
        state = group.wait_on_cpu(_start(parts, params, *rows, stop_ids, cfg=program))
        ids_BZ = whole(mesh, state.token_B)[:, None]
    count, done = 1, [False] * len(ids_BZ)
    while True:
        kept = [[] if ended else _until(ids, stops) for ended, ids in zip(done, ids_BZ.tolist(), strict=True)]
        done = [ended or len(ids) < ids_BZ.shape[1] for ended, ids in zip(done, kept, strict=True)]
        yield kept
        if all(done) or count == cfg.tokens:
            return
        with use_mesh(mesh):  # and left before the caller goes on
            state, ids_BZ = group.wait_on_cpu(_advance(parts, params, state, stop_ids, cfg=program, tokens=chunk))
            ids_BZ = whole(mesh, ids_BZ)[:, : cfg.tokens - count]
        count += ids_BZ.shape[1]


def _spell(chunks: Iterable[list[int]], tokenizer: Tokenizer, prefix: bytes) -> Iterator[str]:
    """The text of the ids, piece by piece, without `prefix` in front."""
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span tokens
    for ids in chunks:
        if spelled := tokenizer.decode_bytes(ids):
            spelled, prefix = spelled.removeprefix(prefix), b""
        if piece := utf8.decode(spelled):
            yield piece
    if rest := utf8.decode(b"", final=True):
        yield rest


# Compiled ---------------------------------------------------------------------------------------------------------


@flax.struct.dataclass
class State:
    """Rows being written: the newest token of each is not in the memory yet."""

    memory: Memory
    token_B: jax.Array
    position_B: jax.Array
    """The position of the newest token."""
    count: jax.Array
    """New tokens so far."""
    done_B: jax.Array
    keys_B: jax.Array
    seen_BV: jax.Array | None
    """Tokens of each row's prompt and text, kept only for a repetition penalty."""


def start(
    model: Functions,
    params: Params,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    keys_B: jax.Array,
    stop_ids: jax.Array,
    cfg: GenerateConfig,
) -> State:
    """Read the prompts and choose each row's first token."""
    logits_BV, memory = prefill(model, params, tokens_BT, lengths_B, cfg.tokens)
    seen_BV = _seen(tokens_BT, lengths_B, logits_BV.shape[1]) if cfg.repetition_penalty != 1 else None
    zero, none_B = jnp.zeros((), jnp.int32), jnp.zeros(lengths_B.shape, bool)
    state = State(memory, lengths_B, lengths_B - 1, zero, none_B, keys_B, seen_BV)
    return _choose(state, logits_BV, stop_ids, cfg)


def advance(
    model: Functions, params: Params, state: State, stop_ids: jax.Array, cfg: GenerateConfig, tokens: int
) -> tuple[State, jax.Array]:
    """Up to `tokens` more tokens for every row, fewer once all are done -> (state, int32 [B, tokens])."""

    def unfinished(carry: tuple[State, jax.Array, jax.Array]) -> jax.Array:
        state, _, i = carry
        return (i < tokens) & ~jnp.all(state.done_B)

    def body(carry: tuple[State, jax.Array, jax.Array]) -> tuple[State, jax.Array, jax.Array]:
        state, ids_BZ, i = carry
        logits_BV, memory = step(model, params, state.memory, state.token_B, state.position_B)
        state = _choose(dataclasses.replace(state, memory=memory), logits_BV, stop_ids, cfg)
        return state, jax.lax.dynamic_update_slice(ids_BZ, state.token_B[:, None], (0, i)), i + 1

    ids_BZ = jnp.full((state.token_B.shape[0], tokens), stop_ids[0], jnp.int32)
    if tokens == 0:  # the loop's body would be traced, and no token fits into an empty array
        return state, ids_BZ
    state, ids_BZ, _ = jax.lax.while_loop(unfinished, body, (state, ids_BZ, jnp.zeros((), jnp.int32)))
    return state, ids_BZ


def _choose(state: State, logits_BV: jax.Array, stop_ids: jax.Array, cfg: GenerateConfig) -> State:
    """Choose the token that follows each row's newest one; done rows only repeat a stop token."""
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys_B, state.count)
    token_B = sample(logits_BV, keys_B, cfg, state.seen_BV).astype(jnp.int32)
    token_B = jnp.where(state.done_B, stop_ids[0], token_B)
    seen_BV = state.seen_BV
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
    return dataclasses.replace(
        state,
        token_B=token_B,
        position_B=state.position_B + 1,
        count=state.count + 1,
        done_B=state.done_B | jnp.isin(token_B, stop_ids),
        seen_BV=seen_BV,
    )


def _seen(tokens_BT: jax.Array, lengths_B: jax.Array, vocab: int) -> jax.Array:
    B, T = tokens_BT.shape
    ids_BT = jnp.where(jnp.arange(T) < lengths_B[:, None], tokens_BT, vocab)  # padding specs outside: mode="drop"
    return jnp.zeros((B, vocab), bool).at[jnp.arange(B)[:, None], ids_BT].set(True, mode="drop")


_start = jax.jit(start, static_argnums=0, static_argnames="cfg")
_advance = jax.jit(advance, static_argnums=0, static_argnames=("cfg", "tokens"), donate_argnums=2)


@functools.partial(jax.jit, static_argnums=0, static_argnames="cfg")
def _decode(
    model: Functions,
    params: Params,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    keys_B: jax.Array,
    stop_ids: jax.Array,
    *,
    cfg: GenerateConfig,
) -> jax.Array:
    """Prefill and all steps in one program -> int32 [B, cfg.tokens]."""
    state = start(model, params, tokens_BT, lengths_B, keys_B, stop_ids, cfg)
    first_B1 = state.token_B[:, None]
    _, rest = advance(model, params, state, stop_ids, cfg, cfg.tokens - 1)
    return replicate(jnp.concatenate([first_B1, rest], axis=1))


# On the host ------------------------------------------------------------------------------------------------------


def row_keys(seed: int, numbers: Sequence[int]) -> jax.Array:
    """One key per row, by its number, such as its place among the prompts. `seed` has up to 64 bits."""
    high, low = divmod(seed, 1 << 32)
    key = jax.random.key(low)  # which takes 32 bits, and of more only the lowest
    if high:
        key = jax.random.fold_in(key, high)
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.asarray(numbers))


def _program(cfg: GenerateConfig) -> GenerateConfig:
    """The config as far as it shapes the compiled program: keys and stop tokens are data."""
    return dataclasses.replace(cfg, seed=0, stop_at_endoftext=True)


def _read(prompt: str | Sequence[int], tokenizer: Tokenizer) -> Sequence[int]:
    """The ids that the model reads before it writes."""
    if not isinstance(prompt, str):
        return prompt
    begin = [] if tokenizer.begin_id is None else [tokenizer.begin_id]
    return begin + tokenizer.encode(prompt)


def _opens(prompt: str | Sequence[int]) -> bool:
    """What follows is a text of its own, not the rest of one: decoding takes away what encoding puts in front."""
    return not isinstance(prompt, str) or not prompt


def _stops(tokenizer: Tokenizer) -> tuple[int, ...]:
    return tokenizer.stop_ids or (tokenizer.endoftext_id,)


def _stop_array(stops: Sequence[int], cfg: GenerateConfig) -> np.ndarray:
    return np.array(stops if cfg.stop_at_endoftext else [-1], np.int32)


def _until(ids: list[int], stops: Sequence[int]) -> list[int]:
    """The ids before the first of `stops`."""
    return list(itertools.takewhile(lambda index: index not in stops, ids))


def _pad(prompts: Sequence[Sequence[int]], endoftext: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts padded at their ends to one of a few lengths, and their lengths; an empty one becomes endoftext."""
    rows = [list(prompt) or [endoftext] for prompt in prompts]
    lengths_B = np.array([len(row) for row in rows], np.int32)
    tokens_BT = np.zeros((len(rows), _bucket(int(lengths_B.max()))), np.int32)
    for row, ids in zip(tokens_BT, rows, strict=True):
        row[: len(ids)] = ids
    return tokens_BT, lengths_B


def _bucket(length: int) -> int:
    """The next power of two up to 64, the next multiple of 64 beyond."""
    return max(8, 1 << (length - 1).bit_length()) if length <= 64 else -(-length // 64) * 64


def _check(spec: Spec, tokens_BT: np.ndarray, prompt: int, tokens: int) -> None:
    """Learned positions end with their table, all others go on."""
    check_ids(spec, int(tokens_BT.max()))
    for weight in by_path(spec).values():
        if weight.in_axes == ("context",):
            _check_positions(prompt, tokens, context=weight.shape[0])


def check_ids(spec: Spec, highest: int) -> None:
    """Raise DataError where the model's table of tokens has no row for an id: a tokenizer may have more."""
    for weight in by_path(spec).values():
        if weight.in_axes == ("vocab",) and highest >= weight.shape[0]:
            raise DataError(
                f"a prompt has token {highest}, and the model's table only {weight.shape[0]} rows; leave that "
                "symbol out, or use the tokenizer that the model was trained with"
            )


def _check_positions(prompt: int, tokens: int, *, context: int) -> None:
    """The last new token is not read again, so it needs no position."""
    if prompt > context:
        raise ConfigError(
            f"a prompt of {prompt} tokens is longer than the position table: model.context={context}; shorten it"
        )
    if prompt + tokens - 1 > context:
        raise ConfigError(
            f"a prompt of {prompt} tokens and tokens={tokens} new ones are longer than the position table: "
            f"model.context={context}; ask for at most {context - prompt + 1} tokens"
        )
