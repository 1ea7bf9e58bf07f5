"""`python -m launch sweep CONFIG --out=DIR`: the cells of a config file, priced, written down, and started.

Nothing is written or started before every cell was checked. The same command again starts what is missing or did not
finish.
"""

import argparse
import contextlib
import dataclasses
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata

from etils import epath

from launch import ahead, manifest, page, price, stack, status, table, trunks
from launch.engines import ENGINES
from launch.job import Hardware, Job
from launch.manifest import Entry, Manifest
from launch.price import Price
from lmjax.cells import Cell, load_cells, program, shown
from lmjax.config import hash_text
from lmjax.data.prepare.prepare import prepare
from lmjax.data.store.manifest import read_manifest
from lmjax.devices.chips import PRICES_FROM
from lmjax.errors import DONE, CheckpointError, ConfigError, one_line
from lmjax.process.start_up import git_revision
from lmjax.record import files

TARGET_RATIO = 10
"""How far beyond its dearest cell a sweep is extrapolated, where nobody says."""


def launch(arguments: argparse.Namespace) -> int:
    if arguments.nodes < 1:
        raise ConfigError(f"--nodes={arguments.nodes} must be at least 1")
    files.check_takes_checkpoints(arguments.out, "--out")
    cells = load_cells(arguments.config, arguments.cells, arguments.overrides, bracket=arguments.bracket)
    on = price.accelerator(arguments.accelerator, share_of_peak=arguments.share_of_peak, dollars=arguments.dollars)
    target = ahead.target(on) if arguments.compile else None
    wanted = trunks.resolved(entries(cells, price.price_all(cells, on)), cells)
    if target is not None:
        needed = ahead.step_bytes(cells, target)
        wanted = [dataclasses.replace(one, step_bytes=size) for one, size in zip(wanted, needed, strict=True)]
    print(table.of_entries(wanted))
    print(table.totals(wanted, on))
    directory = files.locate(arguments.out)
    old = manifest.read(directory) if (directory / manifest.FILE).exists() else None
    if old is not None:
        wanted = joined(old, wanted, directory, extend=arguments.extend)
    chosen = todo(manifest.chosen(wanted, arguments.only), directory)
    sweep = blank(arguments, old.name if old else directory.name)
    hardware, engine = Hardware(arguments.accelerator, arguments.nodes, arguments.spot), ENGINES[arguments.engine]
    jobs = jobs_of(sweep.name, directory, chosen, wanted, arguments)
    rendered = engine.render(sweep.name, str(directory), jobs, hardware, arguments)
    if arguments.dry_run:
        for file, text in rendered.items():
            print(f"--- {file}\n{text}")
        return DONE
    starting = {index for job in jobs for index in job.cells}
    ask_for([entry for entry in chosen if entry.index in starting], arguments)
    with only_launcher(directory):
        sweep = filled(sweep, wanted, prepared(cells))
        manifest.write(directory, sweep)
        code = engine.submit(sweep.name, str(directory), jobs, hardware, arguments) if jobs else DONE
        return told(sweep, directory, arguments, code)


# What a sweep is --------------------------------------------------------------------------------------------------


def entries(cells: Sequence[Cell], prices: Sequence[Price], round: int = 0) -> list[Entry]:
    """The cells as the manifest has them, numbered from 0, their ids left open until the data are there."""
    keys = dict.fromkeys(key for cell in cells for key in cell.overrides)
    varying = [key for key in keys if len(cells) == 1 or _varies(key, cells)]
    return [
        Entry(
            index=index,
            name=cell.cfg.tracking.name
            or shown({key: cell.overrides[key] for key in varying if key in cell.overrides}),
            overrides=cell.overrides,
            digest=cell.digest,
            run_id="",
            steps=cell.cfg.train.steps,
            params=priced.counts.total,
            params_non_embedding=priced.counts.non_embedding,
            params_active=priced.counts.active,
            tokens=priced.tokens,
            flops_6nd=priced.flops_6nd,
            flops=priced.flops,
            state_bytes=priced.state_bytes,
            epochs=priced.epochs,
            hours=priced.hours,
            dollars=priced.dollars,
            round=round,
            bracket=cell.bracket,
            factor=cell.factor,
            program=program(cell.cfg),
        )
        for index, (cell, priced) in enumerate(zip(cells, prices, strict=True))
    ]


def _varies(key: str, cells: Sequence[Cell]) -> bool:
    return len({repr(cell.overrides.get(key)) for cell in cells}) > 1


def joined(old: Manifest, wanted: Sequence[Entry], directory: epath.Path, *, extend: bool) -> list[Entry]:
    """The sweep's own cells, and with `extend` those of `wanted` that it lacks after them.

    Raises ConfigError for cells that are not the sweep's.
    """
    known = {entry.digest for entry in old.cells}
    new = [entry for entry in wanted if entry.digest not in known]
    lost = known - {entry.digest for entry in wanted}
    if extend:
        index = {entry.digest: number for number, entry in enumerate([*old.cells, *new])}
        return [*old.cells, *(_moved(entry, wanted, index) for entry in new)]
    if new or lost:
        what = f"cell {new[0].index} ({new[0].name}) is none of its" if new else f"{len(lost)} are missing of its"
        raise ConfigError(
            f"{directory} holds another sweep: {what} {len(old.cells)} cells; use another --out, or --extend adds cells"
        )
    return old.cells


