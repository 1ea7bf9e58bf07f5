"""config.json files of published models, as their publishers wrote them, and the parameters these are known to have."""

import contextlib
import json
from typing import Any

import pytest

from lmjax.errors import LmjaxError
from lmjax.hf.config_json import canonical, read_config, write_config
from lmjax.hf.families import FAMILIES, family_of
from lmjax.hf.tensors import expected
from lmjax.models.decoder import weights
from lmjax.weights import count

LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False}
LLAMA |= {"mlp_bias": False, "pretraining_tp": 1, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-05}
QWEN = {"hidden_act": "silu", "rms_norm_eps": 1e-06, "use_sliding_window": False, "attention_dropout": 0.0}
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-06, "head_dim": 256, "attention_bias": False}
GEMMA |= {"query_pre_attn_scalar": 256, "cache_implementation": "hybrid", "max_position_embeddings": 8192}


def sizes(vocab: int, embed: int, mlp: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "vocab_size": vocab,
        "hidden_size": embed,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


# name: (config.json, all parameters, a tied table counted once)
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "gpt2": (
        {
            "activation_function": "gelu_new",
            "architectures": ["GPT2LMHeadModel"],
            "attn_pdrop": 0.1,
            "bos_token_id": 50256,
            "embd_pdrop": 0.1,
            "eos_token_id": 50256,
            "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05,
            "model_type": "gpt2",
            "n_ctx": 1024,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 1024,
            "resid_pdrop": 0.1,
            "summary_activation": None,
            "summary_first_dropout": 0.1,
            "summary_proj_to_labels": True,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
            "vocab_size": 50257,
        },
        124_439_808,
    ),
    "Llama-2-7b": (
        LLAMA | sizes(32_000, 4096, 11_008, 32, 32, 32) | {"max_position_embeddings": 4096, "rope_scaling": None},
        6_738_415_616,
    ),
    "Llama-3.1-8B": (
        LLAMA
        | sizes(128_256, 4096, 14_336, 32, 32, 8)
        | {"max_position_embeddings": 131_072, "rope_theta": 500_000.0, "rope_scaling": LLAMA3 | {"factor": 8.0}}
        | {"tie_word_embeddings": False},
        8_030_261_248,
    ),
    "Llama-3.2-1B": (
        LLAMA
        | sizes(128_256, 2048, 8192, 16, 32, 8)
        | {"max_position_embeddings": 131_072, "rope_theta": 500_000.0, "rope_scaling": LLAMA3, "head_dim": 64}
        | {"tie_word_embeddings": True},
        1_235_814_400,
    ),
    "Mistral-7B-v0.1": (
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "rms_norm_eps": 1e-05}
        | sizes(32_000, 4096, 14_336, 32, 32, 8)
        | {"max_position_embeddings": 32_768, "rope_theta": 10_000.0, "sliding_window": 4096}
        | {"tie_word_embeddings": False, "use_cache": True},
        7_241_732_096,
    ),
    "Qwen2.5-0.5B": (
        QWEN
        | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_window_layers": 24, "use_mrope": False}
        | sizes(151_936, 896, 4864, 24, 14, 2)
        | {"max_position_embeddings": 32_768, "rope_theta": 1_000_000.0, "sliding_window": 32_768}
        | {"tie_word_embeddings": True},
        494_032_768,
    ),
    "Qwen3-0.6B": (
        QWEN
        | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "max_window_layers": 28, "head_dim": 128}
        | sizes(151_936, 1024, 3072, 28, 16, 8)
        | {"max_position_embeddings": 40_960, "rope_theta": 1_000_000, "rope_scaling": None, "sliding_window": None}
        | {"tie_word_embeddings": True, "attention_bias": False},
        596_049_920,
    ),
    "gemma-2-2b": (
        GEMMA
        | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh"}
        | sizes(256_000, 2304, 9216, 26, 8, 4)
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "rope_theta": 10_000.0}
        | {"sliding_window": 4096},
        2_614_341_888,
    ),
    "gemma-3-1b": (
        GEMMA
        | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "max_position_embeddings": 32_768}
        | sizes(262_144, 1152, 6912, 26, 4, 1)
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "rope_theta": 1_000_000}
        | {"rope_local_base_freq": 10_000, "rope_scaling": None, "sliding_window": 512, "sliding_window_pattern": 6},
        999_885_952,
    ),
    "OLMo-2-1B": (
        {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "hidden_act": "silu", "rms_norm_eps": 1e-06}
        | sizes(100_352, 2048, 8192, 16, 16, 16)
        | {"max_position_embeddings": 4096, "rope_theta": 500_000, "rope_scaling": None, "attention_bias": False}
        | {"tie_word_embeddings": False},
        1_484_916_736,
    ),
    "Mixtral-8x7B": (
        {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu", "rms_norm_eps": 1e-05}
        | sizes(32_000, 4096, 14_336, 32, 32, 8)
        | {"max_position_embeddings": 32_768, "rope_theta": 1_000_000.0, "sliding_window": None}
        | {"num_experts_per_tok": 2, "num_local_experts": 8, "output_router_logits": False}
        | {"router_aux_loss_coef": 0.02, "tie_word_embeddings": False},
        46_702_792_704,
    ),
    "Qwen3-30B-A3B": (
        QWEN
        | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "max_window_layers": 48}
        | sizes(151_936, 2048, 6144, 48, 32, 4)
        | {"head_dim": 128, "max_position_embeddings": 40_960, "rope_theta": 1_000_000.0, "rope_scaling": None}
        | {"decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True}
        | {"num_experts": 128, "num_experts_per_tok": 8, "output_router_logits": False, "sliding_window": None}
        | {"router_aux_loss_coef": 0.001, "tie_word_embeddings": False, "attention_bias": False},
        30_532_122_624,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_published_size(name: str) -> None:
    values, parameters = PUBLISHED[name]
    values = json.loads(json.dumps(values))
    family = family_of(values, name)
    cfg = read_config(values, family, name)
    spec = weights(cfg)
    assert count(spec).total == parameters
    expected(family.tensors, spec, cfg.segments)  # every weight has its line, whatever the size
    again = read_config(write_config(cfg, family, "bfloat16"), family, name)
    assert canonical(again) == canonical(cfg)


def test_every_family_has_a_published_model() -> None:
    assert {values["model_type"] for values, _ in PUBLISHED.values()} == set(FAMILIES)


ODD = [None, "x", -1, 0, 1.5, True, float("nan"), float("inf"), 10**30, [], ["full_attention"], [None], [{}], {}]
ODD += [{"rope_type": ["x"], "factor": 2}, {"rope_type": "llama3", "factor": "x"}, {"full_attention": 1}]
RULED = """rope_scaling rope_parameters rope_theta rope_local_base_freq layer_types architectures sliding_window
    use_sliding_window sliding_window_pattern max_window_layers num_key_value_heads query_pre_attn_scalar head_dim
    mlp_only_layers decoder_sparse_step num_local_experts n_inner tie_word_embeddings attention_bias mlp_bias
    partial_rotary_factor""".split()


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_field_of_any_value_is_read_or_refused_in_a_line(name: str) -> None:
    refused = 0
    for field in {*PUBLISHED[name][0], *RULED}:
        for value in ODD:
            values = {**PUBLISHED[name][0], field: value}
            with contextlib.suppress(LmjaxError):
                weights(read_config(values, family_of(values, name), name))
                continue
            refused += 1
    assert refused > 100
