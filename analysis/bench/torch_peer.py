"""What `speed.py` measures lmjax against: a plain PyTorch GPT, and generation by Hugging Face transformers.

Both have the config's shape (layers, widths, heads, vocabulary, length, biases, activation, dropout) and otherwise
GPT-2's form: LayerNorm before each part, learned positions, tied head. Normalization elsewhere costs the same; rotary
positions would cost a little more.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from typing import Any

# Our compile times are cold, so PyTorch's are, too.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import torch  # type: ignore[import-not-found, unused-ignore]
from torch import nn  # type: ignore[import-not-found, unused-ignore]
from torch.nn import functional as F  # type: ignore[import-not-found, unused-ignore]  # noqa: N812

from lmjax.config import Config
from lmjax.models.config import ModelConfig
from lmjax.optim.config import OptimizerConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ACTIVATIONS = {"relu": F.relu, "relu_squared": lambda x: F.relu(x).square(), "gelu": F.gelu}
HF_ACTIVATIONS = {"relu": "relu", "relu_squared": "relu2", "gelu": "gelu_new"}

if DEVICE == "cuda":
    torch.set_float32_matmul_precision("high")  # TF32, as JAX multiplies float32 by default


# The model --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        D, bias = cfg.embed, cfg.bias
        self.heads, self.activation = cfg.heads, ACTIVATIONS[cfg.activation]
        self.attention_norm, self.mlp_norm = nn.LayerNorm(D, bias=bias), nn.LayerNorm(D, bias=bias)
        self.qkv, self.output = nn.Linear(D, 3 * D, bias=bias), nn.Linear(D, D, bias=bias)
        self.up, self.down = nn.Linear(D, cfg.mlp, bias=bias), nn.Linear(cfg.mlp, D, bias=bias)
        self.dropout, self.attention_dropout = nn.Dropout(cfg.dropout), cfg.attention_dropout

    def forward(self, x_BTD: Any) -> Any:
        q_BNTH, k_BNTH, v_BNTH = (
            y_BTD.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y_BTD in self.qkv(self.attention_norm(x_BTD)).chunk(3, dim=-1)
        )
        rate = self.attention_dropout if self.training else 0.0
        y_BNTH = F.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, dropout_p=rate, is_causal=True)
        x_BTD = x_BTD + self.dropout(self.output(y_BNTH.transpose(1, 2).flatten(2)))
        return x_BTD + self.dropout(self.down(self.activation(self.up(self.mlp_norm(x_BTD)))))


class GPT(nn.Module):
    """tokens, targets -> the mean loss."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(cfg.vocab, cfg.embed), nn.Embedding(cfg.context, cfg.embed)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.norm = nn.LayerNorm(cfg.embed, bias=cfg.bias)
        for table in (self.embed, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens_BT: Any, targets_BT: Any) -> Any:
        T = tokens_BT.shape[1]
        x_BTD = self.embed(tokens_BT) + self.position(torch.arange(T, device=tokens_BT.device))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV = F.linear(self.norm(x_BTD), self.embed.weight)
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


# Work to be timed: functions of the number of calls, which return when all are done ----------------------------------


def train_steps(cfg: Config, *, compiled: bool) -> Callable[[int], None]:
    """Loss, gradient, clipping and update, with the config's optimizer."""
    torch.manual_seed(0)
    model = GPT(cfg.model).to(DEVICE)
    optimizers = build_optimizers(model, cfg.optimizer)
    loss_of = torch.compile(model) if compiled else model
    rows = torch.randint(cfg.model.vocab, (8, cfg.train.batch, cfg.data.seq_len + 1), device=DEVICE)

    def step(row_BT: Any) -> None:
        with autocast(cfg.model.dtype):
            loss = loss_of(row_BT[:, :-1], row_BT[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), cfg.optimizer.clip_norm or float("inf"))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def run(steps: int) -> None:
        for i in range(steps):
            step(rows[i % len(rows)])
        wait()

    return run


def build_optimizers(model: GPT, cfg: OptimizerConfig) -> list[Any]:
    """AdamW, or Muon for the blocks' matrices and AdamW for the rest."""
    muon = [p for p in model.blocks.parameters() if p.ndim == 2] if cfg.name == "muon" else []
    chosen = set(muon)
    rest = [p for p in model.parameters() if p not in chosen]
    adamw = torch.optim.AdamW(
        rest, lr=1e-4, betas=(cfg.b1, cfg.b2), eps=cfg.eps, weight_decay=cfg.weight_decay, fused=True
    )
    return [adamw, torch.optim.Muon(muon, lr=1e-4, momentum=cfg.momentum)] if muon else [adamw]


def generations(cfg: ModelConfig, *, batch: int, prompt: int, tokens: int) -> Callable[[int], None] | None:
    """Greedy `generate` of transformers' GPT-2 with its KV cache; None when transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    import transformers  # type: ignore[import-not-found, unused-ignore]

    shape = transformers.GPT2Config(
        vocab_size=cfg.vocab,
        n_positions=cfg.context,
        n_embd=cfg.embed,
        n_layer=cfg.layers,
        n_head=cfg.heads,
        n_inner=cfg.mlp,
        activation_function=HF_ACTIVATIONS[cfg.activation],
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(shape).to(DEVICE, getattr(torch, cfg.dtype)).eval()
    tokens_BT = torch.randint(1, cfg.vocab, (batch, prompt), device=DEVICE)
    mask_BT = torch.ones_like(tokens_BT)

    def run(calls: int) -> None:
        for _ in range(calls):
            ids = model.generate(tokens_BT, attention_mask=mask_BT, max_new_tokens=tokens, do_sample=False)
            assert ids.shape == (batch, prompt + tokens)
        wait()

    return run


def autocast(dtype: str) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if dtype == "float32" else torch.autocast(DEVICE, getattr(torch, dtype))


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def versions() -> str:
    """Versions, threads and the device that PyTorch runs on."""
    names = ["torch"] + ["transformers"] * (importlib.util.find_spec("transformers") is not None)
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"{found} on {DEVICE} with {torch.get_num_threads()} threads"
