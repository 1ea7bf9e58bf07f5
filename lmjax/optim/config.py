"""What a user sets about the optimizer, and the same as traced scalars."""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from lmjax.errors import ConfigError
from lmjax.names import names_in
from lmjax.schema import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, config_class, one_of

if TYPE_CHECKING:
    from lmjax.optim.schedules import Hyper

Momentum = Annotated[float, Field(ge=0, lt=1)]


@config_class
class ScheduleConfig:
    """The learning rate over time, relative to its peak; formulas in schedules.py."""

    name: Annotated[str, one_of(names_in("lmjax.optim.schedules", "SCHEDULES"))] = "cosine"
    warmup: NonNegativeInt = 100
    """Updates of linear warmup."""
    final_fraction: Fraction = 0.1
    """Learning rate at the end over the peak (inverse_sqrt: its floor; constant has no end)."""
    decay_fraction: Fraction = 0.2
    """wsd, wsd_sqrt: the part of all updates, at the end, in which the learning rate falls."""


@config_class
class OptimizerConfig:
    """One optimizer and all scalars any of them reads; formulas in rules.py."""

    name: Annotated[str, one_of(names_in("lmjax.optim.rules", "OPTIMIZERS"))] = "adamw"
    learning_rate: PositiveFloat = 1e-3
    """The peak; for muon, of the hidden matrices."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled: matrices and tables shrink by learning_rate * weight_decay per update; scales and biases do not."""
    b1: Momentum = 0.9
    """adamw, lion, muon's AdamW part: decay of the first moment."""
    b2: Momentum = 0.95
    """adamw, muon's AdamW part: decay of the second moment. lion: decay of its momentum (0.99 is usual)."""
    eps: Annotated[float, Field(ge=1e-30)] = 1e-8
    """adamw, muon's AdamW part: added to the root of the second moment."""
    momentum: Momentum = 0.95
    """sgd, muon: Nesterov momentum."""
    adam_rate: NonNegativeFloat = 0.5
    """muon: learning rate of all that is not a hidden matrix, over `learning_rate`."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest global gradient norm; None is off."""
    schedule: ScheduleConfig = ScheduleConfig()


def hyper(cfg: OptimizerConfig, *, steps: int, seed: int = 0) -> "Hyper":
    """All scalar hyperparameters of a run of `steps` updates, as arrays that the compiled step takes as input.

    Raises ConfigError when the schedule's phases do not fit into `steps`.
    """
    import jax.numpy as jnp

    check(cfg.schedule, steps)
    scalars = {
        "learning_rate": cfg.learning_rate,
        "weight_decay": cfg.weight_decay,
        "b1": cfg.b1,
        "b2": cfg.b2,
        "eps": cfg.eps,
        "momentum": cfg.momentum,
        "adam_rate": cfg.adam_rate,
        "clip_norm": jnp.inf if cfg.clip_norm is None else cfg.clip_norm,
        "warmup": cfg.schedule.warmup,
        "steps": steps,
        "final_fraction": cfg.schedule.final_fraction,
        "decay_fraction": cfg.schedule.decay_fraction,
    }
    return {name: jnp.asarray(value, jnp.float32) for name, value in scalars.items()} | {"seed": jnp.uint32(seed)}


def check(schedule: ScheduleConfig, steps: int) -> None:
    """Raise ConfigError unless warmup, and for wsd also the decay, fit into `steps` updates."""
    decay = round(schedule.decay_fraction * steps) if schedule.name.startswith("wsd") else 0
    if schedule.warmup + decay > steps:
        phases = f"warmup={schedule.warmup}" + (f" plus decay_fraction={schedule.decay_fraction:g}" if decay else "")
        raise ConfigError(f"optimizer.schedule: {phases} does not fit into {steps} steps; lower warmup or train longer")
