"""The families of checkpoints, one table each: names and layouts of tensors, fields of config.json."""

from collections.abc import Mapping
from typing import Any

from lmjax.errors import ConfigError
from lmjax.hf import rules
from lmjax.hf.config_json import Family, n_lost, write_config
from lmjax.hf.tensors import Tensor, tensor
from lmjax.models.config import ModelConfig

# Tensors ----------------------------------------------------------------------------------------------------------


def _in_layers(prefix: str, *lines: Tensor) -> tuple[Tensor, ...]:
    return tuple(line._replace(name=f"{prefix}.{{layer}}.{line.name}") for line in lines)


_OUTSIDE = (
    tensor("model.embed_tokens.weight", "vocab embed", "embed"),
    tensor("model.norm.weight", "embed", "final_norm/scale"),
    tensor("lm_head.weight", "vocab embed", "unembed"),
)
_ATTENTION = _in_layers(
    "model.layers",
    tensor("self_attn.q_proj.weight", "(heads head_dim) embed", "attention/query"),
    tensor("self_attn.k_proj.weight", "(kv_heads head_dim) embed", "attention/key"),
    tensor("self_attn.v_proj.weight", "(kv_heads head_dim) embed", "attention/value"),
    tensor("self_attn.o_proj.weight", "embed (heads head_dim)", "attention/output"),
    tensor("self_attn.q_proj.bias", "(heads head_dim)", "attention/query_bias"),
    tensor("self_attn.k_proj.bias", "(kv_heads head_dim)", "attention/key_bias"),
    tensor("self_attn.v_proj.bias", "(kv_heads head_dim)", "attention/value_bias"),
    tensor("self_attn.o_proj.bias", "embed", "attention/output_bias"),
)
_QK_NORM = _in_layers(
    "model.layers",
    tensor("self_attn.q_norm.weight", "head_dim", "attention/query_norm/scale"),
    tensor("self_attn.k_norm.weight", "head_dim", "attention/key_norm/scale"),
)
_QK_NORM_TOGETHER = _in_layers(
    "model.layers",
    tensor("self_attn.q_norm.weight", "(heads head_dim)", "attention/query_norm/scale"),
    tensor("self_attn.k_norm.weight", "(kv_heads head_dim)", "attention/key_norm/scale"),
)
_MLP = _in_layers(
    "model.layers",
    tensor("mlp.gate_proj.weight", "mlp embed", "mlp/gate"),
    tensor("mlp.up_proj.weight", "mlp embed", "mlp/up"),
    tensor("mlp.down_proj.weight", "embed mlp", "mlp/down"),
    tensor("mlp.gate_proj.bias", "mlp", "mlp/gate_bias"),
    tensor("mlp.up_proj.bias", "mlp", "mlp/up_bias"),
    tensor("mlp.down_proj.bias", "embed", "mlp/down_bias"),
)
_QWEN_EXPERTS = _in_layers(
    "model.layers",
    tensor("mlp.gate.weight", "routes embed", "moe/router"),
    tensor("mlp.experts.{expert}.gate_proj.weight", "expert_mlp embed", "moe/experts/gate"),
    tensor("mlp.experts.{expert}.up_proj.weight", "expert_mlp embed", "moe/experts/up"),
    tensor("mlp.experts.{expert}.down_proj.weight", "embed expert_mlp", "moe/experts/down"),
)
_MIXTRAL_EXPERTS = _in_layers(
    "model.layers",
    tensor("block_sparse_moe.gate.weight", "routes embed", "moe/router"),
    tensor("block_sparse_moe.experts.{expert}.w1.weight", "expert_mlp embed", "moe/experts/gate"),
    tensor("block_sparse_moe.experts.{expert}.w2.weight", "embed expert_mlp", "moe/experts/down"),
    tensor("block_sparse_moe.experts.{expert}.w3.weight", "expert_mlp embed", "moe/experts/up"),
)
_PRE_NORMS = _in_layers(
    "model.layers",
    tensor("input_layernorm.weight", "embed", "attention_norm/scale"),
    tensor("post_attention_layernorm.weight", "embed", "mlp_norm/scale"),
)
_OUTPUT_NORMS = _in_layers(
    "model.layers",
    tensor("post_attention_layernorm.weight", "embed", "attention_output_norm/scale"),
    tensor("post_feedforward_layernorm.weight", "embed", "mlp_output_norm/scale"),
)
_FOUR_NORMS = _OUTPUT_NORMS + _in_layers(
    "model.layers",
    tensor("input_layernorm.weight", "embed", "attention_norm/scale"),
    tensor("pre_feedforward_layernorm.weight", "embed", "mlp_norm/scale"),
)
# Conv1D stores [in, out], and queries, keys and values side by side.
_GPT2 = (
    tensor("transformer.wte.weight", "vocab embed", "embed"),
    tensor("transformer.wpe.weight", "context embed", "position"),
    tensor("transformer.ln_f.weight", "embed", "final_norm/scale"),
    tensor("transformer.ln_f.bias", "embed", "final_norm/bias"),
    tensor("lm_head.weight", "vocab embed", "unembed"),
    *_in_layers(
        "transformer.h",
        tensor("ln_1.weight", "embed", "attention_norm/scale"),
        tensor("ln_1.bias", "embed", "attention_norm/bias"),
        tensor(
            "attn.c_attn.weight",
            "embed (parts heads head_dim)",
            "attention/query",
            "attention/key",
            "attention/value",
        ),
        tensor(
            "attn.c_attn.bias",
            "(parts heads head_dim)",
            "attention/query_bias",
            "attention/key_bias",
            "attention/value_bias",
        ),
        tensor("attn.c_proj.weight", "(heads head_dim) embed", "attention/output"),
        tensor("attn.c_proj.bias", "embed", "attention/output_bias"),
        tensor("ln_2.weight", "embed", "mlp_norm/scale"),
        tensor("ln_2.bias", "embed", "mlp_norm/bias"),
        tensor("mlp.c_fc.weight", "embed mlp", "mlp/up"),
        tensor("mlp.c_fc.bias", "mlp", "mlp/up_bias"),
        tensor("mlp.c_proj.weight", "mlp embed", "mlp/down"),
        tensor("mlp.c_proj.bias", "embed", "mlp/down_bias"),
    ),
)

