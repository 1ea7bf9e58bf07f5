"""The canonical figures of a scaling-law study. Each takes a `Study`, and raises NotApplicableError where data lack."""

from analysis.figures import fit, laws, regimes, sweep

FIGURES = {
    "training-curves": sweep.training_curves,
    "isoflop": sweep.isoflop,
    "optimal-params": laws.optimal_params,
    "optimal-tokens": laws.optimal_tokens,
    "tokens-per-param": laws.tokens_per_param,
    "contours": laws.contours,
    "isoloss-slices": sweep.isoloss_slices,
    "residuals": fit.residuals,
    "bootstrap": fit.bootstrap,
    "exponents": laws.exponents,
    "reducible-loss": regimes.reducible_loss,
    "overtraining": regimes.overtraining,
    "repeats": regimes.repeats,
    "hyperparameters": regimes.hyperparameters,
    "hold-out": fit.hold_out,
    "inference": regimes.inference,
    "cost-of-certainty": fit.cost_of_certainty,
}
