"""Data sets in buckets, brought to local disk before training reads them at random."""

import concurrent.futures
import os

from etils import epath

from lmjax.data import manifest as manifests
from lmjax.data import storage
from lmjax.data.config import DataConfig
from lmjax.data.manifest import Manifest
from lmjax.data.shards import TOKENIZER, shard_files, shard_sizes

_STREAMS = 8


def stage(source: epath.Path, manifest: Manifest, cache: str | None = None) -> epath.Path:
    """Copy a data set into `cache` (by default DataConfig's), every file hashed on the way; return where it is.

    Files that are there already and right are kept, so a second job, or a second try, only reads its disk. Raises
    DataError if the disk is too small, before anything is copied, and for a file that is not what the manifest says.
    """
    target = storage.locate(cache or DataConfig().cache) / manifest.fingerprint
    with storage.reporting(target, "write"):
        target.mkdir(parents=True, exist_ok=True)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    sizes = {name: size for shard in shards for name, size in shard_sizes(shard, manifest.dtype).items()}
    hashes = {name: digest for shard in shards for name, digest in shard_files(shard).items()}
    with storage.locked(target):
        missing = [name for name, size in sizes.items() if not storage.has_size(target / name, size)]
        storage.require_space(target, sum(sizes[name] for name in missing))
        with concurrent.futures.ThreadPoolExecutor(_STREAMS) as pool:
            copies = [pool.submit(storage.fetch, source / n, target / n, sizes[n], hashes[n]) for n in missing]
        for copy in copies:
            copy.result()
        (target / TOKENIZER).mkdir(exist_ok=True)
        for path in sorted((source / TOKENIZER).iterdir()):
            name = os.path.basename(os.fspath(path))
            storage.write_atomically(target / TOKENIZER / name, storage.read_bytes(path))
        manifests.write_manifest(manifest, target)
    return target
