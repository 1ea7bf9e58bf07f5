"""One plain model of a work directory, with an array in place of each weight, for another one or for transformers.

On several devices each weight is spread over them, as the run's `mesh` or `--layout` says, from the file that it is
read from to the file that it is written to: no device holds the whole model.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from lmjax import config as configs
from lmjax.config import Config
from lmjax.data.config import DataConfig
from lmjax.devices import mesh as meshes
from lmjax.devices.config import MeshConfig
from lmjax.devices.place import use_mesh
from lmjax.errors import ConfigError
from lmjax.hf.imported import Imported, write_checkpoint
from lmjax.hf.tokenizer_files import kept_files
from lmjax.models import decoder
from lmjax.models.read import as_array
from lmjax.record.trees import one_array_at_a_time
from lmjax.registry import without_data
from lmjax.run.convert import new_workdir, write_workdir
from lmjax.run.trained import load_trained
from lmjax.weights import Params, Spec, Weight, abstract, map_weights


def merge(workdir: str, out: str, *, step: int | None = None, layout: str | None = None) -> Imported:
    """Make a work directory of one that stands on frozen weights, with an array in place of each weight.

    Raises what `read_workdir` and `write_workdir` do.
    """
    target = new_workdir(out, "--out")
    imported, data = read_workdir(workdir, step, layout)
    write_workdir(imported, target, source=workdir, data=data)
    return imported


def to_hf(
    workdir: str, out: str, *, step: int | None, dtype: str, shard_bytes: int, layout: str | None = None
) -> list[str]:
    """Write the model of a work directory for transformers; the names of the files.

    Raises what `read_workdir` and `write_checkpoint` do.
    """
    imported, _ = read_workdir(workdir, step, layout)
    return write_checkpoint(Path(out), imported, dtype=dtype, shard_bytes=shard_bytes)


def read_workdir(workdir: str, step: int | None, layout: str | None = None) -> tuple[Imported, DataConfig]:
    """The model of a work directory, with an array in place of each weight, and the data that it was trained on.

    Raises what `trained.load_trained` and `mesh_for` do, and ConfigError for adapters that no array can replace.
    """
    cfg = configs.from_json(epath.Path(workdir) / "config.json")
    mesh = mesh_for(cfg, layout)
    with one_array_at_a_time(abstract(decoder.weights(cfg.model))):
        trained = load_trained(workdir, step, mesh=mesh)
    with use_mesh(mesh):
        weights = merged(trained.model.spec, trained.params)
    imported = Imported(trained.cfg.model, weights, trained.tokenizer, kept_files(epath.Path(workdir) / "tokenizer"))
    return imported, trained.cfg.data


def mesh_for(cfg: Config, layout: str | None) -> jax.sharding.Mesh | None:
    """All devices as the run's mesh, or in another layout; None for a single one, which does where each would hold all.

    Raises ConfigError for a mesh that does not fit the devices, or does not divide the weights.
    """
    wanted = cfg.mesh if layout is None else MeshConfig(layout=layout)
    if len(meshes.own_devices()) == 1 or wanted.layout == "dp":
        return None
    try:
        mesh = meshes.make_mesh(wanted)
        meshes.shardings(without_data(cfg).spec, mesh)
    except ConfigError as error:
        raise ConfigError(f"{error}; or name another --layout (dp: one device has all)") from None
    return mesh


def merged(spec: Spec, params: Params) -> Params:
    """An array in float32 in place of each weight, laid out as it is; one weight after another."""

    def one(weight: Weight, w: Any) -> jax.Array:
        return as_array(weight, w).astype(jnp.float32)

    whole: Params = map_weights(lambda weight, w: jax.jit(one, static_argnums=0)(weight, w), spec, params)
    return whole
