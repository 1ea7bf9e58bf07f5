"""The convert command: foreign checkpoints into work directories. Back: merge.py."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from lmjax import config as configs
from lmjax.config import Config
from lmjax.data.config import DataConfig
from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.errors import CheckpointError, ConfigError
from lmjax.hf import llama2c
from lmjax.hf.imported import Imported, read_checkpoint
from lmjax.record.checkpoint import Checkpoints
from lmjax.record.trees import one_array_at_a_time
from lmjax.run.workdir import make_workdir
from lmjax.tasks.pretrain import save_tokenizer

SEQ_LEN = 1024


Pins = Sequence[tuple[str, str]]
"""(name of a file, or nothing for the only file of weights; its SHA-256)."""


def from_hf(directory: str, workdir: str, pins: Pins = ()) -> Imported:
    """Make a work directory of a Hugging Face checkpoint: evaluate, generate, inspect and verify then read it.

    Raises what `check_pins`, `read_checkpoint` and `write_workdir` do.
    """
    check_pins(sorted(Path(directory).glob("*.safetensors")), Path(directory), pins)
    target = new_workdir(workdir)
    imported = read_checkpoint(Path(directory))
    write_workdir(imported, target, source=directory)
    return imported


def from_llama2c(path: str, tokenizer: str, workdir: str, pins: Pins = ()) -> Imported:
    """Make a work directory of a llama2.c .bin file and its vocabulary, a .bin or a SentencePiece .model.

    Raises what `llama2c.read`, `llama2c.read_tokenizer` and `write_workdir` do.
    """
    check_pins([Path(path)], Path(path).parent, pins)
    target = new_workdir(workdir)
    cfg, params = llama2c.read(path)
    found = llama2c.read_tokenizer(tokenizer, cfg.dims["vocab"])
    imported = Imported(cfg, jax.tree.map(jnp.asarray, params), found, {})
    write_workdir(imported, target, source=path)
    return imported


def check_flags(given: Mapping[str, Any]) -> None:
    """Raise ConfigError for a flag that the direction needs, or that it would not read."""
    read: dict[str, tuple[str, ...]] = {
        "to_hf": ("out", "step", "dtype", "shard_gb", "layout"),
        "to_peft": ("out", "step"),
        "from_llama2c": ("tokenizer", "sha256"),
        "from_hf": ("sha256",),
        "from_peft": ("base",),
    }
    needed = {
        "to_hf": ("out", "--out=DIR, the directory to write"),
        "to_peft": ("out", "--out=DIR, the directory to write"),
        "from_peft": ("base", "--base=DIR: the run, or the Hugging Face directory, that the adapter is for"),
        "from_llama2c": ("tokenizer", "--tokenizer=FILE: the vocabulary, a .bin or a SentencePiece .model"),
    }
    direction = next(name for name in read if given[name])
    for other, flags in read.items():
        for flag in flags:
            if flag not in read[direction] and given[flag] not in (None, []):
                raise ConfigError(
                    f"{flag_of(flag)} belongs to {flag_of(other)}: {flag_of(direction)} has no use for it"
                )
    if direction in needed and not given[needed[direction][0]]:
        raise ConfigError(f"{flag_of(direction)} needs {needed[direction][1]}")


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_pins(weights: Sequence[Path], directory: Path, pins: Pins) -> None:
    """Raise CheckpointError unless all files that are pinned are what they should be, and if any is, all of weights."""
    if not pins:
        return
    named: dict[str, str] = {}
    for name, digest in pins:
        if not name and len(weights) != 1:
            raise ConfigError(f"--sha256: {directory} has {len(weights)} files of weights; name each, FILE={digest}")
        named[name or weights[0].name] = digest
    if free := [path.name for path in weights if path.name not in named]:
        raise CheckpointError(f"{directory / free[0]} has no --sha256, though others have; name it, too")
    for name, digest in named.items():
        path = directory / name
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"--sha256: cannot read {path}: {error.strerror}") from None
        if found != digest:
            raise CheckpointError(f"{path} has the SHA-256 {found}, not {digest}; it is another file, or damaged")


def new_workdir(workdir: str, flag: str = "--workdir") -> epath.Path:
    """Where a model may be written to. Raises CheckpointError for a directory that is not empty, or not writable."""
    target = epath.Path(workdir)
    if (target / "config.json").exists() or (target / "checkpoints").exists():
        raise CheckpointError(f"{flag}={workdir} holds a run already; choose another")
    if target.is_dir() and any(target.iterdir()):
        raise CheckpointError(f"{flag}={workdir} holds other files; choose a new or empty directory")
    make_workdir(target)
    return target


def write_workdir(imported: Imported, workdir: epath.Path, *, source: str, data: DataConfig | None = None) -> None:
    """The files of a run that has been trained elsewhere: a sealed checkpoint of step 0, tokenizer/, config.json."""
    checkpoints = Checkpoints(workdir / "checkpoints", Config().checkpoint)
    context = one_array_at_a_time(imported.params)
    checkpoints.save(0, {"params": imported.params}, {"source": source}, context=context)
    checkpoints.wait()
    write_tokenizer(imported.tokenizer, imported.files, workdir)
    data = data or DataConfig(seq_len=min(SEQ_LEN, imported.model.context))
    configs.write_json(workdir / "config.json", Config(model=imported.model, data=data))


def write_tokenizer(tokenizer: Tokenizer | None, files: Mapping[str, bytes], workdir: epath.Path) -> None:
    """The tokenizer of a work directory, if there is one, and the files beside it."""
    if tokenizer is None:
        return
    save_tokenizer(tokenizer, workdir)
    for name, content in files.items():
        (workdir / "tokenizer" / name).write_bytes(content)
