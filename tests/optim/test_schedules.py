import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax.errors import ConfigError
from lmjax.optim.config import OptimizerConfig, ScheduleConfig, hyper
from lmjax.optim.schedules import SCHEDULES

STEPS = 100
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def schedule_hyper(steps=STEPS, **fields):
    return hyper(OptimizerConfig(schedule=ScheduleConfig(**fields)), steps=steps)


def curve(name, scalars, steps=STEPS):
    return np.asarray(jax.jit(SCHEDULES[name])(jnp.arange(steps), scalars))


@every_schedule
@pytest.mark.parametrize("warmup", [0, 1, 10, 60])
@pytest.mark.parametrize("final_fraction", [0.0, 0.1, 1.0])
def test_a_schedule_rises_to_the_peak_and_never_leaves_zero_to_one(name, warmup, final_fraction):
    values = curve(name, schedule_hyper(name=name, warmup=warmup, final_fraction=final_fraction), steps=2 * STEPS)
    assert np.all((values >= 0) & (values <= 1))
    assert np.all(values[:STEPS] > 0), "no update is wasted at rate zero"
    np.testing.assert_allclose(values[:warmup], np.arange(1, warmup + 1) / max(warmup, 1), rtol=1e-6)
    assert values[max(warmup - 1, 0)] == 1
    after = values[max(warmup - 1, 0) :]
    assert np.all(np.diff(after) <= 0), "it falls after warmup"


@every_schedule
def test_it_is_continuous(name):
    steps = 100_000
    values = curve(name, schedule_hyper(steps, name=name, warmup=1000, final_fraction=0.1), steps + 100)
    largest = 0.01 if name == "wsd_sqrt" else 0.0011  # the square root falls steeply at first
    assert np.abs(np.diff(values)).max() < largest


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "wsd_sqrt"])
@pytest.mark.parametrize("final_fraction", [0.0, 0.1])
def test_it_ends_at_the_final_fraction_and_stays_there(name, final_fraction):
    values = curve(name, schedule_hyper(name=name, warmup=10, final_fraction=final_fraction), STEPS + 50)
    np.testing.assert_allclose(values[STEPS:], final_fraction, atol=1e-6)
    assert values[STEPS - 1] > final_fraction


@pytest.mark.parametrize("name", ["wsd", "wsd_sqrt"])
def test_wsd_is_flat_until_it_decays(name):
    values = curve(name, schedule_hyper(name=name, warmup=10, final_fraction=0, decay_fraction=0.25), STEPS + 1)
    assert np.all(values[9:76] == 1)
    done = np.arange(26) / 25
    np.testing.assert_allclose(values[75:], 1 - (done if name == "wsd" else np.sqrt(done)), atol=1e-6)


@pytest.mark.parametrize("name", ["wsd", "wsd_sqrt"])
def test_wsd_without_decay_is_constant(name):
    scalars = schedule_hyper(name=name, warmup=10, decay_fraction=0)
    np.testing.assert_array_equal(curve(name, scalars), curve("constant", scalars))


def test_cosine_and_linear_are_optax_after_warmup():
    scalars = schedule_hyper(warmup=10, final_fraction=0.1)
    cosine = optax.cosine_decay_schedule(1.0, STEPS - 10, alpha=0.1)
    linear = optax.linear_schedule(1.0, 0.1, STEPS - 10)
    after = np.arange(STEPS - 10)
    np.testing.assert_allclose(curve("cosine", scalars)[10:], cosine(after), rtol=1e-5)
    np.testing.assert_allclose(curve("linear", scalars)[10:], linear(after), rtol=1e-5)


def test_inverse_sqrt_is_the_transformers():
    scalars = schedule_hyper(warmup=20, final_fraction=0)
    count = np.arange(1, STEPS + 1)
    expected = 20**0.5 * np.minimum(count**-0.5, count * 20**-1.5)
    np.testing.assert_allclose(curve("inverse_sqrt", scalars), expected, rtol=1e-5)


@every_schedule
def test_runs_with_other_phases_share_one_program(name):
    runs = [
        schedule_hyper(steps, name=name, warmup=warmup, final_fraction=final)
        for steps, warmup, final in [(50, 0, 0.0), (80, 8, 0.1), (100, 30, 0.5)]
    ]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)
    together = jax.jit(jax.vmap(lambda scalars: SCHEDULES[name](jnp.arange(120), scalars)))(stack)
    for row, scalars in zip(together, runs, strict=True):
        np.testing.assert_allclose(row, curve(name, scalars, 120), atol=1e-6)


def test_phases_that_do_not_fit_are_refused_in_one_line():
    schedule_hyper(steps=10, warmup=10)
    with pytest.raises(ConfigError, match=r"optimizer\.schedule: warmup=11 does not fit into 10 steps") as error:
        schedule_hyper(steps=10, warmup=11)
    assert "\n" not in str(error.value)
    schedule_hyper(steps=100, name="wsd", warmup=80, decay_fraction=0.2)
    with pytest.raises(ConfigError, match=r"plus decay_fraction=0\.2 does not fit"):
        schedule_hyper(steps=100, name="wsd", warmup=81, decay_fraction=0.2)


@pytest.mark.parametrize("fields", [{"name": "cosin"}, {"warmup": -1}, {"final_fraction": 1.1}, {"warmpu": 3}])
def test_a_wrong_field_is_refused(fields):
    with pytest.raises(ValueError):
        ScheduleConfig(**fields)


def test_hyper_holds_scalars_only():
    scalars = hyper(OptimizerConfig(clip_norm=None), steps=1000, seed=2**32 - 1)
    assert all(value.shape == () for value in scalars.values())
    assert {name for name, value in scalars.items() if value.dtype != jnp.float32} == {"seed"}
    assert scalars["clip_norm"] == jnp.inf
    data = jax.random.key_data(jax.jit(jax.random.key)(scalars["seed"]))
    np.testing.assert_array_equal(data, jax.random.key_data(jax.random.key(2**32 - 1)))
