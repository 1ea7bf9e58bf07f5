"""A plan as text, and as JSON."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from lmjax import dry_run
from lmjax.chips import GIB, PRICES_FROM
from lmjax.collectives import by_kind
from lmjax.models import decoder
from lmjax.plan.search import Candidate, Search
from lmjax.plan.step import Plan

_MEMORY = {
    "params": "params, float32",
    "optimizer": "optimizer state",
    "inputs": "batch, hyperparameters, counters",
    "padding": "padding of these by the device's layouts",
    "temporaries": "temporaries: activations, gradients, gathered weights",
    "activations": "  of these, activations saved for the backward pass",
    "outputs": "results not written in place",
    "program": "the program",
}


def lines(plan: Plan) -> Iterator[str]:
    """The table of one plan."""
    cfg = plan.cfg
    yield f"topology     {plan.topology}"
    yield f"mesh         {mesh_text(plan)}; remat {cfg.model.remat}, {cfg.train.microbatches} microbatch(es)"
    yield from dry_run.size(cfg, decoder.build(cfg.model))
    yield ""
    yield from _memory(plan)
    if plan.compiled is not None and plan.work is not None:
        yield ""
        yield from _work(plan)
        yield ""
        yield from _collectives(plan)
    if plan.estimate is not None:
        yield ""
        yield from _time_and_price(plan)
    if plan.seconds:
        yield ""
        yield "; ".join(f"{what} took {seconds:.0f} s" for what, seconds in plan.seconds.items())


def mesh_text(plan: Plan) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"


def verdict(plan: Plan) -> str:
    """`fits: 3.10 GiB of 15.75 GiB, 12.65 GiB to spare`."""
    if plan.limit is None:
        return f"{_size(plan.needed)}; no limit is known for {plan.topology.family}"
    of = f"{_size(plan.needed)} of {_size(plan.limit)}"
    if plan.fits:
        return f"fits: {of}, {_size(plan.limit - plan.needed)} to spare"
    least = "" if plan.work is not None else "at least "
    return f"does not fit: {least}{of}, {_size(plan.needed - plan.limit)} too much"


def _memory(plan: Plan) -> Iterator[str]:
    yield "memory of one device"
    if plan.compiled is not None:
        for field, name in _MEMORY.items():
            yield f"  {name:<56}{_size(getattr(plan.compiled.memory, field)):>12}"
        yield f"  {'peak, as XLA assigns it':<56}{_size(plan.compiled.memory.peak):>12}"
    yield f"  {verdict(plan)}"
    if not plan.fits:
        yield f"  the largest {'of state and gradients' if plan.work is None else 'temporaries'}:"
        for buffer in plan.largest:
            yield f"    {_size(buffer.bytes):>12}  {buffer.name}"


def _work(plan: Plan) -> Iterator[str]:
    assert plan.work is not None and plan.compiled is not None
    devices = plan.topology.devices
    yield "FLOPs of one device in a step"
    yield f"  {plan.step_flops.causal / devices:.4g}  matmuls and causal attention, counted from the declaration: MFU's"
    yield f"  {plan.work.flops:.4g}  executed: with recomputation, and with what several devices compute alike"
    yield f"  {plan.compiled.xla_flops:.4g}  as XLA says: a loop's body once, nothing inside kernels; not to be used"
    yield f"bytes between HBM and chip in a step: {_size(plan.work.hbm_bytes)}, of matmuls and the optimizer"


def _collectives(plan: Plan) -> Iterator[str]:
    assert plan.compiled is not None
    found = plan.compiled.collectives
    runs: Counter[str] = Counter()
    for one in found:
        runs[one.kind] += one.times
    yield "bytes that one device sends in a step"
    for kind, sent in by_kind(found).items():
        if runs[kind]:
            axes = sorted({"x".join(one.axes(plan.mesh)) for one in found if one.kind == kind})
            yield f"  {kind:<20}{_size(sent):>12}  in {runs[kind]:>5} runs, over {', '.join(axes)}"
    if not found:
        yield "  none"


def _time_and_price(plan: Plan) -> Iterator[str]:
    estimate, chip = plan.estimate, plan.chip
    assert estimate is not None and chip is not None
    yield "time of a step, a roofline"
    yield f"  compute {estimate.compute:.4f} s, HBM {estimate.memory:.4f} s, network {estimate.network:.4f} s"
    for name, seconds in (("all overlapped", estimate.fastest), ("nothing overlapped", estimate.slowest)):
        tokens = plan.cfg.train.batch * plan.cfg.data.seq_len / seconds
        yield f"  {name:<20}{seconds:.4f} s: {tokens:,.0f} tokens/s, MFU {mfu(plan, seconds):.1%}"
    yield "the whole run, steps alone: no start-up, evaluation, checkpoints or restarts"
    for name, seconds in (("all overlapped", estimate.fastest), ("nothing overlapped", estimate.slowest)):
        hours, dollars = hours_and_dollars(plan, seconds)
        price = "no price is known" if dollars is None else f"${dollars:,.0f}"
        yield f"  {name:<20}{hours:,.2f} h, {hours * plan.topology.chips:,.0f} chip-hours, {price}"
    rates = [f"{chip.flops:.3g} bf16 FLOP/s", f"{chip.hbm_bandwidth:.3g} B/s of HBM"]
    rates += [
        f"{chip.link:.3g} B/s one way per link" if chip.link else "",
        f"{chip.dcn:.3g} B/s between slices" * bool(chip.dcn),
    ]
    yield f"assumed: {', '.join(filter(None, rates))}; every unit at its peak, no latency;"
    yield "  collectives as rings, one after another, over the links of the torus dimensions that a group spans"
    yield f"  prices: {PRICES_FROM}"


def mfu(plan: Plan, seconds: float) -> float:
    assert plan.chip is not None
    return plan.step_flops.causal / plan.topology.devices / plan.chip.flops / seconds


def hours_and_dollars(plan: Plan, seconds: float) -> tuple[float, float | None]:
    """Of the config's steps, `seconds` each; dollars are None where no price is known."""
    hours = plan.cfg.train.steps * seconds / 3600
    dollars = (
        None if plan.chip is None or plan.chip.dollars is None else plan.chip.dollars * plan.topology.devices * hours
    )
    return hours, dollars


