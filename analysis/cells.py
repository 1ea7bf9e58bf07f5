"""Turn a shape and D into a config that a sweep can train, with a batch that divides over a mesh."""

from lmjax.models.shapes import Shape
from lmjax.optim.hyperparameters import RULES, Scale, rows, updates

SEQUENCE = 2048
FEWEST_STEPS = 200
WARMUP_SHARE = 0.02


def overrides(
    shape: Shape,
    tokens: float,
    *,
    learning_rate: float | None = None,
    batch_tokens: float | None = None,
    devices: int = 8,
    sequence: int = SEQUENCE,
) -> dict[str, object]:
    """Config overrides of one run: the shape, and batch and steps whose product is `tokens` to within a step.

    Learning rate and batch (tokens) are DeepSeek LLM's where they are not given. The batch is a power of two sequences
    on each of `devices`; short runs get a smaller one, for about 200 steps.
    """
    rule = RULES["deepseek"]
    assert rule.batch is not None
    scale = Scale(tokens, shape.embed, shape.layers, sequence, {"layers": shape.params})
    batch = rows(min(batch_tokens or rule.batch(scale), tokens / FEWEST_STEPS), sequence, devices)
    steps = updates(tokens, batch * sequence)
    rate = learning_rate or rule.advise(scale, batch * sequence).learning_rate
    return shape.settings(sequence) | {
        "train.batch": batch,
        "train.steps": steps,
        "optimizer.learning_rate": float(f"{rate:.3g}"),
        "optimizer.schedule.warmup": max(1, round(WARMUP_SHARE * steps)),
    }
