"""Which cells (N, D) to train so that N*(target) is known best for the money.

Optimal design for one number (c-optimality: Elfving 1952; exchange: Fedorov 1972): near a supposed surface the
variance of ln N*(target) is c' M^-1 c, with M the sum over cells of the outer products of the loss's gradient with
respect to (E, ln A, ln B, alpha, beta), over the noise variance. Cells far from the frontier, cheap ones at extreme
D / N, tell more about the exponents per FLOP than the usual isoFLOP grid. That trusts the surface's form there, so one
cell at an extreme D / N is set aside: it costs money and checks the fit, and takes no part in it.
"""

from dataclasses import dataclass

import numpy as np

from analysis.surface import FLOPS_PER_PARAM_TOKEN, Surface

# Standard deviations of what is known of (E, ln A, ln B, alpha, beta) beforehand: next to nothing.
PRIOR_SD = np.array([1.0, 5.0, 5.0, 0.5, 0.5])
# Greedy starts differ in the largest share of the budget that one cell may take.
LARGEST_SHARES = (1.0, 0.5, 0.25, 0.12, 0.06)
HOLD_OUT_SHARE = 0.1
MOST_EXCHANGES = 400
# A further run is worth its FLOPs when it lowers the variance by this share.
LEAST_GAIN = 0.05


@dataclass(frozen=True)
class Candidates:
    """Cells that may be chosen; all (cells,)."""

    params: np.ndarray
    tokens: np.ndarray

    @property
    def flops(self) -> np.ndarray:
        return FLOPS_PER_PARAM_TOKEN * self.params * self.tokens

    @classmethod
    def of(cls, sizes, ratios: tuple[float, float], budget: float, steps: int = 25) -> "Candidates":
        """All pairs of a size and one of `steps` log-spaced D / N within `ratios` that cost at most `budget` FLOPs."""
        sizes = np.asarray(sizes, dtype=np.float64)
        params = np.repeat(sizes, steps)
        tokens = params * np.tile(np.geomspace(*ratios, steps), len(sizes))
        return cls(params, tokens).take(FLOPS_PER_PARAM_TOKEN * params * tokens <= budget)

    def take(self, which) -> "Candidates":
        """Those of a mask (cells,) or of places."""
        which = np.asarray(which)
        which = which if which.dtype == bool else which.astype(int)
        return Candidates(self.params[which], self.tokens[which])


@dataclass(frozen=True)
class Design:
    """The chosen cells, and what the delta method promises of a fit to them (without the hold-out)."""

    params: np.ndarray  # (cells,)
    tokens: np.ndarray
    hold_out: tuple[float, float]  # (N, D)
    budget: float  # FLOPs that might be spent
    spent: float  # FLOPs, hold-out included
    exponent_se: float
    log_params_se: float  # of ln N*(target)


