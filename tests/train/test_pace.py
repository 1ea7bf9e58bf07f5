"""A step that takes far longer than usual is told of, and whose fault it is."""

import threading
import time

import jax

from lmjax.process import group
from lmjax.train.pace import Pace


def test_a_late_host_is_told_from_devices_that_others_wait_for() -> None:
    told: list[str] = []
    pace, done = Pace(told.append), threading.Event()

    def another_run() -> None:
        program = jax.jit(lambda x: x + 1)
        while not done.is_set():
            group.run(lambda x: (time.sleep(0.05), program(x))[1], 1.0)

    beside = [threading.Thread(target=another_run) for _ in range(2)]
    for thread in beside:
        thread.start()
    for step in range(1, 32):
        with pace.step(step):
            time.sleep(1.5 if step == 31 else 0.005)
    done.set()
    for thread in beside:
        thread.join()
    (line,) = told
    assert line.startswith("straggler: step 31 took 1.") and "it is this process that is late" in line


def test_waiting_for_a_program_is_no_lateness() -> None:
    told: list[str] = []
    pace = Pace(told.append)
    for step in range(1, 32):
        with pace.step(step):
            group.run(time.sleep, 1.5 if step == 31 else 0.005)
    (line,) = told
    assert line.startswith("straggler: step 31 took 1.") and "waiting for the devices" in line
