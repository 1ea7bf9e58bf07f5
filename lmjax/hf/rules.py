"""Parts of config.json where fields hang together: activation, biases, windows, rotary positions, scales."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from lmjax.errors import ConfigError
from lmjax.hf.config_json import Fields, Json, Rule, shortest_period
from lmjax.models.config import ModelConfig, RopeConfig

# Activation -------------------------------------------------------------------------------------------------------

# Their name -> ours; the first name of each is the one we write.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
    "relu2": "relu_squared",
}


def activation(name: str) -> Rule:
    """The activation in the field `name`."""

    def read(fields: Fields) -> dict[str, Any]:
        theirs = fields.take(name)
        if not isinstance(theirs, str) or theirs not in _ACTIVATIONS:
            raise fields.refuse(name, f"is no activation known here; there is {', '.join(_ACTIVATIONS)}")
        return {"activation": _ACTIVATIONS[theirs]}

    def write(cfg: ModelConfig) -> Json:
        return {name: next((theirs for theirs, ours in _ACTIVATIONS.items() if ours == cfg.activation), None)}

    return Rule(read, write)


# Biases -----------------------------------------------------------------------------------------------------------


def _read_llama_bias(fields: Fields) -> dict[str, Any]:
    attention, mlp = boolean(fields, "attention_bias"), boolean(fields, "mlp_bias")
    if mlp and not attention:
        raise fields.refuse("mlp_bias", "without attention_bias is not supported")
    return {"bias": attention and mlp, "attention_bias": attention and not mlp}


LLAMA_BIAS = Rule(
    _read_llama_bias, lambda cfg: {"attention_bias": cfg.bias or cfg.attention_bias, "mlp_bias": cfg.bias}
)


# Windows ----------------------------------------------------------------------------------------------------------


def _kinds(fields: Fields, types: Any) -> tuple[str, ...]:
    names = {"full_attention": "global", "sliding_attention": "local"}
    known = isinstance(types, list) and all(one in [*names] for one in types)
    if not known or len(types) != fields.take("num_hidden_layers"):
        raise fields.refuse("layer_types", f"must name {' or '.join(names)} for every layer")
    return tuple(names[one] for one in types)


def _window(pattern: tuple[str, ...], window: Any) -> dict[str, Any]:
    return {"pattern": pattern, "window": window if "local" in pattern else None}


def _types(cfg: ModelConfig) -> list[str]:
    return ["sliding_attention" if kind.mixer == "local" else "full_attention" for kind in cfg.kinds]


def _size(fields: Fields) -> int | None:
    """The size of the window, if there is one; a field that nothing uses must make sense, too."""
    return None if fields.take("sliding_window") is None else integer(fields, "sliding_window")


def _switched_size(fields: Fields) -> int | None:
    use, window = boolean(fields, "use_sliding_window"), _size(fields)
    return window if use else None


def _read_one_window(fields: Fields) -> dict[str, Any]:
    window = _size(fields)
    return _window(("global",) if window is None else ("local",), window)


# Mistral: every layer slides, or none.
ONE_WINDOW = Rule(_read_one_window, lambda cfg: {"sliding_window": cfg.window})


def _read_switched_window(fields: Fields) -> dict[str, Any]:
    window = _switched_size(fields)
    return _window(("global",) if window is None else ("local",), window)


# Qwen 3 MoE: the same, with a switch.
SWITCHED_WINDOW = Rule(
    _read_switched_window,
    lambda cfg: {"use_sliding_window": cfg.window is not None, "sliding_window": cfg.window},
)


def _read_late_windows(fields: Fields) -> dict[str, Any]:
    window, first = _switched_size(fields), integer(fields, "max_window_layers", least=0)
    layers, types = integer(fields, "num_hidden_layers"), fields.take("layer_types")
    if types is None:
        return _window(_late_pattern(layers, layers if window is None else first), window)
    return _window(shortest_period(_kinds(fields, types)), window)


def _late_pattern(layers: int, first: int) -> tuple[str, ...]:
    if first >= layers:
        return ("global",)
    return ("local",) if first <= 0 else ("global",) * first + ("local",) * (layers - first)


def _write_late_windows(cfg: ModelConfig) -> Json:
    types = _types(cfg)
    first = types.index("sliding_attention") if cfg.window else len(types)
    return {
        "use_sliding_window": cfg.window is not None,
        "sliding_window": cfg.window,
        "max_window_layers": first,
        "layer_types": types,
    }


# Qwen: from some layer on, if at all.
LATE_WINDOWS = Rule(_read_late_windows, _write_late_windows)


def periodic_windows(period: int) -> Rule:
    """Gemma: every layer slides but each `period`-th, unless layer_types or sliding_window_pattern say otherwise."""

    def read(fields: Fields) -> dict[str, Any]:
        types, length = fields.take("layer_types"), period
        for name in ("sliding_window_pattern", "_sliding_window_pattern"):
            length = integer(fields, name) if fields.has(name) else length
        if types is not None:
            return _window(shortest_period(_kinds(fields, types)), _size(fields))
        return _window(("local",) * (length - 1) + ("global",), _size(fields))

    def write(cfg: ModelConfig) -> Json:
        return {"sliding_window": cfg.window, "layer_types": _types(cfg)}

    return Rule(read, write)


# Experts ----------------------------------------------------------------------------------------------------------


def _read_mixtral(fields: Fields) -> dict[str, Any]:
    return {"moe": {"experts": integer(fields, "num_local_experts"), "top_k": integer(fields, "num_experts_per_tok")}}


MIXTRAL = Rule(_read_mixtral, lambda cfg: {"num_local_experts": cfg.moe.experts, "num_experts_per_tok": cfg.moe.top_k})


def _read_qwen_moe(fields: Fields) -> dict[str, Any]:
    layers, step = integer(fields, "num_hidden_layers"), integer(fields, "decoder_sparse_step")
    dense = fields.take("mlp_only_layers")
    dense = [] if dense is None else dense
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise fields.refuse("mlp_only_layers", "is not a list of layers")
    experts = "num_local_experts" if fields.has("num_local_experts") else "num_experts"  # transformers 5, and before
    kinds = ["dense" if i in dense or (i + 1) % step else "moe" for i in range(layers)]
    return {
        "moe": {
            "experts": integer(fields, experts),
            "top_k": integer(fields, "num_experts_per_tok"),
            "mlp": integer(fields, "moe_intermediate_size"),
            "normalize": fields.take("norm_topk_prob"),
            "pattern": shortest_period(tuple(kinds)),
        }
    }


def _write_qwen_moe(cfg: ModelConfig) -> Json:
    return {
        "num_experts": cfg.moe.experts,
        "num_experts_per_tok": cfg.moe.top_k,
        "moe_intermediate_size": cfg.dims["expert_mlp"],
        "norm_topk_prob": cfg.moe.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, kind in enumerate(cfg.kinds) if kind.mlp == "dense"],
    }


QWEN_MOE = Rule(_read_qwen_moe, _write_qwen_moe)


# Rotary positions -------------------------------------------------------------------------------------------------

# Of each rope_type: its keys -> ours. Both spellings of the type's own name are read.
_ROPE_KEYS: dict[str, Mapping[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
        "original_max_position_embeddings": "original_context",
    },
    "yarn": {
        "factor": "factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "original_max_position_embeddings": "original_context",
    },
}
_OUR_SCALING = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}


def _scaling(fields: Fields, name: str, values: Json) -> tuple[float | None, dict[str, Any]]:
    """(theta if it stands here, settings of RopeConfig) of a rope_scaling or rope_parameters object."""
    values = {key: value for key, value in values.items() if value is not None}
    for key in set(values) - {"rope_type", "type", "truncate"}:
        _require_number(fields, f"{name}.{key}", values[key])
    theta = values.pop("rope_theta", None)
    kinds = {str(values.pop(key)) for key in ("rope_type", "type") if key in values}
    kind = kinds.pop() if kinds else "default"
    if kinds or kind not in _ROPE_KEYS:
        raise ConfigError(f"{fields.where}: {name}.rope_type={kind!r} is not supported; there is {list(_ROPE_KEYS)}")
    if values.pop("partial_rotary_factor", 1) != 1:
        raise ConfigError(f"{fields.where}: {name}.partial_rotary_factor is not supported; it must be 1")
    if kind == "yarn" and values.get("truncate") is True:  # what it means to leave it out
        values.pop("truncate")
    keys = _ROPE_KEYS[kind]
    unknown = sorted(set(values) - set(keys))
    if unknown:
        raise ConfigError(f"{fields.where}: {name}.{unknown[0]} is not supported with rope_type {kind!r}")
    settings = {keys[key]: value for key, value in values.items()}
    if kind != "default" and "factor" not in settings:
        raise ConfigError(f"{fields.where}: {name} has no factor; rope_type {kind!r} needs it")
    if "original_max_position_embeddings" in keys:
        settings.setdefault("original_context", fields.take("max_position_embeddings"))
    return theta, {"scaling": _OUR_SCALING[kind], **settings}


def _require_number(fields: Fields, name: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{fields.where}: {name}={json.dumps(value)[:80]} is not a number")


def _rope_object(fields: Fields) -> tuple[str, Json]:
    """The one of the two names of this object that is there; older files say rope_scaling."""
    old, new = fields.take("rope_scaling"), fields.take("rope_parameters")
    for name, value in {"rope_scaling": old, "rope_parameters": new}.items():
        if not isinstance(value, dict | None):
            raise fields.refuse(name, "is not an object")
    return ("rope_scaling", old) if old else ("rope_parameters", new or {})


def _read_rope(fields: Fields) -> dict[str, Any]:
    name, values = _rope_object(fields)
    theta, settings = _scaling(fields, name, values)
    outside = fields.take("rope_theta")
    return {"rope": {"theta": outside if theta is None else theta, **settings}}


def _write_scaling(rope: RopeConfig) -> Json | None:
    kind = next(theirs for theirs, ours in _OUR_SCALING.items() if ours == rope.scaling)
    if kind == "default":
        return None
    values = {theirs: getattr(rope, ours) for theirs, ours in _ROPE_KEYS[kind].items()}
    return {"rope_type": kind, **{key: value for key, value in values.items() if value is not None}}


ROPE = Rule(_read_rope, lambda cfg: {"rope_theta": cfg.rope.theta, "rope_scaling": _write_scaling(cfg.rope)})


def _read_two_ropes(fields: Fields) -> dict[str, Any]:
    name, values = _rope_object(fields)
    theta, local_theta = fields.take("rope_theta"), fields.take("rope_local_base_freq")
    if name == "rope_parameters":
        kinds = ("full_attention", "sliding_attention")
        if not set(values) <= {*kinds} or not all(isinstance(one, dict) for one in values.values()):
            raise fields.refuse(name, f"must hold an object for each of {' and '.join(kinds)}")
        values, local = (dict(values.get(kind, {})) for kind in kinds)
        inside = local.pop("rope_theta", None)
        local_theta = local_theta if inside is None else inside
        if local.pop("rope_type", "default") != "default" or local:
            raise fields.refuse(name, "is not supported: sliding_attention must not be scaled")
    inside, settings = _scaling(fields, name, values)
    return {"rope": {"theta": theta if inside is None else inside, "local_theta": local_theta, **settings}}


def _write_two_ropes(cfg: ModelConfig) -> Json:
    return {
        "rope_theta": cfg.rope.theta,
        "rope_local_base_freq": cfg.rope.local_theta or cfg.rope.theta,
        "rope_scaling": _write_scaling(cfg.rope),
    }


# Gemma 3: local layers turn with their own base and are never scaled.
TWO_ROPES = Rule(_read_two_ropes, _write_two_ropes)
_LARGEST = 1_000_000


# Sizes and scales -------------------------------------------------------------------------------------------------


def optional(name: str, ours: str, otherwise: Callable[[Fields], Any]) -> Rule:
    """A size whose absence or null means another one."""

    def read(fields: Fields) -> dict[str, Any]:
        value = fields.take(name)
        return {ours: otherwise(fields) if value is None else value}

    return Rule(read, lambda cfg: {name: cfg.dims[ours]})


def integer(fields: Fields, name: str, *, least: int = 1) -> int:
    """A field that others are computed from."""
    value = fields.take(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _LARGEST:
        raise fields.refuse(name, f"is not an integer from {least} to {_LARGEST}")
    return value


def boolean(fields: Fields, name: str) -> bool:
    """A switch; null is off."""
    value = fields.take(name)
    if not isinstance(value, bool | None):
        raise fields.refuse(name, "is neither true nor false")
    return bool(value)


KV_HEADS = optional("num_key_value_heads", "kv_heads", lambda fields: integer(fields, "num_attention_heads"))
HEAD_DIM = optional(
    "head_dim", "head_dim", lambda fields: integer(fields, "hidden_size") // integer(fields, "num_attention_heads")
)
GPT2_MLP = optional("n_inner", "mlp", lambda fields: 4 * integer(fields, "n_embd"))

# Gemma multiplies embeddings by the square root of their width.
EMBED_SCALE = Rule(lambda fields: {"embed_scale": integer(fields, "hidden_size") ** 0.5}, lambda cfg: {})
QUERY_SCALE = Rule(
    lambda fields: {"attention_scale": integer(fields, "query_pre_attn_scalar") ** -0.5},
    lambda cfg: {"query_pre_attn_scalar": round((cfg.attention_scale or cfg.dims["head_dim"] ** -0.5) ** -2)},
)
