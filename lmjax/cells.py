"""The cells of a sweep: many sets of overrides of one config, all of them checked before anything starts.

A config file may have a function `sweep` beside `get_config`, which takes the same argument and returns the cells:

    def sweep(sizes: str = "") -> Iterable[Overrides]:
        return product(each("model.embed", [64, 128, 256]), each("optimizer.learning_rate", [1e-3, 2e-3]), seeds(3))

A cell is a dict in the dotted keys of the command line, `{"model.embed": 64, "train.seed": 0}`.
"""

import fnmatch
import functools
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lmjax.config import Config, ConfigFile, hash_text, settings
from lmjax.errors import ConfigError, one_line
from lmjax.record import files

Overrides = Mapping[str, Any]


# To make them -----------------------------------------------------------------------------------------------------


def each(key: str, values: Iterable[Any]) -> list[Overrides]:
    """One cell for each value of a setting."""
    return [{key: value} for value in values]


def seeds(count: int) -> list[Overrides]:
    """`count` runs that differ in their initial weights and dropout."""
    return each("train.seed", range(count))


def product(*factors: Iterable[Overrides]) -> list[Overrides]:
    """Every combination of a cell of each factor; the last factor changes fastest."""
    return [_merged(cells) for cells in itertools.product(*factors)]


def zipped(*columns: Iterable[Overrides]) -> list[Overrides]:
    """The first cells of all columns together, then the second ones. Raises ConfigError for unequal lengths."""
    rows = [list(column) for column in columns]
    if len({len(row) for row in rows}) > 1:
        raise ConfigError(f"zipped() was given columns of {', '.join(str(len(row)) for row in rows)} cells")
    return [_merged(cells) for cells in zip(*rows, strict=True)]


def chain(*parts: Iterable[Overrides]) -> list[Overrides]:
    """The cells of all parts, one part after another."""
    return list(itertools.chain(*parts))


def _merged(cells: Sequence[Overrides]) -> Overrides:
    """Raises ConfigError for a setting that two of them set."""
    merged: dict[str, Any] = {}
    for cell in cells:
        if twice := merged.keys() & cell.keys():
            raise ConfigError(f"two factors of a sweep set {min(twice)}; leave it to one of them")
        merged |= cell
    return merged


# To check them ----------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """One run of a sweep."""

    overrides: dict[str, Any]
    cfg: Config
    bracket: str = ""
    """The digest of the cell in the middle, among cells that differ in the learning rate alone; else empty."""
    factor: float = 1.0
    """Its learning rate over that of the middle."""

    @property
    def arguments(self) -> list[str]:
        """The overrides as flags of `lmjax train`."""
        return [f"--config.{text}" for text in texts(self.overrides)]

    @property
    def digest(self) -> str:
        """A hash of what makes the run what it is: all settings that are not the defaults, without those of tracking.

        Settings that a later version adds leave it as it is.
        """
        told = {
            key: value
            for key, value in settings(self.cfg).items()
            if not key.startswith("tracking.") and (key not in _defaults() or _defaults()[key] != value)
        }
        return hash_text(json.dumps(told, sort_keys=True))


@functools.cache
def _defaults() -> Mapping[str, Any]:
    return settings(Config())


def load_cells(
    location: str, listed: str | None = None, common: Sequence[str] = (), *, bracket: int | None = None
) -> list[Cell]:
    """The cells of the config file `path.py[:argument]`, or those of a JSON list, as `analysis design` writes one.

    `common` has overrides of all cells, `a.b=value`; a cell's own come after them. With a `bracket` of 3 there are
    three of each, at a half, once and twice its learning rate. Raises ConfigError that names the first cell with a
    setting that does not fit, and for two cells that are the same run.
    """
    if bracket is not None and (bracket < 3 or bracket % 2 == 0):
        raise ConfigError(f"--bracket={bracket} must be odd and at least 3: as many learning rates above as below")
    file = ConfigFile(location)
    cells = check_cells(file, _listed(listed) if listed is not None else _swept(file), common)
    if not cells:
        raise ConfigError(f"{listed or location} has no cells")
    return cells if bracket is None else _bracketed(file, cells, bracket, common)


