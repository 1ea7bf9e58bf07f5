"""Every backend against the reference wherever it does not refuse, and the reference against plain loops."""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.errors import ConfigError
from lmjax.models.attention import cache as caches
from lmjax.models.attention.attention import BACKENDS, Choice, Mask, Score, attention, choose, visible
from lmjax.models.position import alibi_slopes

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T, N, K, H = 2, 128, 4, 2, 16  # T: what splash needs; H: the least that triton takes

SEGMENTS_BT = jnp.asarray([np.repeat([0, 1, 2], [50, 38, 40]), np.repeat([0, 1], [10, 118])])
CASES: dict[str, tuple[Mask, Score]] = {
    "plain": (Mask(), Score(H**-0.5)),
    "scale": (Mask(), Score(0.8)),
    "window": (Mask(window=7), Score(H**-0.5)),
    "window of one": (Mask(window=1), Score(H**-0.5)),
    "segments": (Mask(segments_BT=SEGMENTS_BT), Score(H**-0.5)),
    "softcap": (Mask(), Score(0.7, softcap=2.0)),
    "alibi": (Mask(), Score(H**-0.5, slopes_N=alibi_slopes(N))),
    "all but alibi": (Mask(window=20, segments_BT=SEGMENTS_BT), Score(0.7, softcap=2.0)),
    "all but softcap": (Mask(window=20, segments_BT=SEGMENTS_BT), Score(0.7, slopes_N=alibi_slopes(N))),
}


