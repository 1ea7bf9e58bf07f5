"""One decision at a time of a sweep that grows by itself: what it starts with, adds, leaves out, and when it stops."""

import itertools
import json
from datetime import UTC, datetime

import numpy as np
import pytest

from analysis.design import Candidates, standard_errors
from analysis.forecast import read_forecast, score_forecasts, seal
from analysis.growth import FEWEST_TO_STOP, START_RUNS, START_SHARE, Goal, Grow, Stop, diverged, plan_next, recommend
from analysis.simulate import EPOCH, HOFFMANN
from lmjax.models.shapes import shapes

BUDGET, NOISE = 1e19, 0.005
GOAL = Goal(target=1e22)
CANDIDATES = Candidates.of([shape.params for shape in shapes(1e7, 1e12)], (2.0, 200.0), BUDGET)
# Sixteen cells that tell the exponents well apart.
CELLS = np.array(list(itertools.product((1e7, 3e7, 1e8, 3e8), (2.0, 10.0, 50.0, 200.0))))
NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


def trained(params, tokens, seed=0, noise=NOISE, surface=EPOCH):
    return params, tokens, surface.loss(params, tokens) + np.random.default_rng(seed).normal(0.0, noise, len(params))


def swept(runs=16, **how):
    return (
        trained(CELLS[:, 0], CELLS[:, 0] * CELLS[:, 1], **how)
        if runs == 16
        else tuple(column[:runs] for column in swept(**how))
    )


def planned(runs=((), (), ()), *, left=BUDGET, goal=GOAL, candidates=CANDIDATES, running=((), ()), now=NOON):
    return plan_next(*runs, goal=goal, candidates=candidates, flops_left=left, running=running, now=now)


def pairs(cells):
    return set(zip(cells.params, cells.tokens, strict=True))


# The start ------------------------------------------------------------------------------------------------------------


def test_a_sweep_starts_with_cheap_cells_that_spread():
    start = planned()
    assert isinstance(start, Grow) and start.forecasts == () and start.recommendation is None
    cells = start.cells
    assert len(pairs(cells)) == START_RUNS and cells.flops.sum() <= START_SHARE * BUDGET
    assert np.ptp(np.log(cells.params)) > np.log(3) and np.ptp(np.log(cells.tokens / cells.params)) > np.log(20)


def test_the_start_tells_the_exponents_apart_better_than_cells_chosen_blindly():
    cells = planned().cells
    cheap = CANDIDATES.take(CANDIDATES.flops <= cells.flops.max())
    rng = np.random.default_rng(0)
    blind = [cheap.take(rng.choice(len(cheap.params), START_RUNS, replace=False)) for _ in range(200)]
    exponents = [standard_errors(EPOCH, some.params, some.tokens, 1e22, NOISE)[0] for some in blind]
    found = standard_errors(EPOCH, cells.params, cells.tokens, 1e22, NOISE)[0]
    assert np.mean(found < np.array(exponents)) > 0.98


def test_a_start_that_was_interrupted_is_completed():
    cells = planned().cells
    done = trained(cells.params[:3], cells.tokens[:3])
    rest = planned(done, running=(cells.params[3:5], cells.tokens[3:5])).cells
    assert len(rest.params) == START_RUNS - 5 and not pairs(rest) & pairs(cells.take(range(5)))


def test_nothing_is_added_while_the_start_runs():
    cells = planned().cells
    waiting = planned(running=(cells.params, cells.tokens))
    assert isinstance(waiting, Grow) and len(waiting.cells.params) == 0


def test_a_start_keeps_within_a_budget_that_is_nearly_nothing():
    small = 3.0 * CANDIDATES.flops.min()
    start = planned(left=small)
    assert isinstance(start, Grow) and 0 < start.cells.flops.sum() <= small


# Growing --------------------------------------------------------------------------------------------------------------


def test_a_batch_has_as_many_cells_as_may_run_at_once():
    grown = planned(swept(8))
    assert isinstance(grown, Grow) and len(pairs(grown.cells)) == GOAL.batch
    running = grown.cells.params[:3], grown.cells.tokens[:3]
    more = planned(swept(8), running=running)
    assert isinstance(more, Grow) and len(more.cells.params) == GOAL.batch - 3
    # What runs is known for the design: the first cells are counted on, the rest follows from them.
    assert pairs(more.cells) == pairs(grown.cells.take([3]))


