"""The report as one self-contained HTML page."""

import base64
import json
from html import escape
from pathlib import Path

from analysis.estimates import Estimate, Quantity
from analysis.figures.style import Drawing
from analysis.study import Study

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th:first-child, td:first-child, .words th, .words td { text-align: left; overflow-wrap: anywhere; }
td small { white-space: nowrap; }
.wide { overflow-x: auto; }
.answer { font-size: 18px; border-left: 3px solid #0072b2; padding-left: .8rem; }
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
        _flagged_budgets(study),
        _settings(study),
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
    """What to train, what to expect, and how sure that is, in sentences for people."""
    first, target = study.estimates[0], study.options.target
    told = (
        f"With {target:.3g} FLOPs train {people(first.params.value)} parameters on {people(first.tokens.value)} tokens"
    )
    if first.loss is not None:
        told += f", and expect a loss of {first.loss.value:.3f} {study.runs.loss_unit}"
        if ends := first.loss.interval:
            told += f" ({ends.low:.3f} to {ends.high:.3f})"
    told += f", says {first.method}."
    if ends := first.params.interval:
        told += f" Its {ends.level:.0%} interval of the size is {people(ends.low)} to {people(ends.high)};"
    sizes = [estimate.params.value for estimate in study.estimates]
    told += f" the {len(sizes)} methods say {people(min(sizes))} to {people(max(sizes))}"
    told += " and disagree by more than their intervals." if study.disagreement else "."
    reach = target / study.runs.column("flops").max()
    return told + (f" The target is {reach:.2g} times the largest run." if reach > 1 else "")


def people(count: float) -> str:
    """44.1B for 4.41e10; beyond trillions and below thousands as they are."""
    for letter, unit in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if unit <= count < 1000 * unit:
            return f"{count / unit:.3g}{letter}"
    return f"{count:.3g}"


def _disagreement(study: Study) -> str:
    if not study.disagreement:
        return ""
    what = "Methods disagree by more than their intervals"
    return f'<p class="bad"><b>{what}</b> on N*: {escape(study.disagreement)}.</p>'


# Field of an estimate -> how it is headed, and how it is written.
COLUMNS = {
    "params_exponent": ("a in N* ~ C^a", ".3f"),
    "tokens_exponent": ("b in D* ~ C^b", ".3f"),
    "params": ("N*", "people"),
    "tokens": ("D*", "people"),
    "loss": ("loss", ".3f"),
    "learning_rate": ("learning rate", ".2g"),
    "batch_tokens": ("batch (tokens)", "people"),
}


def _estimates(study: Study) -> str:
    shown = [name for name in COLUMNS if any(getattr(estimate, name) for estimate in study.estimates)]
    header = "".join(f"<th>{COLUMNS[name][0]}</th>" for name in shown)
    rows = "".join(_row(estimate, shown) for estimate in study.estimates)
    absent = "".join(f"<li>no {escape(name)}: {escape(why)}</li>" for name, why in study.absent.items())
    return (
        f"<h2>Estimates at the target, with {study.options.level:.0%} intervals</h2><p>Loss in "
        f"{study.runs.loss_unit}.</p>"
        f'<div class="wide"><table><tr><th>method</th>{header}</tr>{rows}</table></div><ul>{absent}</ul>'
    )


def _row(estimate: Estimate, shown: list[str]) -> str:
    """One method; the kinds of its intervals stand under its name."""
    quantities = [getattr(estimate, name) for name in shown]
    kinds = dict.fromkeys(q.interval.method for q in quantities if q is not None and q.interval is not None)
    cells = "".join(_cell(quantity, COLUMNS[name][1]) for name, quantity in zip(shown, quantities, strict=True))
    return f"<tr><td>{escape(estimate.method)}<br><small>{', '.join(kinds)}</small></td>{cells}</tr>"


def _cell(quantity: Quantity | None, form: str) -> str:
    if quantity is None:
        return "<td>-</td>"
    exact = f"<br><small>{quantity.value:.4g}</small>" if form == "people" else ""
    ends = quantity.interval
    reach = f"<br><small>{_written(ends.low, form)} to {_written(ends.high, form)}</small>" if ends else ""
    return f"<td>{_written(quantity.value, form)}{exact}{reach}</td>"


def _written(value: float, form: str) -> str:
    return people(value) if form == "people" else f"{value:{form}}"


def _flagged_budgets(study: Study) -> str:
    """One row a budget and method that approach 2 cannot trust, folded away."""
    rows = [
        f"<tr><td>{method}</td><td>{n.budget:.3g}</td><td>{n.flag or '-'}</td><td>{d.flag or '-'}</td></tr>"
        for method, fit in study.isoflops.items()
        for n, d in zip(fit.params_vertices, fit.tokens_vertices, strict=True)
        if n.flag or d.flag
    ]
    if not rows:
        return ""
    header = "<tr><th>approach 2</th><th>budget (FLOPs)</th><th>in N</th><th>in D</th></tr>"
    return (
        f"<details><summary>{len(rows)} optima of budgets are not to be trusted</summary>"
        f'<table class="words">{header}{"".join(rows)}</table></details>'
    )


def _settings(study: Study) -> str:
    """Every law of the learning rate and the batch; the first of each is the one used."""
    rows = []
    at = study.estimates[0].params.value, study.estimates[0].tokens.value
    for name, laws in study.settings_laws.items():
        for law in laws:
            powers = {"N": law.params_exponent, "D": law.tokens_exponent}
            form = " ".join(f"{axis}^{powers[axis]:.3f}" for axis in law.regressors.split(", "))
            kind = "all near-optimal runs" if law.pooled else "one mean a cell"
            value = Quantity(float(law(*at)), law.interval(*at, study.options.level))
            used = "used" if law is laws[0] else ""
            cells = "".join(f"<td>{text}</td>" for text in (kind, form, f"{law.residual_sd:.2f}"))
            rows.append(f"<tr><td>{COLUMNS[name][0]}</td>{cells}{_cell(value, COLUMNS[name][1])}<td>{used}</td></tr>")
    if not rows:
        return ""
    near = f"{100 * study.options.near_optimal:g}%"
    header = "<th></th><th>through</th><th>law</th><th>sd of ln</th><th>at the target</th><th></th>"
    return (
        f"<h2>Laws of the learning rate and the batch</h2><p>Near-optimal: within {near} of the lowest loss of its "
        f"(N, D). Intervals: {study.options.level:.0%}.</p>"
        f'<table class="words"><tr>{header}</tr>{"".join(rows)}</table>'
    )


def _next_run(study: Study, next_run: dict) -> str:
    estimate = study.estimates[0]
    length, known = next_run["data.seq_len"], study.runs.sequence_length
    told = [
        f"rows of {length:,} tokens, {'as the runs had' if known else 'since theirs differ or are not told'}",
        "a plain decoder, its N and so its FLOPs counted without embeddings; a model of the family of a sweep that was "
        f"launched, counted as its runs are: python -m launch recommend DIR --target={study.options.target:g}",
    ]
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
    return f'<div class="note"><b>Read with care</b><ul>{items}</ul></div>'


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
    return f'<h2>Provenance</h2><table class="words">{rows}</table>'
