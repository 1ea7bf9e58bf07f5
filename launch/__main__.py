"""Start runs and sweeps: `python -m launch COMMAND --help`.

local    several processes of one command on this machine:
         python -m launch local --processes=4 --devices-per-process=2 -- lmjax train --config=... --workdir=...
sweep    the cells of a config file: python -m launch sweep configs/sweeps/cpu_isoflop.py --out=sweeps/first
grow     the cells that tell most, until N* is known; recommend writes the config of the run that a sweep speaks for
status   what they are at, from their files; exit code 0 once all are done
logs     what a cell printed
stop     have those that run save and end
cell     one of them, or several together: what an engine starts
curate   a recipe of lmjax curate, by datatrove, on a Slurm cluster
"""

import argparse
import dataclasses
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from etils import epath

from analysis.cells import FEWEST_STEPS
from launch import cell, job, local, manifest, page, stack, status
from launch.engines import ENGINES
from lmjax.errors import BUG, DONE, ConfigError
from lmjax.process import ending
from lmjax.record import buckets

WATCH_SECONDS = 10.0


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ours: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str]) -> int:
    buckets.register()
    ours, command = _split(argv)
    overrides = [word.removeprefix("--config.") for word in ours if word.startswith("--config.")]
    arguments, unknown = _parser().parse_known_args([word for word in ours if not word.startswith("--config.")])
    if command and arguments.command != "local":
        raise ConfigError(f"launch {arguments.command} starts no command of yours: leave out what follows --")
    if not command and arguments.command == "local":
        raise ConfigError("say what to start, after `--`")
    if unknown:
        raise ConfigError(f"unrecognized arguments: {' '.join(unknown)}; see `python -m launch {arguments.command} -h`")
    if overrides and arguments.command not in ("sweep", "grow"):
        raise ConfigError(f"launch {arguments.command} takes no --config.{overrides[0]}")
    arguments.overrides, arguments.started = overrides, command
    return arguments.function(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    def command(name: str, summary: str, function: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(function=function)
        return sub

    local.add_arguments(command("local", "several processes of one command on this machine", _local))
    _sweep_arguments(command("sweep", "train the cells of a config file", _sweep))
    sub = command("grow", "train the cells that tell most, until N* is known", _grow)
    _goal_arguments(sub)
    sub.add_argument("--config", metavar="CONFIG", help="FILE.py[:ARG]: the models of a sweep that begins")
    sub.add_argument("--budget", type=float, required=True, metavar="FLOPS", help="to spend on all cells, 6ND")
    sub.add_argument("--ratios", type=_ratios, default=(2.0, 200.0), metavar="LOW,HIGH", help="bounds of D/N")
    sub.add_argument("--until-done", action="store_true", help="go on until it says stop")
    _engine_arguments(sub)
    sub = command("recommend", "write the config of the run that a sweep speaks for", _recommend)
    _goal_arguments(sub)
    _price_arguments(sub)
    sub = command("status", "what the cells of a sweep are at", _status)
    sub.add_argument("directory", metavar="DIR")
    sub.add_argument("--watch", action="store_true", help=f"again every {WATCH_SECONDS:.0f} s, until all are done")
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub = command("logs", "what a cell printed", _logs)
    sub.add_argument("directory", metavar="DIR")
    sub.add_argument("index", type=int, metavar="CELL")
    command("stop", "have the cells that run save and end", _stop).add_argument("directory", metavar="DIR")
    sub = command("cell", "train one cell, or several together, or go on: what an engine starts", _cell)
    sub.add_argument("directory", metavar="DIR")
    sub.add_argument("indices", type=_indices, metavar="CELL[,CELL...]")
    _curate_arguments(command("curate", "a recipe of lmjax curate, by datatrove, on a Slurm cluster", _curate))
    return parser


def _sweep_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("config", metavar="CONFIG", help="FILE.py[:ARG] with get_config() and sweep()")
    sub.add_argument("--out", required=True, metavar="DIR", help="the sweep's directory, local or in a bucket")
    sub.add_argument("--cells", metavar="FILE.json", help="a list of cells instead of the config's sweep()")
    sub.add_argument("--bracket", type=int, metavar="3", help="so many learning rates for each cell, a factor 2 apart")
    sub.add_argument("--dry-run", action="store_true", help="show the cells, and start nothing")
    sub.add_argument("--compile", action="store_true", help="ask XLA what each step needs; seconds for each program")
    sub.add_argument("--only", metavar="3,7,10-12", help="start these cells alone")
    sub.add_argument("--extend", action="store_true", help="add the cells that the sweep in DIR lacks")
    sub.add_argument(
        "--report", nargs="?", type=float, const=0.0, metavar="FLOPS", help="fit laws at the end, extrapolated to FLOPS"
    )
    sub.epilog = "a setting of all cells: --config.train.steps=100"
    _engine_arguments(sub)


def _engine_arguments(sub: argparse.ArgumentParser) -> None:
    """What cells run on, and what that costs."""
    sub.add_argument("--engine", choices=list(ENGINES), default="local", help="what starts the cells")
    sub.add_argument("--accelerator", metavar="NAME", help="v5e-16, 2xv5p-256, H100-8; default: CPUs")
    sub.add_argument("--nodes", type=int, default=1, help="hosts of a cell, where the accelerator leaves them open")
    sub.add_argument("--spot", action="store_true", help="on machines that may be taken away")
    sub.add_argument("--yes", action="store_true", help="do not ask before money is spent")
    _price_arguments(sub)
    stack.add_arguments(sub)
    for name, engine in ENGINES.items():
        engine.add_arguments(sub.add_argument_group(f"--engine={name}"))


def _price_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--share-of-peak", type=float, default=0.4, help="of its FLOP/s, for hours and price")
    sub.add_argument("--dollars", type=float, metavar="PRICE", help="of a device for an hour, if not the list's")


def _goal_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("directory", metavar="DIR")
    sub.add_argument("--target", type=float, required=True, metavar="FLOPS", help="at which N* is wanted, 6ND")
    sub.add_argument("--tolerance", type=float, default=0.2, help="half the interval of ln N* (0.2: about 20%%)")
    sub.add_argument("--level", type=float, default=0.9, help="of the interval")
    sub.add_argument("--batch", type=int, default=4, help="cells at a time")
    sub.add_argument("--smallest", type=float, default=1e4, metavar="N", help="parameters of the smallest model")
    sub.add_argument("--largest", type=float, default=1e12, metavar="N", help="and of the largest")
    sub.add_argument(
        "--fewest-steps",
        type=int,
        default=FEWEST_STEPS,
        metavar="N",
        help="shorter cells are neither planned nor counted: they tell of their warmup, not of N and D",
    )


def _curate_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("config", metavar="CONFIG", help="FILE.py[:ARG], a recipe for a folder of JSON lines")
    sub.add_argument("--out", required=True, metavar="DIR")
    sub.add_argument("--tasks", type=int, required=True, metavar="N", help="shares of the files")
    sub.add_argument("--buckets", type=int, default=14, metavar="N", help="of near duplicates; default as FineWeb's")
    sub.add_argument("--hashes", type=int, default=8, metavar="N", help="of a bucket")
    sub.add_argument("--partition", metavar="NAME", help="of the cluster; default: this machine, without Slurm")
    sub.add_argument("--time", default="24:00:00", metavar="HH:MM:SS", help="the most that a task may take")
    sub.add_argument("--gigabytes", type=int, default=2, metavar="N", help="memory of a task")
    sub.add_argument("--max-running", type=int, default=-1, metavar="N", help="tasks at a time; default: all that fit")


def _indices(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() for word in words) or len(set(words)) < len(words):
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of different cells, such as 3,4,5")
    return list(map(int, words))


def _ratios(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low = high = 0.0
    if not 0 < low < high < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not LOW,HIGH with 0 < LOW < HIGH")
    return low, high


def _local(arguments: argparse.Namespace) -> int:
    return local.launch(arguments, arguments.started)


def _sweep(arguments: argparse.Namespace) -> int:
    from launch import sweep  # it prices cells by JAX, which takes seconds to import

    return sweep.launch(arguments)


def _grow(arguments: argparse.Namespace) -> int:
    from launch import grow

    return grow.launch(arguments)


def _recommend(arguments: argparse.Namespace) -> int:
    from launch import recommend

    return recommend.launch(arguments)


def _status(arguments: argparse.Namespace) -> int:
    while True:
        sweep, rows = manifest.read(arguments.directory), status.rows(arguments.directory)
        if arguments.json:
            print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
        else:
            print(status.table(rows))
            for note in status.bracket_notes(sweep, rows):
                print(f"note: {note}")
            print(f"{status.headline(rows)}; {page.write(arguments.directory, sweep, rows)}")
        if status.all_done(rows):
            return DONE
        if not arguments.watch:
            return BUG
        time.sleep(WATCH_SECONDS)


def _logs(arguments: argparse.Namespace) -> int:
    entry = manifest.entry(manifest.read(arguments.directory), arguments.index)
    path = epath.Path(arguments.directory) / entry.log
    if not path.exists():
        raise ConfigError(f"{path} is not there: the cell has not started, or its engine keeps the log")
    with path.open("rb") as file:
        shutil.copyfileobj(file, sys.stdout.buffer)
    return DONE


def _stop(arguments: argparse.Namespace) -> int:
    sweep = manifest.read(arguments.directory)
    jobs = [job.of(sweep.name, arguments.directory, [entry]) for entry in sweep.cells]
    return ENGINES[sweep.engine].stop(sweep.name, arguments.directory, jobs)


def _cell(arguments: argparse.Namespace) -> int:
    return cell.run(arguments.directory, arguments.indices)


def _curate(arguments: argparse.Namespace) -> int:
    from launch.curate import curate

    return curate(arguments)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(what is ours, the command after `--`)."""
    place = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:place]), list(argv[place + 1 :])


if __name__ == "__main__":
    ending.run_main(lambda: main(sys.argv[1:]), debug=False)
