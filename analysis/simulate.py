"""Sweeps simulated from a known surface, with the faults that real sweeps have, to test every method against truth."""

from dataclasses import dataclass

import numpy as np

from analysis.surface import FLOPS_PER_PARAM_TOKEN, Surface

# Besiroglu et al. 2024 (arXiv 2404.10102), their refit of Hoffmann et al.'s runs.
EPOCH = Surface(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
# Hoffmann et al. 2022, the digits in the source of the paper: rounded to two, D/N at their budget moves from 59 to 93.
HOFFMANN = Surface(
    E=float(np.exp(0.5267228)), A=float(np.exp(6.0073404)), B=float(np.exp(6.0179186)), alpha=0.33917084, beta=0.2849083
)
# A strongly asymmetric surface, on which the isoFLOP parabola is biased.
ASYMMETRIC = Surface(E=1.7, A=2.0e4, B=40.0, alpha=0.465, beta=0.155)
# Between those: a = 0.40, D/N of 40 at 1e22 FLOPs.
MILDLY_ASYMMETRIC = Surface(E=1.7, A=2300.0, B=400.0, alpha=0.41, beta=0.27)
# Hoffmann et al. 2022's nine budgets run from 6e18 to 3e21 FLOPs.
STANDARD_BUDGETS = tuple(float(x) for x in np.geomspace(6e18, 3e21, 9))


@dataclass(frozen=True)
class Faults:
    """What goes wrong in a sweep; the defaults are a clean one.

    noise_sd: seed noise of a run, nats. mistuning: nats added a decade of N away from the geometric centre of the
    sizes (a learning rate tuned at one size only), squared. wrong_horizon: nats added to every run but the longest of
    its size, per e-fold of D short of it (a cosine not matched to the run). drift: the grid's centre is N* at the
    first budget and drift times N* at the last.
    """

    noise_sd: float = 0.0
    mistuning: float = 0.0
    wrong_horizon: float = 0.0
    drift: float = 1.0


@dataclass(frozen=True)
class Sweep:
    """Runs of a simulated sweep; all fields (runs,), but `loss` (sweeps, runs)."""

    budget: np.ndarray
    params: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray


def isoflop_grid(
    surface: Surface, budgets=STANDARD_BUDGETS, sizes: int = 7, span: float = 4.0, drift: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(budget, N, D) of `sizes` models log-spaced within a factor `span` either side of each budget's optimum."""
    budgets = np.asarray(budgets, dtype=np.float64)
    shift = drift ** np.linspace(0.0, 1.0, len(budgets))
    factors = span ** np.linspace(-1.0, 1.0, sizes)
    params = (surface.optimum(budgets)[0] * shift)[:, None] * factors
    budget = np.repeat(budgets, sizes)
    return budget, params.ravel(), budget / (FLOPS_PER_PARAM_TOKEN * params.ravel())


def simulate(
    surface: Surface,
    faults: Faults | None = None,
    *,
    budgets=STANDARD_BUDGETS,
    sizes: int = 7,
    span: float = 4.0,
    sweeps: int = 1,
    seed: int = 0,
) -> Sweep:
    """`sweeps` noisy copies of one isoFLOP sweep. Noise is drawn per copy; the other faults are the same in all."""
    faults = Faults() if faults is None else faults
    budget, params, tokens = isoflop_grid(surface, budgets, sizes, span, faults.drift)
    log_params = np.log10(params)
    loss = surface.loss(params, tokens) + faults.mistuning * (log_params - log_params.mean()) ** 2
    loss = loss + faults.wrong_horizon * np.log(_longest(params, tokens) / tokens)
    noise = np.random.default_rng(seed).normal(0.0, faults.noise_sd, (sweeps, len(params)))
    return Sweep(budget, params, tokens, loss + noise)


def _longest(params, tokens) -> np.ndarray:
    """The most tokens that any run of about the same size (within a factor 1.5) is trained on."""
    close = np.abs(np.log(params[:, None] / params)) < np.log(1.5)
    return np.where(close, tokens, 0.0).max(axis=1)


def simulate_curves(
    surface: Surface, params, tokens, *, points: int = 200, noise_sd: float = 0.0, seed: int = 0
) -> dict[str, np.ndarray]:
    """Loss curves of fully tuned runs (each point as if cooled down): run, step, tokens, flops, loss, all flat.

    `points` log-spaced token counts from 1% of a run's tokens to all of them.
    """
    rng = np.random.default_rng(seed)
    shares = np.geomspace(0.01, 1.0, points)
    seen = np.asarray(tokens)[:, None] * shares
    params_R1 = np.asarray(params)[:, None]
    loss = surface.loss(params_R1, seen) + rng.normal(0.0, noise_sd, seen.shape)
    return {
        "run": np.repeat(np.arange(len(seen)), points),
        "step": np.tile(np.arange(1, points + 1), len(seen)),
        "tokens": seen.ravel(),
        "flops": (FLOPS_PER_PARAM_TOKEN * params_R1 * seen).ravel(),
        "loss": loss.ravel(),
    }
