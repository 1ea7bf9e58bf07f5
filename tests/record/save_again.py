"""Restore a run's newest state onto the mesh of this process (or of these processes), save it elsewhere, and take the
next step, whose loss and gradient norm process 0 says as JSON.

python -m launch local ... -- python tests/record/save_again.py WORKDIR OUT "fsdp=2 tensor=2"
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

from lmjax import config
from lmjax.data.loader import Loader, LoaderState
from lmjax.devices import place
from lmjax.devices.config import MeshConfig
from lmjax.metrics import finish
from lmjax.process import ending, group
from lmjax.record.checkpoint import Checkpoints
from lmjax.record.config import CheckpointConfig
from lmjax.run import assemble
from lmjax.run.assemble import Experiment
from lmjax.schema import validated
from lmjax.tasks.pretrain import without_data
from lmjax.train.state import TrainState


def main(workdir: Path, out: Path, mesh: str) -> None:
    group.start(os.environ, timeout=60, on_loss=lambda message: ending.exit_now(message, 6))
    sizes = dict(setting.split("=") for setting in mesh.split())
    cfg = dataclasses.replace(config.from_json(workdir / "config.json"), mesh=validated(MeshConfig, sizes))
    parts = assemble.assemble(without_data(cfg))
    restored = Checkpoints(workdir / "checkpoints", CheckpointConfig()).restore(assemble.abstract_state(parts))
    assert restored is not None
    state, meta, step = restored
    again = Checkpoints(out, CheckpointConfig())
    again.save(step, state, meta)
    again.wait()
    say_next_step(parts, state, meta["data"])
    group.finish()


def say_next_step(parts: Experiment, state: TrainState, position: LoaderState) -> None:
    cfg, size = parts.cfg, parts.cfg.train.batch
    rows = place.local_rows(parts.mesh, size)
    batch = next(iter(Loader(cfg.data, batch_size=size, rows=rows, at=position)))
    _, metrics = assemble.compiled_step(parts)(state, {}, place.shard_batch(batch, parts.mesh, size))
    values = finish(metrics)
    print(json.dumps({name: values[name] for name in ("loss", "grad_norm")}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
