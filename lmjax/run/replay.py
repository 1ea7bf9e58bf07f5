"""One step of a run again, to look at: from the checkpoint before it, on the batch that it read.

A run that ends because its updates were not finite keeps the batches of those steps as they were on the devices,
`batches/22.npz`; any other step's is read from the data again.
"""

import dataclasses
import io
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lmjax import config as configs
from lmjax.devices.place import local_rows, on_host, shard_batch, use_mesh
from lmjax.errors import CheckpointError
from lmjax.process import group
from lmjax.record import files, steps
from lmjax.record.checkpoint import restore_parts
from lmjax.record.trees import leaves_by_path
from lmjax.registry import with_data
from lmjax.run import assemble, rollback
from lmjax.run.assemble import Experiment
from lmjax.run.progress import Progress
from lmjax.train.state import TrainState
from lmjax.train.step import accumulate, sample_keys
from lmjax.weights import map_weights

FOLDER = "batches"


# Keeping ----------------------------------------------------------------------------------------------------------


def keep(workdir: epath.Path, mesh: jax.sharding.Mesh | None, batches: Sequence[tuple[int, Any]]) -> str:
    """Write the batches of these steps down, and say where and of which samples they are. All processes call it."""
    whole = [(step, on_host(mesh, batch)) for step, batch in batches]
    if group.is_leader():
        (workdir / FOLDER).mkdir(exist_ok=True)
        for step, batch in whole:
            content = io.BytesIO()
            np.savez(content, **{name: x for name, x in vars(batch).items() if x is not None})
            files.write_atomically(workdir / FOLDER / f"{step}.npz", content.getvalue())
    last, first = whole[-1][0], whole[0][0]
    ids = np.concatenate([batch.ids_B for _, batch in whole])
    which = f"batch of step {last}" if first == last else f"batches of steps {first} to {last}"
    return f"the {which}, samples {ids[0]} to {ids[-1]}, kept in {workdir / FOLDER}: lmjax replay {workdir} {last}"


def kept(workdir: epath.Path, step: int, like: Any, first_sample: int) -> Any | None:
    """The batch that was kept of a step, of the shapes of `like`, if it begins with this sample; None where none was.

    Raises CheckpointError for a file that does not hold one.
    """
    path = workdir / FOLDER / f"{step}.npz"
    if not path.exists():
        return None
    fields = {name: x for name, x in vars(like).items() if x is not None}
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as found:
            arrays = {name: found[name] for name in fields}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}); remove it to read the data again") from None
    if any((arrays[name].shape, arrays[name].dtype) != (x.shape, x.dtype) for name, x in fields.items()):
        raise CheckpointError(f"{path} is a batch of other shapes; remove it to read the data again")
    return dataclasses.replace(like, **arrays) if arrays["ids_B"][0] == first_sample % 2**31 else None


# Again ------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One weight, or one layer of a stacked one."""

    name: str
    weight: float
    """Norms."""
    gradient: float
    not_finite: int
    """Entries of the gradient."""


class Replay(NamedTuple):
    start: int
    """The step of the checkpoint."""
    samples: tuple[int, int]
    was_kept: bool
    metrics: dict[str, float]
    rows: list[Row]


