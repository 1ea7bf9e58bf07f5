"""What a checkpoint holds, as a table."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from lmjax.errors import CheckpointError, one_line
from lmjax.record import seal
from lmjax.record.seal import Manifest
from lmjax.record.steps import find_step, read_verified, step_directories
from lmjax.record.trees import ORBAX_TURN, count_parts, orbax


def inspect(path: epath.PathLike, *, step: int | None = None, hashes: bool = False) -> dict[str, Any]:
    """What a checkpoint holds: `step, path, time, value, bytes, meta, leaves, parts, steps` and, on request, `hashes`.

    `leaves` maps each path to `[shape, dtype]`; `parts` maps params, opt_state, ... to leaves, entries and bytes;
    `steps` lists the directory's steps; `hashes` maps each part to a hash of its contents alone, the same
    on whatever mesh and by whatever version it was saved. Raises CheckpointError for a step that does not verify.
    """
    found = find_step(path, step)
    manifest = read_verified(found, hash_files=hashes)
    report = {
        "step": manifest["step"],
        "path": os.fspath(found),
        "time": manifest["time"],
        "value": manifest["value"],
        "bytes": sum(size for _, size in manifest["files"].values()),
        "meta": manifest["meta"],
        "leaves": manifest["leaves"],
        "parts": count_parts(manifest["leaves"]),
        "steps": [_summary(child) for child in step_directories(found.parent)],
    }
    if hashes:
        report["hashes"] = {part: _content_hash(found, manifest, part) for part in report["parts"]}
    return report


def format_inspection(report: Mapping[str, Any]) -> str:
    """The report of `inspect` as text."""
    lines = [f"checkpoint {report['path']}  ({report['bytes'] / 1e6:.1f} MB)", ""]
    for name, value in report["meta"].items():
        lines.append(f"  {name}: {json.dumps(value)}")
    lines += ["", f"  {'part':<28}{'leaves':>8}{'entries':>16}{'MB':>10}  {'hash' if 'hashes' in report else ''}"]
    for part, (leaves, entries, size) in report["parts"].items():
        content = report.get("hashes", {}).get(part, "")
        lines.append(f"  {part:<28}{leaves:>8,}{entries:>16,}{size / 1e6:>10.1f}  {content}")
    lines += ["", f"  {'leaf':<60}{'dtype':>10}  shape"]
    lines += [f"  {path:<60}{dtype:>10}  {tuple(shape)}" for path, (shape, dtype) in report["leaves"].items()]
    lines += ["", f"  {'step':<12}{'sealed':>8}{'MB':>10}{'value':>12}"]
    for row in report["steps"]:
        value = "" if row["value"] is None else f"{row['value']:.5g}"
        lines.append(f"  {row['step']:<12}{'yes' if row['sealed'] else 'no':>8}{row['bytes'] / 1e6:>10.1f}{value:>12}")
    return "\n".join(line.rstrip() for line in lines)


def _summary(path: epath.Path) -> dict[str, Any]:
    manifest, problems = seal.read(path)
    size = sum(file.stat().length for file in seal.files(path).values())
    return {"step": int(path.name), "sealed": not problems, "bytes": size, "value": manifest.get("value")}


def _content_hash(path: epath.Path, manifest: Manifest, part: str) -> str:
    """Hash of path, dtype, shape and C-order bytes of each leaf of a part."""
    digest = hashlib.blake2b(digest_size=16)
    leaves = {name: leaf for name, leaf in manifest["leaves"].items() if name.split("/")[0] == part}
    abstract = {name: np.empty(shape, jax.numpy.dtype(dtype)) for name, (shape, dtype) in leaves.items()}
    try:
        with ORBAX_TURN:
            arrays = orbax().load(path, dict.fromkeys(manifest["leaves"], orbax().PLACEHOLDER) | abstract)
    except Exception as error:
        raise CheckpointError(f"checkpoint {path} verifies but cannot be loaded: {one_line(error, 300)}") from error
    for name in sorted(leaves):
        digest.update(json.dumps([name, leaves[name]]).encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
