"""The cells of a sweep and what they cost, as text."""

from collections.abc import Sequence

from launch.manifest import Entry
from launch.price import Accelerator
from launch.status import aligned, duration
from lmjax.devices.chips import PRICES_FROM


def of_entries(cells: Sequence[Entry]) -> str:
    """A row a cell. N is the total, D/N by the parameters that a token passes through."""
    head = ("", "cell", "N", "N non-emb.", "D", "D/N", "C exact", "C = 6ND", "epochs", "memory", "time", "price")
    body = [
        (
            str(one.index),
            one.name or "(the config)",
            number(one.params),
            number(one.params_non_embedding),
            number(one.tokens),
            f"{one.tokens / one.params_active:.1f}",
            f"{one.flops:.2e}",
            f"{one.flops_6nd:.2e}",
            epochs(one),
            size(one.state_bytes if one.step_bytes is None else one.step_bytes),
            "" if one.hours is None else duration(3600 * one.hours),
            "" if one.dollars is None else f"${one.dollars:,.2f}",
        )
        for one in cells
    ]
    return aligned([head, *body], left={1})


def totals(cells: Sequence[Entry], on: Accelerator) -> str:
    """What all cells cost together, and what these figures assume."""
    flops, tokens = sum(one.own_flops for one in cells), sum(one.tokens * one.share for one in cells)
    lines = [f"{len(cells)} cells, {number(tokens)} tokens, {flops:.3g} FLOPs (exact, causal), each on {on.name}"]
    lines += [line for line in (saved(cells),) if line]
    if all(one.hours is not None for one in cells):
        hours = sum(one.hours or 0.0 for one in cells)
        dollars = sum(one.dollars or 0.0 for one in cells)
        price = "no price is known" if on.dollars is None else f"${dollars:,.2f} at ${on.dollars} a device-hour"
        lines.append(
            f"{duration(3600 * hours)} one after another at {on.share_of_peak:.0%} of peak FLOP/s and network; {price}"
        )
        lines += [PRICES_FROM] * (on.dollars is not None)
    lines.append(
        "memory: weights, gradients, optimizer on one device; activations come on top (--compile)"
        if any(one.step_bytes is None for one in cells)
        else "memory: of a step on one device, as XLA compiles it"
    )
    return "\n".join(lines)


def saved(cells: Sequence[Entry]) -> str:
    """How many FLOPs the same cells, each trained from its start, would take; empty without branches."""
    branches = [entry for entry in cells if entry.first_step]
    if not branches:
        return ""
    trunks = {entry.trunk for entry in branches}
    apart = sum(entry.flops for entry in cells if entry.index not in trunks)
    together = sum(entry.own_flops for entry in cells)
    return (
        f"{len(branches)} cells branch from {len(trunks)}: {together:.3g} FLOPs in the place of {apart:.3g}, "
        f"{1 - together / apart:.0%} saved"
    )


def epochs(one: Entry) -> str:
    """Of the data set that is read most often."""
    known = [epochs for epochs in one.epochs.values() if epochs is not None]
    return f"{max(known):.2f}" if known else ""


def number(count: float) -> str:
    """`366k`, `1.2M`, `13.0B`."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.0f}"


def size(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes > 2**30 else f"{n_bytes / 2**20:.1f} MiB"
