"""Many fits of `log L = logsumexp_t(Z_t theta)` at once: a damped Newton method batched over lanes.

Additive power laws (Hoffmann et al. 2022, eq. 10; Gadre et al. 2024, eq. 4) are sums of exponentials of linear
functions of their parameters: E + A/N^alpha + B/D^beta has the three terms `e`, `a - alpha ln N` and `b - beta ln D`.
The objective is the sum over runs of weight * Huber_delta(log L - logsumexp). A lane is one starting point, or one
bootstrap replicate. Exact second derivatives converge in tens of steps where quasi-Newton methods stop early, and
all lanes share every matrix product.

Shapes: K lanes, R runs, P parameters, T terms.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

# Numbers in one (lanes, runs) buffer: enough to hide the interpreter, few enough for a core's cache.
BUFFER_SIZE = 96_000
# Beyond this predictor an exponential says nothing more; clipping keeps every sum finite.
MAX_PREDICTOR = 300.0
SMALLEST_TOTAL = 1e-300
# Share of the largest curvature added to the metric, and the trust radius, relative to the objective's own unit, at
# which rounding leaves nothing to gain.
RIDGE = 1e-6
SMALLEST_RADIUS = 1e-14
# Error of a computed ln L: data without noise are fitted to this, not to nothing.
ROUNDING = 1e-15


@dataclass(frozen=True)
class Terms:
    """The linear predictors: term t of run r is `design_TRP[t, r] @ theta + offset_TR[t, r]`."""

    design_TRP: np.ndarray
    offset_TR: np.ndarray

    @classmethod
    def of(cls, design_TRP: np.ndarray, offset_TR: np.ndarray | None = None) -> "Terms":
        design_TRP = np.asarray(design_TRP, dtype=np.float64)
        offset_TR = np.zeros(design_TRP.shape[:2]) if offset_TR is None else np.asarray(offset_TR, dtype=np.float64)
        return cls(design_TRP, offset_TR)

    def log_sum(self, theta_KP: np.ndarray) -> np.ndarray:
        """Predicted log loss, (K, R)."""
        predictors_TKR = np.einsum("trp,kp->tkr", self.design_TRP, theta_KP) + self.offset_TR[:, None]
        return np.logaddexp.reduce(predictors_TKR, axis=0)

    def fixing(self, index: int, value: float) -> "Terms":
        """The same terms with parameter `index` held at `value` (for profile likelihoods)."""
        offset_TR = self.offset_TR + value * self.design_TRP[:, :, index]
        return Terms(np.delete(self.design_TRP, index, axis=2), offset_TR)


@dataclass(frozen=True)
class Minima:
    """Where each lane ended: parameters (K, P), objective (K,), convergence (K,), Newton steps taken (K,)."""

    theta_KP: np.ndarray
    objective_K: np.ndarray
    converged_K: np.ndarray
    steps_K: np.ndarray


def minimize(
    terms: Terms,
    log_loss: np.ndarray,
    starts_KP: np.ndarray,
    delta: float,
    weights: np.ndarray | None = None,
    tolerance: float = 1e-11,
    max_steps: int = 300,
) -> Minima:
    """Minimize sum_r weight_r * Huber_delta(log_loss_r - logsumexp_t) from every start.

    `log_loss` and `weights` are (R,) or one row a lane (K, R). A lane has converged when the decrease that its
    Newton model still promises is below `tolerance` times its objective.
    """
    starts_KP = np.atleast_2d(np.asarray(starts_KP, dtype=np.float64))
    lanes, runs = len(starts_KP), terms.design_TRP.shape[1]
    targets_KR = np.atleast_2d(np.asarray(log_loss, dtype=np.float64))
    weights_KR = np.ones((1, runs)) if weights is None else np.atleast_2d(np.asarray(weights, dtype=np.float64))
    share = -(-lanes // (os.cpu_count() or 1))
    pieces = [slice(start, start + share) for start in range(0, lanes, share)]

    def work(piece: slice) -> Minima:
        kernel = _Kernel(terms, delta, width=max(1, min(BUFFER_SIZE // runs, share)))
        return _descend(
            kernel, _rows(targets_KR, piece), _rows(weights_KR, piece), starts_KP[piece], tolerance, max_steps
        )

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        done = list(pool.map(work, pieces))
    return Minima(*(np.concatenate(field) for field in zip(*(vars(d).values() for d in done), strict=True)))


def _rows(array_KR: np.ndarray, lanes) -> np.ndarray:
    """The rows of some lanes; a single row serves all."""
    return array_KR if len(array_KR) == 1 else array_KR[lanes]


class _Kernel:
    """Objective, gradient, Hessian and metric of a batch of lanes; the products Z_i Z_j^T are laid out once.

    The metric is the Gauss-Newton matrix of the quadratic that touches the Huber loss from above (iteratively
    reweighted least squares): positive, invariant to units, and never blind to the runs that lie beyond delta.
    All (lanes, runs) arrays live in buffers made once: allocating them anew costs more than the arithmetic.
    """

    def __init__(self, terms: Terms, delta: float, width: int):
        self.design_TRP, self.offset_TR, self.delta = terms.design_TRP, terms.offset_TR, delta
        count, runs = self.offset_TR.shape
        self.columns = [np.flatnonzero(design_RP.any(axis=0)) for design_RP in self.design_TRP]
        # A term that is the same for all runs, such as the irreducible loss, needs one exponential a lane.
        self.constant = [
            np.ptp(design_RP, axis=0).max() == np.ptp(offset_R) == 0
            for design_RP, offset_R in zip(self.design_TRP, self.offset_TR, strict=True)
        ]
        pairs = [(i, j) for i in range(count) for j in range(i, count)]
        self.pairs = [(i, j, *_outer(self.design_TRP[i], self.design_TRP[j], i == j)) for i, j in pairs]
        self.buffers = np.empty((count + 7, width, runs))

    def __call__(self, theta_KP, targets_KR, weights_KR):
        """The objective (K,), its gradient (K, P) and Hessian (K, P, P), and the metric (K, P, P) at `theta_KP`.

        For each lane, with s_t the share of term t in the sum over terms, r = log L - logsumexp_t(Z_t theta) the
        residual, w the weight, and h = clip(r, -delta, delta) the derivative of the Huber loss:

            objective   sum over runs of  w h (r - h / 2)
            gradient    sum over runs of  -w h sum_t s_t Z_t
            Hessian     sum over runs of  w (h' + h) sum_ij s_i s_j Z_i Z_j^T - w h sum_t s_t Z_t Z_t^T
            metric      sum over runs of  w delta / max(|r|, delta) sum_ij s_i s_j Z_i Z_j^T
        """
        *shares_TKR, total_KR, residual_KR, slope_KR, curvature_KR, metric_weight_KR, product_KR, spare_KR = (
            self.buffers[:, : len(theta_KP)]
        )
        self._shares(theta_KP, shares_TKR, total_KR)
        np.subtract(targets_KR, np.log(total_KR, out=total_KR), out=residual_KR)
        factors = (slope_KR, curvature_KR, metric_weight_KR)
        objective_K = self._huber(residual_KR, weights_KR, *factors, spare_KR)
        return objective_K, *self._derivatives(shares_TKR, *factors, product_KR, spare_KR)

    def _huber(self, residual_KR, weights_KR, slope_KR, curvature_KR, metric_weight_KR, spare_KR):
        """Return the objective, and write w h, w (h' + h) and w delta / max(|r|, delta). Overwrites the residuals."""
        clipped_KR = np.minimum(np.maximum(residual_KR, -self.delta, out=slope_KR), self.delta, out=slope_KR)
        # Huber: r^2/2 inside delta, delta (|r| - delta/2) outside: both are clip(r) * (r - clip(r)/2).
        huber_over_slope_KR = np.subtract(residual_KR, np.multiply(clipped_KR, 0.5, out=spare_KR), out=spare_KR)
        np.multiply(weights_KR, np.equal(clipped_KR, residual_KR), out=curvature_KR)
        size_KR = np.maximum(np.abs(residual_KR, out=residual_KR), self.delta, out=residual_KR)
        np.multiply(weights_KR, np.divide(self.delta, size_KR, out=metric_weight_KR), out=metric_weight_KR)
        np.multiply(weights_KR, clipped_KR, out=slope_KR)
        np.add(curvature_KR, slope_KR, out=curvature_KR)
        return np.einsum("kr,kr->k", slope_KR, huber_over_slope_KR)

    def _derivatives(self, shares_TKR, slope_KR, curvature_KR, metric_weight_KR, product_KR, spare_KR):
        """Gradient, Hessian and metric, summed over pairs of terms."""
        lanes, params = len(slope_KR), self.design_TRP.shape[2]
        gradient_KP = np.zeros((lanes, params))
        hessian, metric = np.zeros((2, lanes, params * params))
        for i, j, columns, designs in self.pairs:
            np.multiply(shares_TKR[i], shares_TKR[j], out=product_KR)
            metric[:, columns] += np.multiply(metric_weight_KR, product_KR, out=spare_KR) @ designs
            np.multiply(curvature_KR, product_KR, out=product_KR)
            if i == j:
                pull_KR = np.multiply(slope_KR, shares_TKR[i], out=spare_KR)
                gradient_KP[:, self.columns[i]] -= pull_KR @ self.design_TRP[i][:, self.columns[i]]
                np.subtract(product_KR, pull_KR, out=product_KR)
            hessian[:, columns] += product_KR @ designs
        square = (lanes, params, params)
        return gradient_KP, hessian.reshape(square), metric.reshape(square)

    def _shares(self, theta_KP, shares_TKR, total) -> None:
        """Write each term's share of the sum, and the sum."""
        for t, (share, columns) in enumerate(zip(shares_TKR, self.columns, strict=True)):
            design_RP, offset_R = self.design_TRP[t][:, columns], self.offset_TR[t]
            if self.constant[t]:
                share[:] = np.exp(np.minimum(theta_KP[:, columns] @ design_RP[:1].T + offset_R[0], MAX_PREDICTOR))
                continue
            np.matmul(theta_KP[:, columns], design_RP.T, out=share)
            np.minimum(np.add(share, offset_R, out=share), MAX_PREDICTOR, out=share)
            np.exp(share, out=share)
        np.add(shares_TKR[0], SMALLEST_TOTAL, out=total)
        for share in shares_TKR[1:]:
            np.add(total, share, out=total)
        for share in shares_TKR:
            np.divide(share, total, out=share)


def _outer(left_RP: np.ndarray, right_RP: np.ndarray, same: bool) -> tuple[np.ndarray, np.ndarray]:
    """Symmetrized products of two designs, (R, columns), and the non-zero columns of the flat (P * P) Hessian."""
    products = left_RP[:, :, None] * right_RP[:, None, :]
    if not same:
        products = products + products.transpose(0, 2, 1)
    flat = products.reshape(len(left_RP), -1)
    columns = np.flatnonzero(flat.any(axis=0))
    return columns, np.ascontiguousarray(flat[:, columns])


def _descend(kernel: _Kernel, targets_KR, weights_KR, starts_KP, tolerance, max_steps) -> Minima:
    """Trust-region Newton steps; lanes that converge make room for waiting ones, so that batches stay full."""
    lanes, width = len(starts_KP), kernel.buffers.shape[1]
    result = Minima(starts_KP.copy(), np.empty(lanes), np.zeros(lanes, bool), np.zeros(lanes, int))
    batch, waiting = _start(kernel, targets_KR, weights_KR, starts_KP, np.arange(min(width, lanes))), width
    while len(batch.lane):
        _, gradient, hessian, metric = batch.state
        move, length, promise = _newton_step(gradient, hessian, metric, batch.radius)
        inside = length < 0.99 * batch.radius
        stuck = batch.radius <= SMALLEST_RADIUS * np.sqrt(batch.state[0])
        floor = 0.5 * targets_KR.shape[1] * ROUNDING**2
        converged = (inside & (promise <= tolerance * batch.state[0] + floor)) | stuck
        leaving = converged | (batch.steps >= max_steps)
        if leaving.any():
            done = batch.lane[leaving]
            result.theta_KP[done], result.objective_K[done] = batch.theta[leaving], batch.state[0][leaving]
            result.converged_K[done], result.steps_K[done] = converged[leaving], batch.steps[leaving]
            batch = batch.select(~leaving)
            move, length, promise = move[~leaving], length[~leaving], promise[~leaving]
        if len(batch.lane):
            _advance(batch, kernel, targets_KR, weights_KR, move, length, promise)
        if waiting < lanes and len(batch.lane) <= 0.75 * width:
            new = np.arange(waiting, min(waiting + width - len(batch.lane), lanes))
            batch, waiting = batch.join(_start(kernel, targets_KR, weights_KR, starts_KP, new)), waiting + len(new)
    return result


@dataclass
class _Batch:
    """The lanes being worked on: index, parameters, trust radius, steps so far, and the kernel's results there."""

    lane: np.ndarray
    theta: np.ndarray
    radius: np.ndarray
    steps: np.ndarray
    state: tuple[np.ndarray, ...]

    def select(self, keep: np.ndarray) -> "_Batch":
        state = tuple(part[keep] for part in self.state)
        return _Batch(self.lane[keep], self.theta[keep], self.radius[keep], self.steps[keep], state)

    def join(self, other: "_Batch") -> "_Batch":
        return _Batch(
            np.concatenate([self.lane, other.lane]),
            np.concatenate([self.theta, other.theta]),
            np.concatenate([self.radius, other.radius]),
            np.concatenate([self.steps, other.steps]),
            tuple(np.concatenate(parts) for parts in zip(self.state, other.state, strict=True)),
        )


def _start(kernel: _Kernel, targets_KR, weights_KR, starts_KP, lane) -> _Batch:
    state = kernel(starts_KP[lane], _rows(targets_KR, lane), _rows(weights_KR, lane))
    # The metric's unit of length: a step of this length could remove the whole objective.
    radius = np.sqrt(2.0 * state[0])
    return _Batch(lane, starts_KP[lane], radius, np.zeros(len(lane), int), state)


def _advance(batch: _Batch, kernel: _Kernel, targets_KR, weights_KR, move, length, promise) -> None:
    """Take the steps that lower the objective as promised, and adapt every trust radius."""
    trial = kernel(batch.theta + move, _rows(targets_KR, batch.lane), _rows(weights_KR, batch.lane))
    gain = (batch.state[0] - trial[0]) / promise
    better = gain > 1e-4
    batch.theta[better] += move[better]
    for old, new in zip(batch.state, trial, strict=True):
        old[better] = new[better]
    radius = np.where(gain > 0.75, np.maximum(batch.radius, 2.5 * length), batch.radius)
    batch.radius = np.where(gain < 0.25, 0.25 * np.minimum(length, radius), radius)
    batch.steps += 1


def _newton_step(gradient_KP, hessian_KPP, metric_KPP, radius_K):
    """The Newton step within `radius` of the metric, its length, and the decrease that its model promises.

    Directions of negative curvature are followed to the edge of the region, so that a term that has vanished can
    grow back. The ridge keeps the metric from losing sight of such terms.
    """
    params = gradient_KP.shape[1]
    diagonal_KP = np.einsum("kpp->kp", metric_KPP)
    ridge_K = RIDGE * diagonal_KP.max(axis=1) + 1e-200
    scale_KP = np.sqrt(diagonal_KP + ridge_K[:, None])
    rescaled = (metric_KPP + ridge_K[:, None, None] * np.eye(params)) / (scale_KP[:, :, None] * scale_KP[:, None, :])
    whiten_KPP = np.linalg.inv(np.linalg.cholesky(rescaled + 1e-13 * np.eye(params))) / scale_KP[:, None, :]
    curvature_KP, vectors_KPP = np.linalg.eigh(whiten_KPP @ hessian_KPP @ whiten_KPP.transpose(0, 2, 1))
    basis_KPP = vectors_KPP.transpose(0, 2, 1) @ whiten_KPP
    pull_KP = np.einsum("kqp,kp->kq", basis_KPP, gradient_KP)
    steps_KP, length_K = _within(radius_K, pull_KP, np.maximum(curvature_KP, 0.0) + 1e-14)
    promise_K = -np.einsum("kq,kq->k", steps_KP, pull_KP + 0.5 * curvature_KP * steps_KP)
    return np.einsum("kqp,kq->kp", basis_KPP, steps_KP), length_K, promise_K


def _within(radius_K, pull_KP, curvature_KP):
    """Solve |pull / (curvature + shift)| <= radius for the smallest shift >= 0 (More & Sorensen 1983)."""
    shift_K = np.zeros(len(radius_K))
    for _ in range(5):
        steps_KP = pull_KP / (curvature_KP + shift_K[:, None])
        square_K = np.einsum("kp,kp->k", steps_KP, steps_KP)
        length_K = np.sqrt(square_K)
        slope_K = np.einsum("kp,kp->k", steps_KP, steps_KP / (curvature_KP + shift_K[:, None])) + 1e-300
        shift_K = np.maximum(shift_K + square_K / slope_K * (length_K / radius_K - 1.0), 0.0)
    steps_KP = -pull_KP / (curvature_KP + shift_K[:, None])
    length_K = np.sqrt(np.einsum("kp,kp->k", steps_KP, steps_KP))
    shrink_K = np.minimum(1.0, radius_K / np.maximum(length_K, 1e-300))
    return steps_KP * shrink_K[:, None], length_K * shrink_K