def _moved(entry: Entry, wanted: Sequence[Entry], index: Mapping[str, int]) -> Entry:
    """The cell, and its trunk, with the numbers that their digests have in another list."""
    trunk = None if entry.trunk is None else index[wanted[entry.trunk].digest]
    return dataclasses.replace(entry, index=index[entry.digest], trunk=trunk)


def prepared(cells: Sequence[Cell]) -> dict[str, str]:
    """The fingerprints of all data sets, by path; those that have a recipe and are not there yet are made."""
    sources = {source.path: source for cell in cells for source in cell.cfg.data.sources.values()}
    return {
        path: (prepare(source.prepare, path) if source.prepare else read_manifest(files.locate(path))).fingerprint
        for path, source in sources.items()
    }


def blank(arguments: argparse.Namespace, name: str) -> Manifest:
    """A sweep without cells yet, as the command line describes it."""
    return Manifest(
        name=name,
        config=arguments.config,
        common=arguments.overrides,
        engine=arguments.engine,
        accelerator=arguments.accelerator,
        nodes=arguments.nodes,
        spot=arguments.spot,
        prices=PRICES_FROM,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        lmjax=metadata.version("lmjax"),
        code=code_version(),
        data={},
        cells=[],
    )


def filled(sweep: Manifest, cells: Sequence[Entry], data: dict[str, str]) -> Manifest:
    """The sweep with these cells, each with an id that depends on its settings, the code and the data."""
    code, fingerprints = code_version(), [data[path] for path in sorted(data)]
    named = [
        entry if entry.run_id else dataclasses.replace(entry, run_id=hash_text(entry.digest, code, *fingerprints))
        for entry in cells
    ]
    return dataclasses.replace(sweep, cells=named, data=data)


def code_version() -> str:
    """The commit, with + where the tree has changes; empty for an installed package."""
    revision = git_revision()
    return revision["git_commit"] + "+" * revision["git_dirty"] if revision else ""


# Start ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def only_launcher(directory: epath.Path) -> Iterator[None]:
    """Raises ConfigError while another one starts cells of the same sweep, and CheckpointError for a full disk."""
    with contextlib.ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            free = stack.enter_context(files.lock(directory / ".lock", patience=0))
        except OSError as error:
            raise CheckpointError(f"storage: cannot write {directory}: {one_line(error)}; free or mend it") from None
        if not free:
            raise ConfigError(f"another launcher works in {directory}; wait for it, or see launch status {directory}")
        yield


def told(sweep: Manifest, directory: epath.Path, arguments: argparse.Namespace, code: int) -> int:
    """Say how all cells stand, and where to look; the report, where it is asked for. Returns the exit code."""
    rows = status.rows(directory)
    print(status.table(rows))
    for note in status.bracket_notes(sweep, rows):
        print(f"note: {note}")
    print(f"{status.headline(rows)}; {page.write(directory, sweep, rows)}")
    if arguments.report is None or not status.all_done(rows):
        return code
    return report(directory, arguments.report or TARGET_RATIO * max(entry.flops for entry in sweep.cells))


def report(directory: epath.Path, target: float) -> int:
    """The fits of all cells, extrapolated to `target` FLOPs, by the analysis' own command; its exit code."""
    flags = [f"--runs={directory}", f"--target={target:.3g}", f"--out={directory / 'report'}"]
    return subprocess.run([sys.executable, "-m", "analysis", "report", *flags]).returncode


def todo(chosen: Sequence[Entry], directory: epath.Path) -> list[Entry]:
    """Those of the chosen cells that are neither done nor running."""
    return [entry for entry in chosen if status.row(directory, entry).state not in ("done", "running")]


def jobs_of(
    name: str,
    directory: epath.Path,
    chosen: Sequence[Entry],
    cells: Sequence[Entry],
    arguments: argparse.Namespace,
) -> list[Job]:
    """What starts the chosen cells. A branch comes after its trunk; where the engine does not wait, it is left out.

    Raises ConfigError for a branch whose trunk is not done, and not chosen.
    """
    waits, starting = ENGINES[arguments.engine].WAITS, {entry.index for entry in chosen}
    after = {
        entry.index: entry.trunk
        for entry in chosen
        if entry.trunk is not None and status.row(directory, cells[entry.trunk]).state != "done"
    }
    for index, trunk in after.items():
        if waits and trunk not in starting:
            raise ConfigError(f"cell {index} branches from cell {trunk}, which is not done; start that, too")
    if after and not waits:
        print(f"{len(after)} cells branch from others: the same command starts them when those have ended")
        chosen, after = [entry for entry in chosen if entry.index not in after], {}
    return stack.jobs(name, str(directory), chosen, arguments, after)


def ask_for(todo: Sequence[Entry], arguments: argparse.Namespace) -> None:
    """Money is spent after a yes. Raises ConfigError without one."""
    dollars = sum(entry.dollars or 0.0 for entry in todo)
    if not dollars or arguments.yes:
        return
    question = f"start {len(todo)} cells for about ${dollars:,.2f}? [y/N] "
    if not sys.stdin.isatty() or input(question).strip().lower() not in ("y", "yes"):
        raise ConfigError(f"{len(todo)} cells would cost about ${dollars:,.2f}; say --yes")
