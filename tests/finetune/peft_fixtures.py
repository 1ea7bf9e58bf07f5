"""What PEFT saves and computes, for tests that run without it.

Command     python -m tests.finetune.peft_fixtures, where torch, transformers and peft are installed

For each name tests/fixtures/peft/NAME has `base/`, a tiny model with weights drawn, `adapter/`, what PEFT saves of an
adapter whose weights are drawn, too, and golden.safetensors: tokens, the logits of both together, and the gradient of
the mean next-token loss by each weight of the adapter.
"""

from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parents[1] / "fixtures" / "peft"
SIZES = {"vocab_size": 19, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"max_position_embeddings": 32, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LLAMA = {**SIZES, "num_key_value_heads": 1, "head_dim": 4}
GPT2 = {"vocab_size": 19, "n_positions": 32, "n_embd": 8, "n_layer": 2, "n_head": 2, "bos_token_id": None}
GPT2 |= {"eos_token_id": None, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}

EXPERTS = {**LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2, "tie_word_embeddings": False}
EVERYWHERE = ["q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"]

# transformers' config class, its settings, PEFT's, and its config class.
ADAPTERS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        {**LLAMA, "tie_word_embeddings": False},
        "LoraConfig",
        {"r": 2, "target_modules": EVERYWHERE, "lora_alpha": 6},
    ),
    "gpt2": (
        "GPT2Config",
        GPT2,
        "LoraConfig",
        {"r": 3, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
    "gemma2": (
        "Gemma2Config",
        {**LLAMA, "query_pre_attn_scalar": 4, "sliding_window": 4},
        "LoraConfig",
        {
            "r": 4,
            "target_modules": ["q_proj", "o_proj", "gate_proj"],
            "use_rslora": True,
            "rank_pattern": {"o_proj": 2},
            "alpha_pattern": {"gate_proj": 3},
        },
    ),
    "llama_dora": (
        "LlamaConfig",
        {**LLAMA, "tie_word_embeddings": False},
        "LoraConfig",
        {"r": 2, "target_modules": EVERYWHERE, "lora_alpha": 6, "use_dora": True},
    ),
    "gpt2_dora": (
        "GPT2Config",
        GPT2,
        "LoraConfig",
        {"r": 2, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "llama_tied": (
        "LlamaConfig",
        {**LLAMA, "tie_word_embeddings": True},
        "LoraConfig",
        {"r": 2, "target_modules": ["embed_tokens", "o_proj"], "ensure_weight_tying": True, "lora_dropout": 0.1},
    ),
    "llama_ia3": (
        "LlamaConfig",
        {**LLAMA, "tie_word_embeddings": False},
        "IA3Config",
        {"target_modules": ["k_proj", "v_proj", "down_proj", "lm_head"], "feedforward_modules": ["down_proj"]},
    ),
    "mixtral": (
        "MixtralConfig",
        EXPERTS,
        "LoraConfig",
        {
            "r": 2,
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {"mlp.experts.down_proj": 1},
        },
    ),
}


def write(name: str) -> None:
    import peft
    import torch
    import transformers
    from safetensors.torch import save_file

    kind, settings, kind_of_adapter, adapter = ADAPTERS[name]
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings))
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    base.save_pretrained(FIXTURES / name / "base")
    model = peft.get_peft_model(base, getattr(peft, kind_of_adapter)(task_type="CAUSAL_LM", **adapter)).eval()
    own = {label: parameter for label, parameter in model.named_parameters() if parameter.requires_grad}
    for label, parameter in own.items():
        near = "ia3" in label or "magnitude" in label  # what is multiplied by stays near what it is
        start = parameter.detach().clone() if near else 0
        torch.nn.init.normal_(parameter, std=0.3)
        parameter.data += start
    model.save_pretrained(FIXTURES / name / "adapter")
    tokens_BT = torch.randint(0, 19, (2, 9))
    out = model(input_ids=tokens_BT)
    logits_BTV = out.logits.float()
    torch.nn.functional.cross_entropy(logits_BTV[:, :-1].reshape(-1, 19), tokens_BT[:, 1:].reshape(-1)).backward()
    gradients = {label.replace(".default", ""): parameter.grad for label, parameter in own.items()}
    golden = {"tokens": tokens_BT, "logits": logits_BTV.detach(), **{f"gradient {k}": v for k, v in gradients.items()}}
    save_file({key: x.contiguous() for key, x in golden.items()}, FIXTURES / name / "golden.safetensors")


if __name__ == "__main__":
    for name in ADAPTERS:
        write(name)
        for extra in (FIXTURES / name).rglob("*"):
            if extra.name in ("README.md", "generation_config.json"):
                extra.unlink()