def test_cells_lower_the_variance_more_per_flop_than_others():
    goal = Goal(target=1e22, tolerance=1e-3, batch=1)
    params, tokens, loss = swept()
    grown = planned((params, tokens, loss), goal=goal)
    fit = grown.recommendation.fit

    def gain(cell):
        both = np.append(params, cell[0]), np.append(tokens, cell[1])
        before = standard_errors(fit.surface, params, tokens, goal.target, fit.residual_sd)[1]
        return before**2 - standard_errors(fit.surface, *both, goal.target, fit.residual_sd)[1] ** 2

    (chosen,) = pairs(grown.cells)
    rivals = CANDIDATES.take(np.random.default_rng(0).choice(len(CANDIDATES.params), 60, replace=False))
    as_good = [cell for cell in pairs(rivals) if gain(cell) >= gain(chosen)]
    assert all(cell[0] * cell[1] >= chosen[0] * chosen[1] for cell in as_good)


def test_no_cell_is_trained_twice_though_sizes_and_tokens_were_rounded():
    cells = planned(swept(8)).cells
    params, tokens, _ = swept(8)
    done = trained(np.append(params, 1.03 * cells.params), np.append(tokens, 0.997 * cells.tokens))
    again = planned(done).cells
    for n, d in pairs(again):
        assert not ((abs(done[0] / n - 1) < 0.04) & (abs(done[1] / d - 1) < 0.04)).any()


def test_decisions_are_the_same_twice():
    first, second = planned(swept(8)), planned(swept(8))
    assert first.forecasts == second.forecasts and pairs(first.cells) == pairs(second.cells)


def test_every_cell_has_a_dated_and_hashed_forecast(tmp_path):
    grown = planned(swept(8))
    assert [(f["params"], f["tokens"]) for f in grown.forecasts] == [
        *zip(grown.cells.params, grown.cells.tokens, strict=True)
    ]
    for forecast in grown.forecasts:
        (tmp_path / "one.json").write_text(json.dumps(forecast))
        assert read_forecast(tmp_path / "one.json")["made"] == "2026-01-02T12:00:00+00:00"
        assert forecast["low"] < forecast["loss"] < forecast["high"] and forecast["level"] == GOAL.level
    other = planned(swept(8, seed=1))
    assert {f["data_sha256"] for f in other.forecasts}.isdisjoint(f["data_sha256"] for f in grown.forecasts)


def test_forecasts_hold_what_comes_out():
    inside = []
    for seed in range(20):
        runs = swept(seed=seed)
        grown = planned(runs, goal=Goal(target=1e22, tolerance=1e-3))
        _, _, loss = trained(grown.cells.params, grown.cells.tokens, seed=1000 + seed)
        forecasts = {str(i): forecast for i, forecast in enumerate(grown.forecasts)}
        inside.append(score_forecasts(forecasts, grown.cells.params, grown.cells.tokens, loss).inside)
    assert 0.82 <= np.mean(inside) <= 0.97


# Stopping -------------------------------------------------------------------------------------------------------------


def test_a_narrow_interval_stops_the_sweep_but_not_one_of_few_runs():
    wide = Goal(target=1e22, tolerance=3.0)
    assert isinstance(planned(swept(FEWEST_TO_STOP - 1), goal=wide), Grow)
    stopped = planned(swept(), goal=wide)
    assert isinstance(stopped, Stop) and "within 3" in stopped.reason and stopped.recommendation.half <= 3.0
    assert isinstance(planned(swept(), goal=Goal(target=1e22, tolerance=0.01)), Grow)


def test_an_interval_that_the_running_cells_will_narrow_is_waited_for():
    """With room for more, and nothing to wait for without those that run."""
    runs, goal = swept(), Goal(target=1e22, tolerance=0.04, batch=20)
    enough = planned(runs, goal=goal)
    assert isinstance(enough, Grow) and 0 < len(enough.cells.params) < goal.batch
    waiting = planned(runs, goal=goal, running=(enough.cells.params, enough.cells.tokens))
    assert isinstance(waiting, Grow) and len(waiting.cells.params) == 0


def test_a_budget_that_is_spent_stops_the_sweep_and_runs_are_waited_for():
    goal = Goal(target=1e22, tolerance=1e-3)
    stopped = planned(swept(), goal=goal, left=1e12)
    assert isinstance(stopped, Stop) and "1e+12 FLOPs are left" in stopped.reason
    assert stopped.recommendation.fit.runs == 16
    waiting = planned(swept(), goal=goal, left=1e12, running=([2e7], [1e9]))
    assert isinstance(waiting, Grow) and len(waiting.cells.params) == 0


def test_a_sweep_of_which_every_cell_was_trained_stops():
    params, tokens, loss = swept()
    stopped = planned((params, tokens, loss), candidates=Candidates(params, tokens), goal=Goal(1e22, tolerance=1e-3))
    assert isinstance(stopped, Stop) and "they pay for no new cell" in stopped.reason


