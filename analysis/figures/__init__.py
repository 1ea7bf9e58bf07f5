"""The canonical figures of a scaling-law study. Each takes a `Study`, and raises NotApplicableError where data lack."""

from analysis.figures import fit, laws, regimes, settings, sweep

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
    "stages": laws.stages,
    "reducible-loss": regimes.reducible_loss,
    "overtraining": regimes.overtraining,
    "downstream-error": regimes.downstream_error,
    "repeats": regimes.repeats,
    "hyperparameters": settings.hyperparameters,
    "learning-rate-batch": settings.learning_rate_batch,
    "hold-out": fit.hold_out,
    "inference": regimes.inference,
    "cost-of-certainty": fit.cost_of_certainty,
}
