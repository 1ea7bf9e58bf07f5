"""Texts written in a number of rows at once: as one ends, the next prompt takes its row."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.devices.place import use_mesh
from lmjax.errors import ConfigError, DataError
from lmjax.generate import rows
from lmjax.generate.config import GenerateConfig
from lmjax.generate.forward import Memory, functions
from lmjax.generate.rows import MOST_STEPS
from lmjax.generate.spread import Ready, auto_mesh, decoding_weights, row_pieces
from lmjax.models.front import places
from lmjax.models.model import Model
from lmjax.process import group
from lmjax.weights import Params, Spec, by_path


class Writer:
    """Continues prompts, a number of them at once: when a text ends, the next prompt takes its row."""

    def __init__(
        self,
        model: Model,
        params: Params | Ready,
        prompts: Sequence[Sequence[int]],
        cfg: GenerateConfig,
        *,
        endoftext: int,
        vocab: int,
        stops: Sequence[int] = (),
        numbers: Sequence[int] | None = None,
    ) -> None:
        """`numbers` name the texts' random draws (default: the places of their prompts).

        Raises DataError and ConfigError for prompts that the model's tables have no rows for.
        """
        check(model.spec, prompts, cfg.tokens, front=places(params))
        self._prompts = [list(prompt) or [endoftext] for prompt in prompts]
        self._parts, self._tokens = functions(model, vocab), np.int32(cfg.tokens)
        # Keys, stop tokens and lengths are data, and no part of a program.
        self._cfg = dataclasses.replace(cfg, seed=0, stop_at_endoftext=True, tokens=1, rows=1)
        self._stop_ids = stop_array(stops or (endoftext,), cfg)
        self._mesh = auto_mesh()
        self._params = decoding_weights(model, params, self._mesh, cfg.weights)
        self._waiting = collections.deque(range(len(prompts)))
        count = min(cfg.rows, 1 << (len(prompts) - 1).bit_length())
        self._held: list[int | None] = [None] * count
        """The text in each row."""
        self._together = min(count, row_pieces(self._mesh))
        """Prompts that are read at once while other rows are written: one for each group of devices."""
        self._chunk = 32 if jax.default_backend() == "cpu" else 256
        """Tokens of each prompt that are read at once."""
        self._written = [0] * len(prompts)
        self._length = _room(max(max(self._padded(len(ids)), len(ids) + cfg.tokens) for ids in self._prompts))
        with use_mesh(self._mesh):
            self._keys = row_keys(cfg.seed, range(len(prompts)) if numbers is None else numbers)
            self._rows = rows.empty_rows(self._parts, self._params, count, self._length, cfg=self._cfg)

    @property
    def is_writing(self) -> bool:
        """Whether any text has not ended yet."""
        return bool(self._waiting) or any(text is not None for text in self._held)

    def write(self, steps: int) -> list[tuple[int, list[int]]]:
        """Read prompts into all rows that are free, then write up to `steps` tokens in each row -> the new ids of each
        text, which is named by the number of its prompt. It returns early for the next prompt where one waits."""
        assert steps <= MOST_STEPS, steps
        with use_mesh(self._mesh):
            while self._waiting and None in self._held:
                self._admit()
            self._rows, found = rows.advance(
                self._parts,
                self._params,
                self._rows,
                self._stop_ids,
                self._tokens,
                np.int32(steps),
                np.bool_(bool(self._waiting)),
                cfg=self._cfg,
            )
            ids_BZ, count_B, done_B = map(np.asarray, group.wait_on_cpu(found))
        pieces = []
        for row, text in enumerate(self._held):
            if text is not None:
                first = min(self._written[text], 1)  # ids_BZ begins with the newest token of before
                pieces.append((text, ids_BZ[row, first : first + count_B[row] - self._written[text]].tolist()))
                self._written[text] = int(count_B[row])
                if done_B[row]:
                    self._held[row] = None
        return pieces

    def end(self, text: int) -> None:
        """Write no more of a text."""
        if text in self._held:
            row = self._held.index(text)
            with use_mesh(self._mesh):
                self._rows = group.wait_on_cpu(rows.end(self._rows, np.int32(row)))
            self._held[row] = None

    def _admit(self) -> None:
        """The next prompts take free rows: as many as there are rows, if all are free, else as many as there are groups
        of devices. More programs than these two would be faster at times, and would have to be compiled."""
        free, count = [row for row, text in enumerate(self._held) if text is None], len(self._held)
        together = count if len(free) == count else self._together
        texts = [self._waiting.popleft() for _ in range(min(together, len(free), len(self._waiting)))]
        source_B = np.full(len(self._held), -1, np.int32)
        for place, (row, text) in enumerate(zip(free, texts, strict=False)):
            self._held[row], source_B[row] = text, place
        prompts = [self._prompts[text] for text in texts]
        prompts += prompts[:1] * (together - len(prompts))  # which get no row
        seen_GV = None
        if self._cfg.repetition_penalty != 1:
            seen_GV = np.zeros((len(prompts), self._parts.vocab), bool)
            for row_V, ids in zip(seen_GV, prompts, strict=True):
                row_V[[index for index in ids if index < len(row_V)]] = True
        lengths_G = np.array([len(ids) for ids in prompts], np.int32)
        keys_G = self._keys[np.resize(texts, len(prompts))]
        logits_GV, memory = self._read(prompts)
        self._rows = group.wait_on_cpu(
            rows.admit(
                self._rows,
                source_B,
                memory,
                logits_GV,
                lengths_G,
                keys_G,
                seen_GV,
                self._stop_ids,
                self._tokens,
                cfg=self._cfg,
            )
        )

    def _read(self, prompts: Sequence[Sequence[int]]) -> tuple[jax.Array, Memory]:
        """Padding stands before a prompt: what comes after it would push its tokens out of a sliding window."""
        T = self._padded(max(map(len, prompts)))
        tokens_GT = np.zeros((len(prompts), T), np.int32)
        positions_GT = np.full((len(prompts), T), -1, np.int32)
        for place, ids in enumerate(prompts):
            tokens_GT[place, T - len(ids) :], positions_GT[place, T - len(ids) :] = ids, np.arange(len(ids))
        memory = rows.empty_memory(self._parts, self._params, len(prompts), self._length)
        for start in range(0, T, self._chunk):
            now = slice(start, start + self._chunk)
            logits_GV, memory = group.wait_on_cpu(
                rows.read(self._parts, self._params, memory, tokens_GT[:, now], positions_GT[:, now])
            )
        return logits_GV, memory

    def _padded(self, length: int) -> int:
        return -(-length // self._chunk) * self._chunk


def _room(tokens: int) -> int:
    """The length of memory for so many tokens: one of few, so that few programs are compiled, and none much too long,
    since attention takes its time for every column, filled or not."""
    return max(128, 1 << (tokens - 1).bit_length())


def row_keys(seed: int, numbers: Sequence[int]) -> jax.Array:
    """One key per row, by its number, such as its place among the prompts. `seed` has up to 64 bits."""
    high, low = divmod(seed, 1 << 32)
    key = jax.random.key(low)  # which takes 32 bits, and of more only the lowest
    if high:
        key = jax.random.fold_in(key, high)
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.asarray(numbers))


def stop_array(stops: Sequence[int], cfg: GenerateConfig) -> np.ndarray:
    return np.array(stops if cfg.stop_at_endoftext else [-1] * len(stops), np.int32)


# What fits -----------------------------------------------------------------------------------------------------------


def check(spec: Spec, prompts: Sequence[Sequence[int]], tokens: int, *, front: int = 0) -> None:
    """Learned positions end with their table, all others go on. `front` are places in front of every text.

    Raises DataError and ConfigError.
    """
    check_ids(spec, max(itertools.chain.from_iterable(prompts), default=0))
    for weight in by_path(spec).values():
        if weight.in_axes == ("context",):
            _check_positions(max(1, *map(len, prompts)), tokens, context=weight.shape[0], front=front)


def check_ids(spec: Spec, highest: int) -> None:
    """Raise DataError where the model's table of tokens has no row for an id: a tokenizer may have more."""
    for weight in by_path(spec).values():
        if weight.in_axes == ("vocab",) and highest >= weight.shape[0]:
            raise DataError(
                f"a prompt has token {highest}, and the model's table only {weight.shape[0]} rows; leave that "
                "symbol out, or use the tokenizer that the model was trained with"
            )


def _check_positions(prompt: int, tokens: int, *, context: int, front: int) -> None:
    """The last new token is not read again, so it needs no position."""
    taken = f", {front} of them in front of the prompt" if front else ""
    table, room = f"the position table: model.context={context}{taken}", context - front
    if prompt > room:
        raise ConfigError(f"a prompt of {prompt} tokens is longer than {table}; shorten it")
    if prompt + tokens - 1 > room:
        raise ConfigError(
            f"a prompt of {prompt} tokens and tokens={tokens} new ones are longer than {table}; ask for at most "
            f"{room - prompt + 1} tokens"
        )
