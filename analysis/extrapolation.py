"""Hold out the largest budgets, fit the rest, and see how far the prediction is off."""

from dataclasses import dataclass

import numpy as np

from analysis.parametric import fit_parametric, standard_starts
from analysis.surface import FLOPS_PER_PARAM_TOKEN

# A budget's runs scatter about its label; a cut keeps those up to this much above it.
CUT_SLACK = 1.05
MIN_TRAINED = 10
# Every ninth start still covers the grid, and one fit is made per cut.
START_STRIDE = 9


@dataclass(frozen=True)
class HoldOut:
    """One cut: the fit below it, and relative errors of its predictions above."""

    cut: float  # FLOPs
    trained: int
    held_out: int
    mean_error: float  # mean |L_fit / L - 1|
    max_error: float
    params_exponent: float
    flops: np.ndarray  # (held_out,)
    errors: np.ndarray  # (held_out,) L_fit / L - 1


def hold_out(params, tokens, loss, cut: float, starts=None) -> HoldOut:
    """Fit runs with 6ND <= 1.05 `cut` FLOPs and predict the others. Raises ValueError when either part is too small."""
    params, tokens, loss = (np.asarray(x, dtype=np.float64) for x in (params, tokens, loss))
    flops = FLOPS_PER_PARAM_TOKEN * params * tokens
    below = flops <= CUT_SLACK * cut
    if below.sum() < MIN_TRAINED or below.all():
        raise ValueError(
            f"cut {cut:.3g} FLOPs leaves {below.sum()} runs to fit and {(~below).sum()} to predict: "
            f"needs {MIN_TRAINED} and 1"
        )
    starts = standard_starts()[::START_STRIDE] if starts is None else starts
    surface = fit_parametric(params[below], tokens[below], loss[below], starts=starts).surface
    errors = surface.loss(params[~below], tokens[~below]) / loss[~below] - 1.0
    return HoldOut(
        cut, int(below.sum()), int((~below).sum()), float(np.abs(errors).mean()), float(np.abs(errors).max()),
        float(surface.params_exponent), flops[~below], errors,
    )  # fmt: skip


def hold_outs(params, tokens, loss, cuts=None, most: int = 4) -> list[HoldOut]:
    """`hold_out` at each cut that leaves enough runs on both sides; by default up to `most` quantiles of the FLOPs."""
    flops = FLOPS_PER_PARAM_TOKEN * np.asarray(params) * np.asarray(tokens)
    cuts = np.unique(np.quantile(flops, np.linspace(0.4, 0.9, most), method="lower")) if cuts is None else cuts
    usable = [c for c in cuts if (flops <= CUT_SLACK * c).sum() >= MIN_TRAINED and (flops > CUT_SLACK * c).any()]
    return [hold_out(params, tokens, loss, float(cut)) for cut in usable]
