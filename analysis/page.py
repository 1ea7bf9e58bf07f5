"""The report as one self-contained HTML page."""

import base64
import json
from collections.abc import Callable
from html import escape
from pathlib import Path

from analysis.estimates import Estimate, Quantity
from analysis.figures.style import Drawing
from analysis.study import Study

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
td small { white-space: nowrap; } .list td { text-align: left; }
.scroll { overflow-x: auto; }
.answer { font-size: 18px; border-left: 4px solid #0072b2; padding: .2rem 0 .2rem 1rem; }
img { max-width: 100%; } figure { margin: 1.5rem 0; } figcaption { color: #555; font-size: 13px; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: 12.5px; }
.bad { border: 2px solid #b00020; background: #fdecee; padding: .6rem 1rem; }
.note { border-left: 3px solid #e69f00; padding-left: .8rem; }
small { color: #777; }
"""


def render(
    study: Study, numbers: dict, drawings: dict[str, Drawing], skipped: dict[str, str], folder: Path, next_run: dict
) -> str:
    parts = [
        f"<h1>Scaling-law study: {study.options.target:.3g} FLOPs</h1>",
        f'<p class="answer">{escape(answer(study))}</p>',
        _disagreement(study),
        _estimates(study),
        _warnings(study),
        _next_run(study, next_run),
        "<h2>Figures</h2>",
        *(_figure(name, drawing, folder) for name, drawing in drawings.items()),
        "<ul>" + "".join(f"<li>no {name}: {escape(why)}</li>" for name, why in skipped.items()) + "</ul>",
        _provenance(study, numbers),
    ]
    title = f"<title>Scaling laws at {study.options.target:.3g} FLOPs</title>"
    head = f"<!doctype html><html lang=en><meta charset=utf-8>{title}<style>{STYLE}</style>"
    return head + "\n".join(parts) + "</html>\n"


def answer(study: Study) -> str:
    """What to train at the target and what to expect, by approach 3, in a few sentences."""
    best, level = study.estimates[0], f"{study.options.level:.0%}"
    parts = [
        f"At {study.options.target:.3g} FLOPs train a model of {amount(best.params.value)} parameters on "
        f"{amount(best.tokens.value)} tokens, {best.tokens.value / best.params.value:.3g} a parameter"
    ]
    if best.params.interval is not None:
        ends = best.params.interval
        parts[0] += f" ({level} interval of the size: {amount(ends.low)} to {amount(ends.high)})"
    if best.loss is not None:
        interval = best.loss.interval
        between = f" ({interval.low:.3f} to {interval.high:.3f})" if interval is not None else ""
        parts.append(f"Expect a loss of {best.loss.value:.3f}{between} {study.runs.loss_unit}")
    others = [estimate.params.value for estimate in study.estimates[1:]]
    parts.append(
        f"{'The other methods' if len(others) > 1 else 'The other method'} put the size at "
        f"{' to '.join(dict.fromkeys((amount(min(others)), amount(max(others)))))}"
        f"{', further apart than their intervals allow' if study.disagreement else ''}"
    )
    reach = study.options.target / study.runs.column("flops").max()
    if reach > 1:
        parts.append(f"The target is {reach:.3g} times the largest run")
    return ". ".join(parts) + "."


def amount(value: float) -> str:
    """A count for people: 44B, 380B, 1.2T, 560M, 31k; three digits at most."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            rounded = float(f"{value / size:.3g}")
            return f"{rounded:,.0f}{letter}" if rounded >= 100 else f"{rounded:.3g}{letter}"
    return f"{value:.3g}"


def _disagreement(study: Study) -> str:
    if not study.disagreement:
        return ""
    what = "Methods disagree by more than their intervals"
    return f'<p class="bad"><b>{what}</b> on N*: {escape(study.disagreement)}.</p>'


def _estimates(study: Study) -> str:
    loss = f"loss ({study.runs.loss_unit})"
    names = ("method", "a in N* ~ C^a", "b in D* ~ C^b", "N*", "D*", loss, "learning rate", "batch (tokens)")
    header = "".join(f"<th>{name}</th>" for name in names)
    rows = "".join(_row(estimate) for estimate in study.estimates)
    absent = "".join(f"<li>no {escape(name)}: {escape(why)}</li>" for name, why in study.absent.items())
    return (
        f"<h2>Estimates at the target, with {study.options.level:.0%} intervals</h2>"
        f'<div class="scroll"><table><tr>{header}</tr>{rows}</table></div>'
        f"<p><small>Intervals: {escape(_interval_methods(study))}.</small></p><ul>{absent}</ul>"
    )


def _interval_methods(study: Study) -> str:
    """How the intervals of each method were found, as in `variable projection delta`."""
    said = []
    for estimate in study.estimates:
        quantities = (estimate.params_exponent, estimate.params, estimate.loss, estimate.learning_rate)
        methods = dict.fromkeys(q.interval.method for q in quantities if q is not None and q.interval is not None)
        said.append(f"{estimate.method} {' and '.join(methods) or 'none'}")
    return "; ".join(said)


def _row(estimate: Estimate) -> str:
    cells = (
        _cell(estimate.params_exponent, ".3f"),
        _cell(estimate.tokens_exponent, ".3f"),
        _cell(estimate.params, ".3g", amount),
        _cell(estimate.tokens, ".3g", amount),
        _cell(estimate.loss, ".3f"),
        _cell(estimate.learning_rate, ".2g"),
        _cell(estimate.batch_tokens, ".2g", amount),
    )
    return f"<tr><td>{escape(estimate.method)}</td>{''.join(cells)}</tr>"


def _cell(quantity: Quantity | None, form: str, for_people: Callable[[float], str] | None = None) -> str:
    """The value, for people where that is another form than the exact one, and under it the interval."""
    if quantity is None:
        return "<td>-</td>"
    lines = [] if for_people is None else [f"<b>{for_people(quantity.value)}</b>"]
    lines.append(f"{quantity.value:{form}}")
    if quantity.interval is not None:
        lines.append(f"<small>{quantity.interval.low:{form}} to {quantity.interval.high:{form}}</small>")
    return f"<td>{'<br>'.join(lines)}</td>"


def _next_run(study: Study, next_run: dict) -> str:
    estimate = study.estimates[0]
    told = []
    for name, what in (("learning_rate", "learning rate"), ("batch_tokens", "batch in tokens")):
        quantity = getattr(estimate, name)
        if quantity is None:
            told.append(f"{what}: the law of DeepSeek LLM (arXiv 2401.02954), since these runs tried too few")
        else:
            told.append(f"{what}: {_with_ends(quantity, '.2g')}, by the law of these runs")
    if estimate.loss is not None:
        told.append(f"expected loss: {_with_ends(estimate.loss, '.3f')} {study.runs.loss_unit}")
    items = "".join(f"<li>{escape(line)}</li>" for line in told)
    return (
        f"<h2>What to train next</h2><p>N* and D* at the target by {escape(estimate.method)}, as config overrides "
        f"(<code>next.json</code>):</p><pre>{escape(json.dumps(next_run, indent=1))}</pre><ul>{items}</ul>"
    )


def _with_ends(quantity: Quantity, form: str) -> str:
    if quantity.interval is None:
        return f"{quantity.value:{form}}"
    interval = quantity.interval
    ends = f"{interval.level:.0%} {interval.method} interval {interval.low:{form}} to {interval.high:{form}}"
    return f"{quantity.value:{form}} ({ends})"


def _warnings(study: Study) -> str:
    if not study.warnings:
        return ""
    items = "".join(f"<li>{escape(warning)}</li>" for warning in study.warnings)
    return f'<div class="note"><b>Read with care</b><ul>{items}</ul>{_left_out(study)}</div>'


def _left_out(study: Study) -> str:
    """A folded table of the isoFLOP budgets without an optimum, by what is missing."""
    if not study.left_out:
        return ""
    rows = "".join(
        f"<tr><td>{escape(reason)}</td><td>{escape(', '.join(fits))}</td>"
        f"<td>{', '.join(f'{budget:.3g}' for budget in budgets)}</td></tr>"
        for (reason, budgets), fits in study.left_out.items()
    )
    return (
        "<details><summary>Budgets that approach 2 leaves out</summary>"
        f'<table class="list"><tr><th>why</th><th>in the fits</th><th>budgets (FLOPs)</th></tr>{rows}</table></details>'
    )


def _figure(name: str, drawing: Drawing, folder: Path) -> str:
    image = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
    caption = f"{escape(drawing.caption)} <small>figures/{name}.csv</small>"
    return (
        f'<figure><img alt="{escape(drawing.caption)}" src="data:image/png;base64,{image}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _provenance(study: Study, numbers: dict) -> str:
    huber, provenance = study.huber, numbers["provenance"]
    exclusions = "; ".join(f"{len(e.runs)} {e.reason}" for e in study.runs.exclusions) or "none"
    facts = (
        ("source", study.runs.source),
        ("data sha256", provenance["data_sha256"]),
        ("runs", f"{provenance['runs']}, of which {provenance['runs_fitted']} fitted; excluded: {exclusions}"),
        ("loss", f"{study.runs.loss_name}, {study.runs.loss_unit}"),
        ("N counted", study.runs.params_convention),
        ("C counted", study.runs.flops_convention),
        ("approach 3", f"{huber.loss_name}, objective {huber.objective:.10g}"),
        ("starts", f"{huber.starts}: {huber.converged:.1%} converged, {huber.agreeing:.1%} agree with the best"),
        ("condition number", f"{huber.condition:.3g} (centred)"),
        ("bootstrap", f"{study.options.replicates} of {study.bootstrap}, seed {study.options.seed}"),
        ("versions", ", ".join(f"{k} {v}" for k, v in provenance["versions"].items())),
    )
    rows = "".join(f"<tr><td>{name}</td><td>{escape(str(value))}</td></tr>" for name, value in facts)
    return f"<h2>Provenance</h2><table>{rows}</table>"
