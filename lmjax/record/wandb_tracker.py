"""A view of a run in Weights & Biases."""

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal

from etils import epath

from lmjax.errors import one_line
from lmjax.record.config import TrackingConfig
from lmjax.record.tracking import Status

logger = logging.getLogger(__name__)


class WandbTracker:
    """A Weights & Biases run that training never waits for.

    All calls run in order on a thread of their own. A call that raises, or a queue that fills up because one hangs,
    turns the tracker off with one warning. Only process 0 makes one.
    """

    _INIT_SECONDS = 15
    _CLOSE_SECONDS = 60

    def __init__(self, cfg: TrackingConfig, run_id: str, name: str, workdir: epath.PathLike) -> None:
        """`run_id` is the same for every restart of a run, which rejoins it."""
        self._cfg, self._run_id, self._name, self._workdir = cfg, run_id, name, os.fspath(workdir)
        self._run: Any = None
        self._off = False
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=10_000)
        self._thread = threading.Thread(target=self._work, name="lmjax-wandb", daemon=True)
        self._thread.start()

    def start(self, info: Mapping[str, Any]) -> None:
        self._submit(lambda: self._init(dict(info)))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._submit(lambda: self._run.log(dict(values), step=step))

    def summary(self, values: Mapping[str, Any]) -> None:
        self._submit(lambda: self._run.summary.update(dict(values)))

    def close(self, status: Status) -> None:
        """Waits a bounded time for what is left to be written or uploaded."""
        self._submit(lambda: self._finish(status))
        self._submit(None)
        if self._off:
            return
        self._thread.join(self._CLOSE_SECONDS)
        if self._thread.is_alive():
            self._turn_off(f"still busy after {self._CLOSE_SECONDS} s")

    def _submit(self, call: Callable[[], None] | None) -> None:
        if self._off:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._turn_off("it does not answer")

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception as error:
                self._turn_off(repr(error))
            if self._off:
                return

    def _turn_off(self, why: str) -> None:
        if not self._off:
            self._off = True
            logger.warning("wandb is off from here on (%s); metrics.jsonl has everything", why)
            # Left to itself wandb would wait for its dead or stuck service when the process exits.
            threading.Thread(target=_leave, args=(self,), name="lmjax-wandb-teardown", daemon=True).start()

    def _init(self, info: dict[str, Any]) -> None:
        if self._cfg.wandb == "offline" or not self._try_online(info):
            self._open("offline", info)
            logger.warning("wandb records offline; upload with:  wandb sync %s", self._run.settings.sync_dir)
        self._run.define_metric("tokens")
        self._run.define_metric("flops")
        self._run.define_metric("*", step_metric="tokens")

    def _try_online(self, info: dict[str, Any]) -> bool:
        import wandb

        try:
            self._open("online", info)
        except wandb.Error as error:  # no key, no network, no such entity
            logger.warning("wandb cannot be reached: %s", one_line(error, 200))
            _leave(self)  # else the service holds the run id
            return False
        return True

    def _open(self, mode: Literal["online", "offline"], info: dict[str, Any]) -> None:
        import wandb

        # Silent also keeps wandb from prompting for a key; console capture and metadata would record secrets.
        settings = wandb.Settings(
            silent=True,
            console="off",
            save_code=False,
            x_disable_meta=True,
            init_timeout=self._INIT_SECONDS,
            reinit="create_new",  # others may train in this process
        )
        with _changing:
            _users.add(self)
        self._run = wandb.init(
            project=self._cfg.project,
            entity=self._cfg.entity,
            group=self._cfg.group,
            tags=list(self._cfg.tags),
            job_type="pretrain",
            name=self._cfg.name or self._name,
            id=self._run_id,
            resume="allow",
            mode=mode,
            dir=self._workdir,
            config=info,
            settings=settings,
        )

    def _finish(self, status: Status) -> None:
        self._run.summary["status"] = status
        if status == "preempted":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if status == "finished" else 1)
        _leave(self)  # only now is an offline run wholly on the disk


_users: set[WandbTracker] = set()
"""The trackers of this process that use wandb's service: one for each run that trains in it."""
_changing = threading.Lock()


def _leave(tracker: WandbTracker) -> None:
    """Stop the service, once no other run uses it."""
    import wandb

    with _changing, contextlib.suppress(Exception):
        _users.discard(tracker)
        if not _users:
            wandb.teardown()