def replay(workdir: epath.PathLike, step: int) -> Replay:
    """Do the steps from the newest checkpoint before `step` again, and look at that one; nothing is written.

    Raises CheckpointError where there is no such checkpoint, and what preparing a run does.
    """
    workdir = epath.Path(workdir)
    cfg = configs.from_json(workdir / "config.json")
    start = _checkpoint_before(workdir, step)
    task = with_data(cfg)
    experiment = assemble.assemble(task)
    abstract = assemble.abstract_state(experiment)
    wanted = {name: x for name, x in vars(abstract).items() if x is not None and name != "hyper"}
    parts, meta, _ = restore_parts(workdir, wanted, step=start)
    assert task.source is not None
    meta = rollback.resumed(workdir, meta, start)
    source = task.source(rows=local_rows(experiment.mesh, cfg.train.batch), at=meta["data"])
    progress = Progress(task, source, start, meta, devices=1)
    state = TrainState(**parts, hyper=assemble.placed_scalars(experiment))
    frozen = assemble.frozen_params(experiment)
    train_step = assemble.compiled_step(experiment)
    batches = _batches(experiment, workdir, progress)
    for _ in range(start + 1, step):
        batch, _ = next(batches)
        state, _ = train_step(state, frozen, batch)
    batch, was_kept = next(batches)
    rows = _norms(experiment, state, frozen, batch)
    _, metrics = train_step(state, frozen, batch)
    first = progress.accounting.spent(step - 1).samples
    named = {name: float(total / weight) for name, (total, weight) in jax.device_get(metrics).items() if weight}
    return Replay(start, (first, first + cfg.train.batch - 1), was_kept, named, rows)


def _checkpoint_before(workdir: epath.Path, step: int) -> int:
    sealed = [int(path.name) for path in steps.sealed_steps(workdir / "checkpoints")]
    before = [one for one in sealed if one < step]
    if not before:
        have = ", ".join(map(str, sealed)) or "none"
        raise CheckpointError(
            f"{workdir} has no checkpoint before step {step} (sealed steps: {have}); choose a later step"
        )
    return before[-1]


def _batches(experiment: Experiment, workdir: epath.Path, progress: Progress) -> Iterator[tuple[Any, bool]]:
    """(a step's batch on the devices, whether it was kept)."""
    size = experiment.cfg.train.batch
    for number, batch in enumerate(progress.source, progress.start_step + 1):
        first = progress.accounting.spent(number - 1).samples
        found = kept(workdir, number, batch, first)
        yield shard_batch(batch if found is None else found, experiment.mesh, size), found is not None


def _norms(experiment: Experiment, state: TrainState, frozen: Any, batch: Any) -> list[Row]:
    """The norms of every weight and of its gradient; a stack of layers has one for each."""

    def gradients(state: TrainState, batch: Any) -> Any:
        keys_B = sample_keys(state.hyper["seed"], batch.ids_B)
        microbatches = experiment.cfg.train.microbatches
        return accumulate(experiment.task.objective, state, frozen, batch, keys_B, microbatches)[0]

    def measured(weight: Any, w: jax.Array, gradient: jax.Array) -> jax.Array:
        over = tuple(range(len(weight.batch_axes), w.ndim))
        norms = [jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), over)) for x in (w, gradient)]
        return jnp.stack([*norms, jnp.sum(~jnp.isfinite(gradient), over).astype(jnp.float32)])

    def measure(state: TrainState, batch: Any) -> Any:
        return map_weights(measured, experiment.task.spec, state.params, gradients(state, batch))

    with use_mesh(experiment.mesh):
        table = jax.jit(measure)(state, batch)
    rows = []
    for name, numbers in leaves_by_path(jax.device_get(table)).items():
        for layer, (weight, gradient, bad) in enumerate(numbers.reshape(3, -1).T.tolist()):
            rows.append(Row(f"{name} [{layer}]" if numbers.ndim > 1 else name, weight, gradient, int(bad)))
    return rows


def described(found: Replay, workdir: epath.PathLike, step: int) -> Iterator[str]:
    """The lines that the command prints."""
    first, last = found.samples
    read = "as it was kept" if found.was_kept else "read from the data again"
    yield f"step {step} of {workdir}, from the checkpoint of step {found.start}: samples {first} to {last}, {read}"
    yield f"  {'weight':<60}{'norm':>12}{'gradient':>12}  not finite"
    for row in found.rows:
        yield f"  {row.name:<60}{row.weight:>12.5g}{row.gradient:>12.5g}  {row.not_finite or ''}".rstrip()
    yield "  ".join(f"{name} {value!r}" for name, value in found.metrics.items())