def _bracketed(file: ConfigFile, cells: Sequence[Cell], count: int, common: Sequence[str]) -> list[Cell]:
    """`count` of each cell, a factor 2 in the learning rate apart: the rate that its config, or a rule, has come to."""
    factors = [2.0 ** (place - count // 2) for place in range(count)]
    given, middles = [], []
    for cell in cells:
        for factor in factors:
            rate = cell.cfg.optimizer.learning_rate * factor
            name = cell.cfg.tracking.name
            named = {} if name is None else {"tracking.name": f"{name}-lr{factor:g}x"}
            given.append({**cell.overrides, "optimizer.learning_rate": rate, **named})
            middles.append(cell.digest)
    return [
        cell._replace(bracket=middle, factor=factor)
        for cell, middle, factor in zip(check_cells(file, given, common), middles, factors * len(cells), strict=True)
    ]


def check_cells(file: ConfigFile, given: Iterable[Any], common: Sequence[str] = ()) -> list[Cell]:
    """The cells of these overrides. Raises ConfigError as `load_cells` does."""
    cells: list[Cell] = []
    first: dict[str, int] = {}
    for index, overrides in enumerate(given):
        cells.append(_cell(file, index, overrides, common))
        other = first.setdefault(cells[-1].digest, index)
        if other != index:
            raise ConfigError(f"cells {other} and {index} are the same run, {shown(overrides)}; leave one out")
    return cells


def _cell(file: ConfigFile, index: int, overrides: Any, common: Sequence[str]) -> Cell:
    if not isinstance(overrides, Mapping) or not all(isinstance(key, str) for key in overrides):
        raise ConfigError(f"cell {index} is {overrides!r}; write an object of settings, {{'model.embed': 64}}")
    try:
        return Cell(dict(overrides), file.config([*common, *texts(overrides)]))
    except ConfigError as error:
        raise ConfigError(f"cell {index}: {error}") from None


def _swept(file: ConfigFile) -> Iterable[Any]:
    if not hasattr(file.module, "sweep"):
        raise ConfigError(f"--config={file.location} has no function sweep(); write one, or give --cells=FILE.json")
    return list(file.call("sweep"))


def _listed(path: str) -> list[Any]:
    try:
        listed = json.loads(files.read_bytes(files.locate(path)))
    except (ValueError, RecursionError) as error:  # a DataError, too: it names the file
        raise ConfigError(f"--cells={path}: {one_line(error)}") from None
    if not isinstance(listed, list):
        raise ConfigError(f"--cells={path}: it holds no JSON list of cells")
    return listed


def texts(overrides: Overrides) -> list[str]:
    """Overrides as the command line has them: `a.b=value`."""
    return [f"{key}={value if isinstance(value, str) else repr(value)}" for key, value in overrides.items()]


def shown(overrides: Overrides) -> str:
    """`embed=64 seed=0`: what varies, by the shortest names that tell its keys apart."""
    return " ".join(f"{name}={value}" for name, value in zip(short_names(overrides), overrides.values(), strict=True))


def short_names(keys: Iterable[str]) -> list[str]:
    """The last words of dotted keys, as few as tell them apart."""
    paths = [key.split(".") for key in keys]
    names = []
    for path in paths:
        others = [other for other in paths if other != path]
        count = next(n for n in range(1, len(path) + 1) if n == len(path) or all(o[-n:] != path[-n:] for o in others))
        names.append(".".join(path[-count:]))
    return names


# Which of them share a compiled step ------------------------------------------------------------------------------

# What the compiled train step does not know, or reads as a number of `TrainState.hyper`.
_OWN = (
    "hyperparameters",
    "model.init_std",
    "model.embed_init_std",
    "model.residual_init_scale",
    "data.sources.*.weight",
    "data.sources.*.tokens",
    "data.mixture",
    "data.seed",
    "data.prefetch",
    "data.verify",
    "data.cache",
    "optimizer.*",
    "train.*",
    "checkpoint.*",
    "tracking.*",
)
_SHARED = (
    "optimizer.name",
    "optimizer.schedule.name",
    "train.batch",
    "train.microbatches",
    "train.noise_scale",
    "train.average_decay",
    "train.loss.*",
)
"""All the same the step's, though they match a pattern above."""
_SWITCHES = (
    "model.dropout",
    "model.attention_dropout",
    "model.embed_dropout",
    "model.moe.balance_weight",
    "model.moe.router_z_weight",
    "train.loss.z_weight",
    "train.average_decay",
)
"""Numbers that the step reads, where they are not 0; at 0 it is another."""


def compiled_settings(cfg: Config) -> dict[str, Any]:
    """What runs have in common that one compiled step can train: all settings but seeds, scalars, and what is done
    between steps."""

    own, shared = (_any_of(patterns) for patterns in (_OWN, _SHARED))
    return {
        key: value != 0 if key in _SWITCHES else value
        for key, value in settings(cfg).items()
        if shared.match(key) or not own.match(key)
    }


@functools.cache
def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(fnmatch.translate, patterns)))


def program(cfg: Config) -> str:
    """A hash of its `compiled_settings`: cells of one program may train together."""
    return hash_text(json.dumps(compiled_settings(cfg), sort_keys=True))


def check_together(cfg: Config, first: Config) -> None:
    """Raise ConfigError for a run that cannot train in one step with the `first`."""
    here, there = compiled_settings(cfg), compiled_settings(first)
    for key in {**there, **here}:
        if here.get(key) != there.get(key):
            was, now = (settings(one).get(key) for one in (first, cfg))
            raise ConfigError(
                f"{key} is {now!r} here, but {was!r} in the first run of the stack: what trains together may differ in "
                "seeds and scalars alone; train this run by itself"
            )
