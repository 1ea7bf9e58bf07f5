"""Data sets in buckets, brought to local disk before training reads them at random."""

import concurrent.futures
import json
import os

from etils import epath

from lmjax.data.config import DataConfig
from lmjax.data.store import manifest as manifests
from lmjax.data.store.manifest import Manifest
from lmjax.data.store.shards import TOKENIZER, shard_files, shard_sizes
from lmjax.record import files

_STREAMS = 8
_STAMPS = "staged.json"  # size and times of each file when it was last found right


def stage(source: epath.Path, manifest: Manifest, cache: str | None = None) -> epath.Path:
    """Copy a data set into `cache` (by default DataConfig's), every file hashed on the way; return where it is.

    Files that are there already and right are kept, so a second job, or a second try, only reads its disk. Those that
    nobody has touched since they were found right are not hashed again. Raises DataError if the disk is too small,
    before anything is copied, and for a file that is not what the manifest says.
    """
    target = files.locate(cache or DataConfig().cache) / manifest.fingerprint
    with files.reporting(target, "write"):
        target.mkdir(parents=True, exist_ok=True)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    sizes = {name: size for shard in shards for name, size in shard_sizes(shard, manifest.dtype).items()}
    hashes = {name: digest for shard in shards for name, digest in shard_files(shard).items()}
    with files.locked(target):
        stamps = _read_stamps(target / _STAMPS)
        missing = [name for name in sizes if not _is_right(target / name, sizes[name], hashes[name], stamps.get(name))]
        files.require_space(target, sum(sizes[name] for name in missing))
        with concurrent.futures.ThreadPoolExecutor(_STREAMS) as pool:
            copies = [pool.submit(files.fetch, source / n, target / n, hashes[n]) for n in missing]
        for copy in copies:
            copy.result()
        right = {name: files.stamp(target / name) for name in sizes}
        files.write_bytes(target / _STAMPS, json.dumps(right, indent=0).encode())
        (target / TOKENIZER).mkdir(exist_ok=True)
        for path in sorted((source / TOKENIZER).iterdir()):
            name = os.path.basename(os.fspath(path))
            files.write_bytes(target / TOKENIZER / name, files.read_bytes(path))
        manifests.write_manifest(manifest, target)
    return target


def _is_right(path: epath.Path, size: int, digest: str, stamp: str | None) -> bool:
    if not files.has_size(path, size):
        return False
    return stamp == files.stamp(path) or files.hash_file(path) == digest


def _read_stamps(path: epath.Path) -> dict[str, str]:
    """What was noted; where that is gone or damaged, nothing, and every file is hashed."""
    try:
        stamps = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}
