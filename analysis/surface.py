"""The additive loss surface L(N, D) = E + A / N^alpha + B / D^beta and what follows from it in closed form.

N parameters, D training tokens, C = 6 N D FLOPs, L nats per token (Hoffmann et al. 2022, arXiv 2203.15556, eq. 2).
"""

from dataclasses import dataclass

import numpy as np

FLOPS_PER_PARAM_TOKEN = 6.0


@dataclass(frozen=True)
class Surface:
    """L(N, D) = E + A / N^alpha + B / D^beta. Fields may be floats or arrays of one shape (one entry a replicate)."""

    E: np.ndarray | float
    A: np.ndarray | float
    B: np.ndarray | float
    alpha: np.ndarray | float
    beta: np.ndarray | float

    def loss(self, params, tokens):
        """Loss in nats per token at N `params` and D `tokens`; broadcasts."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self.E + self.A * np.power(params, -self.alpha) + self.B * np.power(tokens, -self.beta)

    @property
    def params_exponent(self):
        """a in N* ~ C^a: beta / (alpha + beta) (Hoffmann et al. 2022, eq. 4)."""
        return self.beta / (self.alpha + self.beta)

    @property
    def tokens_exponent(self):
        """b in D* ~ C^b: alpha / (alpha + beta) (Hoffmann et al. 2022, eq. 4)."""
        return self.alpha / (self.alpha + self.beta)

    def optimum(self, flops):
        """(N*, D*) of least loss with 6 N D = `flops`: N* = G (C/6)^a, D* = (C/6)^b / G (eq. 4)."""
        log_product = np.log(flops / FLOPS_PER_PARAM_TOKEN)
        # A replicate without a law (a coefficient of zero, an exponent of no sign) has no optimum: NaN.
        with np.errstate(all="ignore"):
            ratio = np.divide(self.alpha * self.A, self.beta * self.B)
            scale = np.log(np.where((ratio > 0) & np.isfinite(ratio), ratio, np.nan)) / (self.alpha + self.beta)
            return (
                np.exp(scale + self.params_exponent * log_product),
                np.exp(-scale + self.tokens_exponent * log_product),
            )

    def frontier_loss(self, flops):
        """The least loss that `flops` can buy, nats per token."""
        return self.loss(*self.optimum(flops))

    def tokens_at(self, params, loss):
        """The D that reaches `loss` with N `params`; NaN where no D does."""
        return self._invert(loss - self.E - self.A * np.power(params, -self.alpha), self.B, self.beta)

    @staticmethod
    def _invert(gap, coefficient, exponent):
        with np.errstate(over="ignore"):
            return np.where(gap > 0, np.power(coefficient / np.maximum(gap, 1e-300), 1.0 / exponent), np.nan)