# What is left out -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "lost"), [*((place, 0.3) for place in range(16)), (5, np.nan), (5, np.inf), (5, 3.0)]
)
def test_a_run_that_diverged_is_left_out_and_not_trained_again(place, lost):
    params, tokens, loss = swept()
    others = np.arange(16) != place
    clean = recommend(params[others], tokens[others], loss[others], goal=GOAL)
    spoilt = np.where(others, loss, loss + lost)
    found = recommend(params, tokens, spoilt, goal=GOAL)
    assert found.left_out == (place,) and found.estimate == clean.estimate
    grown = planned((params, tokens, spoilt), candidates=Candidates(params, tokens))
    assert isinstance(grown, Stop)


def test_several_that_diverged_are_left_out_together():
    params, tokens, loss = swept()
    spoilt = loss + np.where(np.isin(np.arange(16), [5, 10, 15]), [1.0], [0.0])
    assert recommend(params, tokens, spoilt, goal=GOAL).left_out == (5, 10, 15)


@pytest.mark.parametrize("noise", [0.003, 0.01])
def test_noise_alone_leaves_nothing_out(noise):
    assert sum(diverged(*swept(seed=seed, noise=noise), 0.003).sum() for seed in range(15)) <= 1


def test_a_surface_that_bends_does_not_lose_most_of_its_runs():
    params, tokens, loss = swept()
    bent = loss + 0.05 * np.log(tokens / params / 2.0) ** 2
    assert diverged(params, tokens, bent, 0.003).sum() <= 2


# What cannot be told --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [np.full(16, 3.0), 3.0 + 1e-9 * CELLS[:, 0]], ids=["flat", "rising"])
def test_runs_that_tell_no_exponents_are_added_to(loss):
    params, tokens, _ = swept()
    grown = planned((params, tokens, loss))
    assert isinstance(grown, Grow) and grown.recommendation is None and len(pairs(grown.cells)) == GOAL.batch
    with pytest.raises(ValueError, match="add runs"):
        recommend(params, tokens, loss, goal=GOAL)


def test_few_runs_are_no_recommendation():
    with pytest.raises(ValueError, match="5 runs do not tell"):
        recommend(*swept(5), goal=GOAL)


def test_the_recommendation_is_the_optimum_of_the_surface_and_its_loss():
    found = recommend(*swept(noise=1e-6, surface=HOFFMANN), goal=GOAL)
    params, tokens = HOFFMANN.optimum(1e22)
    assert found.estimate.params.value == pytest.approx(params, rel=0.01)
    assert found.estimate.tokens.value == pytest.approx(tokens, rel=0.01)
    assert found.estimate.loss.value == pytest.approx(HOFFMANN.frontier_loss(1e22), rel=1e-3)
    # No run's noise is taken for less than the floor, so no interval is narrower than it.
    assert found.estimate.loss.interval.high - found.estimate.loss.interval.low > 2 * GOAL.noise_sd
    assert found.half == pytest.approx(0.5 * np.log(found.interval.high / found.interval.low))


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        (([1e8], [1e9, 1e10], [3.0]), "differ in length"),
        (([1e8, -1.0], [1e9, 1e9], [3.0, 3.0]), "params must be"),
        (([1e8, 1e8], [1e9, np.nan], [3.0, 3.0]), "tokens must be"),
    ],
)
def test_columns_that_cannot_be_are_refused(runs, says):
    with pytest.raises(ValueError, match=says):
        planned(runs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target", 0.0),
        ("tolerance", -0.1),
        ("tolerance", np.nan),
        ("noise_sd", 0.0),
        ("level", 1.0),
        ("batch", 0),
        ("runs", 5),
    ],
)
def test_a_goal_that_cannot_be_is_refused(name, value):
    with pytest.raises(ValueError, match=name):
        Goal(**{"target": 1e22, name: value})


# Scores ---------------------------------------------------------------------------------------------------------------


def test_forecasts_are_scored_by_what_came_out():
    made = {
        name: seal({"params": 1e8, "tokens": tokens, "loss": 3.0, "low": 2.9, "high": 3.1}, NOON)
        for name, tokens in (("hit", 1e9), ("miss", 2e9), ("diverged", 3e9), ("later", 4e9))
    }
    table = score_forecasts(made, [1.01e8, 1e8, 1e8], [1e9, 2e9, 3e9], [3.03, 3.2, np.nan])
    assert [score.forecast for score in table.scores] == ["hit", "miss", "diverged"] and table.waiting == ("later",)
    assert table.inside == pytest.approx(1 / 3)
    assert table.mean_error == pytest.approx(np.mean([0.03 / 3.03, 0.2 / 3.2]))
    nothing = score_forecasts(made, [], [], [])
    assert np.isnan(nothing.inside) and np.isnan(nothing.mean_error) and len(nothing.waiting) == 4
