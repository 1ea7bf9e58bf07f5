"""The lessons of configs/tune/instruct.py under a tiny model."""

from pathlib import Path

from lmjax import config as configs
from lmjax.config import Config

CONFIG = Path(__file__).parents[2] / "configs" / "tune" / "instruct.py"
STEPS = 8
SETTINGS = (
    "model.layers=2",
    "model.embed=16",
    "model.mlp=24",
    "data.seq_len=192",
    "optimizer.schedule.warmup=1",
    "optimizer.learning_rate=0.03",
    f"train.steps={STEPS}",
    "train.batch=4",
    "train.microbatches=2",
    "train.log_every=1",
    "train.evaluate_every=4",
    "train.sample.tokens=4",
    "checkpoint.every=4",
)


def settings(place: Path, *more: str) -> list[str]:
    """Those of a run whose data are prepared in `place`."""
    return [*SETTINGS, f"data.sources.lessons.path={place / 'lessons'}", *more]


def tiny(place: Path, *more: str) -> Config:
    return configs.load(str(CONFIG), settings(place, *more))
