"""The directories of checkpoints: which steps are there, which are sealed, which verify."""

import itertools
import re
import time
import zlib
from collections.abc import Iterator
from typing import Any, NoReturn

from etils import epath

from lmjax.errors import CheckpointError, ConfigError, DataError
from lmjax.process import group
from lmjax.record import files, seal
from lmjax.record.seal import Manifest

SEALED = "SEALED"
RUN_ID = "wandb_id"
"""The file of a work directory that names its run, also in wandb."""


def find_step(path: epath.PathLike, step: int | None = None) -> epath.Path:
    """The directory of a sealed step: of `step` or the newest one in a run's workdir or checkpoints directory, or
    `path` itself. Raises CheckpointError when there is none."""
    path = files.absolute(path)
    if step is None and seal.is_sealed(path):
        return path
    directory = path / "checkpoints" if (path / "checkpoints").exists() else path
    sealed = sealed_steps(directory)
    if step is None and sealed:
        return sealed[-1]
    found = [child for child in sealed if child.name == str(step)]
    if not found:
        which = "checkpoint" if step is None else f"checkpoint of step {step}"
        have = ", ".join(child.name for child in sealed) or "none"
        raise CheckpointError(f"{directory} holds no sealed {which} (sealed steps: {have}); check the path and step")
    return found[0]


def parse_origin(setting: str, value: str) -> tuple[epath.Path, int | None]:
    """The work directory and the step of a setting that names another run, `WORKDIR` or `WORKDIR@STEP`.

    Raises ConfigError for anything else.
    """
    found = re.fullmatch(r"(.+?)(?:@([0-9]+))?", value)
    if found is None or value.endswith("@"):
        raise ConfigError(f"{setting}='{value}' is no WORKDIR or WORKDIR@STEP; is a variable of the shell unset?")
    try:
        return files.locate(found[1]), int(found[2]) if found[2] else None
    except DataError as error:
        raise ConfigError(f"{setting}={value}: {error}") from None


def origin_checkpoint(setting: str, value: str) -> epath.Path:
    """The directory of the sealed checkpoint that such a setting names; of several the newest. Raises ConfigError."""
    workdir, step = parse_origin(setting, value)
    if not (workdir / "checkpoints").is_dir():
        raise ConfigError(f"{setting}={value}: {workdir} is not the work directory of a run")
    try:
        return find_step(workdir, step)
    except CheckpointError as error:
        raise ConfigError(f"{setting}={value}: {error}") from None


def verify(path: epath.PathLike) -> list[str]:
    """What is wrong with one step or with every sealed step of a directory; empty if all is well.

    A step that was never sealed counts for nothing. Raises CheckpointError when there is nothing to verify.
    """
    path = files.absolute(path)
    if seal.is_sealed(path):
        return list(_problems(path))
    directory = path / "checkpoints" if (path / "checkpoints").exists() else path
    steps = sealed_steps(directory)
    if not steps:
        raise CheckpointError(f"{path} holds no sealed checkpoint; check the path")
    return [problem for step in steps for problem in _problems(step)]


def _problems(step: epath.Path) -> Iterator[str]:
    manifest, problems = seal.check(step, hash_files=True)
    yield from (f"{step.name}: {problem}" for problem in problems)
    if not problems and is_foreign(step, manifest):
        yield f"{step.name}: it is a checkpoint of another run"


def sealed_metas(path: epath.PathLike) -> dict[int, dict[str, Any]]:
    """`{step: meta}` of the sealed steps of a run's workdir; those whose seal is damaged are left out."""
    manifests = (seal.read(step)[0] for step in sealed_steps(epath.Path(path) / "checkpoints"))
    return {manifest["step"]: manifest["meta"] for manifest in manifests if manifest}


def newest_sealed(directory: epath.Path) -> epath.Path | None:
    """The last step of a checkpoints directory that was sealed, whether it verifies or not."""
    return next(reversed(sealed_steps(directory)), None)


def step_directories(directory: epath.Path) -> list[epath.Path]:
    """Step directories, sealed or not, in the order of their steps."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))


def sealed_steps(directory: epath.Path) -> list[epath.Path]:
    return [path for path in step_directories(directory) if seal.is_sealed(path)]


def set_aside(path: epath.Path, why: str) -> epath.Path:
    """Give a step, or a file, another name that says why. In a bucket it is copied, then deleted, seal first: a kill in
    between leaves both, and it is set aside again."""
    aside = path.parent / f"{path.name}.{why}-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6}"
    if not files.is_remote(path):
        return path.rename(aside)
    files.copy_in_bucket(path, aside)
    delete(path)
    return aside


def delete(path: epath.Path) -> None:
    """Unseal, then delete: a kill in between leaves an unfinished step, which the next save clears away."""
    (path / seal.MANIFEST).unlink(missing_ok=True)
    if path.exists():
        path.rmtree()


def ever_sealed(directory: epath.Path) -> bool:
    return (directory / SEALED).exists() or any(directory.glob("*.corrupt-*"))


def check(path: epath.Path, hash_files: bool) -> tuple[Manifest, list[str]]:
    """`seal.check`, its hashing shared out among the processes; all of them get the same answer."""

    def share(name: str) -> bool:
        return zlib.crc32(name.encode()) % group.processes() == group.process()

    manifest, problems = seal.check(path, hash_files=hash_files, mine=share)
    if is_foreign(path, manifest):
        refuse_foreign(path)
    found = group.gather("problems of a checkpoint", problems)
    return manifest, group.broadcast("problems of a checkpoint", list(dict.fromkeys(itertools.chain(*found))))


def is_foreign(path: epath.Path, manifest: Manifest) -> bool:
    """Whether a step lies in the work directory of another run than it was saved by; older ones do not say by which."""
    saved_by = manifest.get("meta", {}).get("run")
    return saved_by is not None and run_of(path.parent.parent) not in (None, saved_by)


def refuse_foreign(path: epath.Path) -> NoReturn:
    raise CheckpointError(
        f"checkpoint {path} is sealed, but by another run than that of {path.parent.parent}; move it away, or train in "
        "a workdir of its own (from its weights: --config.train.init_from)"
    )


def run_of(workdir: epath.Path) -> str | None:
    """The id of the run whose work directory this is: of the file that keeps it or, where that is gone or damaged, of
    its checkpoints. None where neither says. Raises CheckpointError where checkpoints of several runs lie there."""
    try:
        text = (workdir / RUN_ID).read_text().strip()
    except (OSError, ValueError):
        text = ""
    if re.fullmatch(r"[0-9a-zA-Z_-]{8,64}", text):
        return text
    found = {meta["run"] for meta in sealed_metas(workdir).values() if isinstance(meta.get("run"), str)}
    if len(found) > 1:
        raise CheckpointError(
            f"{workdir / 'checkpoints'} holds steps of {len(found)} runs, and {RUN_ID}, which says whose they should "
            "be, is gone or damaged; move those of others away"
        )
    return next(iter(found), None)


def read_verified(path: epath.Path, hash_files: bool) -> Manifest:
    manifest, problems = check(path, hash_files)
    if problems:
        raise CheckpointError(
            f"checkpoint {path} is damaged: {'; '.join(problems[:3])}; use another step or restore it from a backup"
        )
    return manifest