def random_qkv(T: int = T, kv_heads: int = K) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = [(B, T, N, H), (B, T, kv_heads, H), (B, T, kv_heads, H)]
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_backend_equals_reference(backend: str, case: str) -> None:
    mask, score = CASES[case]
    if BACKENDS[backend].refuses(random_qkv()[0], mask, score):
        pytest.skip(f"{backend} refuses {case}")

    for got, expected in zip(output_and_gradient(backend, case), output_and_gradient("reference", case), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


@functools.cache
def output_and_gradient(backend: str, case: str) -> list[jax.Array]:
    mask, score = CASES[case]

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        y_BTNH = attention(q, k, v, mask, score, backend)
        return jnp.sum(y_BTNH * jnp.cos(jnp.arange(y_BTNH.size)).reshape(y_BTNH.shape)), y_BTNH

    return jax.tree.leaves(jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*random_qkv()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_reference_equals_plain_loops(case: str, kv_heads: int) -> None:
    T = 14
    mask, score = CASES[case]
    if mask.segments_BT is not None:
        mask = mask._replace(segments_BT=mask.segments_BT[:, 43 : 43 + T])
    q_BTNH, k_BSKH, v_BSKH = (np.asarray(x, np.float64) for x in random_qkv(T, kv_heads))
    expected_BTNH = np.zeros_like(q_BTNH)
    for b, t, n in np.ndindex(B, T, N):
        keys = [s for s in range(t + 1) if sees(mask, b, t, s)]
        k = n // (N // kv_heads)  # consecutive query heads share a key head
        scores = np.array([score.scale * q_BTNH[b, t, n] @ k_BSKH[b, s, k] for s in keys])
        if score.softcap:
            scores = score.softcap * np.tanh(scores / score.softcap)
        if score.slopes_N is not None:
            scores -= score.slopes_N[n] * (t - np.array(keys))
        weights = np.exp(scores - scores.max())
        expected_BTNH[b, t, n] = weights / weights.sum() @ v_BSKH[b, keys, k]
    got_BTNH = attention(*(jnp.asarray(x, jnp.float32) for x in (q_BTNH, k_BSKH, v_BSKH)), mask, score, "reference")
    np.testing.assert_allclose(got_BTNH, expected_BTNH, atol=1e-5)


def sees(mask: Mask, b: int, t: int, s: int) -> bool:
    near = mask.window is None or t - s < mask.window
    return near and (mask.segments_BT is None or mask.segments_BT[b, t] == mask.segments_BT[b, s])


ALIBI, SOFTCAP = Score(1.0, slopes_N=alibi_slopes(N)), Score(1.0, softcap=2.0)


@pytest.mark.parametrize(
    ("backend", "mask", "score", "length", "reason"),
    [
        ("xla", Mask(), SOFTCAP, T, "has no softcap"),
        ("cudnn", Mask(), Score(1.0), T, "needs an NVIDIA GPU|computes in 16 bit"),
        ("splash", Mask(), ALIBI, T, "has no ALiBi"),
        ("splash", Mask(), Score(1.0), 100, "needs a sequence length divisible by 128, not 100"),
        ("triton", Mask(), ALIBI, T, "has no ALiBi"),
        ("triton", Mask(), SOFTCAP, T, "has no softcap"),
        ("triton", Mask(window=3, segments_BT=SEGMENTS_BT), Score(1.0), T, "has no window"),
        ("triton", Mask(), Score(1.0), 100, "needs a sequence length divisible by 64, not 100"),
    ],
)
def test_refusals_name_the_setting(backend: str, mask: Mask, score: Score, length: int, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"model.attention={backend} ({reason})"):
        attention(*random_qkv(length), mask, score, backend)
    auto = attention(*random_qkv(length), mask, score, "auto")
    np.testing.assert_array_equal(auto, attention(*random_qkv(length), mask, score, "reference"))


def on_gpu(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(compute_capability=capability)])


def test_cudnn_refuses_what_it_would_ignore(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, "8.0")
    q_BTNH = random_qkv()[0].astype(jnp.bfloat16)
    refuses = BACKENDS["cudnn"].refuses
    positions = jnp.zeros((B, T), jnp.int32)
    assert refuses(q_BTNH, Mask(window=3), Score(1.0)) is None
    assert refuses(q_BTNH, Mask(), SOFTCAP) == "has no softcap"
    assert refuses(q_BTNH, Mask(), ALIBI) == "has no ALiBi"
    assert refuses(q_BTNH, Mask(segments_BT=SEGMENTS_BT), Score(1.0)) == "cannot keep documents apart"
    assert "cannot decode from a cache" in str(refuses(q_BTNH, Mask(None, None, positions, positions), Score(1.0)))


@pytest.mark.parametrize(
    ("size", "capability", "able"),
    [
        *((64, "8.0", True), (128, "8.0", True), (136, "8.0", False), (256, "8.9", False), (256, "9.0", True)),
        *((256, "10.0", True), (264, "9.0", False), (6, "9.0", False), (100, "9.0", False)),
    ],
)
def test_cudnn_refuses_head_sizes_that_it_cannot_do(
    monkeypatch: pytest.MonkeyPatch, size: int, capability: str, able: bool
) -> None:
    """Those of jax's own check, check_is_flash_attention; then another backend is chosen."""
    on_gpu(monkeypatch, capability)
    q_BTNH = jnp.ones((1, 8, 2, size), jnp.bfloat16)
    refusal = BACKENDS["cudnn"].refuses(q_BTNH, Mask(), Score(1.0))
    assert (refusal is None) == able
    if not able:
        assert f"not {size}" in str(refusal)
        np.testing.assert_array_equal(attention(q_BTNH, q_BTNH, q_BTNH, Mask(), Score(1.0)), q_BTNH)


OLD = "needs an NVIDIA GPU of compute capability 8.0 or later"
APART = {"cudnn": "cannot keep documents apart"}


@pytest.mark.parametrize(
    ("capability", "mask", "score", "dtype", "choice"),
    [
        ("8.0", Mask(window=3), Score(1.0), "bfloat16", Choice("cudnn", {})),
        ("8.0", Mask(segments_BT=SEGMENTS_BT), Score(1.0), "bfloat16", Choice("triton", APART)),
        (
            "9.0",
            Mask(window=3, segments_BT=SEGMENTS_BT),
            Score(1.0),
            "bfloat16",
            Choice("reference", APART | {"triton": "has no window: model.window"}),
        ),
        ("9.0", Mask(), SOFTCAP, "float16", Choice("reference", dict.fromkeys(["cudnn", "triton"], "has no softcap"))),
        (
            "9.0",
            Mask(),
            Score(1.0),
            "float32",
            Choice(
                "reference",
                dict.fromkeys(["cudnn", "triton"], "computes in 16 bit, not float32: set model.dtype=bfloat16"),
            ),
        ),
        ("7.5", Mask(segments_BT=SEGMENTS_BT), Score(1.0), "float16", Choice("reference", APART | {"triton": OLD})),
        (
            "gfx942",
            Mask(),
            Score(1.0),
            "bfloat16",
            Choice("reference", {"cudnn": "needs an NVIDIA GPU", "triton": OLD}),
        ),
    ],
)
def test_on_a_gpu_the_fastest_is_chosen_that_can_do_what_is_asked(
    monkeypatch: pytest.MonkeyPatch, capability: str, mask: Mask, score: Score, dtype: str, choice: Choice
) -> None:
    on_gpu(monkeypatch, capability)
    assert choose(jax.ShapeDtypeStruct((B, T, N, 64), dtype), mask, score) == choice


@pytest.mark.parametrize("size", [24, 128])
def test_the_kernel_that_keeps_documents_apart_does_so_in_16_bits(size: int) -> None:
    """In heads whose size is no power of two, or of the largest size, whose backward pass has smaller blocks; the last
    tokens of a row are padding."""
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 128, n, size)), jnp.bfloat16) for n in (4, 2, 2))
    mask = Mask(segments_BT=jnp.asarray([np.repeat([0, 1, -1], [30, 70, 28])]))

    def gradients(backend: str, *factors: jax.Array) -> tuple[jax.Array, ...]:
        y, back = jax.vjp(lambda *qkv: attention(*qkv, mask, Score(size**-0.5), backend), *factors)
        return y, *back(jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype))

    got = jax.jit(functools.partial(gradients, "triton"))(q, k, v)
    exact = gradients("reference", *(x.astype(jnp.float32) for x in (q, k, v)))
    for one, other in zip(got, exact, strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.02 * float(jnp.max(jnp.abs(other))))


