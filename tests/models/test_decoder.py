"""What must hold for every decoder, whatever its config: tests/conftest.py lists the families."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.errors import ConfigError
from lmjax.losses import chunked_token_sums
from lmjax.models import decoder
from lmjax.models.attention.attention import BACKENDS
from lmjax.models.config import ModelConfig, RopeConfig, layer_index
from lmjax.models.dropout import EMBED_SITE, MIXER_SITE, MLP_SITE, dropout
from lmjax.models.flops import program_flops, sequence_flops, visible_pairs
from lmjax.models.model import Model
from lmjax.models.moe import grouped
from lmjax.models.remat import REMAT
from lmjax.weights import Params, abstract, by_path, count, initialize
from tests.conftest import FAMILIES
from tests.random_params import random_params

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOLERANCE = 1e-5  # largest absolute difference between two float32 ways to the same number of order one
T = 16

replace = dataclasses.replace


def random_tokens(*shape: int, vocab: int = 61) -> np.ndarray:
    return np.random.default_rng(1).integers(vocab, size=shape)


def sample_keys(rows: int) -> jax.Array:
    return jax.vmap(jax.random.key)(jnp.arange(rows))


def differ(a: Any, b: Any) -> float:
    """The largest absolute difference between two trees."""
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.max(jnp.abs(x - y))), a, b)))


# Causality and documents ------------------------------------------------------------------------------------------


def test_no_position_depends_on_a_later_one(cfg: ModelConfig) -> None:
    model = decoder.build(cfg)
    params = random_params(model.spec)
    tokens_1T = jnp.arange(T)[None]  # all different: row s of the table is the input at position s

    def embeddings_to_hidden(table_VD: jax.Array) -> jax.Array:
        return model.hidden({**params, "embed": table_VD}, tokens_1T)[0][0]

    @jax.jit
    def sensitivity(table_VD: jax.Array) -> jax.Array:
        """How much activations at t move with the input at s, [T, S]."""
        h_TD, pullback = jax.vjp(embeddings_to_hidden, table_VD)
        direction_D = jnp.linspace(1.0, 2.0, h_TD.shape[1])
        gradients_TVD = jax.lax.map(lambda one_T: pullback(one_T[:, None] * direction_D)[0], jnp.eye(T))
        return jnp.abs(gradients_TVD[:, :T]).max(axis=-1)

    moves_TS = np.asarray(sensitivity(params["embed"]))
    assert np.all(moves_TS[np.triu_indices(T, 1)] == 0)
    assert np.all(moves_TS[np.tril_indices(T)] > 0)  # reached over several layers even where windows are short


def test_logits_of_a_position_depend_on_its_activations_alone(cfg: ModelConfig) -> None:
    model = decoder.build(cfg)
    params = random_params(model.spec)
    x_BTD = np.random.default_rng(2).standard_normal((2, 3, cfg.embed)).astype(np.float32)
    logits_BTV = model.unembed(params, x_BTD)
    assert logits_BTV.dtype == jnp.float32
    for b, t in np.ndindex(2, 3):
        np.testing.assert_allclose(logits_BTV[b, t], model.unembed(params, x_BTD[b, t][None])[0], atol=TOLERANCE)


@functools.cache
def hidden_of_documents(cfg: ModelConfig) -> Any:
    """Compiled (params, tokens, segments, positions) -> activations."""
    model = decoder.build(cfg)
    return jax.jit(
        lambda params, tokens_BT, segments_BT, positions_BT: model.hidden(
            params, tokens_BT, segments_BT=segments_BT, positions_BT=positions_BT
        )[0]
    )


PACKED = 128  # splash needs a multiple of this
LENGTHS = (37, 50, 41)
SEGMENTS = np.repeat(np.arange(3), LENGTHS)[None].astype(np.int32)
POSITIONS = np.concatenate([np.arange(length) for length in LENGTHS])[None].astype(np.int32)


def refuses(cfg: ModelConfig) -> bool:
    """Whether the config's backend cannot serve it on this machine."""
    try:
        jax.eval_shape(
            hidden_of_documents(cfg), abstract(decoder.weights(cfg)), random_tokens(1, PACKED), SEGMENTS, POSITIONS
        )
    except ConfigError:
        return True
    return False


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_do_not_leak(cfg: ModelConfig, backend: str) -> None:
    cfg = replace(cfg, attention=backend)
    if refuses(cfg):
        pytest.skip(f"{backend} refuses this config here")
    params = random_params(decoder.weights(cfg))
    hidden = hidden_of_documents(cfg)
    tokens = random_tokens(1, PACKED)
    first, second = SEGMENTS[0] == 0, SEGMENTS[0] == 1
    changed = np.where(SEGMENTS == 1, tokens, (tokens + 1) % cfg.vocab)

    apart, apart_changed = (hidden(params, x, SEGMENTS, POSITIONS)[0] for x in (tokens, changed))
    assert bool(jnp.all(apart[second] == apart_changed[second]))
    assert not bool(jnp.any(jnp.all(apart[first] == apart_changed[first], axis=-1)))
    together, together_changed = (hidden(params, x, np.zeros_like(SEGMENTS), POSITIONS)[0] for x in (tokens, changed))
    assert not bool(jnp.all(together[second] == together_changed[second]))


