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
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
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
        f"<table><tr>{header}</tr>{rows}</table><ul>{absent}</ul>"
    )


def _row(estimate: Estimate) -> str:
    cells = (
        _cell(estimate.params_exponent, ".3f"),
        _cell(estimate.tokens_exponent, ".3f"),
        _cell(estimate.params, ".3g"),
        _cell(estimate.tokens, ".3g"),
        _cell(estimate.loss, ".3f"),
        _cell(estimate.learning_rate, ".2g"),
        _cell(estimate.batch_tokens, ".2g"),
    )
    return f"<tr><td>{escape(estimate.method)}</td>{''.join(cells)}</tr>"


def _cell(quantity: Quantity | None, form: str) -> str:
    if quantity is None:
        return "<td>-</td>"
    if quantity.interval is None:
        return f"<td>{quantity.value:{form}}</td>"
    ends = f"{quantity.interval.low:{form}} to {quantity.interval.high:{form}}"
    return f"<td>{quantity.value:{form}}<br><small>{ends}, {quantity.interval.method}</small></td>"


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
    return f"<h2>Provenance</h2><table>{rows}</table>"
