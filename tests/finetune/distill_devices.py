"""A step of distillation on eight devices is that of one. Run by test_distill.py, which says where a teacher is."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.devices.config import MeshConfig
from lmjax.devices.mesh import make_mesh
from lmjax.devices.place import local_rows, shard_batch, use_mesh
from lmjax.errors import ConfigError
from lmjax.finetune.distill import distill
from lmjax.losses import Output, token_divergences
from lmjax.metrics import finish
from lmjax.run import assemble
from tests.finetune.test_distill import student


def step(layout: str, devices: int) -> dict[str, float]:
    place = Path(os.environ["LMJAX_TEST_TEACHER"])
    sizes = ("train.batch=8", "train.microbatches=1", f"mesh.layout={layout}")
    mixed = ("train.distill.share=0.6", "train.distill.temperature=1.5")
    experiment = assemble.assemble(distill(student(place, *sizes, *mixed)), jax.devices()[:devices])
    assert experiment.task.source is not None
    batch = next(iter(experiment.task.source(rows=local_rows(experiment.mesh, 8), at=0)))
    state, frozen = assemble.initial_state(experiment), assemble.frozen_params(experiment)
    _, metrics = assemble.compiled_step(experiment)(state, frozen, shard_batch(batch, experiment.mesh, 8))
    return {name: finish(metrics)[name] for name in ("loss", "divergence", "accuracy", "grad_norm")}


def test_a_step_on_a_mesh_is_that_of_one_device() -> None:
    alone = step("dp", 1)
    for layout in ("dp", "fsdp"):
        for name, value in step(layout, 8).items():
            np.testing.assert_allclose(value, alone[name], rtol=1e-5, err_msg=f"{layout}: {name}")


def test_a_vocabulary_that_devices_share_is_refused() -> None:
    """Half of the words say nothing of how probable any of them is."""
    output = Output(lambda head, x_BTD: x_BTD, {}, jnp.zeros((1, 2, 4)))
    mesh, settings = make_mesh(MeshConfig(layout="tp"), jax.devices()[:2]), {"divergence": "forward_kl", "chunk": 2}
    with use_mesh(mesh), pytest.raises(ConfigError, match="task=distill needs whole vocabularies"):
        token_divergences(output, output, jnp.zeros((1, 2), int), temperature=1.0, **settings)  # type: ignore[arg-type]
