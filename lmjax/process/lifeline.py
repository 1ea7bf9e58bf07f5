"""The line that every process of a run holds to process 0: a roll call at the start, and word at once when one is gone.

JAX alone says no more than "deadline exceeded" when a process does not come, and takes 30 s or more to notice one that
died. A TCP connection breaks as soon as the kernel clears a process away, however it ended; where a whole machine
falls silent, keepalive probes find out within half a minute.

    process 1 ---+                       {"process": 1, "processes": 4, "program": "..."}  when it comes
    process 2 ---+--- process 0          "go"  when all are there: the port is then free for JAX's own service
    process 3 ---+                       "missing 2, 3" when these did not come in time
                                         "bye" when a process ends as it should; "lost 2" when process 2 did not
                                         "here" every few seconds: one that is silent for long is named, and lost
"""

import contextlib
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from lmjax.errors import ConfigError, StallError

_GO, _BYE, _HERE, _LOST, _MISSING = "go", "bye", "here", "lost ", "missing "
_HERE_SECONDS, _SILENT_SECONDS, _LOST_SECONDS = 3.0, 10.0, 30.0
_LINE_BYTES = 1000


class Lifeline:
    """Raises StallError when process 0 is not reached, or not everybody came, within `timeout` seconds, or process 0
    ends meanwhile, and ConfigError when the processes contradict each other."""

    def __init__(
        self, address: str, process: int, processes: int, timeout: float, program: str = "", listen: str = "::"
    ) -> None:
        """`program` names what runs, versions and all: it must be the same at all processes. Process 0 listens at the
        IP address `listen`, by default at all that the machine has."""
        self._closed = threading.Event()
        if process == 0:
            self._lines = _call_the_roll(address, processes, timeout, program, listen)
        else:
            self._lines = {0: _answer(address, process, processes, timeout, program)}
        for line in self._lines.values():
            _keep_alive(line)

    def watch(self, on_loss: Callable[[str], NoReturn], warn: Callable[[str], None]) -> None:
        """Call `on_loss` from now on with a message, on a thread, when a process ends without a word, or has been
        silent for half a minute, and `warn` when one falls silent: whether it is stopped or only busy cannot be known
        from here."""
        threading.Thread(target=self._speak, name="lmjax-lifeline-speak", daemon=True).start()
        threading.Thread(target=self._listen, args=(on_loss, warn), name="lmjax-lifeline", daemon=True).start()

    def close(self) -> None:
        """This process ends as it should: nobody needs to worry."""
        self._closed.set()
        for line in self._lines.values():
            _send(line, _BYE)

    def _speak(self) -> None:
        while not self._closed.wait(_HERE_SECONDS):
            for line in self._lines.values():
                _send(line, _HERE)

    def _listen(self, on_loss: Callable[[str], NoReturn], warn: Callable[[str], None]) -> None:
        heard = dict.fromkeys(self._lines, time.monotonic())
        silent: set[int] = set()
        with selectors.DefaultSelector() as selector:
            for process, line in self._lines.items():
                selector.register(line, selectors.EVENT_READ, process)
            while heard:
                for key, _ in selector.select(timeout=_HERE_SECONDS):
                    word = _receive(self._lines[key.data])
                    heard[key.data] = time.monotonic()
                    if word == _BYE:
                        selector.unregister(key.fileobj)
                        del heard[key.data]
                    elif word != _HERE:
                        gone = int(word.removeprefix(_LOST)) if word.startswith(_LOST) else key.data
                        self._lost(gone, "is gone (its own last line says why)", on_loss)
                for process, when in heard.items():
                    if time.monotonic() - when > _LOST_SECONDS:
                        why = f"has been silent for {_LOST_SECONDS:g} s (stopped, swapped out, or its machine lost)"
                        self._lost(process, why, on_loss)
                now_silent = {process for process, when in heard.items() if time.monotonic() - when > _SILENT_SECONDS}
                for process in sorted(now_silent - silent):
                    warn(f"process {process} is silent: stopped, swapped out, or its machine lost?")
                silent = now_silent

    def _lost(self, process: int, why: str, on_loss: Callable[[str], NoReturn]) -> NoReturn:
        for line in self._lines.values():
            _send(line, f"{_LOST}{process}")
        on_loss(f"process {process} {why}; run again to go on from the last checkpoint")


# The roll call ----------------------------------------------------------------------------------------------------


