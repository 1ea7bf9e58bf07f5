"""A plan as text, and as JSON."""

import math
from collections.abc import Iterator
from typing import Any

from lmjax.config import Config
from lmjax.devices.chips import GIB, PRICES_FROM
from lmjax.plan.collectives import by_kind
from lmjax.plan.search import Search, changes
from lmjax.plan.step import Plan
from lmjax.registry import without_data
from lmjax.run import dry_run

_MEMORY = {
    "params": "params, float32",
    "optimizer": "optimizer state",
    "frozen": "frozen weights",
    "inputs": "batch, hyperparameters, counters",
    "padding": "padding of these by the device's layouts",
    "temporaries": "temporaries, but for what stays on the chip:",
    "gradients": "  gradients, float32",
    "activations": "  activations saved, by the traced types",
    "outputs": "results not written in place",
    "program": "the program",
    "beyond": "more at XLA's own peak, which counts the chip",
    "peak": "the sum, which is needed at once",
}


def lines(plan: Plan) -> Iterator[str]:
    """The table of one plan."""
    cfg = plan.cfg
    yield f"topology     {plan.topology}"
    yield f"mesh         {settings_text(plan)}"
    idle = plan.topology.devices - math.prod(plan.mesh.values())
    if idle:
        yield f"             {idle} of {plan.topology.devices} devices have nothing to do"
    yield from dry_run.size(without_data(cfg))
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


def settings_text(plan: Plan) -> str:
    """`data 2 x fsdp 8, remat full, 4 microbatches`."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    pieces = plan.cfg.train.microbatches
    return f"{mesh}, remat {plan.cfg.model.remat}, {pieces} microbatch{'es' * (pieces > 1)}"


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
    for field, name in _MEMORY.items():
        n_bytes = getattr(plan.memory, field)
        if n_bytes:
            yield f"  {name:<48}{_size(n_bytes):>12}"
    yield f"  {verdict(plan)}"
    if not plan.fits:
        yield f"  the largest {'of state and gradients' if plan.work is None else 'temporaries'}:"
        for buffer in plan.largest:
            yield f"    {_size(buffer.bytes):>12}  {buffer.name}"


def _work(plan: Plan) -> Iterator[str]:
    assert plan.work is not None and plan.compiled is not None
    model = plan.step_flops.causal / plan.topology.devices
    yield "FLOPs of one device in a step"
    yield f"  {model:.3e}  the model's: matmuls and causal attention, from the declaration"
    yield f"  {plan.work.flops:.3e}  executed: also recomputation, and what several devices compute alike"
    yield f"  {plan.compiled.xla_flops:.3e}  by XLA's count: a loop's body once, nothing in kernels; not to be used"
    yield f"bytes between HBM and chip in a step: {_size(plan.work.hbm_bytes)}, of matmuls and the optimizer"


def _collectives(plan: Plan) -> Iterator[str]:
    assert plan.compiled is not None
    found = plan.compiled.collectives
    yield "bytes that one device sends in a step" if found else "no device sends anything in a step"
    for kind, sent in by_kind(found).items():
        ours = [one for one in found if one.kind == kind]
        if ours:
            runs, axes = sum(one.times for one in ours), sorted({" x ".join(one.axes(plan.mesh)) for one in ours})
            yield f"  {kind:<20}{_size(sent):>12}  in {runs:,} run{'s' * (runs > 1)} over {', '.join(axes)}"


def _time_and_price(plan: Plan) -> Iterator[str]:
    estimate = plan.estimate
    assert estimate is not None
    yield (
        f"a roofline of the step: compute {estimate.compute:.4f} s, HBM {estimate.memory:.4f} s, network "
        f"{estimate.network:.4f} s"
    )
    yield f"  {'':<18}{'step':>10}{'tokens/s':>14}{'MFU':>8}{'whole run':>14}{'chip-hours':>14}{'price':>14}"
    for name, seconds in (("all overlapped", estimate.fastest), ("nothing overlapped", estimate.slowest)):
        tokens = plan.cfg.train.batch * plan.cfg.data.seq_len / seconds
        hours, dollars = hours_and_dollars(plan, seconds)
        price = "unknown" if dollars is None else f"${dollars:,.0f}"
        yield (
            f"  {name:<18}{seconds:>8.4f} s{tokens:>14,.0f}{mfu(plan, seconds):>8.1%}{hours:>12,.2f} h"
            f"{hours * plan.topology.chips:>14,.0f}{price:>14}"
        )
    yield from _assumptions(plan)


def _assumptions(plan: Plan) -> Iterator[str]:
    chip = plan.chip
    assert chip is not None and chip.hbm_bandwidth is not None
    rates = [f"{chip.flops / 1e12:,.0f} TFLOP/s in bf16", f"{chip.hbm_bandwidth / 1e9:,.0f} GB/s of HBM"]
    if chip.link is not None:
        rates.append(f"{chip.link / 1e9:,.0f} GB/s one way per link")
    if chip.dcn is not None and plan.topology.slices > 1:
        rates.append(f"{chip.dcn / 1e9:,.1f} GB/s per device between slices")
    yield "assumed"
    yield f"  {', '.join(rates)}: all at their peak, without latency"
    yield "  collectives one after another, as rings over the links of the torus dimensions that a group spans"
    yield "  a run is its steps alone: no start-up, evaluation, checkpoints or restarts"
    yield f"  {PRICES_FROM}"


def mfu(plan: Plan, seconds: float) -> float:
    assert plan.chip is not None
    return plan.step_flops.causal / plan.topology.devices / plan.chip.flops / seconds


def hours_and_dollars(plan: Plan, seconds: float) -> tuple[float, float | None]:
    """Hours and dollars of the config's steps, `seconds` each; dollars are None where no price is known."""
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
        "memory": plan.memory._asdict(),
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
        f"{found.candidates} combinations of layout, remat policy and microbatches",
        f"  {found.too_large} too large, {compiled} compiled, of which {len(found.plans)} fit, "
        f"{found.candidates - found.too_large - found.refused.total() - compiled} not reached in time",
        *(f"  {count} refused: {why}" for why, count in found.refused.items()),
        f"{'':>4}{'nothing overlapped':>20}{'all overlapped':>16}{'memory':>12}  settings",
    ]
    for place, plan in enumerate(found.plans, 1):
        estimate = plan.estimate
        slowest, fastest = ("", "") if estimate is None else (f"{estimate.slowest:.4f} s", f"{estimate.fastest:.4f} s")
        rows.append(f"{place:>4}{slowest:>20}{fastest:>16}{_size(plan.needed):>12}  {settings_text(plan)}")
    if found.plans:
        rows += ["", f"best: {flags(found.cfg, found.plans[0].cfg) or 'the config as it is'}"]
    return "\n".join(rows)


def flags(old: Config, new: Config) -> str:
    return " ".join(f"--config.{key}={value}" for key, value in changes(old, new).items())


def search_as_json(found: Search) -> dict[str, Any]:
    ranked = [{"flags": flags(found.cfg, plan.cfg), **as_json(plan)} for plan in found.plans]
    counts = {name: value for name, value in found._asdict().items() if isinstance(value, int)}
    return counts | {"refused": found.refused, "plans": ranked}
