"""The commands as a user starts them: what they exit with, say and leave behind.

Each is a process of its own, forked from one that has imported lmjax and started nothing: importing JAX, Orbax and
Grain is most of what a short command costs. `start` is the whole command, for what is killed or looked at as it runs.
"""

import atexit
import concurrent.futures
import json
import os
import resource
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).parent / "tiny.py"
SECONDS = 120
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # the same programs again and again: the small ones count, too
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0",  # a process that it is set for does not start itself again
}


class Result(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last line on stderr."""
        return self.err.rstrip("\n").rpartition("\n")[2]

    def done(self) -> "Result":
        """It did what it was to do."""
        assert self.code == 0, self
        return self

    def refused(self, code: int, *words: str) -> str:
        """It failed as it should: with this exit code, and one last line that holds the words; gives that line."""
        assert self.code == code, self
        assert self.last.startswith("lmjax: error: ") and len(self.last) <= 1200, self.last
        assert "Traceback" not in self.err and "this is a bug" not in self.err, self.err
        for word in words:
            assert word in self.last, (word, self.last)
        return self.last


def few(values: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Parameters of a test (tuples where they are several), all but the `quick` ones only for those who have time."""
    several = [value if isinstance(value, tuple) else (value,) for value in values]
    marks = {False: (pytest.mark.slow,), True: ()}
    return [pytest.param(*one, marks=marks[one in quick or one[0] in quick]) for one in several]


def lmjax(*words: Any, cwd: Path = ROOT, limits: tuple[tuple[int, int], ...] = (), **environment: str) -> Result:
    """Run a command to its end; `limits` are of `resource.setrlimit`."""
    request = {"words": [str(word) for word in words], "cwd": str(cwd), "limits": limits, "environment": environment}
    return _server().run(request)


def train(corpus: Path, workdir: Path | str, *words: str, **environment: str) -> Result:
    return lmjax("train", f"--config={CONFIG}:{corpus}", f"--workdir={workdir}", *words, **environment)


def together(command: Callable[[], Result], meanwhile: Callable[[], object], ready: Callable[[], object]) -> Result:
    """Run a command and, once something is `ready`, do something to it."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(command)
        deadline = time.monotonic() + SECONDS
        while not ready():
            assert not running.done() and time.monotonic() < deadline, running.result()
            time.sleep(0.005)
        assert not running.done(), "it ended too early to be disturbed"
        meanwhile()
        return running.result()


def start(*words: Any, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lmjax", *map(str, words)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | ENVIRONMENT | environment, cwd=ROOT, **pipes)


def finished(process: subprocess.Popen[str]) -> Result:
    out, err = process.communicate(timeout=SECONDS)
    return Result(process.returncode, out, err)


def wait_for(what: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Until something is so, while the command runs."""
    deadline = time.monotonic() + SECONDS
    while not what():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def copied(directory: Path, target: Path) -> Path:
    """A copy with the times of its files, of a directory that other tests read, too."""
    shutil.copytree(directory, target, symlinks=True)
    return target


def hashes(workdir: Path | str, step: int | None = None, **environment: str) -> list[str]:
    """What `lmjax inspect --hash` says of the contents of each part of a checkpoint."""
    words = [] if step is None else [f"--step={step}"]
    lines = lmjax("inspect", workdir, "--hash", *words, **environment).done().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.split()[:1] == ["part"])
    return [line for line in lines[start : lines.index("", start)] if line.split()[0] != "hyper"]


def ledger(workdir: Path) -> list[tuple[int, int, int, int]]:
    """(step, first sample, count, crc) of every line of the ledger, in its order."""
    entries = map(json.loads, (workdir / "ledger.jsonl").read_text().splitlines())
    return [(e["step"], e["first_sample"], e["count"], e["crc"]) for e in entries if "step" in e]


# The process that the commands are forked from ------------------------------------------------------------------------


class _Server:
    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="lmjax-faults-"))
        environment = os.environ | ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(self._folder / "xla")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.black_box"],
            env=environment,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        atexit.register(self.stop)

    def run(self, request: dict[str, Any]) -> Result:
        out, err = self._folder / "out", self._folder / "err"
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request | {"out": str(out), "err": str(err)}) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        return Result(code, *(path.read_bytes().decode("utf-8", "backslashreplace") for path in (out, err)))

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


_servers: list[_Server] = []


def _server() -> _Server:
    if not _servers:
        _servers.append(_Server())
    return _servers[0]


def _serve() -> None:
    for name in ("lmjax.run.run", "lmjax.tasks.pretrain", "lmjax.run.trained", "grain", "matplotlib.figure"):
        __import__(name)
    from lmjax.record import trees

    trees.orbax()
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            _become(request)
        print(_waited(child), flush=True)


def _waited(child: int) -> int:
    deadline = time.monotonic() + SECONDS
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, 9)
        time.sleep(0.005)


def _become(request: dict[str, Any]) -> NoReturn:
    """The command, in this process, which ends with it."""
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(request[name], os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    for which, limit in request["limits"]:
        resource.setrlimit(which, (limit, limit))
    sys.argv = ["lmjax", *request["words"]]
    code = 0
    try:
        runpy.run_module("lmjax", run_name="__main__", alter_sys=True)
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
