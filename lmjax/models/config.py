"""What a decoder looks like. One config spans GPT-2, mini-GPT, Llama, Qwen, Gemma, OLMo, Mixtral."""

import dataclasses
import fractions
import math
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from lmjax.errors import ConfigError
from lmjax.names import names_in
from lmjax.schema import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Size,
    config_class,
    one_of,
    validated,
)

MixerKind = Annotated[str, one_of(names_in("lmjax.models.mixers", "MIXERS"))]
MlpKind = Literal["dense", "moe"]


class LayerKind(NamedTuple):
    mixer: str
    """A name in MIXERS."""
    mlp: MlpKind


Segments = tuple[tuple[tuple[LayerKind, ...], int], ...]


@config_class
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864)."""

    theta: PositiveFloat = 10_000.0
    """Base of the wavelengths in global layers."""
    local_theta: PositiveFloat | None = None
    """Base in local layers, which then are not scaled; None means that they rotate as global ones do."""
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    """How the model reaches beyond the length it was trained at."""
    factor: PositiveFloat = 1.0
    """How much longer: linear divides every frequency by it, llama3 and yarn only the slow ones."""
    low_frequency_factor: PositiveFloat = 1.0
    high_frequency_factor: PositiveFloat = 4.0
    """llama3: turns within `original_context` below the low factor are slow, above the high one fast."""
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    """yarn: the same in its terms."""
    attention_factor: PositiveFloat | None = None
    """yarn multiplies queries and keys by it; None means 0.1 ln(factor) + 1."""
    original_context: PositiveInt = 8192


@config_class
class MoeConfig:
    """A router sends each token through a few of many mlps (Shazeer et al. 2017, arXiv:1701.06538)."""

    experts: Size | None = None
    """How many mlps a mixture layer has; None means that every layer has a single one."""
    top_k: PositiveInt = 2
    """Experts that a token passes through."""
    mlp: Size | None = None
    """Width of each expert; None means model.mlp."""
    pattern: tuple[MlpKind, ...] = ("moe",)
    """Which layers are mixtures: one period, counted from the input as model.pattern is."""
    dense_first: NonNegativeInt = 0
    """So many layers at the input are dense whatever `pattern` says (DeepSeek-V3: 3)."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    """What makes an expert's score of its router logit: softmax over all experts, or each by itself (DeepSeek-V3)."""
    normalize: bool = True
    """Divide the chosen experts' scores by their sum; with softmax this is a softmax over the chosen (Mixtral)."""
    scale: PositiveFloat = 1.0
    """Multiplies the chosen experts' weights (DeepSeek-V3: 2.5)."""
    shared_mlp: Size | None = None
    """Width of an mlp beside the experts that every token passes through; None means that there is none."""
    shared_gate: bool = False
    """Multiply the shared mlp's output by a sigmoid of its input (Qwen2-MoE)."""

    dispatch: Annotated[str, one_of(names_in("lmjax.models.moe.moe", "DISPATCHES"))] = "dropless"
    """capacity: in training an expert takes only so many tokens of a sequence, the first that choose it; arrays then
    have a fixed size. Evaluation and generation drop nothing."""
    capacity_factor: PositiveFloat = 1.25
    """An expert's room over what it would receive if all received the same."""
    balance_weight: NonNegativeFloat = 0.01
    """Of the loss that is 1 when all experts receive the same share of each sequence, the mean over mixture layers."""
    router_z_weight: NonNegativeFloat = 0.0
    """Of logsumexp(router logits)^2, the mean over tokens and mixture layers (ST-MoE used 1e-3)."""
    bias_rate: NonNegativeFloat | None = None
    """Balance by a bias on each expert's score that acts on the choice alone and moves by this much after each update
    (DeepSeek-V3: 1e-3; Wang et al. 2024, arXiv:2408.15664). None means no bias, 0 keeps it as it is."""

    def __post_init__(self) -> None:
        if self.experts is None:
            return
        if self.top_k > self.experts:
            raise ConfigError(f"model.moe.top_k={self.top_k} is more than model.moe.experts={self.experts}")
        if "moe" not in self.pattern:
            raise ConfigError("model.moe.pattern names no 'moe' layer; e.g. ('moe',) or ('dense', 'moe')")
        if self.shared_gate and self.shared_mlp is None:
            raise ConfigError("model.moe.shared_gate is set but there is no shared expert: set model.moe.shared_mlp")


