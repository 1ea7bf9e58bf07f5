"""What PEFT saves and computes, for tests that run without it.

Command     python -m tests.finetune.peft_fixtures, where torch, transformers and peft are installed

For each of three families tests/fixtures/peft/NAME has `base/`, a tiny model with weights drawn, `adapter/`, a LoRA
with both factors drawn, and golden.safetensors: tokens, the logits of both together, and the gradient of the mean
next-token loss by each factor.
"""

from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parents[1] / "fixtures" / "peft"
SIZES = {"vocab_size": 19, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"max_position_embeddings": 32, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LLAMA = {**SIZES, "num_key_value_heads": 1, "head_dim": 4}
GPT2 = {"vocab_size": 19, "n_positions": 32, "n_embd": 8, "n_layer": 2, "n_head": 2, "bos_token_id": None}
GPT2 |= {"eos_token_id": None, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}

# transformers' config class, its settings, PEFT's.
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        {**LLAMA, "tie_word_embeddings": False},
        {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"], "lora_alpha": 6},
    ),
    "gpt2": ("GPT2Config", GPT2, {"r": 3, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gemma2": (
        "Gemma2Config",
        {**LLAMA, "query_pre_attn_scalar": 4, "sliding_window": 4},
        {
            "r": 4,
            "target_modules": ["q_proj", "o_proj", "gate_proj"],
            "use_rslora": True,
            "rank_pattern": {"o_proj": 2},
            "alpha_pattern": {"gate_proj": 3},
        },
    ),
}


def write(name: str) -> None:
    import peft
    import torch
    import transformers
    from safetensors.torch import save_file

    kind, settings, adapter = FAMILIES[name]
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings))
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    base.save_pretrained(FIXTURES / name / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **adapter))
    for label, parameter in model.named_parameters():
        if "lora_" in label:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(FIXTURES / name / "adapter")
    tokens_BT = torch.randint(0, 19, (2, 9))
    out = model(input_ids=tokens_BT)
    logits_BTV = out.logits.float()
    torch.nn.functional.cross_entropy(logits_BTV[:, :-1].reshape(-1, 19), tokens_BT[:, 1:].reshape(-1)).backward()
    gradients = {
        label.replace(".default", ""): parameter.grad
        for label, parameter in model.named_parameters()
        if "lora_" in label
    }
    golden = {"tokens": tokens_BT, "logits": logits_BTV.detach(), **{f"gradient {k}": v for k, v in gradients.items()}}
    save_file({key: x.contiguous() for key, x in golden.items()}, FIXTURES / name / "golden.safetensors")


if __name__ == "__main__":
    for name in FAMILIES:
        write(name)
        for extra in (FIXTURES / name).rglob("*"):
            if extra.name in ("README.md", "generation_config.json"):
                extra.unlink()