def loss_gradient(surface: Surface, params, tokens) -> np.ndarray:
    """dL / d(E, ln A, ln B, alpha, beta), nats, (cells, 5)."""
    params, tokens = np.asarray(params, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    from_size, from_data = surface.A * params**-surface.alpha, surface.B * tokens**-surface.beta
    ones = np.ones_like(params)
    return np.stack([ones, from_size, from_data, -from_size * np.log(params), -from_data * np.log(tokens)], axis=-1)


def exponent_gradient(surface: Surface) -> np.ndarray:
    """d a / d(E, ln A, ln B, alpha, beta), with a = beta / (alpha + beta)."""
    total = surface.alpha + surface.beta
    return np.array([0.0, 0.0, 0.0, -surface.beta / total**2, surface.alpha / total**2])


def log_params_gradient(surface: Surface, flops: float) -> np.ndarray:
    """d ln N*(C) / d(E, ln A, ln B, alpha, beta).

    ln N* = (ln(alpha A / (beta B)) + beta ln(C / 6)) / (alpha + beta).
    """
    total = surface.alpha + surface.beta
    log_params = np.log(surface.optimum(flops)[0])
    return np.array(
        [
            0.0,
            1.0 / total,
            -1.0 / total,
            (1.0 / surface.alpha - log_params) / total,
            (np.log(flops / FLOPS_PER_PARAM_TOKEN) - 1.0 / surface.beta - log_params) / total,
        ]
    )


def standard_errors(surface: Surface, params, tokens, target: float, noise_sd: float) -> tuple[float, float]:
    """Delta-method standard errors of the exponent a and of ln N*(`target`) from a fit to these cells.

    Infinite where the cells cannot tell the surface's parameters apart, and with so little noise that what is known
    beforehand (PRIOR_SD) is lost in rounding beside them.
    """
    information = _information(loss_gradient(surface, params, tokens), noise_sd)
    # In units of its own diagonal the matrix can be inverted even when the cells hardly tell parameters apart.
    scale = np.sqrt(np.diag(information))
    information /= np.outer(scale, scale)
    if np.linalg.matrix_rank(information, hermitian=True) < len(information):
        return np.inf, np.inf
    inverse = np.linalg.inv(information)
    gradients = exponent_gradient(surface) / scale, log_params_gradient(surface, target) / scale
    variances = [float(c @ inverse @ c) for c in gradients]
    # Rounding can leave nothing, or less, of what such cells know.
    exponent_se, log_params_se = (np.sqrt(variance) if variance > 0 else np.inf for variance in variances)
    return exponent_se, log_params_se


def choose_cells(
    surface: Surface,
    candidates: Candidates,
    *,
    budget: float,
    target: float,
    noise_sd: float = 0.005,
    most: int = 40,
    goal: str = "optimum",
) -> Design:
    """The cells of least variance of N*(`target`) (`goal` "optimum") or of the exponent a ("exponent").

    `budget` and `target` in FLOPs, `noise_sd` in nats, at most `most` cells, all distinct. Up to a tenth of the budget
    goes to the hold-out. Raises ValueError when fewer than six cells are affordable.
    """
    if len(candidates.params) < 6 or np.sort(candidates.flops)[:7].sum() > budget:
        raise ValueError(
            f"a budget of {budget:.3g} FLOPs affords fewer than six of the {len(candidates.params)} candidate cells: "
            "raise --budget or allow smaller models and ratios"
        )
    held = _hold_out(candidates, HOLD_OUT_SHARE * budget)
    free = np.arange(len(candidates.params)) != held
    gradients = loss_gradient(surface, candidates.params[free], candidates.tokens[free]) / noise_sd
    costs, money = candidates.flops[free], budget - candidates.flops[held]
    wanted = exponent_gradient(surface) if goal == "exponent" else log_params_gradient(surface, target)
    greedy = [_greedy(gradients, costs, money, wanted, most, share) for share in LARGEST_SHARES]
    designs = [_exchange(cells, gradients, costs, money, wanted) for cells in greedy]
    chosen = min(designs, key=lambda cells: _variance(gradients[cells], wanted))
    chosen = np.flatnonzero(free)[np.sort(chosen)]
    params, tokens = candidates.params[chosen], candidates.tokens[chosen]
    exponent_se, log_params_se = standard_errors(surface, params, tokens, target, noise_sd)
    spent = float(candidates.flops[chosen].sum() + candidates.flops[held])
    hold_out = (float(candidates.params[held]), float(candidates.tokens[held]))
    return Design(params, tokens, hold_out, budget, spent, exponent_se, log_params_se)


def next_cells(
    surface: Surface,
    params,
    tokens,
    candidates: Candidates,
    *,
    target: float,
    noise_sd: float,
    count: int = 1,
    fewest: int = 1,
    enough: float = 0.0,
    within: int = 40,
    budget: float = np.inf,
) -> Candidates:
    """Up to `count` candidates that lower the variance of ln N*(`target`) most per FLOP, after cells (N, D) (cells,).

    Each is chosen as if those before it were trained, from what `budget` FLOPs still buy; after the first `fewest`,
    only until the standard error is down to `enough`. Only candidates count that lower the variance by a twentieth, and
    by what leaves `enough` after `within` cells, for a pittance at no cost is no progress; without any, the one that
    lowers it most. `surface` and `noise_sd` (in the loss) are those of a fit to the runs so far.
    """
    gradients = loss_gradient(surface, candidates.params, candidates.tokens) / noise_sd
    known = np.linalg.inv(_information(loss_gradient(surface, params, tokens), noise_sd))
    wanted, costs = log_params_gradient(surface, target), candidates.flops

    def worth(inverse: np.ndarray, allowed: np.ndarray, chosen: int) -> np.ndarray | None:
        variance = wanted @ inverse @ wanted
        if chosen >= fewest and variance <= enough**2:
            return None
        gains = np.where(allowed, _gains(gradients, inverse, wanted), 0.0)
        least = max(LEAST_GAIN, _pace(variance, enough**2, within - chosen)) * variance
        return np.where(gains >= least, gains / costs, 0.0) if (gains >= least).any() else gains

    return candidates.take(_add_cells(gradients, costs, budget, known, count, worth))


def spread_cells(
    surface: Surface, params, tokens, candidates: Candidates, *, noise_sd: float, count: int, budget: float = np.inf
) -> Candidates:
    """Up to `count` candidates for `budget` FLOPs that, beside cells (N, D) (cells,), tell most of all five parameters.

    Greedy D-optimality (Wald 1943): each raises the determinant of the information most, near a supposed `surface`.
    """
    gradients = loss_gradient(surface, candidates.params, candidates.tokens) / noise_sd
    known = np.linalg.inv(_information(loss_gradient(surface, params, tokens), noise_sd))

    def worth(inverse: np.ndarray, allowed: np.ndarray, chosen: int) -> np.ndarray:
        return np.einsum("cp,pq,cq->c", gradients, inverse, gradients)

    return candidates.take(_add_cells(gradients, candidates.flops, budget, known, count, worth))


def _pace(variance: float, enough: float, cells: int) -> float:
    """The share of `variance` that each of `cells` must take away to leave `enough`; 0 where nothing is ever enough."""
    return 1.0 - min(1.0, enough / variance) ** (1.0 / max(1, cells)) if enough > 0 else 0.0


def _information(gradients, noise_sd: float = 1.0) -> np.ndarray:
    return np.diag(PRIOR_SD**-2.0) + gradients.T @ gradients / noise_sd**2


def _variance(gradients, wanted) -> float:
    return float(wanted @ np.linalg.solve(_information(gradients), wanted))


def _hold_out(candidates: Candidates, money: float) -> int:
    """The dearest affordable cell among those of the largest D / N: where surfaces are known to bend."""
    ratios = candidates.tokens / candidates.params
    affordable = candidates.flops <= max(money, candidates.flops.min())
    extreme = affordable & (ratios >= 0.999 * ratios[affordable].max())
    return int(np.argmax(np.where(extreme, candidates.flops, -1.0)))


def _greedy(gradients, costs, money, wanted, most, share) -> list[int]:
    """Add the cell that lowers the variance most, among those a remaining budget and `share` allow."""
    costs = np.where(costs <= share * money, costs, np.inf)
    start = np.linalg.inv(_information(gradients[:0]))
    return _add_cells(gradients, costs, money, start, most, lambda inverse, *_: _gains(gradients, inverse, wanted))


def _add_cells(gradients, costs, budget, inverse, most, worth) -> list[int]:
    """Up to `most` distinct cells, each the one of most worth that the rest of `budget` buys.

    `worth(inverse of the information so far, allowed, how many are chosen)` is (cells,), or None to end it.
    """
    cells: list[int] = []
    left = np.ones(len(costs), bool)
    while len(cells) < most and (allowed := left & (costs <= budget)).any():
        value = worth(inverse, allowed, len(cells))
        if value is None:
            break
        best = int(np.argmax(np.where(allowed, value, -1.0)))
        inverse, budget, left[best] = _add(inverse, gradients[best]), budget - costs[best], False
        cells.append(best)
    return cells


def _exchange(cells, gradients, costs, money, wanted) -> list[int]:
    """Swap one cell for another while that lowers the variance and the money suffices."""
    cells, improved, exchanges = list(cells), True, 0
    while improved and exchanges < MOST_EXCHANGES:
        improved = False
        for place in range(len(cells)):
            rest = cells[:place] + cells[place + 1 :]
            inverse = np.linalg.inv(_information(gradients[rest]))
            allowed = costs <= money - costs[rest].sum()
            allowed[rest] = False
            gains = np.where(allowed, _gains(gradients, inverse, wanted), -1.0)
            best = int(np.argmax(gains))
            if gains[best] > gains[cells[place]] * (1 + 1e-9):
                cells[place], improved, exchanges = best, True, exchanges + 1
    return cells


def _gains(gradients, inverse, wanted) -> np.ndarray:
    """How much one more cell lowers the variance (Sherman & Morrison)."""
    through = gradients @ inverse
    return (through @ wanted) ** 2 / (1.0 + np.einsum("cp,cp->c", through, gradients))


def _add(inverse, gradient) -> np.ndarray:
    through = inverse @ gradient
    return inverse - np.outer(through, through) / (1.0 + gradient @ through)