@config_class
class BaseConfig:
    """The shape at which hyperparameters are known to be good: a parametrization carries them to the model's own.

    Widths that are not set are the model's in proportion to `embed`.
    """

    embed: Size | None = None
    layers: PositiveInt | None = None
    heads: Size | None = None
    kv_heads: Size | None = None
    head_dim: Size | None = None
    """With neither this nor `heads`, heads keep their size, and there are fewer of them."""
    mlp: Size | None = None
    """Of every mlp, those of experts too, in proportion to model.mlp."""


@config_class
class ModelConfig:
    """A decoder-only transformer."""

    architecture: Annotated[str, one_of(names_in("lmjax.models.architectures", "ARCHITECTURES"))] = "decoder"
    """What is built of these settings."""
    vocab: Size | None = None
    """Rows of the embedding table; None takes the data set's vocabulary."""
    context: Size = 256
    """Longest sequence the model is meant for (the size of a learned position table)."""
    layers: Annotated[int, Field(gt=0, le=1 << 16)] = 4
    pattern: tuple[MixerKind, ...] = ("global",)
    """One period of layers, repeated; `layers` need not be a multiple of it."""
    window: PositiveInt | None = None
    """How many tokens, itself included, a token sees in local layers."""

    embed: Size = 128
    heads: Size = 2
    kv_heads: Size | None = None
    """Key and value heads, shared by groups of query heads (GQA); None means `heads`."""
    head_dim: Size | None = None
    """None means embed / heads."""
    mlp: Size = 512
    moe: MoeConfig = MoeConfig()

    activation: Annotated[str, one_of(names_in("lmjax.models.activations", "ACTIVATIONS"))] = "gelu"
    gated: bool = False
    """Multiply the activation by a second projection (SwiGLU, GeGLU)."""
    norm: Literal["rms", "layer"] = "rms"
    norm_position: Literal["pre", "post", "output", "pre_and_output"] = "pre"
    """pre: f(norm(x)) + x. post: norm(f(x) + x). output: norm(f(x)) + x. pre_and_output: norm(f(norm(x))) + x."""
    norm_epsilon: PositiveFloat = 1e-6
    norm_offset: float = 0.0
    """Added to the stored scale (Gemma stores scale - 1)."""
    qk_norm: bool = False
    """RMSNorm queries and keys."""
    qk_norm_heads: Literal["each", "together"] = "each"
    """Normalize every head by itself, or all heads of a token as one vector (OLMo 2)."""
    bias: bool = False
    """Biases in attention, mlp and LayerNorm."""
    qkv_bias: bool = False
    """Biases in query, key and value projections alone (Qwen 2)."""
    attention_bias: bool = False
    """Biases in all four projections of attention, not in the mlp."""

    position: Literal["learned", "sinusoidal", "rope", "alibi", "none"] = "rope"
    rope: RopeConfig = RopeConfig()
    attention: Annotated[str, one_of(["auto", *names_in("lmjax.models.attention.attention", "BACKENDS")])] = "auto"
    """auto: ring where devices share rows; splash on TPU, cudnn on GPU, or triton where documents are kept apart, if
    they can do what is asked; else reference. A run says which it is, and why."""
    attention_scale: PositiveFloat | None = None
    """Multiplies query . key; None means head_dim ** -0.5."""
    attention_softcap: PositiveFloat | None = None
    logit_scale: PositiveFloat = 1.0
    """Multiplies the logits, before their softcap. At 1 a tied head learns slowly: try 4 to 16 (docs/mup.md)."""
    logit_softcap: PositiveFloat | None = None

    tied: bool = True
    """The output head is the embedding table."""
    embed_scale: PositiveFloat = 1.0
    """Multiplies embeddings (Gemma: sqrt(embed))."""
    embed_norm: bool = False
    """Normalize after adding embeddings and positions."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """On the output of every attention and mlp."""
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """On the weights that softmax gives the keys. The reference alone can do it, and holds them all."""
    embed_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    parametrization: Annotated[str, one_of(names_in("lmjax.parametrization", "PARAMETRIZATIONS"))] = "standard"
    """How initialization, rates and multipliers follow width and depth: docs/mup.md."""
    base: BaseConfig = BaseConfig()
    init_std: PositiveFloat | None = None
    """Standard deviation of every matrix at the start; None means fan_in ** -0.5."""
    embed_init_std: PositiveFloat = 0.02
    residual_init_scale: NonNegativeFloat | None = None
    """Multiplies the start of matrices that write to the residual stream; None means (2 * layers) ** -0.5, with
    the layers of `base` where a parametrization says the rest."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and matmuls; weights are stored in float32."""
    matmul: Literal["float8"] | None = None
    """float8: in training, matrices of attention and dense mlps multiply in 8 bits (docs/performance.md). None: in
    `dtype`."""
    remat: Annotated[str, one_of(names_in("lmjax.models.remat", "REMAT"))] = "none"
    """What the backward pass finds saved: everything, the outputs of weight matmuls, or only each period's input."""
    unroll: Fraction | None = None
    """Fraction of a segment's repeats that the layer scan unrolls; on a mesh, all of them are then gathered at once.
    None unrolls all where that is faster and compiles in seconds: up to 16 layers on a single CPU or GPU, without
    remat."""

    def __post_init__(self) -> None:
        if self.unroll and self.remat != "none":
            raise ConfigError(
                f"model.unroll={self.unroll} undoes model.remat={self.remat}: XLA merges what unrolled layers compute "
                "again with what they computed first; set model.unroll=0 or model.remat=none"
            )
        if self.head_dim is None and self.embed % self.heads:
            raise ConfigError(
                f"model.embed={self.embed} is not divisible by model.heads={self.heads}; set model.head_dim or use "
                f"model.embed={self.embed // self.heads * self.heads or self.heads}"
            )
        if self.heads % (self.kv_heads or self.heads):
            raise ConfigError(f"model.heads={self.heads} must be a multiple of model.kv_heads={self.kv_heads}")
        if not self.pattern:
            raise ConfigError("model.pattern is empty; name at least one layer kind, e.g. ('global',)")
        if "local" in self.pattern and self.window is None:
            raise ConfigError("model.pattern has local layers: set model.window")
        if self.window is not None and "local" not in self.pattern:
            raise ConfigError("model.window is set but model.pattern has no 'local' layer; e.g. ('local', 'global')")
        if self.position == "rope" and self.dims["head_dim"] % 2:
            raise ConfigError(f"rope rotates pairs: the head size {self.dims['head_dim']} must be even")
        if self.moe.experts is None and self.moe != MoeConfig():
            raise ConfigError("model.moe has settings but no experts; set model.moe.experts or leave the others out")
        if self.moe.experts is not None and all(kind.mlp == "dense" for kind in self.kinds):
            raise ConfigError(
                f"model.moe leaves all of model.layers={self.layers} dense; lower model.moe.dense_first="
                f"{self.moe.dense_first} or change model.moe.pattern"
            )
        if self.parametrization == "standard" and self.base != BaseConfig():
            raise ConfigError(
                "model.base is read by a parametrization: set model.parametrization=mup or completep, or leave it out"
            )
        if self.parametrization != "standard":
            self.base_shape  # noqa: B018  # which raises for one that cannot be

    @property
    def dims(self) -> dict[str, int]:
        """The size of every named axis."""
        return {
            "vocab": self.vocab or 1,
            "context": self.context,
            "embed": self.embed,
            "heads": self.heads,
            "kv_heads": self.kv_heads or self.heads,
            "head_dim": self.head_dim or self.embed // self.heads,
            "mlp": self.mlp,
            "experts": self.moe.experts or 1,
            "routes": self.moe.experts or 1,
            "expert_mlp": self.moe.mlp or self.mlp,
            "shared_mlp": self.moe.shared_mlp or 1,
            "shared_gate": 1,
        }

    @property
    def residual_scale(self) -> float:
        """What the start of matrices that write to the residual stream is multiplied by: 2 L of them add up to its
        size (GPT-2)."""
        return (2 * self.base_shape.layers) ** -0.5 if self.residual_init_scale is None else self.residual_init_scale

    @property
    def score_scale(self) -> float:
        """What query . key is multiplied by: 1 / sqrt(head_dim) at the base shape, and from there on as 1 / head_dim,
        since queries and keys that have learned are not independent (Yang et al. 2022, arXiv:2203.03466, 4.1)."""
        base = self.attention_scale or self.base_shape.dims["head_dim"] ** -0.5
        return base / self.growth["head_dim"]

    @property
    def base_shape(self) -> "ModelConfig":
        """The model at the base shape; itself under the standard parametrization."""
        return self if self.parametrization == "standard" else base_shape(self)

    @property
    def growth(self) -> dict[str, float]:
        """The size of every named axis over that of the base shape."""
        base = self.base_shape.dims
        return {axis: size / base[axis] for axis, size in self.dims.items()}

    @property
    def depth(self) -> float:
        """The number of layers over that of the base shape."""
        return self.layers / self.base_shape.layers

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """What each layer is made of, from the input."""
        return tuple(LayerKind(self.pattern[i % len(self.pattern)], self._mlp_of(i)) for i in range(self.layers))

    def _mlp_of(self, layer: int) -> MlpKind:
        if self.moe.experts is None or layer < self.moe.dense_first:
            return "dense"
        return self.moe.pattern[layer % len(self.moe.pattern)]

    @property
    def segments(self) -> Segments:
        """((period, repeats), ...): full periods, then what remains; before them those of `moe.dense_first` alone."""
        first = self.moe.dense_first
        mixed = self.moe.pattern if self.moe.experts is not None else ("dense",)
        period = math.lcm(len(self.pattern), len(mixed))
        return _periods(self.kinds[:first], len(self.pattern)) + _periods(self.kinds[first:], period)

    def window_of(self, kind: LayerKind) -> int | None:
        return self.window if kind.mixer == "local" else None


