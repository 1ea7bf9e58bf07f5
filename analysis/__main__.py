"""The commands:

    python -m analysis report  --runs=SOURCE --target=1e23 --out=DIR     fit everything, write figures and a page
    python -m analysis verify  DIR                                       derive every number of a report again
    python -m analysis design  --budget=1e20 --target=1e23 --out=FILE    which cells to train
    python -m analysis next    --runs=SOURCE --target=1e23 --tolerance=0.2 --largest=1e20 --out=FILE
    python -m analysis predict --runs=SOURCE --size=1e9 --tokens=2e10 --out=FILE
    python -m analysis score   FORECAST... (--runs=SOURCE | --loss-value=2.31)
    python -m analysis compare DIR...|wandb:entity/project [--group=SWEEP] [--out=DIR]
    python -m analysis noise   DIR...                                    gradient noise scale: which batch is enough

SOURCE is a CSV or parquet file, a directory of work directories or offline wandb runs, or wandb:entity/project.
"""

import argparse
import json
import sys
from pathlib import Path

try:
    import numpy as np

    from analysis import cells, compare, design, forecast, growth, noise_scale, page, report
    from analysis.estimates import Options
    from analysis.hyperparameters import NEAR_OPTIMAL
    from analysis.parametric import fit_parametric
    from analysis.runs import load_runs, naming
    from analysis.simulate import EPOCH
    from analysis.sources import read_records
    from analysis.study import check_law
    from analysis.surface import Surface
    from lmjax.models.shapes import nearest_shape, shapes
except ModuleNotFoundError as missing:
    if missing.name not in ("numpy", "scipy", "matplotlib", "pandas", "pyarrow"):
        raise
    print(f"lmjax analysis: error: {missing.name} is not installed; pip install -e .[analysis]", file=sys.stderr)
    raise SystemExit(2) from None

MOST_FLAGS = 4


class _OneLineParser(argparse.ArgumentParser):
    """Errors are one line; `--help` is there for the rest."""

    def error(self, message: str):
        raise ValueError(f"{message} (see python -m analysis {self.prog.split()[-1]} --help)")


