"""Measures the tables of docs/parallelism.md on eight fake CPU devices: python -m analysis.bench.parallelism_page

Nothing is run: the train step is compiled for every layout, and XLA's text and memory analysis are read.
"""

import dataclasses
import os
from collections import defaultdict
from typing import Any

os.environ |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}

import jax

from lmjax.config import Config
from lmjax.data.config import DataConfig
from lmjax.devices import place
from lmjax.devices.config import MeshConfig
from lmjax.devices.mesh import LAYOUTS
from lmjax.models.config import ModelConfig, MoeConfig
from lmjax.plan.collectives import collectives
from lmjax.registry import without_data
from lmjax.run import assemble
from lmjax.train.config import TrainConfig

SIZES: dict[str, Any] = {"vocab": 1024, "layers": 4, "embed": 128, "heads": 8, "gated": True, "tied": False}
DENSE = ModelConfig(**SIZES, mlp=512)
MIXTURE = ModelConfig(**SIZES, moe=MoeConfig(experts=8, top_k=2, mlp=256))
SENT = Config(model=DENSE, data=DataConfig(seq_len=256), train=TrainConfig(batch=16))
# Weights are small beside activations, as they are in long rows.
LONG = ModelConfig(vocab=256, layers=4, embed=64, heads=2, mlp=128)
SHARE = 512  # tokens of a row that one device holds
MB = 1e6


def program(cfg: Config, devices: list[Any] | None = None) -> tuple[Any, assemble.Experiment]:
    experiment = assemble.assemble(without_data(cfg), devices)
    state, batch, step = (
        assemble.abstract_state(experiment),
        assemble.abstract_batch(experiment),
        assemble.jitted_step(experiment),
    )
    with place.use_mesh(experiment.mesh):
        return step.lower(state, {}, batch).compile(), experiment


def sent(layout: str) -> str:
    """A row of the table of collectives."""
    model = MIXTURE if "expert" in LAYOUTS[layout] else DENSE
    compiled, experiment = program(dataclasses.replace(SENT, model=model, mesh=MeshConfig(layout=layout)))
    assert experiment.mesh is not None
    shape, sums = dict(experiment.mesh.shape), defaultdict[str, float](float)
    for one in collectives(compiled.as_text()):
        sums[f"{one.kind} over {' x '.join(one.axes(shape))}"] += one.sent / MB
    mesh = " x ".join(f"{axis} {size}" for axis, size in shape.items() if size > 1)
    state = assemble.device_bytes(assemble.abstract_state(experiment)) / MB
    listed = "; ".join(f"{name} {n:.2f}" for name, n in sorted(sums.items(), key=lambda item: -item[1]) if n > 0.05)
    return f"| `{layout}` | {mesh} | {state:.2f} | {listed} |"


def temporaries(attention: str, context: int) -> float:
    """Bytes of a device beside state and batch, when so many devices share rows of SHARE tokens each."""
    cfg = Config(
        model=dataclasses.replace(LONG, attention=attention),
        data=DataConfig(seq_len=SHARE * context),
        train=TrainConfig(batch=1),
        mesh=MeshConfig(layout="cp"),
    )
    return program(cfg, jax.devices()[:context])[0].memory_analysis().temp_size_in_bytes


def main() -> None:
    print("| devices of a row | its tokens | ring attention, MB | keys gathered, MB |\n| --- | --- | --- | --- |")
    for context in (1, 2, 4, 8):
        ring, gathered = (temporaries(attention, context) / MB for attention in ("ring", "reference"))
        print(f"| {context} | {SHARE * context} | {ring:.1f} | {gathered:.1f} |", flush=True)
    jax.config.update("jax_disable_most_optimizations", True)  # the quicker, and the same collectives
    print("\n| layout | mesh | state, MB | a device sends per step, MB |\n| --- | --- | --- | --- |")
    for layout, axes in LAYOUTS.items():
        if "pipeline" not in axes:  # pipeline_table.py measures those
            print(sent(layout), flush=True)


if __name__ == "__main__":
    main()
