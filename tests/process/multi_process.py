"""What several processes do together: test_group.py starts it with the launcher and reads the JSON it says.

Needs 2 processes x 2 devices, and in DIR a checkpoint `alone` that one process saved.
"""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmjax.config import Config
from lmjax.devices import place
from lmjax.devices.config import MeshConfig
from lmjax.devices.mesh import make_mesh, replicated
from lmjax.errors import ConfigError
from lmjax.process import ending, group
from lmjax.record.checkpoint import Checkpoints
from lmjax.record.config import CheckpointConfig
from lmjax.run import assemble

B, T = 8, 6


def main(directory: Path) -> None:
    group.start(os.environ, timeout=60, on_loss=lambda message: ending.exit_now(message, 6))
    process = group.process()
    report: dict[str, Any] = {"process": process}
    report["shared"] = group.broadcast("x", {"from": process})
    report["gathered"] = group.gather("x", [process, ["zero", "one"][process]])
    vote = group.Vote()
    report["votes"] = [vote(process == 1 and call == 2) for call in range(5)]
    meshes = {
        "data=4": make_mesh(MeshConfig(data=4)),
        "tensor=4": make_mesh(MeshConfig(data=1, tensor=4)),
    }
    report["rows"] = {name: place.local_rows(mesh, B).tolist() for name, mesh in meshes.items()}
    with jax.set_mesh(meshes["data=4"]):  # as between the batches of an evaluation
        report["votes_within"] = [vote(process == 0 and call == 0) for call in range(3)]
    report["refused"] = [refusal(MeshConfig(data=1)), refusal(MeshConfig(data=1, fsdp=2))]
    report["batches"] = "whole"
    for mesh in meshes.values():
        whole_BT, whole_B = np.arange(B * T, dtype=np.int32).reshape(B, T), np.arange(B, dtype=np.uint32)
        rows = place.local_rows(mesh, B)
        placed = (
            place.shard_array(whole_BT[rows], "batch time", mesh, B),
            place.shard_array(whole_B[rows], "batch", mesh, B),
        )
        for found, expected in zip(place.replicate(mesh, placed), (whole_BT, whole_B), strict=True):
            np.testing.assert_array_equal(found, expected)
    report["restored"] = share_checkpoints(directory, meshes["data=4"])
    print(json.dumps(report), file=sys.stderr, flush=True)
    group.finish()
    os.kill(
        os.getpid(), signal.SIGTERM
    )  # as schedulers do when the first of several processes ends: it asks for nothing


def refusal(mesh: MeshConfig) -> str:
    try:
        assemble.make_mesh(dataclasses.replace(Config(), mesh=mesh))
    except ConfigError as error:
        return str(error)
    return "none"


def share_checkpoints(directory: Path, mesh: jax.sharding.Mesh) -> list[Any]:
    """Restore what one process saved, spread over both, and save it from there."""
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    abstract = {
        "w": jax.ShapeDtypeStruct((8, 8), np.float32, sharding=rows),
        "step": jax.ShapeDtypeStruct((), np.int32, sharding=replicated(mesh)),
    }
    restored = Checkpoints(directory / "alone", CheckpointConfig()).restore(abstract)
    assert restored is not None
    state, meta, step = restored
    assert state["w"].sharding == rows and not state["w"].is_fully_addressable
    together = Checkpoints(directory / "together", CheckpointConfig(keep_last=1))
    for number in (3, 4):
        together.save(number, state, meta)
    together.wait()
    return [step, meta]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