def test_a_packed_document_is_the_document_alone(cfg: ModelConfig) -> None:
    model = decoder.build(cfg)
    params = random_params(model.spec)
    tokens = random_tokens(1, PACKED)
    second = SEGMENTS[0] == 1
    packed = hidden_of_documents(replace(cfg, attention="reference"))(params, tokens, SEGMENTS, POSITIONS)[0, second]
    alone = jax.jit(lambda x: model.hidden(params, x)[0])(tokens[:, second])[0]
    assert differ(packed, alone) < TOLERANCE


def test_a_sequence_longer_than_the_position_table_is_refused() -> None:
    model = decoder.build(ModelConfig(vocab=5, context=8, position="learned"))
    with pytest.raises(ConfigError, match=r"9 tokens.*model\.context=8"):
        model.hidden(abstract(model.spec), np.zeros((1, 9), np.int32))


# One model, run in different ways ---------------------------------------------------------------------------------


SLOW = {"dots": pytest.mark.slow}  # a gradient of each family is the costliest compilation; full changes the most


@functools.cache
def loss_and_gradient(cfg: ModelConfig) -> tuple[jax.Array, Params]:
    model = decoder.build(cfg)
    tokens_BT = random_tokens(2, T + 1)
    return jax.jit(jax.value_and_grad(functools.partial(loss, model)))(random_params(model.spec), tokens_BT)


def loss(model: Model, params: Params, tokens_BT: jax.Array) -> jax.Array:
    """The mean chunked loss with dropout on."""
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    weights_BT = jnp.full(targets_BT.shape, 1 / targets_BT.size)
    x_BTD = model.hidden(params, inputs_BT, keys_B=sample_keys(len(inputs_BT)))[0]
    head = model.head(params)
    return chunked_token_sums(model.unembed, head, x_BTD, targets_BT, weights_BT, chunk=T // 2).minimized


# Dropout, a pattern of layers with a remainder, a mixture of experts; the others have nothing more to compute again.
QUICK = ("mini_gpt", "gemma2", "mixtral")


@pytest.mark.parametrize(
    "cfg", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES], indirect=True
)
@pytest.mark.parametrize("remat", [pytest.param(name, marks=SLOW.get(name, ())) for name in REMAT if name != "none"])
def test_remat_changes_nothing(cfg: ModelConfig, remat: Any) -> None:
    assert differ(loss_and_gradient(cfg), loss_and_gradient(replace(cfg, remat=remat))) < TOLERANCE


