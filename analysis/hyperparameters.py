"""Power laws for the best learning rate or batch size, x* = k N^p D^q, or k D^q alone.

At each (N, D) the runs within a tolerance of the lowest loss are near-optimal. A law goes either through one point a
cell, the mean of their ln x, or through all of them pooled, as Step Law does (arXiv 2503.04715: the learning rate on N
and D, the batch on D alone). Cells then weigh by how flat they are, and those that are flat towards large values raise
the law. An optimum at the end of the tried values is no optimum: its cell is flagged and left out.
"""

from collections.abc import Sequence
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
    near: tuple[float, ...]  # the near-optimal values themselves


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
    pooled: bool  # through every near-optimal value, not one mean a cell
    tolerance: float  # near-optimal: at most this share above the cell's lowest loss

    @property
    def regressors(self) -> str:
        """What the law is of: `N, D`, or that of the two which it uses."""
        return ", ".join(name for name, row in (("N", 1), ("D", 2)) if self.covariance[row, row] > 0)

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


def find_optima(params, tokens, values, loss, tolerance: float = NEAR_OPTIMAL) -> tuple[CellOptimum, ...]:
    """The near-optimal value at each (N, D) cell, all columns (runs,)."""
    columns = [np.asarray(x, dtype=np.float64) for x in (params, tokens, values, loss)]
    cells = cells_of(*columns[:2])
    return tuple(
        _cell(*(column[cells == cell] for column in columns), tolerance=tolerance) for cell in np.unique(cells)
    )


def _cell(params, tokens, values, loss, *, tolerance: float) -> CellOptimum:
    near = loss <= loss.min() * (1.0 + tolerance)
    tried = np.unique(values)
    best = values[np.argmin(loss)]
    flag = ""
    if len(tried) < 3:
        flag = f"only {len(tried)} values tried"
    elif best in (tried[0], tried[-1]):
        flag = "optimum at the edge of the values tried"
    value = float(np.exp(np.log(values[near]).mean()))
    near_values = tuple(values[near].tolist())
    return CellOptimum(float(params[0]), float(tokens[0]), value, float(loss.min()), len(tried), flag, near_values)


def fit_hyperparameter_law(
    params,
    tokens,
    values,
    loss,
    *,
    regressors: Sequence[str] = ("params", "tokens"),
    pooled: bool = False,
    tolerance: float = NEAR_OPTIMAL,
) -> HyperparameterLaw:
    """Least squares of ln x* on the logarithms of `regressors` over the unflagged cells; all columns are (runs,).

    One point a cell, or, `pooled`, one a near-optimal run. These are no evidence of their own: intervals take a cell's
    points as one, by the sandwich estimator over cells with its small-sample factor (Cameron & Miller 2015, eq. 11-12).
    Raises ValueError when too few cells have an interior optimum to fit the axes that vary.
    """
    cells = find_optima(params, tokens, values, loss, tolerance)
    used = [cell for cell in cells if not cell.flag]
    free = _free_columns(used, regressors)
    if len(used) < len(free) + 1 or len(free) == 1:
        flags = "; ".join(sorted({cell.flag for cell in cells if cell.flag})) or "one cell size only"
        raise ValueError(f"{len(used)} of {len(cells)} cells have an interior optimum, too few for a law ({flags})")
    points = [(index, value) for index, cell in enumerate(used) for value in (cell.near if pooled else [cell.value])]
    which, values = (np.array(column) for column in zip(*points, strict=True))
    design, target = _columns(used)[free].T[which], np.log(values)
    found = np.linalg.lstsq(design, target, rcond=None)[0]
    residual, freedom = target - design @ found, len(used) - len(free)
    residual_sd = float(np.sqrt(np.sum(residual**2) / (len(target) - len(free))))
    inverse = np.linalg.inv(design.T @ design)
    if pooled:
        scores = np.stack([design[which == i].T @ residual[which == i] for i in range(len(used))])
        factor = len(used) / (len(used) - 1) * (len(target) - 1) / (len(target) - len(free))
        spread = factor * inverse @ (scores.T @ scores) @ inverse
    else:
        spread = residual_sd**2 * inverse
    full, covariance = np.zeros(3), np.zeros((3, 3))
    full[free], covariance[np.ix_(free, free)] = found, spread
    constant, params_exponent, tokens_exponent = (float(x) for x in full)
    return HyperparameterLaw(
        constant, params_exponent, tokens_exponent, residual_sd, covariance, freedom, cells, pooled, tolerance
    )


def _columns(cells: list[CellOptimum]) -> np.ndarray:
    """1, ln N, ln D of the cells, (3, cells)."""
    return np.array(
        [np.ones(len(cells)), *(np.log([getattr(c, axis) for c in cells]) for axis in ("params", "tokens"))]
    )


def _free_columns(cells: list[CellOptimum], regressors: Sequence[str]) -> list[int]:
    """Which columns have a coefficient. An axis that does not vary, or varies with the other, has none of its own."""
    columns = _columns(cells)
    wanted = [place for place, name in ((1, "params"), (2, "tokens")) if name in regressors]
    free = [0] + [place for place in wanted if len(cells) and np.ptp(columns[place]) > 0.02]
    return [0, 1] if len(free) == 3 and abs(np.corrcoef(columns[1:])[0, 1]) > 0.999 else free
