"""A run merged on a mesh; run by test_runs.py in a process with 8 devices, and the writing in one with a single one."""

import os
from pathlib import Path

import jax
import pytest

from lmjax.run.merge import merge, read_workdir, to_hf

TUNED, OUT = os.environ["LMJAX_TUNED"], Path(os.environ["LMJAX_OUT"])

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_each_device_holds_an_eighth_of_every_matrix() -> None:
    imported, _ = read_workdir(TUNED, None, "fsdp")
    held = sum(w.addressable_shards[0].data.nbytes for w in jax.tree.leaves(imported.params))
    assert held < sum(w.nbytes for w in jax.tree.leaves(imported.params)) / 7


def test_it_is_written() -> None:
    name, layout = {1: ("one", None), 8: ("eight", "fsdp")}[jax.device_count()]
    merge(TUNED, str(OUT / name), layout=layout)
    to_hf(TUNED, str(OUT / f"{name}-hf"), step=None, dtype="float32", shard_bytes=1 << 30, layout=layout)
