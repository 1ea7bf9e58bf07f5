"""`sweep.json`: what a sweep is, written when it starts and whenever cells are added. Whoever reads it needs no JAX."""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from lmjax.errors import CheckpointError, ConfigError, DataError, one_line
from lmjax.record import files, formats
from lmjax.schema import validated

FILE = "sweep.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Entry:
    """One cell as it was started."""

    index: int
    name: str
    """What varies, in a few words."""
    overrides: dict[str, Any]
    digest: str
    """Of its settings."""
    run_id: str
    """Of settings, code and data; its id in wandb."""
    steps: int
    params: int
    params_non_embedding: int
    params_active: int
    tokens: int
    flops_6nd: int
    flops: int
    """Exact, attention causal."""
    state_bytes: float
    """Of weights, gradients and optimizer state on one device."""
    epochs: dict[str, float | None]
    hours: float | None
    dollars: float | None
    round: int = 0
    """Which growth of the sweep added it."""
    bracket: str = ""
    """The same for cells that differ in the learning rate alone."""
    factor: float = 1.0
    """Its learning rate over that in the bracket's middle."""
    program: str = ""
    """The same for cells that may train together; older sweeps do not say."""

    step_bytes: float | None = None
    """That its step needs on one device, where XLA was asked."""
    trunk: int | None = None
    """The cell whose first steps are its own, too."""
    first_step: int = 0
    """Where its own steps begin."""

    @property
    def share(self) -> float:
        """Of its FLOPs, those of its own steps."""
        return 1 - self.first_step / self.steps

    @property
    def own_flops(self) -> float:
        return self.flops * self.share

    @property
    def workdir(self) -> str:
        """Below the sweep's directory."""
        return f"cells/{self.index:04d}"

    @property
    def attempts(self) -> str:
        return f"attempts/{self.index:04d}.jsonl"

    @property
    def log(self) -> str:
        return f"logs/{self.index:04d}.log"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A sweep."""

    name: str
    config: str
    """`path.py[:argument]`, from the directory that the sweep was started in."""
    common: list[str]
    """Overrides of all cells."""
    engine: str
    accelerator: str | None
    nodes: int
    spot: bool
    prices: str
    """What the prices assume."""
    created: str
    lmjax: str
    """The version."""
    code: str
    """The commit, with + where the tree had changes."""
    data: dict[str, str]
    """Fingerprints of the data sets, by path."""
    cells: list[Entry]
    format: int = FORMAT


def read(directory: epath.PathLike) -> Manifest:
    """Raises ConfigError for a directory that holds no sweep, or one of a later version."""
    path = epath.Path(directory) / FILE
    try:
        tree = json.loads(path.read_bytes())
        formats.check(path, tree.get("format"), tree.get(formats.STAMP), FORMAT, ConfigError)
        return validated(Manifest, tree)
    except ConfigError:
        raise
    except (OSError, ValueError, AttributeError, ImportError, RecursionError) as error:
        raise ConfigError(f"{path}: not a readable sweep ({one_line(error)}); name its --out") from None


def write(directory: epath.PathLike, manifest: Manifest) -> None:
    """Raises CheckpointError when it cannot be written."""
    directory = epath.Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        files.write_bytes(directory / FILE, json.dumps(dataclasses.asdict(manifest), indent=1).encode())
    except (OSError, DataError) as error:
        raise CheckpointError(f"storage: cannot write {directory / FILE}: {one_line(error)}; free or mend it") from None


def entry(sweep: Manifest, index: int) -> Entry:
    """A cell by its number. Raises ConfigError for one that is not there."""
    if not 0 <= index < len(sweep.cells):
        raise ConfigError(f"the sweep {sweep.name} has no cell {index}; they go from 0 to {len(sweep.cells) - 1}")
    return sweep.cells[index]


def chosen(cells: Sequence[Entry], only: str | None) -> list[Entry]:
    """Those that `--only=3,7,10-12` names; all by default. Raises ConfigError for those that are not there."""
    if only is None:
        return list(cells)
    wanted: list[int] = []
    for part in only.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if found is None:
            raise ConfigError(f"--only={only}: write indices, such as --only=3,7,10-12")
        first, last = int(found[1]), int(found[2] or found[1])
        if last >= len(cells) or first > last:
            raise ConfigError(f"--only={only}: there is no such cell; they go from 0 to {len(cells) - 1}")
        wanted += range(first, last + 1)
    return [cells[index] for index in dict.fromkeys(wanted)]