def main(arguments: list[str] | None = None) -> int:
    try:
        parsed = _parser().parse_args(arguments)
        parsed.command(parsed)
    except (ValueError, OSError) as error:
        print(f"lmjax analysis: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(prog="analysis", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="name", required=True, parser_class=_OneLineParser)
    _add_report(commands)
    verify = commands.add_parser("verify", help="derive every number of a report again")
    verify.add_argument("report", type=Path)
    verify.set_defaults(command=_verify)
    _add_design(commands)
    _add_next(commands)
    _add_predict(commands)
    _add_score(commands)
    comparing = commands.add_parser("compare", help="a table of runs by rising loss")
    comparing.add_argument("sources", nargs="+", metavar="DIR|wandb:entity/project")
    comparing.add_argument("--loss", help="metric, such as val/c4/loss")
    comparing.add_argument("--group", help="only the runs of this group, such as the cells of a sweep")
    comparing.add_argument("--out", type=Path, help="write table, curves and figure here")
    comparing.set_defaults(command=_compare)
    noise = commands.add_parser("noise", help="the gradient noise scale of runs: which batch is enough")
    noise.add_argument("sources", nargs="+", metavar="DIR|wandb:entity/project")
    noise.add_argument("--parts", type=int, default=4, help="of each run: the scale grows as the loss falls")
    noise.set_defaults(command=_noise)
    return parser


def _add_source(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--runs", required=required, metavar="SOURCE")
    parser.add_argument("--loss", help="loss column or metric")
    parser.add_argument("--params", dest="count", help="which N: total, non_embedding, matmul, active, or a column")
    parser.add_argument("--flops", help="which C: 6nd, exact, or a column")
    parser.add_argument("--columns", type=_pairs, default={}, help="canonical=COLUMN,... for unusual tables")
    parser.add_argument("--where", type=_pairs, default={}, help="COLUMN=VALUE,... keeps only these rows")
    parser.add_argument("--exclude", type=_names, default=(), metavar="RUN,...", help="drop these runs, by name or row")
    parser.add_argument("--exclude-invalid", action="store_true", help="drop unusable rows, with the reason recorded")


def _selection(parsed) -> dict:
    return {
        "loss": parsed.loss,
        "params": parsed.count,
        "flops": parsed.flops,
        "columns": parsed.columns,
        "where": parsed.where,
        "exclude": parsed.exclude,
        "exclude_invalid": parsed.exclude_invalid,
    }


def _pairs(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(sign and key and value for key, sign, value in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE,...")
    return {key: value for key, _, value in pairs}


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not (np.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def _share(text: str) -> float:
    value = _positive(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1")
    return value


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _add_report(commands) -> None:
    parser = commands.add_parser("report", help="fit everything, write figures and a page")
    _add_source(parser)
    parser.add_argument("--target", type=_positive, required=True, help="FLOPs to extrapolate to")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budgets", type=_numbers, help="isoFLOP budgets; by default found in the data")
    parser.add_argument("--vertices-beyond-grid", action="store_true", help="approach 2 uses them, too")
    parser.add_argument(
        "--near-optimal",
        type=_share,
        default=NEAR_OPTIMAL,
        metavar="SHARE",
        help="settings at most this far above a cell's lowest loss make the laws of rate and batch",
    )
    parser.add_argument("--level", type=_share, default=0.95, help="of the intervals")
    parser.add_argument("--replicates", type=int, default=1000, help="of every bootstrap")
    parser.add_argument("--seed", type=int, default=42)
    parser.set_defaults(command=_report)


def _report(parsed) -> None:
    if parsed.replicates < 100:
        raise ValueError(f"--replicates={parsed.replicates} is too few for an interval: use at least 100")
    options = Options(
        parsed.target, parsed.level, parsed.replicates, parsed.seed, parsed.budgets,
        interior_only=not parsed.vertices_beyond_grid, near_optimal=parsed.near_optimal,
    )  # fmt: skip
    study = report.write_report(report.Inputs(parsed.runs, options, _selection(parsed)), parsed.out, tell=_tell)
    columns = ["method", "params_exponent", "params_exponent_low", "params_exponent_high", "params", "tokens", "loss"]
    print(compare.as_text(report.estimates_table(study)[columns]))
    for method, reason in study.absent.items():
        print(f"no {method}: {reason}")
    flags = study.budget_flags
    more = [f"{len(flags) - MOST_FLAGS} more such notes are on the page"] if len(flags) > MOST_FLAGS else []
    for warning in [*study.warnings, *flags[:MOST_FLAGS], *more]:
        print(f"note: {warning}")
    print(page.answer(study))
    if study.disagreement:
        print(f"METHODS DISAGREE on N*: {study.disagreement}")
    print(f"wrote {parsed.out / 'report.html'}")


def _tell(text: str) -> None:
    """Progress, on the line where the last one ended."""
    print(text, end="", flush=True)


def _verify(parsed) -> None:
    print(f"{parsed.report}: {report.verify(parsed.report)} numbers derived anew, all the same")


def _add_shapes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ratios", type=_numbers, default=(2.0, 200.0), help="smallest and largest D/N")
    parser.add_argument("--smallest", type=_positive, default=1e7, help="parameters of the smallest model")
    parser.add_argument("--devices", type=int, default=8, help="batches divide by this")


def _add_design(commands) -> None:
    parser = commands.add_parser("design", help="which cells to train")
    _add_source(parser, required=False)
    parser.add_argument("--budget", type=_positive, required=True, help="FLOPs to spend on all cells")
    parser.add_argument("--target", type=_positive, required=True, help="FLOPs at which N* is wanted")
    _add_shapes(parser)
    parser.add_argument("--noise", type=_positive, default=0.005, help="nats between seeds")
    parser.add_argument("--most", type=int, default=40, help="cells at most, without the hold-out")
    parser.add_argument("--out", type=Path, required=True, help="JSON: one object of config overrides a cell")
    parser.set_defaults(command=_design)


def _design(parsed) -> None:
    ratios = _ratios(parsed)
    if parsed.most < 6 or parsed.devices < 1:
        raise ValueError("--most must be at least 6 and --devices at least 1")
    surface = EPOCH if parsed.runs is None else _fitted_surface(parsed)
    sizes = shapes(parsed.smallest, np.sqrt(parsed.budget / (6.0 * ratios[0])))
    candidates = design.Candidates.of([shape.params for shape in sizes], ratios, parsed.budget)
    chosen = design.choose_cells(
        surface, candidates, budget=parsed.budget, target=parsed.target, noise_sd=parsed.noise, most=parsed.most
    )
    pairs = [*zip(chosen.params, chosen.tokens, strict=True), chosen.hold_out]
    by_size = {shape.params: shape for shape in sizes}
    rows = [cells.overrides(by_size[n], d, devices=parsed.devices) for n, d in pairs]
    _write_json(parsed.out, rows)
    for n, d in pairs:
        held = "  hold-out: predict it, do not fit it" if (n, d) == chosen.hold_out else ""
        print(f"N {n:9.3g}  D {d:9.3g}  D/N {d / n:7.3g}  C {6 * n * d:9.3g}{held}")
    print(
        f"{len(rows)} cells, {chosen.spent:.3g} of {chosen.budget:.3g} FLOPs; with noise of {parsed.noise:g} nats "
        f"the standard error of a is {chosen.exponent_se:.4f}, of ln N*({parsed.target:.3g}) {chosen.log_params_se:.3f}"
    )
    print(f"wrote {parsed.out} (the last cell is the hold-out)")


def _fitted_surface(parsed) -> Surface:
    runs = load_runs(parsed.runs, **_selection(parsed)).tuned()
    with naming(runs.source):
        surface = fit_parametric(*runs.points).surface
        check_law(surface)
        return surface


def _add_next(commands) -> None:
    parser = commands.add_parser("next", help="stop the sweep, or the cell to train next")
    _add_source(parser)
    parser.add_argument("--target", type=_positive, required=True, help="FLOPs at which N* is wanted")
    parser.add_argument(
        "--tolerance", type=_positive, required=True, help="half the interval of ln N* (0.2: about 20%%)"
    )
    parser.add_argument("--largest", type=_positive, required=True, help="FLOPs that the next cell may cost")
    _add_shapes(parser)
    parser.add_argument("--level", type=_share, default=0.95, help="of the interval")
    parser.add_argument("--out", type=Path, required=True, help="JSON: the config overrides of the cell")
    parser.set_defaults(command=_next)


def _next(parsed) -> None:
    """By variable projection, whose intervals are right for few runs, too."""
    runs = load_runs(parsed.runs, **_selection(parsed)).tuned()
    sizes = shapes(parsed.smallest, np.sqrt(parsed.largest / (6.0 * _ratios(parsed)[0])))
    candidates = design.Candidates.of([shape.params for shape in sizes], parsed.ratios, parsed.largest)
    if not len(candidates.params):
        raise ValueError(f"no cell costs at most {parsed.largest:.3g} FLOPs: raise --largest or lower --smallest")
    goal = growth.Goal(parsed.target, parsed.tolerance, parsed.level, batch=1)
    with naming(runs.source):
        found = growth.recommend(*runs.points, goal=goal)
        planned = growth.plan_next(*runs.points, goal=goal, candidates=candidates, flops_left=np.inf)
    print(f"N*({parsed.target:.3g}) = {found.estimate.params.value:.3g}, {parsed.level:.0%} interval "
          f"{found.interval.low:.3g} to {found.interval.high:.3g} from {found.fit.runs} runs")  # fmt: skip
    if found.left_out:
        print(f"left out, far above the others: {', '.join(runs.column('run')[list(found.left_out)])}")
    if isinstance(planned, growth.Stop):
        print(f"stop: {planned.reason}")
        return
    ((n, d),) = zip(planned.cells.params, planned.cells.tokens, strict=True)
    _write_json(parsed.out, [cells.overrides(nearest_shape(n), d, devices=parsed.devices)])
    print(f"go on: half the interval of ln N* is {found.half:.3f}, not within {parsed.tolerance:g} from "
          f"{growth.FEWEST_TO_STOP} runs or more")  # fmt: skip
    print(f"next: N {n:.3g}  D {d:.3g}  C {6 * n * d:.3g}; wrote {parsed.out}")


def _ratios(parsed) -> tuple[float, float]:
    if len(parsed.ratios) != 2 or parsed.ratios[0] >= parsed.ratios[1]:
        raise ValueError("--ratios takes the smallest and the largest D/N, such as --ratios=2,200")
    return parsed.ratios


def _write_json(path: Path, value: object) -> None:
    """Over a file of JSON, but no other: that would be somebody's table."""
    try:
        if path.exists():
            json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"{path} is there and is not JSON: choose another --out") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def _add_predict(commands) -> None:
    parser = commands.add_parser("predict", help="a dated, hashed forecast of one run")
    _add_source(parser)
    parser.add_argument("--size", type=_positive, required=True, help="N of the run, parameters")
    parser.add_argument("--tokens", type=_positive, required=True, help="D of the run")
    parser.add_argument("--level", type=_share, default=0.95)
    parser.add_argument("--out", type=Path, required=True)
    parser.set_defaults(command=_predict)


def _predict(parsed) -> None:
    if parsed.out.exists():
        raise ValueError(f"{parsed.out} exists: a forecast is never overwritten; choose another name")
    runs = load_runs(parsed.runs, **_selection(parsed))
    made = forecast.make_forecast(runs, parsed.size, parsed.tokens, level=parsed.level)
    _write_json(parsed.out, made)
    print(f"loss {made['loss']:.4f} nats, {parsed.level:.0%} interval {made['low']:.4f} to {made['high']:.4f}; "
          f"wrote {parsed.out} ({made['sha256'][:12]})")  # fmt: skip


def _add_score(commands) -> None:
    parser = commands.add_parser("score", help="compare forecasts with what came out")
    parser.add_argument("forecasts", nargs="+", type=Path)
    _add_source(parser, required=False)
    parser.add_argument("--loss-value", type=_positive, help="the loss that came out, for a single forecast")
    parser.set_defaults(command=_score)


def _score(parsed) -> None:
    if (parsed.loss_value is None) == (parsed.runs is None):
        raise ValueError("score needs either --runs=SOURCE or --loss-value=NATS")
    if parsed.loss_value is not None and len(parsed.forecasts) > 1:
        raise ValueError("--loss-value scores one forecast: use --runs=SOURCE for several")
    runs = load_runs(parsed.runs, **_selection(parsed)) if parsed.runs else None
    scores = []
    for path in parsed.forecasts:
        made = forecast.read_forecast(path)
        actual = parsed.loss_value if runs is None else forecast.actual_loss(made, runs)
        scores.append(forecast.score(path, actual))
    for each in scores:
        verdict = "inside" if each.inside else "OUTSIDE"
        print(f"{each.forecast}: predicted {each.predicted:.4f} [{each.low:.4f}, {each.high:.4f}], came out "
              f"{each.actual:.4f}: {100 * each.relative_error:+.2f}%, {verdict}")  # fmt: skip
    print(f"{sum(each.inside for each in scores)} of {len(scores)} inside their intervals")


def _compare(parsed) -> None:
    result = compare.compare(read_records(parsed.sources, group=parsed.group), parsed.loss)
    print(compare.as_text(result.table))
    for note in result.notes:
        print(f"note: {note}")
    if parsed.out is not None:
        names = ("runs.csv", "curves.csv", "curves.png", "curves.pdf")
        there = [name for name in names if (parsed.out / name).exists()]
        if 0 < len(there) < len(names):
            raise ValueError(f"{parsed.out / there[0]} is there and was not written by compare: choose another --out")
        parsed.out.mkdir(parents=True, exist_ok=True)
        result.table.to_csv(parsed.out / "runs.csv", index=False)
        result.drawing.data.to_csv(parsed.out / "curves.csv", index=False)
        result.drawing.figure.savefig(parsed.out / "curves.png")
        result.drawing.figure.savefig(parsed.out / "curves.pdf")
        print(f"wrote {parsed.out}")


def _noise(parsed) -> None:
    if parsed.parts < 1:
        raise ValueError(f"--parts={parsed.parts} must be at least 1")
    for record in read_records(parsed.sources):
        for part in noise_scale.noise_scales(record, parsed.parts):
            steps = f"{record.name} steps {part.first_step:,.0f} to {part.last_step:,.0f}"
            if np.isnan(part.scale):
                print(f"{steps}: the gradient drowns in noise; log more steps, or train on larger batches")
            else:
                print(f"{steps}: noise scale {part.scale:,.0f} tokens, standard error {part.stderr:,.0f}")


if __name__ == "__main__":
    sys.exit(main())
