"""What a decoder looks like. One config spans GPT-2, mini-GPT, Llama, Qwen, Gemma, OLMo."""

from typing import Annotated, Literal

from pydantic import Field

from lmjax.errors import ConfigError
from lmjax.models.activations import ACTIVATIONS
from lmjax.models.attention import BACKENDS
from lmjax.models.remat import REMAT
from lmjax.schema import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, config_class, one_of

LayerKind = Literal["global", "local"]
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
class ModelConfig:
    """A decoder-only transformer."""

    vocab: PositiveInt | None = None
    """Rows of the embedding table; None takes the data set's vocabulary."""
    context: PositiveInt = 256
    """Longest sequence the model is meant for (the size of a learned position table)."""
    layers: PositiveInt = 4
    pattern: tuple[LayerKind, ...] = ("global",)
    """One period of layers, repeated; `layers` need not be a multiple of it."""
    window: PositiveInt | None = None
    """How many tokens, itself included, a token sees in local layers."""

    embed: PositiveInt = 128
    heads: PositiveInt = 2
    kv_heads: PositiveInt | None = None
    """Key and value heads, shared by groups of query heads (GQA); None means `heads`."""
    head_dim: PositiveInt | None = None
    """None means embed / heads."""
    mlp: PositiveInt = 512

    activation: Annotated[str, one_of(ACTIVATIONS)] = "gelu"
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
    attention: Annotated[str, one_of(["auto", *BACKENDS])] = "auto"
    """auto: splash on TPU, cudnn on GPU where they can do what is asked, else reference."""
    attention_scale: PositiveFloat | None = None
    """Multiplies query . key; None means head_dim ** -0.5."""
    attention_softcap: PositiveFloat | None = None
    logit_softcap: PositiveFloat | None = None

    tied: bool = True
    """The output head is the embedding table."""
    embed_scale: PositiveFloat = 1.0
    """Multiplies embeddings (Gemma: sqrt(embed))."""
    embed_norm: bool = False
    """Normalize after adding embeddings and positions."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """On the output of every attention and mlp."""
    embed_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    init_std: PositiveFloat | None = None
    """Standard deviation of every matrix at the start; None means fan_in ** -0.5."""
    embed_init_std: PositiveFloat = 0.02
    residual_init_scale: NonNegativeFloat | None = None
    """Multiplies the start of matrices that write to the residual stream; None means (2 * layers) ** -0.5."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and matmuls; weights are stored in float32."""
    remat: Annotated[str, one_of(REMAT)] = "none"
    """What the backward pass finds saved: everything, the outputs of weight matmuls, or only each period's input."""
    unroll: Fraction = 0.0
    """Fraction of a segment's repeats that the layer scan unrolls: 1 compiles longer and may run faster."""

    def __post_init__(self) -> None:
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
        }

    @property
    def segments(self) -> Segments:
        """((period, repeats), ...): full periods, then what remains."""
        repeats, rest = divmod(self.layers, len(self.pattern))
        full = ((self.pattern, repeats),) if repeats else ()
        remainder = ((self.pattern[:rest], 1),) if rest else ()
        return full + remainder

    def window_of(self, kind: LayerKind) -> int | None:
        return self.window if kind == "local" else None


def layer_index(segments: Segments, segment: int, repeat: int, slot: int) -> int:
    """A layer's place in the model, counted from the input. `repeat` may be traced."""
    before = sum(len(period) * repeats for period, repeats in segments[:segment])
    return before + repeat * len(segments[segment][0]) + slot
