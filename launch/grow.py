"""`python -m launch grow DIR --budget=1e19 --target=1e22`: a sweep that says itself what comes next, and when to stop.

Each call reads what has ended, scores the forecasts of it, and asks the planner (`analysis/growth.py`) for the cells of
least variance of ln N*(target) per FLOP. A forecast of each is written before it starts. Called again at any time, by a
cron line or by `--until-done`, it goes on; cells that it started and that did not finish are started again first.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence

from etils import epath
from scipy.stats import binom

from analysis import forecast, growth
from analysis.design import Candidates
from analysis.growth import Goal, Grow, Recommendation, Stop
from launch import manifest, page, price, stack, status
from launch.engines import ENGINES
from launch.family import Family, family
from launch.job import Hardware
from launch.manifest import Entry, Manifest
from launch.status import Row
from launch.sweep import ask_for, blank, entries, filled, only_launcher, prepared
from lmjax.errors import DONE, PREEMPTED, ConfigError
from lmjax.record import files

FORECASTS = "forecasts"
UNLIKELY = 0.01
"""So few forecasts inside their intervals that chance alone gives this share of sweeps no more."""
DIVERGED = 5  # NumericalError's exit code: the cell has no loss, and would have none again


@dataclasses.dataclass(frozen=True)
class Known:
    """What the sweep's cells tell, N by the parameters that a token passes through."""

    ended: list[tuple[Entry, float]]
    """With their losses, NaN where one diverged."""
    running: list[Entry]
    unfinished: list[Entry]
    """Waiting, preempted, killed or failed: to be started again."""

    short: list[Entry]
    """Those that have ended, or run, but take too few updates to count: they lie above any law of N and D."""

    @property
    def columns(self) -> tuple[list[int], list[int], list[float]]:
        """N, D and loss."""
        return (
            [entry.params_active for entry, _ in self.ended],
            [entry.tokens for entry, _ in self.ended],
            [loss for _, loss in self.ended],
        )


def known(sweep: Manifest, rows: Sequence[Row], fewest_steps: int) -> Known:
    found = Known([], [], [], [])
    for entry, row in zip(sweep.cells, rows, strict=True):
        done = row.state == "done" and row.loss is not None
        diverged = row.state == "failed" and row.why.startswith(f"exit code {DIVERGED}")
        if not (done or diverged or row.state == "running"):
            found.unfinished.append(entry)
        elif entry.steps < fewest_steps:
            found.short.append(entry)
        elif row.state == "running":
            found.running.append(entry)
        else:
            found.ended.append((entry, math.nan if row.loss is None or diverged else row.loss))
    return found


def launch(arguments: argparse.Namespace) -> int:
    """Returns 0 once the sweep says stop, 75 while it goes on: the same command, later, takes the next step."""
    directory = files.locate(arguments.directory)
    while True:
        with only_launcher(directory):
            code = step(directory, arguments)
        if code != PREEMPTED or not arguments.until_done:
            return code


def step(directory: epath.Path, arguments: argparse.Namespace) -> int:
    """Start again what did not finish, or else plan the next cells and start them."""
    old = manifest.read(directory) if (directory / manifest.FILE).exists() else None
    if old is None and arguments.config is None:
        raise ConfigError(f"{directory} holds no sweep yet: name the models to train, --config=FILE.py")
    base = old or blank(arguments, directory.name)
    rows = [] if old is None else status.rows(directory)
    found = Known([], [], [], []) if old is None else known(old, rows, arguments.fewest_steps)
    tell_short(found)
    tell_scores(directory, found)
    if old is not None and found.unfinished:
        print(f"{len(found.unfinished)} cells did not finish: they are started again")
        return started(old, directory, found.unfinished, arguments)
    goal = goal_of(arguments)
    on = price.accelerator(base.accelerator, share_of_peak=arguments.share_of_peak, dollars=arguments.dollars)
    members = family(base.config, base.common, on, arguments.smallest, arguments.largest)
    spent = sum(entry.flops_6nd for entry in (old.cells if old else ()))
    left = max(0.0, arguments.budget - spent)
    candidates = Candidates.of([member.params for member in members.members], arguments.ratios, left)
    decision = growth.plan_next(
        *found.columns,
        goal=goal,
        candidates=candidates.take(members.steps(candidates.params, candidates.tokens) >= arguments.fewest_steps),
        flops_left=left,
        running=([entry.params_active for entry in found.running], [entry.tokens for entry in found.running]),
    )
    tell(decision, goal, spent, arguments.budget)
    if isinstance(decision, Stop):
        return DONE
    if not len(decision.cells.params):
        print("those that run may be enough: come again when they have ended")
        return PREEMPTED
    sweep, new = grown(directory, base, members, decision)
    return started(sweep, directory, new, arguments)


