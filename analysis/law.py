"""The laws of learning rate and batch that a study fitted, as a file that a config can name as its rule."""

import numpy as np

from analysis.estimates import SETTING_LAWS
from analysis.study import Study
from lmjax.optim.hyperparameters import LAW_FORMAT


def law_of(study: Study) -> dict:
    """What `lmjax.optim.hyperparameters.read_law` reads: each law is x* = exp(log_coefficient) N^a D^b.

    The ranges of N and D are those that all laws were fitted in. `laws` is empty where the runs tried too few settings,
    and `absent` says why.
    """
    runs, laws = study.trials, study.settings
    used = [[cell for cell in law.cells if not cell.flag] for law in laws.values()]

    def reach(axis: str) -> list[float]:
        ends = [(min(values), max(values)) for values in ([getattr(cell, axis) for cell in cells] for cells in used)]
        return [max(low for low, _ in ends), min(high for _, high in ends)]

    return {
        "format": LAW_FORMAT,
        "source": runs.source,
        "data_sha256": runs.sha256,
        "runs": len(runs.table),
        "loss": runs.loss_name,
        "loss_unit": runs.loss_unit,
        "params": runs.params_convention,
        **({"params_range": reach("params"), "tokens_range": reach("tokens")} if laws else {}),
        "laws": {
            name: {
                "log_coefficient": law.log_coefficient,
                "params_exponent": law.params_exponent,
                "tokens_exponent": law.tokens_exponent,
                "residual_sd": law.residual_sd,
                "standard_errors": np.sqrt(np.diag(law.covariance)).tolist(),
                "regressors": law.regressors,
                "cells": len(cells),
            }
            for (name, law), cells in zip(laws.items(), used, strict=True)
        },
        "absent": {name: study.absent[name] for name in SETTING_LAWS.values() if name in study.absent},
    }
