"""Power laws for the best learning rate or batch size, x* = k N^p D^q (as Step Law, DeepSeek LLM fit them).

At each (N, D) the runs within 0.25% of the lowest loss are near-optimal; ln x* is the mean of their ln x. An optimum
at the end of the tried values is no optimum: it is flagged and left out.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from analysis.uncertainty import Interval

NEAR_OPTIMAL = 0.0025
# Token counts rounded to whole batches differ by less than this between runs of one cell, in ln.
SAME_CELL = 0.01


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
    covariance: np.ndarray  # (3, 3) of the first three fields
    freedom: int  # cells used, less the coefficients fitted
    cells: tuple[CellOptimum, ...]

    def __call__(self, params, tokens):
        return np.exp(
            self.log_coefficient + self.params_exponent * np.log(params) + self.tokens_exponent * np.log(tokens)
        )

    def interval(self, params: float, tokens: float, level: float = 0.95) -> Interval:
        """Where the law itself lies at (N, D): the delta method with Student's t."""
        at = np.array([1.0, np.log(params), np.log(tokens)])
        reach = float(student.ppf((1 + level) / 2, self.freedom) * np.sqrt(at @ self.covariance @ at))
        value = float(self(params, tokens))
        return Interval(value * float(np.exp(-reach)), value * float(np.exp(reach)), level, "delta")


def cells_of(params, tokens) -> np.ndarray:
    """Which cell each run belongs to, (runs,): N and D equal to within 1%."""
    keys = np.stack([_groups_of(np.log(np.asarray(x, dtype=np.float64))) for x in (params, tokens)])
    return np.unique(keys, axis=1, return_inverse=True)[1].ravel()


def _groups_of(values: np.ndarray) -> np.ndarray:
    order = np.argsort(values)
    groups = np.empty(len(values), int)
    groups[order] = np.cumsum(np.diff(values[order], prepend=values[order[0]]) > SAME_CELL)
    return groups


def find_optima(params, tokens, values, loss) -> tuple[CellOptimum, ...]:
    """The near-optimal value at each (N, D) cell, all arguments (runs,)."""
    columns = [np.asarray(x, dtype=np.float64) for x in (params, tokens, values, loss)]
    cells = cells_of(*columns[:2])
    return tuple(_cell(*(column[cells == cell] for column in columns)) for cell in np.unique(cells))


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
    """Least squares of ln x* on ln N and ln D over the unflagged cells; `values` and the others are (runs,).

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
    found = np.linalg.lstsq(design, target, rcond=None)[0]
    freedom = len(used) - len(free)
    residual_sd = float(np.sqrt(np.sum((target - design @ found) ** 2) / freedom))
    full, covariance = np.zeros(3), np.zeros((3, 3))
    full[free], covariance[np.ix_(free, free)] = found, residual_sd**2 * np.linalg.inv(design.T @ design)
    constant, params_exponent, tokens_exponent = (float(x) for x in full)
    return HyperparameterLaw(constant, params_exponent, tokens_exponent, residual_sd, covariance, freedom, cells)
