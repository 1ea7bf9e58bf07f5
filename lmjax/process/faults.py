"""Faults that tests plan through the environment."""

import difflib
import errno
import functools
import os
import re
import signal
import time
from collections.abc import Callable
from typing import NoReturn

from lmjax.errors import ConfigError
from lmjax.process import group


def _raise_disk_full() -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _raise_error() -> NoReturn:
    raise RuntimeError("injected by LMJAX_FAULTS")


# What a fault does. None: the code at the hook knows, `fault` only returns the name.
FAULTS: dict[str, Callable[[], object] | None] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "stall": lambda: time.sleep(1e6),
    "pause": lambda: time.sleep(3),
    "raise": _raise_error,
    "disk_full": _raise_disk_full,
    "nan_grad": None,
    "spike": None,
    "flip": None,
}


# Where a fault can be planned.
SITES = (
    "checkpoint.after_seal",
    "checkpoint.before_seal",
    "checkpoint.retain",
    "checkpoint.write",
    "data.batch",
    "evaluation.batch",
    "prepare.shard",
    "report.between",
    "report.write",
    "rollback.aside",
    "step",
    "summary.write",
)


def check() -> None:
    """Raise ConfigError for a plan that would not do what it says: where a command begins, not where a fault is due."""
    _planned_faults(os.environ.get("LMJAX_FAULTS", ""), group.process())


def fault(site: str, index: int | None = None) -> str | None:
    """A named place where a test can make things go wrong; without LMJAX_FAULTS it does nothing.

    LMJAX_FAULTS is a comma-separated list of `what@site:n`: `kill@step:20` kills the process at `fault("step", 20)`;
    at a site without `index`, n counts the calls from 1 (`disk_full@checkpoint.write:2`). `kill@step:20:1` does so at
    process 1 alone. Returns the fault's name when the caller is to act on it (`nan_grad`), else None. Raises
    ConfigError for a malformed list, a site that there is not, and two faults at one place.
    """
    assert site in SITES, f"{site} is to be named in SITES"
    planned = _planned_faults(os.environ.get("LMJAX_FAULTS", ""), group.process())
    if site not in planned:
        return None
    if index is None:
        index = _calls[site] = _calls.get(site, 0) + 1
    name = planned[site].get(index)
    if name is None:
        return None
    group.say(f"LMJAX_FAULTS: {name} at {site}:{index}")
    act = FAULTS[name]
    if act is None:
        return name
    act()
    return None


_calls: dict[str, int] = {}


@functools.cache
def _planned_faults(text: str, process: int) -> dict[str, dict[int, str]]:
    """`{site: {n: fault}}` of this process."""
    planned: dict[str, dict[int, str]] = {}
    for entry in filter(None, text.split(",")):
        match = re.fullmatch(rf"({'|'.join(FAULTS)})@([^:]+):(\d+)(?::(\d+))?", entry)
        if match is None:
            raise ConfigError(f"LMJAX_FAULTS: '{entry}' is not what@site:n with what one of {', '.join(FAULTS)}")
        name, site, index, at_process = match.groups()
        if site not in SITES:
            close = difflib.get_close_matches(site, SITES, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"there is {', '.join(SITES)}"
            raise ConfigError(f"LMJAX_FAULTS: '{entry}': there is no place '{site}' ({hint})")
        if FAULTS[name] is None and site != "step":
            raise ConfigError(f"LMJAX_FAULTS: '{entry}': {name} is for a step, {name}@step:n")
        if at_process is None or int(at_process) == process:
            here = planned.setdefault(site, {})
            if here.setdefault(int(index), name) != name:
                raise ConfigError(
                    f"LMJAX_FAULTS: {here[int(index)]} and {name} at {site}:{int(index)}; only one can be"
                )
    return planned