# Masks by position, and the ring buffer ---------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, 5])
def test_masks_by_position_and_by_index_agree(window: int | None) -> None:
    positions_BT = jnp.arange(9)[None] + jnp.asarray([[0], [70]])
    by_position = visible(Mask(window, None, positions_BT, positions_BT), 9, 9)
    by_index = visible(Mask(window), 9, 9)
    np.testing.assert_array_equal(by_position, np.broadcast_to(by_index, (2, 9, 9)))
    empty = visible(Mask(window, None, positions_BT, positions_BT.at[:, 4].set(-1)), 9, 9)
    np.testing.assert_array_equal(empty, np.asarray(by_position) & (np.arange(9) != 4))


@pytest.mark.parametrize("case", ["plain", "window", "alibi", "softcap"])
def test_attention_does_not_depend_on_the_order_of_cached_keys(case: str) -> None:
    mask, score = CASES[case]
    q_BTNH, k_BSKH, v_BSKH = random_qkv(24)
    order = np.random.default_rng(3).permutation(24)
    positions_BS = jnp.broadcast_to(jnp.arange(24), (B, 24))
    cached = Mask(mask.window, None, positions_BS, positions_BS[:, order])
    np.testing.assert_allclose(
        attention(q_BTNH, k_BSKH[:, order], v_BSKH[:, order], cached, score),
        attention(q_BTNH, k_BSKH, v_BSKH, mask, score),
        atol=1e-5,
    )


@pytest.mark.parametrize(("places", "pieces"), itertools.product([3, 5, 16], [[5] + [1] * 7, [7, 1, 1, 3], [12]]))
def test_ring_buffer_holds_the_last_tokens_of_each_row(places: int, pieces: list[int]) -> None:
    """Rows of unequal length, fed in pieces, the first with padding on the left, as prompts are."""
    kept: list[list[int]] = [[], []]
    cache = caches.empty(2, places, 1, 1, "float32")
    start = [0, -4]
    for length in pieces:
        positions_BT = np.array([[max(first + i, -1) for i in range(length)] for first in start], np.int32)
        start = [first + length for first in start]
        values_BTKH = jnp.asarray(100.0 + positions_BT)[:, :, None, None]
        before = [set(row) for row in kept]
        seen, cache = caches.extend(cache, values_BTKH, -values_BTKH, jnp.asarray(positions_BT))
        for row, positions in enumerate(positions_BT):
            new = [p for p in positions.tolist() if p >= 0]
            kept[row] = (kept[row] + new)[-places:]
            assert held(cache, row) == set(kept[row])
            for t in new:  # a window of `places` tokens finds all of its keys
                assert held(seen, row) >= {p for p in before[row] | set(new) if t - places < p <= t}


def held(cache: caches.LayerCache, row: int) -> set[int]:
    positions_S = np.asarray(cache.positions_BS[row])
    keys_S, values_S = np.asarray(cache.k_BKSH[row, 0, :, 0]), np.asarray(cache.v_BKSH[row, 0, :, 0])
    np.testing.assert_array_equal(keys_S[positions_S >= 0], 100.0 + positions_S[positions_S >= 0])
    np.testing.assert_array_equal(values_S, -keys_S)
    return set(positions_S[positions_S >= 0].tolist())
