"""A teacher reads the samples of a run, and what it says of them is stored: `lmjax teach` (stored.py)."""

import dataclasses
import functools
import re
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath

from lmjax.config import Config
from lmjax.data.batch import Batch
from lmjax.data.store.shards import token_dtype
from lmjax.errors import ConfigError, DataError
from lmjax.finetune.distill import distill, output
from lmjax.finetune.stored import FILE, StoreManifest, read_manifest, write_piece
from lmjax.losses import Likeliest, likeliest
from lmjax.models import architectures
from lmjax.models.model import Model
from lmjax.record import files
from lmjax.tasks.task import Task
from lmjax.weights import Params, abstract

_PIECE_BYTES = 1 << 24
_OURS = re.compile(rf"(\d{{5,}}\.(tokens|logp)|{re.escape(FILE)})(\.tmp)?|lock")


def teach(cfg: Config, out: epath.Path, *, top: int, samples: int | None = None) -> StoreManifest:
    """Store the `top` likeliest tokens of the teacher of a config at every place of its first `samples` samples, by
    default those that its run reads. Goes on behind what is there; on one device.

    Raises what `distill` does, ConfigError for a `top` that is not below the vocabulary, and DataError for a directory
    of other samples or another teacher.
    """
    if cfg.task != "distill" or cfg.train.distill is None or cfg.train.distill.stored is not None:
        raise ConfigError("lmjax teach reads a config with task=distill and train.distill.teacher; set both")
    task, wanted = distill(cfg), samples or cfg.train.steps * cfg.train.batch
    _check_ours(out)
    with files.reporting(out, "write"):
        out.mkdir(parents=True, exist_ok=True)
    with files.locked(out):
        manifest = _begun(task, out, top)
        if wanted <= manifest.samples:
            return manifest
        full = (piece for piece in manifest.pieces if piece.samples == manifest.piece_samples)
        manifest = dataclasses.replace(manifest, pieces=tuple(full))  # the last one is made anew, to be full
        for said in _pieces(task, manifest, wanted):
            manifest = write_piece(out, manifest, said)
            print(f"{manifest.samples:,} of {wanted:,} samples", flush=True)
    return manifest


def _check_ours(out: epath.Path) -> None:
    if out.exists() and (others := [path.name for path in out.iterdir() if not _OURS.fullmatch(path.name)]):
        raise DataError(f"{out} holds other files, such as {others[0]}; choose a new or empty --out")


def _begun(task: Task, out: epath.Path, top: int) -> StoreManifest:
    """What is in the directory, or will be."""
    settings, seq_len = task.cfg.train.distill, task.cfg.data.seq_len
    assert settings is not None and settings.model is not None and task.frozen is not None and task.source is not None
    vocab, teacher = settings.model.vocab, task.frozen.start.digest()
    assert vocab is not None and teacher is not None
    if top >= vocab:
        raise ConfigError(f"--top={top} is not below the {vocab} tokens of the vocabulary; store fewer")
    B, place_bytes = task.cfg.train.batch, top * np.dtype(token_dtype(vocab)).itemsize + 2 * (top + 1)
    new = StoreManifest(
        source=task.source(rows=np.arange(1), at=0).fingerprint,
        teacher=teacher,
        temperature=settings.temperature,
        seq_len=seq_len,
        vocab=vocab,
        top=top,
        piece_samples=B * max(1, _PIECE_BYTES // (B * seq_len * place_bytes)),
    )
    if not (out / FILE).exists():
        return new
    found = read_manifest(out)
    if found.fingerprint != new.fingerprint:
        raise DataError(
            f"{out} holds what another teacher said, or of other samples, at another temperature or --top; choose "
            "another --out"
        )
    return found


def _pieces(task: Task, manifest: StoreManifest, wanted: int) -> Iterator[Likeliest]:
    """What the teacher says of the samples that are not there yet, piece by piece, in whole batches."""
    cfg, settings = task.cfg, task.cfg.train.distill
    assert settings is not None and settings.model is not None and task.frozen is not None and task.source is not None
    teacher, B = architectures.build(settings.model), cfg.train.batch
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    weights = task.frozen.weights(jax.random.key(0), {}, jax.tree.map(lambda _: single, abstract(teacher.spec)))
    say = jax.jit(functools.partial(_say, teacher, manifest, cfg.train.loss.chunk))
    batches = iter(task.source(rows=np.arange(B), at=manifest.samples))
    for first in range(manifest.samples, wanted, manifest.piece_samples):
        samples = min(manifest.piece_samples, wanted - first)
        said = [jax.device_get(say(weights, next(batches))) for _ in range(-(-samples // B))]
        yield Likeliest(*map(np.concatenate, zip(*said, strict=True)))


def _say(teacher: Model, manifest: StoreManifest, chunk: int, weights: Params, batch: Batch) -> Likeliest:
    said, _ = output(teacher, weights, batch)
    return likeliest(said, K=manifest.top, temperature=manifest.temperature, chunk=chunk)