def base_shape(cfg: ModelConfig) -> ModelConfig:
    """A parametrized model at its base shape. Raises ConfigError for a base that is not given, or no model's."""
    if cfg.base.embed is None or cfg.base.layers is None:
        raise ConfigError(
            f"model.parametrization={cfg.parametrization} needs the shape where the learning rate is known to be good: "
            "set model.base.embed and model.base.layers"
        )
    return reshaped(cfg, cfg.base, "model.base")


def reshaped(cfg: ModelConfig, shape: BaseConfig, where: str) -> ModelConfig:
    """The standard model like `cfg` of another shape, what that does not say in proportion to its embed.

    Raises ConfigError for a size that would not be whole, and for no model's shape; its message begins with `where`.
    """

    def whole(name: str, size: fractions.Fraction) -> int:
        if size.denominator != 1:
            raise ConfigError(f"{where}: {name} would be {float(size):g} in proportion to the other sizes; set it")
        return int(size)

    dims, embed = cfg.dims, shape.embed or cfg.embed
    mlps = fractions.Fraction(embed, cfg.embed) if shape.mlp is None else fractions.Fraction(shape.mlp, cfg.mlp)
    attention = fractions.Fraction(embed, cfg.embed) * dims["heads"] * dims["head_dim"]
    kept = dims["head_dim"] if shape.heads is None else whole("head_dim", attention / shape.heads)
    head_dim = shape.head_dim or kept
    heads = shape.heads or whole("heads", attention / head_dim)
    kv_heads = shape.kv_heads or whole("kv_heads", fractions.Fraction(dims["kv_heads"] * heads, cfg.heads))
    values = dataclasses.asdict(cfg) | {
        "embed": embed,
        "layers": shape.layers or cfg.layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "mlp": whole("mlp", mlps * cfg.mlp),
        "parametrization": "standard",
        "base": {},
    }
    for name in ("mlp", "shared_mlp"):
        if values["moe"][name] is not None:
            values["moe"][name] = whole(f"moe.{name}", mlps * values["moe"][name])
    try:
        return validated(ModelConfig, values)
    except ConfigError as error:
        raise ConfigError(f"{where} is the shape of no model: {error}") from None


