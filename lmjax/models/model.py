"""What a model is to the rest of the code: a spec and pure functions, as an optax optimizer is a pair.

The names of arrays end with the letters of their axes, as in x_BTD; 1 is an axis of length one. Each letter has the
same meaning in all of lmjax:

    A  choices: pairs of a token and one of its experts, T X of a sequence, or those of all rows; last tokens of a row
    B  rows of a batch
    C  positions in a chunk of a row
    D  embed, the width of the residual stream
    E  experts
    F  mlp width
    G  query heads per kv head, N / K
    H  head dim
    I  inputs of a matrix
    J  blocks of rows that are multiplied together
    K  kv heads
    L  layers
    M  rows in a block
    N  query heads
    O  outputs of a matrix
    P  devices along one mesh axis
    Q  slots of all experts for one sequence
    R  rows of a matrix product, any leading axes flattened, or of a table of positions
    S  keys: positions that queries attend to
    T  positions of a row: tokens, and queries in attention
    U  T + 1: a row of data, whose inputs are all but the last token and whose targets are all but the first
    V  vocab
    W  hypotheses of a beam search
    X  chosen experts of a token
    Y  candidates of a beam search
    Z  tokens to generate
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import jax

from lmjax.devices.gather import gather
from lmjax.metrics import Metrics
from lmjax.weights import Params, Spec

Cache = Any


class Hidden(Protocol):
    def __call__(
        self,
        params: Params,
        tokens_BT: jax.Array,
        *,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        keys_B: jax.Array | None = None,
        scalars: Mapping[str, Any] | None = None,
        cache: Cache = None,
    ) -> tuple[jax.Array, Cache, Metrics]:
        """Tokens -> (the last layer's activations x_BTD, the cache with these tokens added, metrics of the layers).

        `keys_B`, one per sample, mean training; `scalars` then has the traced values of `Model.scalars`, and may have
        others.
        """


class Unembed(Protocol):
    def __call__(self, params: Params, x: jax.Array) -> jax.Array:
        """x[..., D] -> float32 logits[..., V]; `params` need to hold no more than `Model.head` gives."""


class AfterUpdate(Protocol):
    def __call__(self, params: Params, metrics: Metrics, hyper: Mapping[str, Any]) -> tuple[Params, Metrics]:
        """Params after an update, with metrics of its whole batch -> (params with buffers moved, metrics to show)."""


def unchanged(params: Params, metrics: Metrics, hyper: Mapping[str, Any]) -> tuple[Params, Metrics]:
    """What `after_update` is where there is nothing to do."""
    return params, metrics


class Model(NamedTuple):
    """`hidden` gives the last layer's activations; `unembed` turns some of them into logits.

    They are apart because logits of a whole batch are the largest array of a training step: they exist only for a
    chunk of positions inside a loss, or for the positions being sampled.
    """

    spec: Spec
    hidden: Hidden
    unembed: Unembed
    start: Callable[[jax.Array, Mapping[str, Any]], Params]
    """(key, scalars) -> initial values of every weight; `scalars` are the model's own, perhaps traced."""
    scalars: Mapping[str, float] = MappingProxyType({})
    """What a sweep may vary without another program: dropout rates, weights of auxiliary losses, initial spreads."""
    head: Callable[[Params], Params] = lambda params: {}
    """The weights that `unembed` reads, as arrays that are not gathered yet."""
    empty_cache: Callable[[Params, int, int], Cache] | None = None
    """(unstacked params, batch, length) -> a cache for decoding; None for a model that cannot decode step by step."""
    unstack: Callable[[Params], Params] = lambda params: params
    """Params as decoding wants them: one layer's weights apart from another's."""
    mixing_flops: Callable[..., int] | None = None
    """(T, *, causal) -> FLOPs between the activations of one row of T tokens, in one forward pass."""
    attends: Callable[..., str] | None = None
    """(params or their shapes, T, *, apart) -> by what it attends in training: models/attention/choice.py."""
    auxiliary: Mapping[str, str] = MappingProxyType({})
    """Metrics of `hidden` that are losses, with the name of the scalar that each is multiplied by in what is minimized.
    A metric's own weight is the number of tokens given that are not padding."""
    after_update: AfterUpdate = unchanged

    def logits(self, params: Params, tokens_BT: jax.Array, **inputs: Any) -> jax.Array:
        """float32 logits_BTV of the whole batch: for tests and small inputs."""
        return self.unembed(gather(self.head(params)), self.hidden(params, tokens_BT, **inputs)[0])
