"""Kaplan et al. 2020 (arXiv 2001.08361, eq. 1.5): L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D.

N there is without embeddings, and no irreducible loss is separated, so the form bends away at small losses.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import least_squares

from analysis.parametric import checked_runs


@dataclass(frozen=True)
class KaplanFit:
    alpha_n: float
    alpha_d: float
    log_n_c: float  # ln parameters
    log_d_c: float  # ln tokens
    residual_sd: float  # of ln L

    def loss(self, params, tokens):
        """Nats per token."""
        size = self.alpha_n / self.alpha_d * (self.log_n_c - np.log(params))
        with np.errstate(over="ignore"):  # far from the data, where a search may step, a loss may be infinite
            return np.exp(self.alpha_d * np.logaddexp(size, self.log_d_c - np.log(tokens)))


def fit_kaplan(params, tokens, loss) -> KaplanFit:
    """Least squares in ln L from 27 starts. Raises ValueError for fewer than 5 runs or bad values."""
    params, tokens, loss = checked_runs(params, tokens, loss)
    if len(loss) < 5:
        raise ValueError(f"Kaplan's form has 4 parameters and needs at least 5 runs, got {len(loss)}: add runs")
    centre_n, centre_d, log_loss = np.log(params).mean(), np.log(tokens).mean(), np.log(loss)

    def unpack(theta) -> KaplanFit:
        ratio, alpha_d = np.exp(theta[:2])
        # theta[2:] are the two terms' sizes at the centre of the data, which the exponents do not move.
        return KaplanFit(ratio * alpha_d, alpha_d, centre_n + theta[2] / ratio, centre_d + theta[3], 0.0)

    def residuals(theta):
        return np.clip(np.log(unpack(theta).loss(params, tokens)) - log_loss, -50.0, 50.0)

    level = log_loss.mean()
    starts = [
        (np.log(ratio), np.log(alpha_d), level / alpha_d + shift - 0.7, level / alpha_d - shift - 0.7)
        for ratio, alpha_d, shift in product((0.4, 0.8, 1.6), (0.05, 0.1, 0.3), (-2.0, 0.0, 2.0))
    ]
    fits = [least_squares(residuals, start, xtol=1e-14, ftol=1e-14, gtol=1e-14, max_nfev=2000) for start in starts]
    best = min(fits, key=lambda fit: fit.cost)
    found = unpack(best.x)
    sd = float(np.sqrt(2 * best.cost / (len(loss) - 4)))
    return KaplanFit(float(found.alpha_n), float(found.alpha_d), float(found.log_n_c), float(found.log_d_c), sd)
