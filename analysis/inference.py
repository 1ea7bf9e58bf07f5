"""The size to train when the model will also serve D_inf tokens (Sardana & Frankle 2023, arXiv 2401.00448).

Minimize 6 N D + 2 N D_inf subject to L(N, D) = loss (their eq. 2). Coefficients fitted at usual D / N overstate the
worth of tokens at extreme ratios (their section 5): treat optima beyond the fitted D / N as extrapolation.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

from analysis.surface import FLOPS_PER_PARAM_TOKEN, Surface

INFERENCE_FLOPS_PER_PARAM_TOKEN = 2.0


@dataclass(frozen=True)
class ServedModel:
    params: float
    tokens: float
    training_flops: float
    total_flops: float


def inference_optimum(surface: Surface, loss: float, inference_tokens: float) -> ServedModel:
    """The cheapest (N, D) over the model's life at `loss` nats. Raises ValueError when no model reaches the loss."""
    if not loss > surface.E:
        raise ValueError(f"loss {loss:g} is not above the irreducible loss {surface.E:.4g}: no model reaches it")
    smallest = (surface.A / (loss - surface.E)) ** (1.0 / surface.alpha)

    def cost(log_excess: float) -> float:
        params = smallest * (1.0 + np.exp(log_excess))
        tokens = float(surface.tokens_at(params, loss))
        total = FLOPS_PER_PARAM_TOKEN * params * tokens + INFERENCE_FLOPS_PER_PARAM_TOKEN * params * inference_tokens
        return float(np.log(total)) if np.isfinite(total) else np.inf

    # N runs from just above the size at which even endless data falls short, to far beyond the training optimum.
    grid = np.linspace(-12.0, 12.0, 241)
    best = int(np.argmin([cost(x) for x in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    log_excess = minimize_scalar(cost, bounds=bounds, method="bounded", options={"xatol": 1e-10}).x
    params = float(smallest * (1.0 + np.exp(log_excess)))
    tokens = float(surface.tokens_at(params, loss))
    training = FLOPS_PER_PARAM_TOKEN * params * tokens
    return ServedModel(params, tokens, training, training + INFERENCE_FLOPS_PER_PARAM_TOKEN * params * inference_tokens)
