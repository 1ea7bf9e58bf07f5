"""Work that is done beside something more urgent, with what that leaves of the processors."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

_LAST = 19
"""The priority of who is served last."""


def beside(function: Callable[[], T]) -> Callable[[], T]:
    """Start a function in a thread of its own; what is returned waits for its result, or raises what it raised.

    On Linux that thread, and those that it starts, take only time that no other wants. A process that ends does not
    wait for it.
    """
    future: Future[T] = Future()

    def work() -> None:
        if sys.platform == "linux":  # elsewhere the priority is that of the whole process
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LAST)
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="lmjax-beside", daemon=True).start()
    return future.result
