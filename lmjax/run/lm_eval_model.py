"""A work directory as `--model lmjax` of EleutherAI's own command line: what `--model_args` say of it."""

from typing import Any

from lmjax.errors import ConfigError
from lmjax.evaluate.harness import HarnessModel
from lmjax.run.benchmarks import scorer
from lmjax.run.trained import load_trained

_BATCH = 16  # rows at a time under --batch_size auto


class WorkDirectory(HarnessModel):
    """`workdir=runs/mine`, and if need be `step=800` and `seq_len=512`; `--batch_size` changes speed, not results."""

    def __init__(
        self,
        workdir: str = "",
        step: int | None = None,
        seq_len: int | None = None,
        batch_size: int | str = _BATCH,
        **others: Any,
    ) -> None:
        """Raises ConfigError for other arguments, and what `load_trained` does."""
        if unknown := {name for name in others if name not in ("device", "max_batch_size")}:
            raise ConfigError(f"--model_args {min(unknown)}: lmjax reads workdir, step and seq_len")
        if not workdir:
            raise ConfigError("--model_args workdir=DIR is missing: a trained run")
        batch = int(batch_size) if str(batch_size).isdecimal() else _BATCH
        super().__init__(scorer(load_trained(str(workdir), step), batch=batch, seq_len=seq_len))