def as_json(plan: Plan) -> dict[str, Any]:
    """The numbers of the table, plain: bytes, FLOPs and seconds."""
    estimate = plan.estimate
    bounds = {} if estimate is None else {"fastest": estimate.fastest, "slowest": estimate.slowest}
    return {
        "topology": plan.topology.name,
        "chips": plan.topology.chips,
        "mesh": plan.mesh,
        "remat": plan.cfg.model.remat,
        "microbatches": plan.cfg.train.microbatches,
        "parameters": plan.counts.total,
        "tokens": plan.cfg.train.steps * plan.cfg.train.batch * plan.cfg.data.seq_len,
        "fits": plan.fits,
        "needed_bytes": plan.needed,
        "limit_bytes": plan.limit,
        "memory": None if plan.compiled is None else plan.compiled.memory._asdict(),
        "largest": [buffer._asdict() for buffer in plan.largest],
        "step_flops": plan.step_flops._asdict(),
        "device_flops": None if plan.work is None else plan.work.flops,
        "device_hbm_bytes": None if plan.work is None else plan.work.hbm_bytes,
        "xla_device_flops": None if plan.compiled is None else plan.compiled.xla_flops,
        "collective_bytes": None if plan.compiled is None else by_kind(plan.compiled.collectives),
        "step_seconds": None if estimate is None else estimate._asdict(),
        "bounds": {
            name: {
                "step_seconds": seconds,
                "mfu": mfu(plan, seconds),
                **dict(zip(("hours", "dollars"), hours_and_dollars(plan, seconds), strict=True)),
            }
            for name, seconds in bounds.items()
        },
        "wall_seconds": plan.seconds,
    }


def _size(n_bytes: float) -> str:
    if abs(n_bytes) >= GIB:
        return f"{n_bytes / GIB:,.2f} GiB"
    return f"{n_bytes / 2**20:,.2f} MiB" if abs(n_bytes) >= 2**20 else f"{n_bytes / 2**10:,.2f} KiB"


# A search --------------------------------------------------------------------------------------------------------


def search_text(found: Search) -> str:
    """A ranking of what fits, and the best as flags to paste."""
    compiled = len(found.plans) + found.rejected
    rows = [
        f"{found.candidates} combinations; {found.too_large} need too much whatever XLA does; compiled {compiled}, of "
        f"which {len(found.plans)} fit; {found.candidates - found.too_large - compiled} were not reached",
        f"{'':>4}{'step, all overlapped':>22}{'nothing overlapped':>20}{'memory':>12}  settings",
    ]
    for place, (candidate, plan) in enumerate(found.plans, 1):
        estimate = plan.estimate
        times = ("", "") if estimate is None else (f"{estimate.fastest:.4f} s", f"{estimate.slowest:.4f} s")
        rows.append(f"{place:>4}{times[0]:>22}{times[1]:>20}{_size(plan.needed):>12}  {_settings(candidate)}")
    if found.plans:
        rows += ["", "best: " + flags(found.plans[0][0])]
    return "\n".join(rows)


def _settings(candidate: Candidate) -> str:
    return ", ".join(
        f"{key.split('.')[1]} {value}" for key, value in candidate.settings.items() if value not in (1, None)
    )


def flags(candidate: Candidate) -> str:
    return " ".join(f"--config.{key}={value}" for key, value in candidate.settings.items())


def search_as_json(found: Search) -> dict[str, Any]:
    ranked = [{"flags": flags(candidate), **as_json(plan)} for candidate, plan in found.plans]
    return found._asdict() | {"plans": ranked}
