"""Text on a mesh is the text of one device. test_mesh.py runs this file in a process of its own, with eight devices."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from lmjax.data.tokenizers.alphabets import ByteTokenizer
from lmjax.devices import place
from lmjax.devices.config import MeshConfig
from lmjax.devices.mesh import make_mesh, shardings
from lmjax.devices.place import use_mesh
from lmjax.generate import rows
from lmjax.generate.config import GenerateConfig
from lmjax.generate.decode import generate, generate_ids, stream
from lmjax.generate.forward import functions
from lmjax.generate.spread import auto_mesh
from lmjax.generate.writer import Writer
from lmjax.models import decoder, flax_model
from lmjax.models.config import ModelConfig
from lmjax.models.model import Model
from lmjax.plan.collectives import collectives
from lmjax.weights import Params, Weight, map_weights

TOKENIZER = ByteTokenizer()
END = TOKENIZER.endoftext_id
V = 260
MESHES = {
    "dp": MeshConfig(layout="dp"),
    "fsdp": MeshConfig(layout="fsdp"),
    "fsdp+tp": MeshConfig(layout="fsdp+tp"),
    "fsdp+cp+tp": MeshConfig(layout="fsdp+cp+tp"),
    "fsdp+ep": MeshConfig(layout="fsdp+ep"),
    "fsdp+pp": MeshConfig(layout="fsdp+pp"),
    "dp+pp+tp": MeshConfig(layout="dp+pp+tp"),
}
GREEDY = GenerateConfig(tokens=6, temperature=0, stop_at_endoftext=False)
SETTINGS = {
    "greedy": GREEDY,
    "sampled": replace(GREEDY, temperature=0.8, top_k=40, top_p=0.9, repetition_penalty=1.2, seed=5),
    "beams": replace(GREEDY, beams=3),
    "int8": replace(GREEDY, weights="int8"),
}
PROMPTS = ["To be, or", "", "not", "to", "be", "that is", "the", "question"]
Cfgs = dict[str, ModelConfig]


def of_a_size(cfg: ModelConfig) -> ModelConfig:
    """A family in sizes that every mesh divides, with two periods of its layers."""
    moe = cfg.moe if cfg.moe.experts is None else replace(cfg.moe, experts=4)
    kv_heads = None if cfg.kv_heads is None else 2
    layers = moe.dense_first + 2 * len(cfg.pattern)
    return replace(cfg, vocab=V, layers=layers, embed=32, heads=4, kv_heads=kv_heads, mlp=48, moe=moe)


@functools.cache
def build(cfg: ModelConfig) -> tuple[Model, Params]:
    """A model and weights so uneven that hardly two tokens are about as probable."""
    model, rng = decoder.build(cfg), np.random.default_rng(0)

    def draw(weight: Weight) -> np.ndarray:
        return (1.5 * weight.unstacked().fan_in ** -0.5 * rng.standard_normal(weight.shape)).astype(np.float32)

    return model, map_weights(draw, model.spec)


def ids(model: Model, params: Params, rows: int, cfg: GenerateConfig) -> list[list[int]]:
    prompts = [TOKENIZER.encode(prompt) for prompt in PROMPTS[:rows]]
    return generate_ids(model, params, prompts, cfg, endoftext=END, vocab=TOKENIZER.vocab_size)


alone = functools.cache(lambda cfg, rows, setting: ids(*build(cfg), rows, SETTINGS[setting]))


# What it takes: first, since what follows switches XLA's optimizations off ----------------------------------------


def small(layout: str) -> tuple[Any, Params, rows.Rows]:
    """The program that writes on a mesh, and what it takes there: weights of zeros, split, and rows in use."""
    model, mesh = decoder.build(ModelConfig(vocab=V, layers=2, embed=128, heads=8, mlp=512)), make_mesh(MESHES[layout])
    params = map_weights(lambda weight: np.zeros(weight.shape, np.float32), model.spec)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, shardings(model.spec, mesh))
        writer = Writer(model, params, [[1, 1]] * 8, GREEDY, endoftext=END, vocab=V)
        writer.write(1)
        params, state, auto = writer._params, writer._rows, auto_mesh()
    inputs = (functions(model, V), params, state, np.array([END]), np.int32(6), np.int32(6), np.bool_(False))
    with use_mesh(auto):
        program = rows.advance.lower(*inputs, cfg=replace(GREEDY, tokens=1, rows=1, stop_at_endoftext=True)).compile()
    return program, params, state


def test_no_device_has_all_weights() -> None:
    """Neither before the program nor within it: all that is sent is smaller than a matrix. The cache is split, too."""
    program, params, state = small("fsdp+pp")
    total, cache = (sum(w.nbytes for w in jax.tree.leaves(tree)) for tree in (params, state.memory))
    memory = program.memory_analysis()
    assert memory.argument_size_in_bytes < 1.1 * (total + cache) / 8
    assert memory.temp_size_in_bytes < total / 4
    assert max(one.bytes for one in collectives(program.as_text())) < 4 * 128 * 128
    keys = state.memory[0][0][0].k_BKSH
    assert keys.sharding.shard_shape(keys.shape)[0] == 1


def test_devices_with_all_weights_send_nothing() -> None:
    """But what the host reads at the end, and whether all rows are done."""
    program, _, _ = small("dp")
    sent = {one.shape for one in collectives(program.as_text())}
    assert sent == {"pred[]", "pred[8]", "s32[8]", f"s32[8,{rows.MOST_STEPS + 1}]"}


# What comes out ---------------------------------------------------------------------------------------------------


def check(cfg: ModelConfig, layout: str, setting: str, rows: int) -> None:
    (model, params), mesh = build(cfg), make_mesh(MESHES[layout])
    with jax.set_mesh(mesh):
        params = jax.device_put(params, shardings(model.spec, mesh))
        assert ids(model, params, rows, SETTINGS[setting]) == alone(cfg, rows, setting)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("layout", "setting", "family", "rows"),
    [
        ("dp", "sampled", "gpt2", 3),
        ("fsdp+tp", "greedy", "gemma2", 8),
        ("fsdp+tp", "beams", "llama3", 3),
        ("fsdp+ep", "greedy", "mixtral", 8),
        ("fsdp+pp", "int8", "gpt2", 8),
    ],
)
def test_a_mesh_changes_no_text(cfgs: Cfgs, layout: str, setting: str, family: str, rows: int) -> None:
    check(of_a_size(cfgs[family]), layout, setting, rows)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("rows", [len(PROMPTS), 3])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("layout", MESHES)
def test_no_mesh_changes_any_familys_text(cfg: ModelConfig, layout: str, setting: str, rows: int) -> None:
    check(of_a_size(cfg), layout, setting, rows)


@pytest.mark.usefixtures("quick_compilation")
def test_streaming(cfgs: Cfgs) -> None:
    """Between the pieces the caller has the mesh that it entered, and it may leave it."""
    (model, params), mesh = build(of_a_size(cfgs["llama3"])), make_mesh(MESHES["fsdp+tp"])
    cfg = SETTINGS["sampled"]
    (whole,) = generate(model, params, TOKENIZER, PROMPTS[:1], cfg)
    with jax.set_mesh(mesh):
        pieces = stream(model, jax.device_put(params, shardings(model.spec, mesh)), TOKENIZER, PROMPTS[0], cfg, chunk=2)
        first = next(pieces)
        assert jax.sharding.get_mesh() == mesh
    assert first + "".join(pieces) == whole.text


@pytest.mark.usefixtures("quick_compilation")
def test_weights_of_every_device_and_of_none(cfgs: Cfgs) -> None:
    cfg, mesh = of_a_size(cfgs["gpt2"]), make_mesh(MESHES["fsdp+pp"])
    model, params = build(cfg)
    with jax.set_mesh(mesh):
        replicated = place.replicate(mesh, jax.device_put(params, shardings(model.spec, mesh)))
        for weights in (replicated, params, jax.device_put(params, jax.devices()[1])):
            assert ids(model, weights, 8, SETTINGS["greedy"]) == alone(cfg, 8, "greedy")


@pytest.mark.usefixtures("quick_compilation")
def test_a_model_without_a_cache() -> None:
    class Bigram(linen.Module):
        @linen.compact
        def __call__(self, tokens_BT: jax.Array) -> jax.Array:
            return linen.Embed(V, V)(tokens_BT)

    model, params = flax_model.from_linen(Bigram(), jnp.zeros((1, 4), jnp.int32), jax.random.key(0))
    expected = ids(model, params, 3, GREEDY)
    with jax.set_mesh(make_mesh(MESHES["fsdp"])):
        assert ids(model, params, 3, GREEDY) == expected
