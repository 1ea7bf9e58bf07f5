"""Batches from the host onto the devices, each written to the ledger before it is used."""

from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import numpy as np

from lmjax.devices.place import replicate, shard_array, shard_batch
from lmjax.process import group
from lmjax.process.faults import fault
from lmjax.record.ledger import Ledger, joined_crc, row_crcs
from lmjax.run.progress import Progress
from lmjax.tasks.task import Source

Item = TypeVar("Item")


def batches(
    progress: Progress, mesh: jax.sharding.Mesh | None, size: int, ledger: Ledger | None, attempt: int
) -> Iterator[Any]:
    """Global batches of `size` rows from where the run stands. `ledger` is None but at process 0."""
    source = progress.source
    for step, (batch, crcs_B, row_bytes) in enumerate(placed(source, mesh, size), progress.start_step + 1):
        fault("data.batch", step)
        if ledger is not None:
            first = progress.accounting.spent(step - 1).samples
            crc = joined_crc(np.asarray(crcs_B), row_bytes)
            ledger.record(attempt, step, first, size, crc, source.fingerprint[:8])
        yield batch


def placed(source: Source, mesh: jax.sharding.Mesh | None, size: int) -> Iterator[tuple[Any, Any, int]]:
    """(a batch on the devices, the CRC of each of its rows from the process that feeds it, bytes of a row).

    Several processes need a collective to learn the others' CRCs. It is sent off one batch ahead: then it is done by
    the time that it is read, and the devices never wait for the ledger.
    """

    def place(batch: Any) -> tuple[Any, Any, int]:
        recorded = source.recorded(batch)
        crcs_B = row_crcs(recorded)
        if group.processes() > 1:
            crcs_B = replicate(mesh, shard_array(crcs_B, "batch", mesh, size))
        return shard_batch(batch, mesh, size), crcs_B, recorded[0].nbytes

    found = map(place, source)
    return found if group.processes() == 1 else prefetch(found)


def prefetch(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each asked for while the one before is being used."""
    item = next(items)
    for following in items:
        yield item
        item = following
    yield item
