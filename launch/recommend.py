"""`python -m launch recommend DIR --target=1e22`: the config of the run that a sweep speaks for, ready to train."""

import argparse

from analysis import growth
from launch import manifest, price, status
from launch.family import family
from launch.grow import goal_of, known, sentence, tell_short
from lmjax.cells import texts
from lmjax.errors import DONE, ConfigError
from lmjax.record import files

FILE = "recommended.py"


def launch(arguments: argparse.Namespace) -> int:
    """Writes DIR/recommended.py. Raises ConfigError while the cells do not tell the exponents apart."""
    directory = files.locate(arguments.directory)
    sweep = manifest.read(directory)
    goal, ended = goal_of(arguments), known(sweep, status.rows(directory), arguments.fewest_steps)
    tell_short(ended)
    try:
        found = growth.recommend(*ended.columns, goal=goal)
    except ValueError as error:
        raise ConfigError(f"{directory}: {error}") from None
    estimate = found.estimate
    assert estimate.loss is not None and estimate.loss.interval is not None and estimate.tokens is not None
    on = price.accelerator(sweep.accelerator, share_of_peak=arguments.share_of_peak, dollars=arguments.dollars)
    members = family(sweep.config, sweep.common, on, arguments.smallest, arguments.largest)
    (cell,), _ = members.cells([(estimate.params.value, estimate.tokens.value)])
    low, high = estimate.loss.interval.low, estimate.loss.interval.high
    lines = [
        f"The run of {goal.target:.3g} FLOPs (6ND) that the sweep {sweep.name} recommends.",
        "",
        f"{sentence(found, goal)},",
        f"D* = {estimate.tokens.value:.3g} tokens; loss {estimate.loss.value:.4f} nats per token, {goal.level:.0%} "
        f"prediction interval {low:.4f} to {high:.4f}.",
        "",
        f"Command     lmjax train --config={directory / FILE} --workdir=runs/recommended",
    ]
    path = directory / FILE
    files.write_bytes(path, source(sweep.config, [*sweep.common, *texts(cell.overrides)], lines).encode())
    print("\n".join(lines[:4]))
    print(f"wrote {path}")
    return DONE


def source(config: str, overrides: list[str], lines: list[str]) -> str:
    """A config file: another one, with overrides as the command line has them."""
    docstring = "\n".join(lines)
    changes = "\n".join(f"    {override!r}," for override in overrides)
    return f'''"""{docstring}
"""

from ml_collections import ConfigDict

from lmjax.config import ConfigFile

CHANGES = [
{changes}
]


def get_config() -> ConfigDict:
    return ConfigFile({config!r}).tree(CHANGES)
'''
