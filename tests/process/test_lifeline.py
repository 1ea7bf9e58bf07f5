"""The roll call and the word that a process is gone: over real sockets, with threads and processes for machines."""

import json
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import pytest

from lmjax.errors import ConfigError, LmjaxError, StallError
from lmjax.process import lifeline
from lmjax.process.lifeline import Lifeline


def free_address() -> str:
    with socket.create_server(("", 0)) as server:
        return f"localhost:{server.getsockname()[1]}"


def outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except LmjaxError as error:
        return error


def roll_call(numbers: list[int], processes: list[int], timeout: float) -> list[Any]:
    """What each process gets: its line or its error."""
    address = free_address()
    with ThreadPoolExecutor(len(numbers)) as pool:
        started = [
            pool.submit(outcome, Lifeline, address, number, count, timeout)
            for number, count in zip(numbers, processes, strict=True)
        ]
        return [future.result() for future in started]


def test_all_come_in_any_order_and_the_port_is_free_again() -> None:
    address = free_address()
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(Lifeline, address, number, 3, 10) for number in (2, 1)]
        time.sleep(0.3)  # nobody listens yet: they try again
        lines = [Lifeline(address, 0, 3, 10), *(other.result() for other in others)]
    socket.create_server(("", int(address.split(":")[1]))).close()  # JAX's own service starts there next
    for line in lines:
        line.close()


def test_process_0_says_who_is_missing() -> None:
    first, *others = roll_call([0, 1, 3], [5, 5, 5], timeout=1)
    assert isinstance(first, StallError) and "3 of 5 processes came within 1 s; missing: 2, 4; " in str(first)
    for other in others:
        assert isinstance(other, StallError) and "not all 5 processes came" in str(other)


def test_process_0_tells_those_who_wait_longer_who_is_missing() -> None:
    address = free_address()
    with ThreadPoolExecutor(2) as pool:
        leader = pool.submit(outcome, Lifeline, address, 0, 3, 0.5)
        with pytest.raises(StallError, match=r"not all 3 processes came to process 0 .* in time; missing 2$"):
            Lifeline(address, 1, 3, 20)
    assert isinstance(leader.result(), StallError)


def test_who_has_gone_again_is_missing_and_may_come_again() -> None:
    address = free_address()
    with ThreadPoolExecutor(3) as pool:
        leader = pool.submit(outcome, Lifeline, address, 0, 3, 1.0)
        come_and_go(address, process=1)
        assert "1 of 3 processes came within 1 s; missing: 1, 2; " in str(leader.result())
        leader = pool.submit(outcome, Lifeline, address, 0, 3, 20)
        come_and_go(address, process=1)
        others = [pool.submit(Lifeline, address, number, 3, 20) for number in (1, 2)]
        assert [isinstance(line.result(), Lifeline) for line in (leader, *others)] == [True, True, True]


def come_and_go(address: str, process: int) -> None:
    """As a process does that is killed while it waits."""
    line = lifeline._reach(address, timeout=10)
    lifeline._send(line, json.dumps({"process": process, "processes": 3, "program": ""}))
    time.sleep(0.2)
    line.close()


def test_a_process_0_that_is_killed_while_others_wait() -> None:
    address = free_address()
    leader = subprocess.Popen([sys.executable, "-c", MEMBER, address, "0", "stays"])
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(outcome, Lifeline, address, 1, 3, 20)
        lifeline._reach(address, timeout=20).close()  # a stranger: by now it listens
        time.sleep(0.5)
        leader.kill()
        leader.wait()
        assert isinstance(other.result(), StallError)
        assert re.match(r"process 0 \(localhost:\d+\) has ended, or has started without this one", str(other.result()))


def test_who_comes_when_the_run_has_started_is_told() -> None:
    """Whatever listens there now, such as JAX's own service, hangs up on what it does not understand."""
    with socket.create_server(("", 0)) as service, ThreadPoolExecutor(1) as pool:
        late = pool.submit(outcome, Lifeline, f"localhost:{service.getsockname()[1]}", 1, 2, 20)
        line, _ = service.accept()
        line.close()
        assert "has ended, or has started without this one" in str(late.result())