def require_learning(cfg: ModelConfig) -> None:
    """Raise ConfigError for a model that computes well but would not learn: a matter of training it alone."""
    if cfg.moe.experts is not None and cfg.moe.top_k == 1 and cfg.moe.normalize:
        raise ConfigError(
            "model.moe.top_k=1 with normalize gives every chosen expert the weight 1, from which no router learns; "
            "set model.moe.normalize=False"
        )


def _periods(kinds: tuple[LayerKind, ...], period: int) -> Segments:
    """A run of layers that repeats every `period` as full periods, then what remains."""
    repeats, rest = divmod(len(kinds), period)
    full = ((kinds[:period], repeats),) if repeats else ()
    remainder = ((kinds[len(kinds) - rest :], 1),) if rest else ()
    return full + remainder


def layer_index(segments: Segments, segment: int, repeat: int, place: int) -> int:
    """A layer's place in the model, counted from the input. `repeat` may be traced."""
    before = sum(len(period) * repeats for period, repeats in segments[:segment])
    return before + repeat * len(segments[segment][0]) + place


def dominant(segments: Segments) -> int:
    """The segment with most layers, the one that a pipeline spreads over its stages."""
    return max(range(len(segments)), key=lambda segment: len(segments[segment][0]) * segments[segment][1])
