"""Peak memory of the train step, beside the peers of `speed.py`, each in a process of its own.

    python -m analysis.bench.memory [--configs quickstart mini_gpt] [--no-dropout]

Convention: the most that a process of Linux ever had resident (VmHWM), in MiB, after its first steps; Python, libraries
and what compiling took included. Every process has imported JAX, PyTorch's, too. What the children of a compiler take,
as those of `torch.compile`, is not counted.
"""

import argparse
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from lmjax.process import start_up

if __name__ == "__main__":
    start_up.tune_allocator()

from analysis.bench import speed

STEPS = 3


def peak(make: Callable[[], speed.Work | None]) -> int | None:
    """MiB of this process after some steps."""
    start_up.run_in_turn()
    if (work := make()) is None:
        return None
    work(STEPS)
    (kib,) = re.findall(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return round(int(kib) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=["quickstart", "mini_gpt"], choices=["quickstart", "mini_gpt"])
    parser.add_argument("--no-dropout", action="store_true")
    arguments = parser.parse_args()
    print(speed.line(["config", "by", "peak, MiB", "lmjax over it"]))
    print(speed.line(["---"] * 4))
    for name in arguments.configs:
        cfg = speed.read_config(name, None)
        (task,) = speed.tasks(speed.without_dropout(cfg) if arguments.no_dropout else cfg, "train", bfloat16=False)
        ours = None
        for by, make in task.contenders.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                if (mebibytes := alone.submit(peak, make).result()) is None:
                    continue
            ours = ours or mebibytes
            print(speed.line([name, by, f"{mebibytes:,}", f"{ours / mebibytes:.2f}"]), flush=True)


if __name__ == "__main__":
    main()