def test_contradictions_are_named_and_nobody_else_is_held_up() -> None:
    address = free_address()
    with ThreadPoolExecutor(4) as pool:
        leader = pool.submit(Lifeline, address, 0, 3, 20, "lmjax 1")
        good = pool.submit(Lifeline, address, 1, 3, 20, "lmjax 1")
        time.sleep(0.3)
        for number, count, problem in (
            (1, 3, "as process 1 of 3"),
            (2, 4, "one of 4 processes, process 0 as one of 3"),
        ):
            with pytest.raises(ConfigError, match=problem):
                Lifeline(address, number, count, 20, "lmjax 1")
        with pytest.raises(ConfigError, match=r"refused this process: it runs lmjax 2, process 0 lmjax 1; .* version"):
            Lifeline(address, 2, 3, 20, "lmjax 2")
        with socket.create_connection(("localhost", int(address.split(":")[1]))) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            Lifeline(address, 2, 3, 20, "lmjax 1")
        leader.result(), good.result()


@pytest.mark.parametrize("address", ["localhost", "no-such-host.invalid"])
def test_a_coordinator_that_is_not_there(address: str) -> None:
    clock = time.monotonic()
    with pytest.raises(StallError, match=rf"coordinator {address}:1 was not reached within 0.5 s \(.+\)"):
        Lifeline(f"{address}:1", 1, 2, 0.5)
    assert time.monotonic() - clock < 8


def test_a_port_in_use() -> None:
    with (
        socket.create_server(("", 0)) as server,
        pytest.raises(StallError, match=r"cannot listen on port .*in use.*another"),
    ):
        Lifeline(f"localhost:{server.getsockname()[1]}", 0, 2, 1)


MEMBER = """
import os, sys, time
from lmjax.process.lifeline import Lifeline
address, number, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
def lost(message):
    print(message, flush=True)
    os._exit(6)
line = Lifeline(address, number, 3, 20)
line.watch(lost, print)
if how == "leaves":
    line.close()
elif how == "dies":
    time.sleep(0.5)
    os.kill(os.getpid(), 9)
else:
    time.sleep(20)
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_dies_all_know_at_once_which(victim: int) -> None:
    """Also the one that reaches the others by way of process 0 alone; who left in good order is not missed."""
    address = free_address()
    command = [sys.executable, "-c", MEMBER, address]
    fates = ["stays", "stays", "stays"]
    fates[victim] = "dies"
    members = [
        subprocess.Popen([*command, str(number), fate], stdout=subprocess.PIPE, text=True)
        for number, fate in enumerate(fates)
    ]
    clock = time.monotonic()
    for number, member in enumerate(members):
        output, _ = member.communicate(timeout=15)
        assert member.returncode == (-9 if number == victim else 6)
        assert number == victim or output.startswith(f"process {victim} is gone")
    assert time.monotonic() - clock < 10


def test_who_is_stopped_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not lost: it may come back."""
    monkeypatch.setattr(lifeline, "_SILENT_SECONDS", 5.0)
    address, warnings = free_address(), queue.Queue[str]()
    members = [subprocess.Popen([sys.executable, "-c", MEMBER, address, number, "stays"]) for number in "12"]
    line = Lifeline(address, 0, 3, 20)

    def lost(message: str) -> NoReturn:
        warnings.put(message)
        while True:  # the thread ends with this process
            time.sleep(60)

    line.watch(lost, warnings.put)
    members[1].send_signal(signal.SIGSTOP)
    assert warnings.get(timeout=20) == "process 2 is silent: stopped, swapped out, or its machine lost?"
    assert warnings.empty()
    for member in members:
        member.kill()
        member.wait()
    assert re.match("process [12] is gone", warnings.get(timeout=20))


def test_who_leaves_in_good_order_is_not_missed() -> None:
    address, lost = free_address(), threading.Event()
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda number: Lifeline(address, number, 2, 10), range(2))
    first.watch(lambda message: lost.set(), print)  # type: ignore[arg-type, return-value]
    second.close()
    del second
    assert not lost.wait(0.3)
