"""An IsoFLOP sweep that two CPU cores train in minutes: the first scaling plot on a new machine.

Reproduces  the shape of Hoffmann et al. (2022), approach 2, in miniature: at each of three budgets five sizes of one
            family of models, on the source code of Python's own standard library. Each budget has its lowest loss
            inside its sizes, and the optimum moves to larger models as the budget grows. With `:branches` the runs of
            a size share their first steps: they branch from one trunk, and each decays at its own end.
Costs       9.8e12 FLOPs: three minutes on 2 idle cores of an AMD EPYC.
Command     python -m launch sweep configs/sweeps/cpu_isoflop.py --out=sweeps/first --report
"""

import math
from collections.abc import Iterable

from ml_collections import ConfigDict

from lmjax.cells import Overrides
from lmjax.config import as_config_dict, default_config
from lmjax.data.config import PrepareConfig, SourceConfig, TokenizerConfig
from lmjax.errors import ConfigError

VOCAB, SEQ_LEN, BATCH = 1024, 128, 8

# FLOPs -> (width, layers) of its models.
BUDGETS = {
    1.5e11: [(16, 2), (24, 2), (32, 2), (40, 2), (48, 2)],
    4.5e11: [(24, 2), (32, 2), (40, 2), (48, 2), (64, 2)],
    1.35e12: [(32, 2), (48, 2), (64, 2), (80, 2), (96, 3)],
}


WAYS = ("apart", "branches")
WARMUP, DECAY = 20, 0.2
"""Of branches and trunks: steps of the one, share of all steps of the other."""
KEPT = 100
"""Branches leave a trunk at multiples of so many steps."""


def get_config(how: str = "apart") -> ConfigDict:
    if how not in WAYS:
        raise ConfigError(f"cpu_isoflop.py:{how}: the ways are {', '.join(WAYS)}")
    config = default_config()
    recipe = PrepareConfig(inputs=("stdlib:",), tokenizer=TokenizerConfig(kind="bpe", vocab=VOCAB), seed=2)
    config.data.sources = {"stdlib": as_config_dict(SourceConfig(path="data/stdlib-1024", prepare=recipe))}
    config.data.seq_len = SEQ_LEN

    config.model.activation = "relu_squared"
    config.model.qk_norm = True

    config.optimizer.name = "muon"  # so few updates teach AdamW's larger models little
    config.optimizer.schedule.final_fraction = 0.0
    config.train.batch = BATCH
    config.train.sample.prompts = ()
    config.checkpoint.every = None
    if how == "branches":
        config.optimizer.schedule.name, config.optimizer.schedule.decay_fraction = "wsd", DECAY
        config.checkpoint.every = config.checkpoint.keep_every = KEPT
    return config


def sweep(how: str = "apart") -> Iterable[Overrides]:
    cells: list[Overrides] = [
        {"tracking.name": f"{flops:.2e}-d{width}", **cell(shape(width, layers), flops / flops_per_token(width, layers))}
        for flops, models in BUDGETS.items()
        for width, layers in models
    ]
    return cells if how == "apart" else branches(cells)


def branches(cells: Iterable[Overrides]) -> Iterable[Overrides]:
    """The same cells at a constant rate and its decay; those of a size, if there are several, from one trunk."""
    by_width: dict[int, list[Overrides]] = {}
    for one in cells:
        by_width.setdefault(one["model.embed"], []).append({**one, "optimizer.schedule.warmup": WARMUP})
    for width, members in by_width.items():
        if len(members) == 1:
            yield members[0]
            continue
        left_at = [int(one["train.steps"] * (1 - DECAY)) // KEPT * KEPT for one in members]
        trunk = {"tracking.name": f"trunk-d{width}", "optimizer.schedule.name": "constant", "train.steps": max(left_at)}
        yield {**members[0], **trunk}
        for one, step in zip(members, left_at, strict=True):
            yield {**one, "train.branch_from": f"{trunk['tracking.name']}@{step}"}


def shapes() -> list[Overrides]:
    """For sweeps that grow."""
    return [shape(width, max(2, width // 32)) for width in (16, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256, 384, 512)]


def shape(width: int, layers: int) -> Overrides:
    heads = max(1, width // 64)
    return {"model.embed": width, "model.layers": layers, "model.heads": heads, "model.mlp": 4 * width}


def cell(shape: Overrides, tokens: float) -> Overrides:
    """One of the models, trained on so many tokens; wider ones learn at lower rates."""
    steps = max(20, round(tokens / (BATCH * SEQ_LEN)))
    return {
        **shape,
        "optimizer.learning_rate": float(f"{0.024 * math.sqrt(32 / shape['model.embed']):.3g}"),
        "optimizer.schedule.warmup": max(1, steps // 50),
        "train.steps": steps,
    }


def flops_per_token(width: int, layers: int) -> int:
    """Forward and backward: 6 for each weight of a matmul, the head included, and for each pair of causal attention."""
    matmuls = 12 * layers * width**2 + VOCAB * width
    return 6 * (matmuls + layers * SEQ_LEN * width)
