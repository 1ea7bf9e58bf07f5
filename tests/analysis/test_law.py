"""What a sweep says about learning rate and batch becomes a rule that a config follows."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.estimates import Options
from analysis.law import law_of
from analysis.report import check_out
from analysis.runs import load_runs
from analysis.simulate import EPOCH
from analysis.study import Study, make_study
from lmjax.optim.hyperparameters import Scale, read_law

ROOT = Path(__file__).resolve().parents[2]


def best_rate(params, tokens):
    return 7e-4 * (params / 4e8) ** -0.25 * (tokens / 1e10) ** 0.05


def best_batch(tokens):
    return 5e5 * (tokens / 1e10) ** 0.38


def study_of(directory: Path, tries: int) -> Study:
    """`tries` learning rates by as many batches at eight (N, D), the best in the middle."""
    offsets = np.linspace(-1.5, 1.5, tries) if tries > 1 else [0.0]
    cells = [(n, n * ratio) for n in np.geomspace(5e7, 3e9, 4) for ratio in (10.0, 80.0)]
    params, tokens, x, y = np.array([(*cell, x, y) for cell in cells for x in offsets for y in offsets]).T
    table = pd.DataFrame({"params_total": params, "tokens": tokens})
    table["learning_rate"] = best_rate(params, tokens) * np.exp(x)
    table["batch_tokens"] = best_batch(tokens) * np.exp(y)
    noise = np.random.default_rng(1).normal(0, 1e-4, len(x))
    table["loss"] = EPOCH.loss(params, tokens) + 0.02 * x**2 + 0.01 * y**2 + noise
    table.to_csv(directory / "runs.csv", index=False)
    return make_study(load_runs(directory / "runs.csv"), Options(target=1e23, replicates=100))


@pytest.fixture(scope="module")
def law(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tuned")
    path = directory / "law.json"
    path.write_text(json.dumps(law_of(study_of(directory, tries=5))))
    return path


def test_the_law_of_a_sweep_is_a_rule_that_knows_the_best_settings(law):
    rule = read_law(str(law))
    for params, tokens in ((1e8, 2e9), (1e9, 2e10)):
        scale = Scale(tokens, 1024, 12, 2048, {"total": params, "layers": params / 2})
        assert rule.batch(scale) == pytest.approx(best_batch(tokens), rel=0.15)
        assert rule.advise(scale, 1e6).learning_rate == pytest.approx(best_rate(params, tokens), rel=0.15)
        assert rule.warnings(scale, 1e6) == []


def test_it_says_where_it_was_fitted_and_to_what(law):
    stored = json.loads(law.read_text())
    assert stored["params_range"] == pytest.approx([5e7, 3e9])
    assert stored["tokens_range"] == pytest.approx([5e8, 2.4e11])
    assert (stored["runs"], stored["params"], stored["loss"]) == (8 * 25, "total", "loss")
    assert stored["laws"]["learning_rate"]["cells"] == 8 and not stored["absent"]
    assert len(stored["data_sha256"]) == 64


def test_a_config_follows_it(law):
    load = pytest.importorskip("lmjax.config").load
    unset = ["optimizer.name=adamw", "optimizer.schedule.warmup=1", "model.vocab=2048", "train.tokens=1000000000"]
    config = law.parent / "bare.py"
    config.write_text("from lmjax.config import default_config as get_config  # noqa: F401\n")
    cfg = load(str(config), [*unset, f"hyperparameters={law}"])
    total = 4 * 128**2 * 12 + 2048 * 128 + 9 * 128
    assert cfg.optimizer.learning_rate == pytest.approx(best_rate(total, 1e9), rel=0.15)
    batch = cfg.train.batch * cfg.data.seq_len
    assert 0.6 < batch / best_batch(1e9) < 1.7 and cfg.train.steps * batch == pytest.approx(1e9, rel=1e-3)


def test_a_sweep_of_one_setting_has_no_law(tmp_path):
    stored = law_of(study_of(tmp_path, tries=1))
    assert stored["laws"] == {} and set(stored["absent"]) == {"law of the learning rate", "law of the batch size"}
    path = tmp_path / "law.json"
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=f"^{path}: has no law: the sweep behind it tried too few"):
        read_law(str(path))


def test_a_report_does_not_overwrite_a_law_that_it_did_not_write(tmp_path):
    (tmp_path / "law.json").write_text("{}")
    with pytest.raises(ValueError, match=r"law\.json is there and no report has written it"):
        check_out(tmp_path)