def test_scanned_layers_equal_unrolled_and_looped_ones(cfg: ModelConfig) -> None:
    def run(params: Params, unroll: float) -> jax.Array:
        model = decoder.build(replace(cfg, unroll=unroll))
        return jax.jit(lambda params: model.hidden(params, random_tokens(2, T), keys_B=sample_keys(2))[0])(params)

    params = random_params(decoder.weights(cfg))
    scanned = run(params, 0.0)
    assert differ(scanned, run(params, 1.0)) < TOLERANCE
    assert differ(scanned, run(decoder.build(cfg).unstack(params), 0.0)) < TOLERANCE


def test_every_trainable_weight_receives_a_gradient(cfg: ModelConfig) -> None:
    gradients = by_path(loss_and_gradient(cfg)[1])
    spec = by_path(decoder.weights(cfg))
    assert gradients.keys() == spec.keys()
    for path, gradient in gradients.items():
        if not spec[path].trainable:
            assert not jnp.any(gradient), path
            continue
        # Each layer's copy counts; rows of a table that no token reads have none.
        copies = gradient.reshape(gradient.shape[0], -1) if spec[path].batch_axes else gradient.reshape(1, -1)
        moved = jnp.any(copies != 0, axis=-1)
        # Softmax over keys cannot see a constant added to all of a query's scores.
        blind = path.endswith("key_bias") and cfg.position != "rope"
        assert blind or bool(jnp.all(moved)), path
    assert all(bool(jnp.all(jnp.isfinite(gradient))) for gradient in gradients.values())


def test_bfloat16_stays_near_float32(cfg: ModelConfig) -> None:
    params = random_params(decoder.weights(cfg))
    tokens_BT = random_tokens(2, T)
    precise, coarse = (
        jax.jit(decoder.build(replace(cfg, dtype=dtype)).logits)(params, tokens_BT) for dtype in ("float32", "bfloat16")
    )
    assert coarse.dtype == jnp.float32
    error = float(jnp.linalg.norm(precise - coarse) / jnp.linalg.norm(precise))
    assert 1e-4 < error < 0.05  # a float32 path would be closer, a wrong one farther


def test_every_layer_and_site_has_its_own_dropout_mask() -> None:
    cfg = ModelConfig(vocab=61, layers=3, embed=24, pattern=("local", "global"), window=4, dropout=0.5)
    indices = [
        layer_index(cfg.segments, segment, repeat, place)
        for segment, (period, repeats) in enumerate(cfg.segments)
        for repeat, place in itertools.product(range(repeats), range(len(period)))
    ]
    assert indices == list(range(cfg.layers))
    sites = itertools.product(range(3), (MIXER_SITE, MLP_SITE))
    names = [(0, EMBED_SITE), *sites]
    ones = jnp.ones((1, 4, 24))
    masks = [tuple(np.asarray(dropout(ones, sample_keys(1), 0.5, *name)).ravel()) for name in names]
    assert len(set(masks)) == len(names)


# Initialization ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_multiplied_by_their_scale(tied: bool) -> None:
    cfg = ModelConfig(vocab=31, embed=16, mlp=32, layers=1, tied=tied)
    tokens_BT = jnp.arange(12).reshape(2, 6)
    plain, scaled = (decoder.build(dataclasses.replace(cfg, logit_scale=scale)) for scale in (1.0, 4.0))
    params = initialize(plain.spec, jax.random.key(0))
    np.testing.assert_array_equal(scaled.logits(params, tokens_BT), 4 * plain.logits(params, tokens_BT))


def test_depth_does_not_change_a_layers_start() -> None:
    def start(layers: int) -> Params:
        # The default start of matrices that write to the residual stream depends on depth by design.
        cfg = ModelConfig(vocab=7, layers=layers, embed=8, mlp=12, residual_init_scale=1.0)
        return initialize(decoder.weights(cfg), jax.random.key(0))

    shallow, deep = start(3), start(5)
    assert differ(shallow["segments"], jax.tree.map(lambda w: w[:3], deep["segments"])) == 0
    assert differ(shallow["embed"], deep["embed"]) == 0
    query = deep["segments"]["0"]["0"]["attention"]["query"]
    assert not jnp.any(jnp.all(query[0] == query[1:], axis=(1, 2, 3)))


