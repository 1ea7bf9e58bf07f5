"""Power laws for the best learning rate or batch size, x* = k N^p D^q (as Step Law, DeepSeek LLM fit them).

At each (N, D) the runs within 0.25% of the lowest loss are near-optimal; ln x* is the mean of their ln x. An optimum
at the end of the tried values is no optimum: it is flagged and left out.
"""

from dataclasses import dataclass

import numpy as np

NEAR_OPTIMAL = 0.0025


@dataclass(frozen=True)
class CellOptimum:
    params: float
    tokens: float
    value: float  # geometric mean of the near-optimal values
    loss: float  # the lowest
    tried: int
    flag: str


@dataclass(frozen=True)
class HyperparameterLaw:
    """x* = exp(log_coefficient) N^params_exponent D^tokens_exponent; an exponent is 0 where that axis never varies."""

    log_coefficient: float
    params_exponent: float
    tokens_exponent: float
    residual_sd: float  # of ln x*
    cells: tuple[CellOptimum, ...]

    def __call__(self, params, tokens):
        return np.exp(
            self.log_coefficient + self.params_exponent * np.log(params) + self.tokens_exponent * np.log(tokens)
        )


def find_optima(params, tokens, values, loss) -> tuple[CellOptimum, ...]:
    """The near-optimal value at each (N, D) cell (N and D equal to 1%)."""
    params, tokens, values, loss = (np.asarray(x, dtype=np.float64) for x in (params, tokens, values, loss))
    keys = np.round(np.log(np.stack([params, tokens])) / 0.01)
    _, which = np.unique(keys, axis=1, return_inverse=True)
    return tuple(_cell(params[mine], tokens[mine], values[mine], loss[mine]) for mine in _groups(which.ravel()))


def _groups(which):
    return [which == group for group in range(which.max() + 1)]


def _cell(params, tokens, values, loss) -> CellOptimum:
    near = loss <= loss.min() * (1.0 + NEAR_OPTIMAL)
    tried = np.unique(values)
    best = values[np.argmin(loss)]
    flag = ""
    if len(tried) < 3:
        flag = f"only {len(tried)} values tried"
    elif best in (tried[0], tried[-1]):
        flag = "optimum at the edge of the values tried"
    value = float(np.exp(np.log(values[near]).mean()))
    return CellOptimum(float(params[0]), float(tokens[0]), value, float(loss.min()), len(tried), flag)


def fit_hyperparameter_law(params, tokens, values, loss) -> HyperparameterLaw:
    """Least squares of ln x* on ln N and ln D over the unflagged cells.

    Raises ValueError when too few cells have an interior optimum to fit the axes that vary.
    """
    cells = find_optima(params, tokens, values, loss)
    used = [cell for cell in cells if not cell.flag]
    log_n, log_d = (np.log([getattr(cell, axis) for cell in used]) for axis in ("params", "tokens"))
    columns = [np.ones(len(used)), log_n, log_d]
    # An axis that does not vary, or varies with the other, cannot have an exponent of its own.
    free = [0] + [i for i in (1, 2) if len(used) and np.ptp(columns[i]) > 0.02]
    if len(free) == 3 and abs(np.corrcoef(log_n, log_d)[0, 1]) > 0.999:
        free = [0, 1]
    if len(used) < len(free) + 1 or len(free) == 1:
        flags = "; ".join(sorted({cell.flag for cell in cells if cell.flag})) or "one cell size only"
        raise ValueError(f"{len(used)} of {len(cells)} cells have an interior optimum, too few for a law ({flags})")
    design = np.stack([columns[i] for i in free], axis=1)
    target = np.log([cell.value for cell in used])
    coefficients, *_ = np.linalg.lstsq(design, target, rcond=None)
    residual_sd = float(np.sqrt(np.sum((target - design @ coefficients) ** 2) / max(len(used) - len(free), 1)))
    full = np.zeros(3)
    full[free] = coefficients
    return HyperparameterLaw(float(full[0]), float(full[1]), float(full[2]), residual_sd, cells)
