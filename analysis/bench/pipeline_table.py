"""Writes the table of docs/pipeline.md, from programs compiled for eight fake devices.

python -m analysis.bench.pipeline_table
"""

import dataclasses
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

from lmjax.config import Config
from lmjax.data.config import DataConfig
from lmjax.devices import place
from lmjax.devices.config import MeshConfig
from lmjax.models.config import ModelConfig
from lmjax.models.flops import matrix_products
from lmjax.models.pipeline import Schedule
from lmjax.plan.collectives import collectives
from lmjax.registry import without_data
from lmjax.run import assemble
from lmjax.train.config import TrainConfig

ROWS, LAYERS, EMBED, MLP = 2, 8, 256, 1024
BASE = Config(
    model=ModelConfig(vocab=768, layers=LAYERS, embed=EMBED, heads=4, mlp=MLP, remat="full"),
    data=DataConfig(seq_len=512),
)
RUNS = [(1, 8), (2, 8), (4, 4), (4, 8), (4, 16), (8, 8), (8, 16)]


def row(stages: int, microbatches: int) -> str:
    """Of a mesh of so many stages and nothing else, and microbatches of two rows."""
    train = TrainConfig(batch=ROWS * microbatches, microbatches=microbatches)
    experiment = assemble.assemble(
        without_data(dataclasses.replace(BASE, train=train, mesh=MeshConfig(data=1, pipeline=stages)))
    )
    with place.use_mesh(experiment.mesh):
        step = assemble.jitted_step(experiment)
        traced = step.trace(assemble.abstract_state(experiment), {}, assemble.abstract_batch(experiment))
        program = traced.lower().compile()
    into = [one for one in matrix_products(traced.jaxpr.jaxpr) if one.equation.outvars[0].aval.shape[-1] == MLP]
    (applied,) = {one.times for one in into if (EMBED, MLP) in [x.aval.shape for x in one.equation.invars]}
    useful = microbatches * LAYERS // stages
    permuted = sum(one.sent for one in collectives(program.as_text()) if one.kind == "collective-permute")
    memory = program.memory_analysis()
    cells = (
        f"{stages} | {microbatches} | {applied} | {useful} | {1 - useful / applied:.1%}",
        f"{Schedule(stages, microbatches).bubble:.1%} | {permuted / 2**20:.1f}",
        f"{memory.argument_size_in_bytes / 2**20:.1f} | {memory.temp_size_in_bytes / 2**20:.1f}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    names = "stages", "microbatches", "layers applied", "of use", "bubble, counted", "by formula"
    print(f"| {' | '.join(names)} | permuted, MiB | state, MiB | temporary, MiB |")
    print("| --- " * 9 + "|")
    for run in RUNS:
        print(row(*run), flush=True)
