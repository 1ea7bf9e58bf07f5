"""s3:// as buckets.py wants it."""

from typing import Any

from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem

from lmjax.record.buckets import SETTINGS, insist, or_nothing


class Bucket(S3FileSystem):
    """Raises StorageError where the store, not what it answers, is the trouble."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**SETTINGS | {"config_kwargs": {"retries": {"total_max_attempts": 1}}} | settings)

    async def _ls(self, path: str, detail: bool = False, **words: Any) -> Any:
        return await or_nothing(super()._ls(path, detail=detail, **words))

    async def _call_s3(self, method: str, *args: Any, **words: Any) -> Any:
        request = super()._call_s3
        place = "/".join(filter(None, (words.get("Bucket"), words.get("Key") or words.get("Prefix"))))
        return await insist(f"s3://{place}", lambda: request(method, *args, **words))

    call_s3 = sync_wrapper(_call_s3)  # which files upload by