def goal_of(arguments: argparse.Namespace) -> Goal:
    try:
        return Goal(arguments.target, arguments.tolerance, arguments.level, arguments.batch)
    except ValueError as error:
        raise ConfigError(f"--target, --tolerance, --level, --batch: {error}") from None


def grown(directory: epath.Path, base: Manifest, members: Family, decision: Grow) -> tuple[Manifest, list[Entry]]:
    """The sweep with the chosen cells, and those cells. Their forecasts and then the manifest are on disk."""
    cells, prices = members.cells([*zip(decision.cells.params, decision.cells.tokens, strict=True)])
    before = base.cells
    rounds = 1 + max((entry.round for entry in before), default=-1)
    numbered = enumerate(entries(cells, prices, round=rounds), start=len(before))
    new = [dataclasses.replace(entry, index=index) for index, entry in numbered]
    known_digests = {entry.digest for entry in before}
    if twice := [entry for entry in new if entry.digest in known_digests]:
        raise ConfigError(
            f"{base.config}: cell() makes a run that the sweep has already ({twice[0].tokens:,} tokens); let steps "
            "follow the tokens, or raise the lower of --ratios"
        )
    sweep = filled(base, [*before, *new], {**base.data, **prepared(cells)})
    (directory / FORECASTS).mkdir(parents=True, exist_ok=True)
    for entry, made in zip(new, decision.forecasts, strict=False):  # without a fit there are none
        files.write_bytes(_forecast_path(directory, entry), json.dumps(made, indent=1).encode())
    manifest.write(directory, sweep)
    return sweep, sweep.cells[len(before) :]


def started(sweep: Manifest, directory: epath.Path, cells: Sequence[Entry], arguments: argparse.Namespace) -> int:
    """PREEMPTED: there is more to do when these have ended."""
    hardware = Hardware(sweep.accelerator, sweep.nodes, sweep.spot)
    jobs = stack.jobs(sweep.name, str(directory), cells, arguments)
    engine = ENGINES[sweep.engine]
    engine.render(sweep.name, str(directory), jobs, hardware, arguments)
    ask_for(cells, arguments)
    code = engine.submit(sweep.name, str(directory), jobs, hardware, arguments)
    rows = status.rows(directory)
    print(f"{status.headline(rows)}; {page.write(directory, sweep, rows)}")
    return PREEMPTED if code == DONE else code


# What it says ---------------------------------------------------------------------------------------------------------


def tell(decision: Stop | Grow, goal: Goal, spent: float, budget: float) -> None:
    print(f"{spent:.3g} of {budget:.3g} FLOPs (6ND) are planned so far")
    if (found := decision.recommendation) is not None:
        print(sentence(found, goal))
        if found.left_out:
            print(f"left out, far above what the others say: {len(found.left_out)} of the cells that ended")
    if isinstance(decision, Stop):
        print(f"stop: {decision.reason}")
        return
    for place, (params, tokens) in enumerate(zip(decision.cells.params, decision.cells.tokens, strict=True)):
        expected = ""
        if decision.forecasts:
            made = decision.forecasts[place]
            expected = f"  forecast {made['loss']:.4f} ({made['low']:.4f} to {made['high']:.4f})"
        sizes = f"N {params:9.3g}  D {tokens:9.3g}  D/N {tokens / params:7.3g}  C {6 * params * tokens:9.3g}"
        print(f"next: {sizes}{expected}")


def sentence(found: Recommendation, goal: Goal) -> str:
    return (
        f"N*({goal.target:.3g}) = {found.estimate.params.value:.3g}, {goal.level:.0%} interval "
        f"{found.interval.low:.3g} to {found.interval.high:.3g} from {found.fit.runs} runs"
    )


def tell_scores(directory: epath.Path, found: Known) -> None:
    """How good the forecasts of cells that have ended were."""
    made = {
        str(entry.index): forecast.read_forecast(_forecast_path(directory, entry))
        for entry, _ in found.ended
        if _forecast_path(directory, entry).exists()
    }
    scores = forecast.score_forecasts(made, *found.columns) if made else None
    if scores is None or not scores.scores:
        return
    print(f"forecasts: {scores.inside:.0%} of {len(scores.scores)} inside their intervals, mean error "
          f"{scores.mean_error:.2%}")  # fmt: skip
    inside, level = round(scores.inside * len(scores.scores)), made[next(iter(made))]["level"]
    if binom.cdf(inside, len(scores.scores), level) < UNLIKELY:
        print("warning: so few forecasts hold that the law must bend where these cells lie, and the interval of N* is "
              "too narrow: raise --fewest-steps or the lower of --ratios")  # fmt: skip


def tell_short(found: Known) -> None:
    if found.short:
        print(f"left out, of too few updates (--fewest-steps): {len(found.short)} cells")


def _forecast_path(directory: epath.Path, entry: Entry) -> epath.Path:
    return directory / FORECASTS / f"{entry.index:04d}.json"
