"""Chunks in parallel processes.

A worker is a plain subprocess (`python -m lmjax.data.curate.workers FOLDER`) that takes orders, a line each, on its
standard input and ends with it: it outlives nobody. Documents travel through files. Orders go round robin and are
awaited in that order.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from etils import epath

from lmjax.data.curate.recipe import parse_step
from lmjax.data.curate.stage import Work
from lmjax.errors import DataError
from lmjax.record.files import read_bytes

RECIPE = "recipe.json"


class Order(NamedTuple):
    """Work on a chunk."""

    stage: int
    chunk: int
    first: int
    """The number of its first document."""


def work(folder: epath.Path, orders: Iterable[Order], processes: int) -> Iterator[Order]:
    """Each order once it is done, in order. One process means this one.

    Raises DataError for what a step cannot do, and where a process dies.
    """
    if processes == 1:
        worker = _Here(folder)
        for order in orders:
            worker.do(order)
            yield order
        return
    pool: list[_Worker] = []
    waiting: list[Order] = []
    try:
        for number, order in enumerate(orders):
            if number < processes:
                pool.append(_Worker(folder))
            else:
                pool[number % processes].receive()
                yield waiting.pop(0)
            pool[number % processes].send(order)
            waiting.append(order)
            total = number + 1
        while waiting:
            pool[(total - len(waiting)) % processes].receive()
            yield waiting.pop(0)
    finally:
        for one in pool:
            one.stop()


class _Here:
    """This process as a worker: it holds the stage that it was last asked for."""

    def __init__(self, folder: epath.Path):
        self._folder = folder
        recipe = json.loads(read_bytes(folder / RECIPE))
        self._steps = [parse_step(place, values) for place, values in enumerate(recipe["steps"])]
        self._tokenizer = recipe.get("tokenizer")
        self._stage = 0

    def do(self, order: Order) -> None:
        if order.stage != self._stage:
            work = Work(self._folder, self._steps, order.stage, self._tokenizer)
            self._work, self._stage = work, order.stage
        self._work.do(order.chunk, order.first)


class _Worker:
    """A subprocess that works on one chunk at a time."""

    def __init__(self, folder: epath.Path):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "lmjax.data.curate.workers", os.fspath(folder)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def send(self, order: Order) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `receive` says that it died
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()

    def receive(self) -> None:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            raise DataError(f"a curating process died with exit code {code} (-9: out of memory?); run it again")
        if error := json.loads(answer)["error"]:
            raise DataError(error)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def _serve(folder: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, and it stops its workers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    worker = _Here(epath.Path(folder))
    for line in sys.stdin:
        error = None
        try:
            worker.do(Order(*json.loads(line)))
        except DataError as problem:
            error = str(problem)
        answers.write(json.dumps({"error": error}) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve(sys.argv[1])
