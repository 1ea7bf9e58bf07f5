"""Start a run: `python -m launch ENGINE [its flags] -- COMMAND`. Imports neither JAX nor what it starts.

python -m launch local --processes=4 --devices-per-process=2 -- lmjax train --config=... --workdir=...
"""

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from launch import local

# An engine is one file: its docstring, `add_arguments(parser)` and `launch(arguments, command) -> exit code`.
ENGINES: dict[str, ModuleType] = {"local": local}


def main(argv: Sequence[str]) -> int:
    ours, command = _split(argv)
    parser = argparse.ArgumentParser(prog="python -m launch", description=(__doc__ or "").splitlines()[0])
    engines = parser.add_subparsers(dest="engine", required=True)
    for name, engine in ENGINES.items():
        summary = (engine.__doc__ or "").splitlines()[0]
        engine.add_arguments(engines.add_parser(name, help=summary, description=summary))
    arguments, unknown = parser.parse_known_args(ours)
    if not command:
        parser.error("say what to start, after `--`")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return ENGINES[arguments.engine].launch(arguments, command)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(what is ours, the command after `--`)."""
    place = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:place]), list(argv[place + 1 :])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