def test_a_new_weight_does_not_change_the_others() -> None:
    base = ModelConfig(vocab=7, layers=2, embed=8, mlp=12)
    more = replace(base, qkv_bias=True, qk_norm=True, gated=True, tied=False, embed_norm=True, position="learned")
    before, after = (by_path(initialize(decoder.weights(cfg), jax.random.key(0))) for cfg in (base, more))
    assert before.keys() < after.keys()
    assert all(bool(jnp.all(after[path] == value)) for path, value in before.items())


def test_layers_start_with_activations_of_order_one() -> None:
    cfg = ModelConfig(vocab=61, layers=3, embed=64, heads=4, mlp=128, gated=True)
    model = decoder.build(cfg)
    x_BTD = model.hidden(initialize(model.spec, jax.random.key(0)), random_tokens(2, T))[0]
    assert 0.5 < float(jnp.std(x_BTD)) < 2


# Counts and FLOPs -------------------------------------------------------------------------------------------------

LLAMA = {"activation": "silu", "gated": True}
QWEN3_0_6B = ModelConfig(
    vocab=151_936, layers=28, embed=1024, heads=16, kv_heads=8, head_dim=128, mlp=3072, qk_norm=True, **LLAMA
)
GEMMA2_2B = ModelConfig(
    vocab=256_000,
    layers=26,
    pattern=("local", "global"),
    window=4096,
    embed=2304,
    heads=8,
    kv_heads=4,
    head_dim=256,
    mlp=9216,
    gated=True,
    norm_position="pre_and_output",
)
PUBLISHED = {
    "GPT-2 124M": (
        ModelConfig(
            vocab=50_257,
            context=1024,
            layers=12,
            embed=768,
            heads=12,
            mlp=3072,
            norm="layer",
            bias=True,
            position="learned",
        ),
        124_439_808,
    ),
    "Llama 3.1 8B": (
        ModelConfig(vocab=128_256, layers=32, embed=4096, heads=32, kv_heads=8, mlp=14_336, tied=False, **LLAMA),
        8_030_261_248,
    ),
    "Llama 3.2 1B": (
        ModelConfig(vocab=128_256, layers=16, embed=2048, heads=32, kv_heads=8, mlp=8192, **LLAMA),
        1_235_814_400,
    ),
    "Gemma 2 2B": (GEMMA2_2B, 2_614_341_888),
    "Qwen3 0.6B": (QWEN3_0_6B, 596_049_920),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name: str) -> None:
    cfg, parameters = PUBLISHED[name]
    assert count(decoder.weights(cfg)).total == parameters


