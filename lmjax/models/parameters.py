"""How many parameters a config's model will have, in closed form: what `weights.count` says, but without JAX.

A config is resolved before JAX is imported, and rules for hyperparameters need N. A test holds both to the same numbers
over every architecture.
"""

from collections.abc import Callable
from typing import NamedTuple

from lmjax.errors import ConfigError
from lmjax.models.config import ModelConfig


class Sizes(NamedTuple):
    total: int
    """All entries."""
    active: int
    """The entries that a token passes through."""
    matmul: int
    """The active entries that are in matrices."""

    def plus(self, other: "Sizes", times: int = 1) -> "Sizes":
        return Sizes(*(one + times * more for one, more in zip(self, other, strict=True)))


def parameters(cfg: ModelConfig) -> dict[str, int]:
    """N by every way of counting: `layers` (their matrices, no vocabulary) and, where the vocabulary is known, the
    total, non_embedding, matmul and active of `weights.Counts`. Raises ConfigError for a mixer that is not counted."""
    dense, mixture, mixers = _mlp(cfg, cfg.mlp), _mixture(cfg), {name: _mixer(name, cfg) for name in cfg.pattern}
    layers = Sizes(0, 0, 0)
    for kind in cfg.kinds:
        layers = layers.plus(mixers[kind.mixer]).plus(mixture if kind.mlp == "moe" else dense)
    found = {"layers": layers.matmul}
    if cfg.vocab is None:
        return found
    outer = int(cfg.embed_norm) + int(cfg.norm_position != "post")
    layers = layers.plus(_norm(cfg), outer + cfg.layers * (4 if cfg.norm_position == "pre_and_output" else 2))
    table = cfg.vocab * cfg.embed
    lookups = table + (cfg.context * cfg.embed if cfg.position == "learned" else 0)
    head = 0 if cfg.tied else table
    return found | {
        "total": layers.total + lookups + head,
        "non_embedding": layers.total + head,
        "matmul": layers.matmul + table,
        "active": layers.active + lookups + head,
    }


def _always(matrices: int, vectors: int = 0) -> Sizes:
    """Weights that every token passes through."""
    return Sizes(matrices + vectors, matrices + vectors, matrices)


def _norm(cfg: ModelConfig) -> Sizes:
    return _always(0, cfg.embed * (2 if cfg.norm == "layer" and cfg.bias else 1))


def _attention(cfg: ModelConfig) -> Sizes:
    dims = cfg.dims
    queries, keys = dims["heads"] * dims["head_dim"], dims["kv_heads"] * dims["head_dim"]
    vectors = 0
    if cfg.bias or cfg.qkv_bias or cfg.attention_bias:
        vectors += queries + 2 * keys
    if cfg.bias or cfg.attention_bias:
        vectors += cfg.embed
    if cfg.qk_norm:
        vectors += queries + keys if cfg.qk_norm_heads == "together" else 2 * dims["head_dim"]
    return _always(2 * cfg.embed * (queries + keys), vectors)


COUNTED: dict[str, Callable[[ModelConfig], Sizes]] = {"global": _attention, "local": _attention}
"""The mixers of models/mixers.py, as far as rules for hyperparameters can count them."""


def _mixer(name: str, cfg: ModelConfig) -> Sizes:
    if name not in COUNTED:
        raise ConfigError(
            f"model.pattern: nothing counts the parameters of '{name}' for a rule; add it to COUNTED in "
            "lmjax/models/parameters.py, or leave hyperparameters unset"
        )
    return COUNTED[name](cfg)


def _mlp(cfg: ModelConfig, width: int) -> Sizes:
    inputs = 2 if cfg.gated else 1
    return _always((inputs + 1) * cfg.embed * width, inputs * width + cfg.embed if cfg.bias else 0)


def _mixture(cfg: ModelConfig) -> Sizes:
    """The router, experts of which a token passes through the chosen, and the shared mlp with its gate."""
    moe, expert = cfg.moe, _mlp(cfg, cfg.dims["expert_mlp"])
    if moe.experts is None:
        return Sizes(0, 0, 0)
    sizes = Sizes(moe.experts * expert.total, moe.top_k * expert.active, moe.top_k * expert.matmul)
    sizes = sizes.plus(_always(cfg.embed * moe.experts))
    if moe.shared_mlp is not None:
        sizes = sizes.plus(_mlp(cfg, moe.shared_mlp)).plus(_always(cfg.embed if moe.shared_gate else 0))
    return sizes
