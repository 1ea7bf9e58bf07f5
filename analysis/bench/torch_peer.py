"""What `speed.py` measures lmjax against: the same GPT in PyTorch, and generation by Hugging Face transformers.

Of a config that is no GPT (gpt.py) both have the shape (layers, widths, heads, vocabulary, length, biases, activation,
dropout) and otherwise GPT-2's form. Normalization elsewhere costs the same; rotary positions would cost a little more.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from typing import Any

# Our compile times are cold, so PyTorch's are, too.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import numpy as np
import torch  # type: ignore[import-not-found, unused-ignore]
from torch import nn  # type: ignore[import-not-found, unused-ignore]
from torch.nn import functional as F  # type: ignore[import-not-found, unused-ignore]  # noqa: N812

from analysis.bench import gpt
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
        self.post = cfg.norm_position == "post"
        self.attention_norm, self.mlp_norm = layer_norm(cfg), layer_norm(cfg)
        self.qkv, self.output = nn.Linear(D, 3 * D, bias=bias), nn.Linear(D, D, bias=bias)
        self.up, self.down = nn.Linear(D, cfg.mlp, bias=bias), nn.Linear(cfg.mlp, D, bias=bias)
        self.dropout, self.attention_dropout = nn.Dropout(cfg.dropout), cfg.attention_dropout

    def forward(self, x_BTD: Any) -> Any:
        if self.post:
            x_BTD = self.attention_norm(x_BTD + self.dropout(self.attention(x_BTD)))
            return self.mlp_norm(x_BTD + self.dropout(self.mlp(x_BTD)))
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD)))
        return x_BTD + self.dropout(self.mlp(self.mlp_norm(x_BTD)))

    def attention(self, x_BTD: Any) -> Any:
        q_BNTH, k_BNTH, v_BNTH = (
            y_BTD.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y_BTD in self.qkv(x_BTD).chunk(3, dim=-1)
        )
        rate = self.attention_dropout if self.training else 0.0
        y_BNTH = F.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, dropout_p=rate, is_causal=True)
        return self.output(y_BNTH.transpose(1, 2).flatten(2))

    def mlp(self, x_BTD: Any) -> Any:
        return self.down(self.activation(self.up(x_BTD)))


class GPT(nn.Module):
    """tokens, targets -> the mean loss."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(cfg.vocab, cfg.embed), nn.Embedding(cfg.context, cfg.embed)
        self.embed_norm = layer_norm(cfg) if cfg.embed_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.norm = nn.Identity() if cfg.norm_position == "post" else layer_norm(cfg)
        for table in (self.embed, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens_BT: Any, targets_BT: Any) -> Any:
        T = tokens_BT.shape[1]
        x_BTD = self.embed_norm(self.embed(tokens_BT) + self.position(torch.arange(T, device=tokens_BT.device)))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV = F.linear(self.norm(x_BTD), self.embed.weight)
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def layer_norm(cfg: ModelConfig) -> nn.LayerNorm:
    return nn.LayerNorm(cfg.embed, cfg.norm_epsilon, bias=cfg.bias)


@torch.no_grad()
def begin_with(model: GPT, weights: gpt.GPT) -> None:
    """Give the model these weights."""

    def put(ours: Any, x: np.ndarray) -> None:
        ours.copy_(torch.tensor(x))

    def put_affine(ours: Any, *parts: gpt.Affine) -> None:
        """Parts side by side, such as queries, keys and values; PyTorch keeps products as [out, in]."""
        put(ours.weight, np.concatenate([part.weight for part in parts], axis=-1).T)
        if parts[0].bias is not None:
            put(ours.bias, np.concatenate([part.bias for part in parts]))

    put(model.embed.weight, weights.embed_VD)
    put(model.position.weight, weights.position_TD)
    for norm, ours in ((weights.embed_norm, model.embed_norm), (weights.final_norm, model.norm)):
        if norm is not None:
            put_affine(ours, norm)
    for block, layer in zip(model.blocks, weights.layers, strict=True):
        put_affine(block.qkv, *layer.qkv)
        put_affine(block.output, layer.output)
        put_affine(block.up, layer.up)
        put_affine(block.down, layer.down)
        put_affine(block.attention_norm, layer.norms[0])
        put_affine(block.mlp_norm, layer.norms[1])


# Work to be timed: functions of the number of calls, which return when all are done ----------------------------------


def train_steps(cfg: Config, *, compiled: bool) -> gpt.Work:
    """Loss, gradient, clipping and update, with the config's optimizer."""
    torch.manual_seed(0)
    model = GPT(cfg.model)
    if gpt.is_gpt(cfg.model):
        begin_with(model, gpt.initial_weights(cfg))
    model = model.to(DEVICE)
    optimizers = build_optimizers(model, cfg.optimizer)
    loss_of = torch.compile(model) if compiled else model
    data = [
        [torch.from_numpy(x.astype(np.int64)).to(DEVICE) for x in (batch.tokens_BT, batch.targets_BT)]
        for batch in gpt.batches(cfg)
    ]

    def step(tokens_BT: Any, targets_BT: Any) -> Any:
        with autocast(cfg.model.dtype):
            loss = loss_of(tokens_BT, targets_BT)
        loss.backward()
        if cfg.optimizer.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), cfg.optimizer.clip_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def run(steps: int) -> float:
        for i in range(steps):
            loss = step(*data[i % len(data)])
        wait()
        return float(loss)

    return run


def build_optimizers(model: GPT, cfg: OptimizerConfig) -> list[Any]:
    """AdamW, or Muon for the blocks' matrices and AdamW for the rest."""
    muon = [p for p in model.blocks.parameters() if p.ndim == 2] if cfg.name == "muon" else []
    chosen = set(muon)
    rest = [p for p in model.parameters() if p not in chosen]
    adamw = torch.optim.AdamW(
        rest, lr=cfg.learning_rate, betas=(cfg.b1, cfg.b2), eps=cfg.eps, weight_decay=cfg.weight_decay, fused=True
    )
    return [adamw, torch.optim.Muon(muon, lr=cfg.learning_rate, momentum=cfg.momentum)] if muon else [adamw]


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