def test_counts_are_sizes_of_arrays(cfg: ModelConfig) -> None:
    spec = decoder.weights(cfg)
    counts = count(spec)
    weights = by_path(spec)
    sizes = {path: leaf.size for path, leaf in by_path(abstract(spec)).items() if weights[path].trainable}
    of_experts = {path: size for path, size in sizes.items() if "/experts/" in path}
    idle = {path: size // cfg.moe.experts * (cfg.moe.experts - cfg.moe.top_k) for path, size in of_experts.items()}
    assert counts.active == counts.total - sum(idle.values())
    assert counts.total == sum(sizes.values())
    tables = sizes["embed"] + sizes.get("position", 0)
    assert counts.non_embedding == counts.total - tables
    vectors = sum(size for path, size in sizes.items() if path.endswith(("bias", "scale")))
    idle = sum(size for path, size in idle.items() if not path.endswith("bias"))
    assert counts.matmul == counts.non_embedding - vectors - idle + (sizes["embed"] if cfg.tied else 0)


@pytest.mark.parametrize("layers", ["scanned", "unrolled"])
def test_flops_are_those_of_the_program(cfg: ModelConfig, layers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "platform", lambda: "tpu")  # on CPUs experts multiply padding, too
    model = decoder.build(replace(cfg, dropout=0.0, embed_dropout=0.0))
    params = abstract(model.spec)
    if layers == "unrolled":
        params = jax.eval_shape(model.unstack, params)
    tokens_1T = jax.ShapeDtypeStruct((1, T), jnp.int32)
    forward = 2 * count(model.spec).matmul * T + model.mixing_flops(T, causal=False)
    assert program_flops(model.logits, params, tokens_1T) == forward
    tokens_1T = jax.ShapeDtypeStruct((1, T + 1), jnp.int32)
    training = program_flops(jax.grad(functools.partial(loss, model)), params, tokens_1T)
    assert training == 3 * forward == sequence_flops(model, T).full


def test_program_flops_counts_products_in_loops() -> None:
    w = jnp.ones((5, 5))

    def three_times(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (jax.checkpoint(jnp.matmul)(x, w), None), x, length=3)[0]

    assert program_flops(three_times, jnp.ones((2, 5))) == 3 * 2 * (2 * 5 * 5)


@pytest.mark.parametrize("window", [None, 1, 3, 12, 40])
def test_visible_pairs_against_brute_force(window: int | None) -> None:
    pairs = sum(1 for t in range(12) for s in range(12) if 0 <= t - s < (window or 12))
    assert visible_pairs(12, window, causal=True) == pairs
    assert visible_pairs(12, window, causal=False) == 12 * 12


def test_causal_flops_are_fewer(cfg: ModelConfig) -> None:
    flops = sequence_flops(decoder.build(cfg), 64)
    kinds = [kind for period, repeats in cfg.segments for kind in period * repeats]
    assert len(kinds) == cfg.layers
    saved = sum(64 * 64 - visible_pairs(64, cfg.window_of(kind), causal=True) for kind in kinds)
    assert flops.full - flops.causal == 3 * 4 * cfg.heads * cfg.dims["head_dim"] * saved > 0
    assert flops.six_nd == 6 * count(decoder.weights(cfg)).active * 64


# Configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embed": 10, "heads": 4}, r"model\.embed=10 is not divisible by model\.heads=4"),
        ({"heads": 4, "kv_heads": 3}, r"model\.heads=4 must be a multiple of model\.kv_heads=3"),
        ({"pattern": ()}, "pattern is empty"),
        ({"pattern": ("local",)}, r"set model\.window"),
        ({"window": 4}, "no 'local' layer"),
        ({"head_dim": 5}, "head size 5 must be even"),
    ],
)
def test_impossible_shapes_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):  # pydantic wraps the ConfigError; config.parse unwraps it
        ModelConfig(vocab=7, **settings)


@pytest.mark.parametrize(
    ("changes", "scanned"),
    [({}, False), ({"unroll": 0.0}, True), ({"remat": "full"}, True), ({"layers": 17}, True), ({"unroll": 0.5}, True)],
)
def test_few_layers_are_unrolled(changes: dict[str, Any], scanned: bool) -> None:
    model = decoder.build(ModelConfig(**{"vocab": 7, "embed": 4, "heads": 2, "mlp": 4, "layers": 4} | changes))
    program = jax.jit(model.hidden).lower(abstract(model.spec), np.zeros((1, 8), np.int32)).as_text()
    assert ("stablehlo.while" in program) == scanned


def test_a_model_needs_a_vocabulary() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab is not set"):
        decoder.build(ModelConfig())


def test_rope_reads_its_own_base_in_local_layers(cfg: ModelConfig) -> None:
    if cfg.position != "rope" or "local" not in cfg.pattern:
        pytest.skip("no local rotary layers")
    changed = replace(cfg, rope=RopeConfig(**{**dataclasses.asdict(cfg.rope), "local_theta": 17.0}))
    before, after = (decoder.rotations(c, None, 5) for c in (cfg, changed))
    assert differ(before["global"], after["global"]) == 0
    assert differ(before["local"], after["local"]) > 0