def _call_the_roll(address: str, processes: int, timeout: float, program: str, listen: str) -> dict[int, socket.socket]:
    """Process 0: wait for all others, then let them go at once."""
    lines: dict[int, socket.socket] = {}
    end = time.monotonic() + timeout
    with _listen(listen, int(address.rpartition(":")[2]), processes) as listener:
        while len(lines) < processes - 1:
            listener.settimeout(max(0.01, end - time.monotonic()))
            try:
                line, _ = listener.accept()
            except TimeoutError:
                _give_up(address, processes, _present(lines), timeout)
            lines = _present(lines)
            _admit(line, processes, program, lines)
    for line in lines.values():
        _send(line, _GO)
    return lines


def _give_up(address: str, processes: int, lines: dict[int, socket.socket], timeout: float) -> NoReturn:
    missing = ", ".join(str(process) for process in range(1, processes) if process not in lines)
    for line in lines.values():
        _send(line, f"{_MISSING}{missing}")
    raise StallError(
        f"{len(lines) + 1} of {processes} processes came within {timeout:g} s; missing: {missing}; see what they said, "
        f"and whether they reach {address}"
    )


def _present(lines: dict[int, socket.socket]) -> dict[int, socket.socket]:
    """Drop the lines of processes that have gone again: each may be started once more."""

    def is_open(line: socket.socket) -> bool:
        try:
            return line.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    return {process: line for process, line in lines.items() if is_open(line)}


def _listen(host: str, port: int, processes: int) -> socket.socket:
    both = host == "::" and socket.has_dualstack_ipv6()
    host = "" if host == "::" else host  # as some machines have no IPv6
    family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=processes, dualstack_ipv6=both)
    except OSError as error:
        where, what = (f"{host}, port {port}", "LMJAX_LISTEN or ") if host else (f"port {port}", "")
        raise StallError(
            f"process 0 cannot listen on {where} ({error.strerror}); choose another {what}--coordinator port"
        ) from None


def _admit(line: socket.socket, processes: int, program: str, lines: dict[int, socket.socket]) -> None:
    """Take in a process that said who it is; tell it what is wrong if it cannot be right, and go on waiting."""
    line.settimeout(5)
    try:
        answer = json.loads(_receive(line))
        process, said, runs = int(answer["process"]), int(answer["processes"]), str(answer["program"])
    except (ValueError, KeyError, TypeError):
        line.close()  # somebody else, such as a port scanner
        return
    if said != processes:
        _send(line, f"it was started as one of {said} processes, process 0 as one of {processes}")
    elif runs != program:
        _send(line, f"it runs {runs}, process 0 {program}")
    elif process in lines or not 0 < process < processes:
        _send(line, f"another process was started as process {process} of {processes}")
    else:
        line.setblocking(False)
        lines[process] = line


def _answer(address: str, process: int, processes: int, timeout: float, program: str) -> socket.socket:
    """The others: reach process 0, say who is there and wait to be let go."""
    end = time.monotonic() + timeout
    line = _reach(address, timeout)
    _send(line, json.dumps({"process": process, "processes": processes, "program": program}))
    line.settimeout(max(0.01, end - time.monotonic()))
    word = _receive(line)
    if word == _GO:
        return line
    if word.startswith(_MISSING):
        raise StallError(f"not all {processes} processes came to process 0 ({address}) in time; {word}")
    if word:
        raise ConfigError(
            f"coordinator {address} refused this process: {word}; start every process once, of one version"
        )
    if time.monotonic() >= end:
        raise StallError(f"not all {processes} processes came within {timeout:g} s; process 0 ({address}) says which")
    raise StallError(
        f"process 0 ({address}) has ended, or has started without this one; see what it said, and start every process "
        "once"
    )


def _reach(address: str, timeout: float) -> socket.socket:
    host, _, port = address.rpartition(":")
    end, problem = time.monotonic() + timeout, "no time to try"
    while time.monotonic() < end:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=5)
        except OSError as error:  # the name is not known yet, or nobody listens yet
            problem = error.strerror or str(error)
        time.sleep(0.1)
    raise StallError(
        f"coordinator {address} was not reached within {timeout:g} s ({problem}); check that process 0 runs there, "
        "that its name resolves and that the port is open"
    )


# Lines ------------------------------------------------------------------------------------------------------------


def _send(line: socket.socket, word: str) -> None:
    with contextlib.suppress(OSError):  # who has gone meanwhile needs no word
        line.sendall(f"{word}\n".encode())


def _receive(line: socket.socket) -> str:
    """The next word; empty when the other end is gone or silent for too long. What is no text is a word, too."""
    received = b""
    try:
        while not received.endswith(b"\n") and len(received) < _LINE_BYTES:
            if not (byte := line.recv(1)):
                return ""
            received += byte
    except OSError:
        return ""
    return received.decode(errors="replace").strip() or "?"


def _keep_alive(line: socket.socket) -> None:
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}.items():  # not everywhere
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