# Fields of config.json --------------------------------------------------------------------------------------------

_FIELDS = {
    "vocab_size": "vocab",
    "hidden_size": "embed",
    "intermediate_size": "mlp",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "max_position_embeddings": "context",
    "rms_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "tied",
}
_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
_QWEN_DEFAULTS = {
    **_DEFAULTS,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_GEMMA_DEFAULTS = {
    **_DEFAULTS,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}
_GEMMA_FIELDS = {
    **_FIELDS,
    "attention_bias": "attention_bias",
    "final_logit_softcapping": "logit_softcap",
}
_ROUTER_TRAINING = frozenset({"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"})
_LLAMA_FIXED = {"gated": True, "position": "rope", "norm": "rms", "norm_position": "pre"}
_SIZES = (rules.KV_HEADS, rules.HEAD_DIM)
_GEMMA_FIXED = {**_LLAMA_FIXED, "norm_position": "pre_and_output", "norm_offset": 1.0}
_GEMMA_RULES = (*_SIZES, rules.activation("hidden_activation"), rules.EMBED_SCALE, rules.QUERY_SCALE)
# Read by no code of the family: hidden_activation took its place.
_GEMMA_IRRELEVANT = frozenset({"hidden_act", "sliding_window_size"})

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        model_type="gpt2",
        architecture="GPT2LMHeadModel",
        fields={
            "vocab_size": "vocab",
            "n_positions": "context",
            "n_embd": "embed",
            "n_layer": "layers",
            "n_head": "heads",
            "layer_norm_epsilon": "norm_epsilon",
            "tie_word_embeddings": "tied",
        },
        defaults={
            "n_positions": 1024,
            "n_inner": None,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
        },
        fixed={"norm": "layer", "norm_position": "pre", "bias": True, "gated": False, "position": "learned"},
        rules=(rules.GPT2_MLP, rules.activation("activation_function")),
        tensors=_GPT2,
        required={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
        irrelevant=frozenset(
            "n_ctx reorder_and_upcast_attn resid_pdrop embd_pdrop attn_pdrop summary_type summary_use_proj "
            "summary_activation summary_proj_to_labels summary_first_dropout gradient_checkpointing".split()
        ),
        prefix="transformer.",
    ),
    "llama": Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        fields=_FIELDS,
        defaults={**_DEFAULTS, "attention_bias": False, "mlp_bias": False},
        fixed=_LLAMA_FIXED,
        rules=(*_SIZES, rules.activation("hidden_act"), rules.LLAMA_BIAS, rules.ROPE),
        tensors=_OUTSIDE + _ATTENTION + _MLP + _PRE_NORMS,
    ),
    "mistral": Family(
        model_type="mistral",
        architecture="MistralForCausalLM",
        fields=_FIELDS,
        defaults={**_DEFAULTS, "num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
        fixed=_LLAMA_FIXED,
        rules=(*_SIZES, rules.activation("hidden_act"), rules.ONE_WINDOW, rules.ROPE),
        tensors=_OUTSIDE + _ATTENTION + _MLP + _PRE_NORMS,
    ),
    "qwen2": Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        fields=_FIELDS,
        defaults=_QWEN_DEFAULTS,
        fixed={**_LLAMA_FIXED, "qkv_bias": True},
        rules=(*_SIZES, rules.activation("hidden_act"), rules.LATE_WINDOWS, rules.ROPE),
        tensors=_OUTSIDE + _ATTENTION + _MLP + _PRE_NORMS,
        required={"use_mrope": (False,)},
    ),
    "qwen3": Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        fields={**_FIELDS, "attention_bias": "attention_bias"},
        defaults={**_QWEN_DEFAULTS, "head_dim": 128, "attention_bias": False},
        fixed={**_LLAMA_FIXED, "qk_norm": True},
        rules=(*_SIZES, rules.activation("hidden_act"), rules.LATE_WINDOWS, rules.ROPE),
        tensors=_OUTSIDE + _ATTENTION + _QK_NORM + _MLP + _PRE_NORMS,
    ),
    "gemma2": Family(
        model_type="gemma2",
        architecture="Gemma2ForCausalLM",
        fields={**_GEMMA_FIELDS, "attn_logit_softcapping": "attention_softcap"},
        defaults={
            **_GEMMA_DEFAULTS,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        fixed=_GEMMA_FIXED,
        rules=(*_GEMMA_RULES, rules.periodic_windows(2), rules.ROPE),
        tensors=_OUTSIDE + _ATTENTION + _MLP + _FOUR_NORMS,
        irrelevant=_GEMMA_IRRELEVANT,
    ),
    "gemma3_text": Family(
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        fields=_GEMMA_FIELDS,
        defaults={
            **_GEMMA_DEFAULTS,
            "max_position_embeddings": 131_072,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "final_logit_softcapping": None,
        },
        fixed={**_GEMMA_FIXED, "qk_norm": True},
        rules=(*_GEMMA_RULES, rules.periodic_windows(6), rules.TWO_ROPES),
        tensors=_OUTSIDE + _ATTENTION + _QK_NORM + _MLP + _FOUR_NORMS,
        required={"attn_logit_softcapping": (None,)},
        irrelevant=_GEMMA_IRRELEVANT,
    ),
    "olmo2": Family(
        model_type="olmo2",
        architecture="Olmo2ForCausalLM",
        fields={**_FIELDS, "attention_bias": "attention_bias"},
        defaults={**_DEFAULTS, "rms_norm_eps": 1e-5, "attention_bias": False},
        fixed={**_LLAMA_FIXED, "norm_position": "output", "qk_norm": True, "qk_norm_heads": "together"},
        rules=(*_SIZES, rules.activation("hidden_act"), rules.ROPE),
        tensors=_OUTSIDE + _ATTENTION + _QK_NORM_TOGETHER + _MLP + _OUTPUT_NORMS,
    ),
    "mixtral": Family(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        fields=_FIELDS,
        defaults={
            **_DEFAULTS,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        fixed=_LLAMA_FIXED,
        rules=(*_SIZES, rules.activation("hidden_act"), rules.ONE_WINDOW, rules.ROPE, rules.MIXTRAL),
        tensors=_OUTSIDE + _ATTENTION + _MIXTRAL_EXPERTS + _PRE_NORMS,
        irrelevant=_ROUTER_TRAINING,
    ),
    "qwen3_moe": Family(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        fields={**_FIELDS, "attention_bias": "attention_bias"},
        defaults={
            **_DEFAULTS,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32_768,
            "attention_bias": False,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "decoder_sparse_step": 1,
            "mlp_only_layers": None,
            "norm_topk_prob": False,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        fixed={**_LLAMA_FIXED, "qk_norm": True},
        rules=(*_SIZES, rules.activation("hidden_act"), rules.SWITCHED_WINDOW, rules.ROPE, rules.QWEN_MOE),
        tensors=_OUTSIDE + _ATTENTION + _QK_NORM + _MLP + _QWEN_EXPERTS + _PRE_NORMS,
        irrelevant=_ROUTER_TRAINING | {"max_window_layers"},
    ),
}


def family_of(values: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json. Raises ConfigError for a model_type that has no table."""
    name = values.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(f"{where}: model_type={name!r} is not supported; there is {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_for(cfg: ModelConfig) -> Family:
    """The first family that a model can be written as. Raises ConfigError with what keeps it from being the nearest."""
    if cfg.parametrization != "standard":
        raise ConfigError(
            f"model.parametrization={cfg.parametrization} multiplies logits, scores and what layers add: no Hugging "
            "Face config has a field for that"
        )
    nearest = min(FAMILIES.values(), key=lambda family: n_lost(cfg, family))
    try:
        write_config(cfg, nearest, "float32")
    except ConfigError as error:
        raise ConfigError(f"no Hugging Face family computes what this model does; the nearest: {error}") from None
    return nearest
