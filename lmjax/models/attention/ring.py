"""Ring attention (Liu et al. 2023, arXiv:2310.01889): devices that share a row keep queries and hand keys round.

A device never holds the keys of more than two, and saves for the backward pass its queries, keys, values and output
alone, however long the row is; the backward pass hands the keys round again, and their gradients with them.

Tokens are in the zig-zag order of rows.time_order: device i of n holds an early chunk, i, and a late one, 2n - 1 - i.
Of another device's keys, all its queries see the early chunk if that device comes before it, and if not, its late
queries see both chunks. Either is half of all pairs, so no device waits for another.

Every array here has its tokens on axis 1.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.devices.gather import per_device
from lmjax.devices.mesh import SHARDING_RULES, partition_spec, shards
from lmjax.models.attention.scores import Mask, Score, by_head, scores, visible

(AXIS,) = SHARDING_RULES["time"]


class Settings(NamedTuple):
    """What is known when the program is traced."""

    window: int | None
    score: Score
    devices: int


class Tokens(NamedTuple):
    index_1T: jax.Array
    """Places in the row, int32."""
    segments_BT: jax.Array | None


class Keys(NamedTuple):
    k_BSKH: jax.Array
    v_BSKH: jax.Array
    tokens: Tokens


class Partial(NamedTuple):
    """Attention to the keys met so far; float32."""

    max_BTKG: jax.Array
    sum_BTKG: jax.Array
    """The sum of exp(score - max)."""
    y_BTKGH: jax.Array
    """The sum of exp(score - max) v."""


class Queries(NamedTuple):
    """What stays on a device; the last three are known in the backward pass."""

    q_BTNH: jax.Array
    tokens: Tokens
    dy_BTKGH: jax.Array | None = None
    logsumexp_BTKG: jax.Array | None = None
    """The logsumexp of all scores of a query."""
    dot_BTKG: jax.Array | None = None
    """dy . y"""


Visit = Callable[[Queries, Any, Keys, Any], tuple[Any, Any]]


def ring(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, score: Score) -> jax.Array:
    """Causal attention over rows that several devices may share -> [B, T, N, H], sharded as q is."""
    settings = Settings(mask.window, score, shards("time"))
    heads, kv_heads = (
        partition_spec(("batch", "time", "heads", None)),
        partition_spec(("batch", "time", "kv_heads", None)),
    )

    @jax.custom_vjp
    def local(*arrays: Any) -> jax.Array:
        return _forward(settings, *arrays)[0]

    local.defvjp(functools.partial(_forward, settings), functools.partial(_backward, settings))
    in_specs = (heads, kv_heads, kv_heads, partition_spec(("batch", "time")))
    return per_device(local, in_specs, heads)(q_BTNH, k_BSKH, v_BSKH, mask.segments_BT)


# Forward and backward ---------------------------------------------------------------------------------------------


def _forward(
    settings: Settings, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segments_BT: Any
) -> tuple[jax.Array, Any]:
    """Softmax over one device's keys after another's (Milakov & Gimelshein 2018, arXiv:1805.02867)."""

    def visit(queries: Queries, so_far: Partial, keys: Keys, _: None) -> tuple[Partial, None]:
        s_BTKGS = _scores(settings, queries, keys, queries.q_BTNH, keys.k_BSKH)
        max_BTKG = jnp.maximum(so_far.max_BTKG, jnp.max(s_BTKGS, axis=-1))
        p_BTKGS = jnp.exp(s_BTKGS - max_BTKG[..., None])
        shrink_BTKG = jnp.exp(so_far.max_BTKG - max_BTKG)
        y_BTKGH = jnp.einsum(
            "BTKGS,BSKH->BTKGH", p_BTKGS.astype(keys.v_BSKH.dtype), keys.v_BSKH, preferred_element_type=jnp.float32
        )
        return Partial(
            max_BTKG,
            so_far.sum_BTKG * shrink_BTKG + jnp.sum(p_BTKGS, axis=-1),
            so_far.y_BTKGH * shrink_BTKG[..., None] + y_BTKGH,
        ), None

    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    tokens = _tokens(settings, q_BTNH, segments_BT)
    lowest, zero = jnp.full((B, T, K, N // K), jnp.finfo(jnp.float32).min), jnp.zeros((B, T, K, N // K))
    nothing = Partial(lowest, zero, jnp.zeros((B, T, K, N // K, H)))
    seen, _ = _go_round(settings, visit, Queries(q_BTNH, tokens), nothing, Keys(k_BSKH, v_BSKH, tokens), None)
    y_BTKGH = seen.y_BTKGH / seen.sum_BTKG[..., None]
    logsumexp_BTKG = seen.max_BTKG + jnp.log(seen.sum_BTKG)
    y_BTNH = y_BTKGH.astype(v_BSKH.dtype).reshape(q_BTNH.shape)
    return y_BTNH, (q_BTNH, k_BSKH, v_BSKH, segments_BT, y_BTNH, logsumexp_BTKG)


def _backward(settings: Settings, saved: Any, dy_BTNH: jax.Array) -> tuple[Any, ...]:
    """With p = exp(score - logsumexp), the gradient of a score is p (dy . v - dy . y), and of v it is p dy.

    Both are gradients of the sum of p (dy . v - dy . y) with logsumexp, dy and dy . y held fixed.
    """
    q_BTNH, k_BSKH, v_BSKH, segments_BT, y_BTNH, logsumexp_BTKG = saved

    def visit(queries: Queries, dq_BTNH: jax.Array, keys: Keys, dkeys: Any) -> tuple[jax.Array, Any]:
        def total(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
            s_BTKGS = _scores(settings, queries, keys, q_BTNH, k_BSKH)
            dp_BTKGS = jnp.einsum("BTKGH,BSKH->BTKGS", queries.dy_BTKGH, v_BSKH, preferred_element_type=jnp.float32)
            assert queries.logsumexp_BTKG is not None and queries.dot_BTKG is not None
            p_BTKGS = jnp.exp(s_BTKGS - queries.logsumexp_BTKG[..., None])
            return jnp.sum(p_BTKGS * (dp_BTKGS - queries.dot_BTKG[..., None]))

        dq, *dkv = jax.grad(total, argnums=(0, 1, 2))(queries.q_BTNH, keys.k_BSKH, keys.v_BSKH)
        return jax.tree.map(jnp.add, (dq_BTNH, dkeys), (dq, tuple(dkv)))

    dy_BTKGH = dy_BTNH.reshape(*logsumexp_BTKG.shape, -1)
    y_BTKGH = y_BTNH.reshape(dy_BTKGH.shape)
    dot_BTKG = jnp.einsum("BTKGH,BTKGH->BTKG", dy_BTKGH, y_BTKGH, preferred_element_type=jnp.float32)
    tokens = _tokens(settings, q_BTNH, segments_BT)
    queries, keys = Queries(q_BTNH, tokens, dy_BTKGH, logsumexp_BTKG, dot_BTKG), Keys(k_BSKH, v_BSKH, tokens)
    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (q_BTNH, k_BSKH, v_BSKH)]
    dq, (dk, dv) = _go_round(settings, visit, queries, zeros[0], keys, tuple(zeros[1:]))
    return dq.astype(q_BTNH.dtype), dk.astype(k_BSKH.dtype), dv.astype(v_BSKH.dtype), None


def _tokens(settings: Settings, q_BTNH: jax.Array, segments_BT: jax.Array | None) -> Tokens:
    """The tokens of this device."""
    T = q_BTNH.shape[1]
    if settings.devices == 1:
        return Tokens(jnp.arange(T)[None], segments_BT)
    me, chunk = jax.lax.axis_index(AXIS), jnp.arange(T // 2)
    late = 2 * settings.devices - 1 - me
    return Tokens(jnp.concatenate([me * (T // 2) + chunk, late * (T // 2) + chunk])[None], segments_BT)


def _scores(settings: Settings, queries: Queries, keys: Keys, q_BTNH: jax.Array, k_BSKH: jax.Array) -> jax.Array:
    by_heads = by_head(q_BTNH, k_BSKH, settings.score.scale)
    s_BNTS = scores(*by_heads, _mask(settings, queries, keys), settings.score)
    B, T, N, K = *q_BTNH.shape[:3], k_BSKH.shape[2]
    return s_BNTS.swapaxes(1, 2).reshape(B, T, K, N // K, -1)


def _mask(settings: Settings, queries: Queries, keys: Keys) -> Mask:
    mine, theirs = queries.tokens, keys.tokens
    return Mask(settings.window, mine.segments_BT, mine.index_1T, theirs.index_1T, theirs.segments_BT)


# The way round ----------------------------------------------------------------------------------------------------


def _go_round(
    settings: Settings, visit: Visit, queries: Queries, state: Any, keys: Keys, gradient: Any
) -> tuple[Any, Any]:
    """`state, gradient = visit(queries, state, keys, gradient)` for this device's queries and every device's keys.

    `state` belongs to the queries and stays; `gradient` belongs to the keys, travels with them and comes home.
    """
    if settings.devices == 1:
        return visit(queries, state, keys, gradient)

    def compare(carry: Any, number: Any, hop: int) -> Any:
        state, keys, gradient = carry
        following = _pass_on(settings, keys, hop)  # on their way while these are compared
        meet = visit if number is None else functools.partial(_meet, settings, visit, number)
        state, gradient = meet(queries, state, keys, gradient)
        return state, following, _pass_on(settings, gradient, hop)

    stretches = _stretches(settings, queries.q_BTNH.shape[1] // 2)
    ends = [*(stretch[0] for stretch in stretches), settings.devices]
    carry = compare((state, keys, gradient), None, ends[0])
    for stretch, end in zip(stretches, ends[1:], strict=True):
        # Tied to data: the masks of all rounds, which depend on none, would else be computed for all layers and kept.
        rounds, _ = jax.lax.optimization_barrier((jnp.asarray(stretch), queries.q_BTNH))
        carry, _ = jax.lax.scan(lambda carry, number: (compare(carry, number, 1), None), carry, rounds[:-1])
        carry = compare(carry, rounds[-1], end - stretch[-1])
    state, _, gradient = carry
    return state, gradient


def _pass_on(settings: Settings, tree: Any, hop: int) -> Any:
    """Send the arrays of a tree to the device `hop` places further on."""
    if hop == settings.devices:
        return tree
    pairs = [(device, (device + hop) % settings.devices) for device in range(settings.devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, pairs), tree)


def _stretches(settings: Settings, chunk: int) -> list[list[int]]:
    """The rounds after the first, in which each device has its own keys, cut where keys pass by whom they are far from.

    In a window of w chunks those are the w rounds after the first, from the early chunks before, and the last w, from
    the late ones; all rounds without one. Nobody waits in the rounds between: the keys make one long hop.
    """
    # In chunks: how far apart tokens can be and still see each other.
    apart = settings.devices if settings.window is None else 1 + (settings.window - 2) // chunk
    if 2 * apart >= settings.devices - 1:
        return [list(range(1, settings.devices))]
    numbers = [list(range(1, apart + 1)), list(range(settings.devices - apart, settings.devices))]
    return [stretch for stretch in numbers if stretch]


def _meet(
    settings: Settings, visit: Visit, number: Any, queries: Queries, state: Any, keys: Keys, gradient: Any
) -> tuple[Any, Any]:
    """Compare queries with the keys of the device `number` > 0 places back, as far as they can see each other."""

    def early_keys(queries: Queries, state: Any, keys: Keys, gradient: Any) -> tuple[Any, Any]:
        early, late = _halves(gradient)
        state, early = visit(queries, state, _halves(keys)[0], early)
        return state, _joined(early, late)

    def late_queries(queries: Queries, state: Any, keys: Keys, gradient: Any) -> tuple[Any, Any]:
        early, late = _halves(state)
        late, gradient = visit(_halves(queries)[1], late, keys, gradient)
        return _joined(early, late), gradient

    def far_apart(queries: Queries, state: Any, keys: Keys, gradient: Any) -> tuple[Any, Any]:
        return state, gradient

    me = jax.lax.axis_index(AXIS)
    which = jnp.where(number <= me, 0, 1)
    if settings.window is not None:
        near = visible(_mask(settings, queries, keys)._replace(segments_BT=None), *_lengths(queries, keys))
        which = jnp.where(jnp.any(near), which, 2)
    branches = (early_keys, late_queries, far_apart)
    return jax.lax.switch(which, branches, queries, state, keys, gradient)


def _lengths(queries: Queries, keys: Keys) -> tuple[int, int]:
    return queries.q_BTNH.shape[1], keys.k_BSKH.shape[1]


def _halves(tree: Any) -> tuple[Any, Any]:
    """The early and the late chunk."""
    early = jax.tree.map(lambda x: x[:, : x.shape[1] // 2], tree)
    late = jax.tree.map(lambda x: x[:, x.shape[1] // 2 :], tree)
    return early, late


def _joined(early: Any, late: Any) -> Any:
    return jax.tree.map(lambda *halves: jnp.concatenate(halves, axis=1), early, late)
