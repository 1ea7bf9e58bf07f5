"""Work beside other work."""

import os
import subprocess
import sys
import threading

import pytest

from lmjax.process.beside import beside


def test_the_result_is_waited_for() -> None:
    may_end = threading.Event()
    result = beside(lambda: (may_end.wait(10), "done"))
    may_end.set()
    assert result() == result() == (True, "done")


def test_what_went_wrong_is_raised_where_the_result_is_asked_for() -> None:
    result = beside(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        result()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority of their own on Linux")
def test_it_alone_and_its_threads_give_way() -> None:
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def both() -> tuple[int, int]:
        found: list[int] = []
        inner = threading.Thread(target=lambda: found.append(priority()))
        inner.start()
        inner.join()
        return priority(), found[0]

    before = priority()
    assert beside(both)() == (19, 19) and priority() == before


def test_a_process_that_ends_does_not_wait_for_it() -> None:
    program = "import time; from lmjax.process.beside import beside; beside(lambda: time.sleep(600))"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
