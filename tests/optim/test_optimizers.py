import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax import weights
from lmjax.devices.config import MeshConfig
from lmjax.devices.mesh import make_mesh, shardings
from lmjax.optim.config import OptimizerConfig, ScheduleConfig, hyper
from lmjax.optim.muon import is_hidden_matrix
from lmjax.optim.optimizers import build, clip, state_shardings
from lmjax.optim.rules import OPTIMIZERS
from lmjax.weights import Weight, bind, map_weights, stacked

pytestmark = pytest.mark.usefixtures("quick_compilation")

LAYERS = 2
STEPS = 4
DIMS = {"vocab": 150, "embed": 128, "heads": 4, "head_dim": 40, "mlp": 256, "rank": 24, "experts": 2}
# Sides of 128 and more, so that Adafactor factors, and a rank of 24, so that it also does not.
LAYER = {
    "query": Weight("embed -> heads head_dim"),
    "out": Weight("heads head_dim -> embed"),
    "experts": Weight("experts | embed -> mlp"),
    "down": Weight("mlp -> rank"),
    "norm": Weight("-> embed", kind="scale", init=weights.ones),
    "bias": Weight("-> heads head_dim", kind="bias", init=weights.normal(0.1)),
}
ENDS = {"embedding": Weight("vocab -> embed", kind="lookup"), "head": Weight("embed -> vocab")}
SPEC = bind(ENDS, DIMS) | {"layers": stacked(bind(LAYER, DIMS), LAYERS)}
# One weight of each class of treatment, where the shapes' variety does not matter.
PART = {"embedding": SPEC["embedding"], "layers": {name: SPEC["layers"][name] for name in ("query", "norm")}}

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def config(name, **fields):
    schedule = fields.pop("schedule", ScheduleConfig(name="cosine", warmup=2, final_fraction=0.1))
    return OptimizerConfig(name=name, schedule=schedule, **fields)


@functools.cache
def whole_spec_params(seed):
    return weights.initialize(SPEC, jax.random.key(seed))


def initial(spec=SPEC, seed=0):
    return whole_spec_params(seed) if spec is SPEC else weights.initialize(spec, jax.random.key(seed))


def gradients(params, step):
    """Different in every entry, layer and step."""
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32) / 10, params)


def zero_gradients(params, step):
    return jax.tree.map(jnp.zeros_like, params)


def update_with(optimizer):
    """What a train step does with gradients."""

    def update(params, state, grads, scalars, step):
        updates, state = optimizer.update(grads, state, params, scalars, step, optax.global_norm(grads))
        return optax.apply_updates(params, updates), state

    return update


def run(cfg, scalars, params, spec=SPEC, gradient=gradients, steps=STEPS):
    """Params and optimizer state after `steps` updates."""
    optimizer = build(cfg, spec)
    update = jax.jit(update_with(optimizer))
    state = optimizer.init(params)
    for step in range(steps):
        params, state = update(params, state, gradient(params, step), scalars, jnp.int32(step))
    return params, state


def largest_difference(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), a, b)))


def split(stack):
    """The layers of a stack as trees of their own, under the keys "0", "1", ..."""
    return {str(i): jax.tree.map(lambda x, i=i: x[i], stack) for i in range(LAYERS)}


@every_optimizer
def test_stacked_equals_unstacked(name):
    def unstack(params):
        return {**params, "layers": split(params["layers"])}

    cfg = config(name)
    scalars = hyper(cfg, steps=STEPS)
    spec_apart = bind(ENDS, DIMS) | {"layers": {str(i): bind(LAYER, DIMS) for i in range(LAYERS)}}
    together, _ = run(cfg, scalars, initial())
    apart, _ = run(cfg, scalars, unstack(initial()), spec_apart, lambda _, step: unstack(gradients(initial(), step)))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), initial(), together)
    assert min(jax.tree.leaves(moved)) > 1e-5
    assert largest_difference(unstack(together), apart) <= 1e-7


@every_optimizer
def test_experts_of_a_layer_are_separate_weights_too(name):
    spec, one = {"experts": SPEC["layers"]["experts"]}, {"experts": bind(LAYER, DIMS)["experts"].unstacked()}
    cfg = config(name, clip_norm=None)  # the norm of all gradients couples them
    scalars = hyper(cfg, steps=STEPS)
    start = initial(spec)
    together, _ = run(cfg, scalars, start, spec)
    for layer, expert in [(0, 1), (1, 0)]:

        def pick(params, at=(layer, expert)):
            return jax.tree.map(lambda x: x[at], params)

        alone, _ = run(cfg, scalars, pick(start), one, lambda _, step, pick=pick: pick(gradients(start, step)))
        assert largest_difference(pick(together), alone) <= 1e-7


@every_optimizer
def test_an_expert_that_no_token_chose_stays(name):
    """Zero gradients are a zero step, also to rules that divide by their size."""

    def of_the_first(params, step):
        return jax.tree.map(lambda g: g * np.float32([1, 0])[:, None, None], gradients(params, step))

    spec = {"experts": SPEC["layers"]["experts"]}
    cfg = config(name, weight_decay=0)
    start = initial(spec)
    end, _ = run(cfg, hyper(cfg, steps=STEPS), start, spec, of_the_first)
    moved_LE = np.abs(np.asarray(end["experts"] - start["experts"])).max(axis=(2, 3))
    assert np.all(moved_LE[:, 0] > 1e-5) and np.all(moved_LE[:, 1] == 0)


@every_optimizer
def test_traced_hyperparameters_equal_constants(name):
    cfg = config(name)
    scalars = hyper(cfg, steps=STEPS)
    optimizer = build(cfg, PART)
    update = update_with(optimizer)
    params = initial(PART)
    arguments = params, optimizer.init(params), gradients(params, 0)
    traced = jax.jit(update)(*arguments, scalars, jnp.int32(1))
    constant = jax.jit(lambda *arguments: update(*arguments, scalars, jnp.int32(1)))(*arguments)
    assert largest_difference(traced, constant) <= 1e-7


@every_optimizer
def test_a_stack_of_runs_equals_each_run_alone(name):
    cfgs = [
        config(name, learning_rate=1e-3, b1=0.8, momentum=0.5, weight_decay=0.0, clip_norm=None),
        config(name, learning_rate=4e-3, b1=0.9, momentum=0.95, weight_decay=0.3, clip_norm=0.5, adam_rate=1.0),
    ]
    scalars = [hyper(cfg, steps=STEPS * (2 + i)) for i, cfg in enumerate(cfgs)]
    starts = [initial(PART, seed) for seed in (1, 2)]
    optimizer = build(cfgs[0], PART)
    update = update_with(optimizer)

    def stack(trees):
        return jax.tree.map(lambda *x: jnp.stack(x), *trees)

    grads = gradients(stack(starts), 0)
    single = jax.jit(update)
    together, _ = jax.jit(jax.vmap(update, in_axes=(0, 0, 0, 0, None)))(
        stack(starts), jax.vmap(optimizer.init)(stack(starts)), grads, stack(scalars), jnp.int32(1)
    )
    alone = [
        single(p, optimizer.init(p), jax.tree.map(lambda g, i=i: g[i], grads), s, jnp.int32(1))[0]
        for i, (p, s) in enumerate(zip(starts, scalars, strict=True))
    ]
    assert largest_difference(together, stack(alone)) <= 1e-6


@every_optimizer
def test_the_state_keeps_its_structure(name):
    optimizer = build(config(name), SPEC)
    before = optimizer.init(initial())
    _, after = run(config(name), hyper(config(name), steps=STEPS), initial(), steps=1)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(lambda x: (x.shape, x.dtype), after)
    assert jax.tree.structure(before) == jax.tree.structure(jax.eval_shape(optimizer.init, weights.abstract(SPEC)))


@every_optimizer
def test_decay_touches_exactly_the_declared_weights(name):
    cfg = config(name, learning_rate=0.1, weight_decay=0.5, schedule=ScheduleConfig(name="constant", warmup=0))
    start = initial()
    end, _ = run(cfg, hyper(cfg, steps=1), start, gradient=zero_gradients, steps=1)

    def expected(weight, x):
        rate = cfg.adam_rate if name == "muon" and not is_hidden_matrix(weight) else 1.0
        return x * (1 - 0.1 * 0.5 * rate) if weights.decays(weight) else x

    assert largest_difference(end, map_weights(expected, SPEC, start)) <= 1e-6
    unmoved = weights.by_path(map_weights(lambda _, a, b: bool(jnp.all(a == b)), SPEC, start, end))
    assert {path for path, same in unmoved.items() if same} == {"layers/norm", "layers/bias"}


@every_optimizer
def test_a_weight_without_gradient_or_decay_stays(name):
    cfg = config(name, weight_decay=0)
    start = initial()
    end, _ = run(cfg, hyper(cfg, steps=STEPS), start, gradient=zero_gradients)
    assert largest_difference(start, end) == 0


@every_optimizer
def test_it_solves_a_regression(name):
    spec = bind({"hidden": Weight("embed -> rank"), "bias": Weight("-> rank", kind="bias", init=weights.zeros)}, DIMS)
    x = jax.random.normal(jax.random.key(1), (256, DIMS["embed"]))
    target = x @ initial(spec, seed=2)["hidden"] + 0.5

    def loss(params):
        return jnp.mean((x @ params["hidden"] + params["bias"] - target) ** 2)

    slope = jax.jit(jax.grad(loss))
    rate = {"sgd": 0.2, "lion": 0.005}.get(name, 0.05)
    cfg = config(name, learning_rate=rate, weight_decay=0)
    end, _ = run(cfg, hyper(cfg, steps=150), initial(spec), spec, lambda params, _: slope(params), steps=150)
    assert loss(end) < 2e-3 * loss(initial(spec))


def muon_by_optax(cfg, mask):
    """optax.contrib.muon, told which weights are matrices and what their sides are."""

    def dimension_numbers(weight):
        if not is_hidden_matrix(weight):
            return None
        first, middle, last = (len(axes) for axes in (weight.batch_axes, weight.in_axes, weight.out_axes))
        sides = np.split(np.arange(first, first + middle + last), [middle])
        return optax.contrib.MuonDimensionNumbers(*(tuple(int(axis) for axis in side) for side in sides))

    return optax.contrib.muon(
        cfg.learning_rate,
        beta=cfg.momentum,
        weight_decay=cfg.weight_decay,
        weight_decay_mask=mask,
        adam_b1=cfg.b1,
        adam_b2=cfg.b2,
        adam_weight_decay=0.0,
        adam_learning_rate=cfg.learning_rate * cfg.adam_rate,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=map_weights(dimension_numbers, SPEC),
    )


REFERENCES = {
    "adafactor": lambda cfg, mask: optax.chain(
        optax.adafactor(None, multiply_by_parameter_scale=False),
        optax.scale(-1),
        optax.add_decayed_weights(cfg.weight_decay, mask),
        optax.scale_by_learning_rate(cfg.learning_rate),
    ),
    "adamw": lambda cfg, mask: optax.adamw(
        cfg.learning_rate, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay, mask=mask
    ),
    "lion": lambda cfg, mask: optax.lion(cfg.learning_rate, cfg.b1, cfg.b2, weight_decay=cfg.weight_decay, mask=mask),
    "sgd": lambda cfg, mask: optax.chain(
        optax.trace(cfg.momentum, nesterov=True),
        optax.add_decayed_weights(cfg.weight_decay, mask),
        optax.scale_by_learning_rate(cfg.learning_rate),
    ),
}


def by_reference(tx, params, steps=STEPS):
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(gradients(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("name", REFERENCES)
def test_it_equals_optax(name):
    """On unstacked matrices, where optax factors what we factor."""
    spec = bind({name: weight for name, weight in LAYER.items() if name in ("norm", "down")} | ENDS, DIMS)
    cfg = config(name, clip_norm=None, schedule=ScheduleConfig(name="constant", warmup=0))
    ours, _ = run(cfg, hyper(cfg, steps=STEPS), initial(spec), spec)
    reference = by_reference(REFERENCES[name](cfg, weights.map_weights(weights.decays, spec)), initial(spec))
    assert largest_difference(ours, reference) <= 2e-7


@pytest.mark.parametrize("momentum", [0.0, 0.95])
def test_muon_equals_a_plain_reference(momentum):
    """Jordan's algorithm in float64 on one projection, its heads taken as one matrix."""
    spec = bind({"query": LAYER["query"]}, DIMS)
    cfg = config("muon", momentum=momentum, clip_norm=None, schedule=ScheduleConfig(name="constant", warmup=0))
    ours, _ = run(cfg, hyper(cfg, steps=STEPS), initial(spec), spec)

    expected = np.asarray(initial(spec)["query"], np.float64)
    buffer = np.zeros_like(expected)
    for step in range(STEPS):
        grad = np.asarray(gradients(initial(spec), step)["query"], np.float64)
        buffer = momentum * buffer + grad
        x = (grad + momentum * buffer).reshape(128, 160)
        x /= np.linalg.norm(x)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        direction = 0.2 * 160**0.5 * x.reshape(expected.shape)
        expected = expected - cfg.learning_rate * (direction + cfg.weight_decay * expected)
    assert np.abs(ours["query"] - expected).max() <= 1e-6


def test_muon_first_step_equals_optax_on_stacked_weights():
    """The first step only: optax corrects the momentum's bias, which later weighs gradient and buffer differently."""
    cfg = config("muon", weight_decay=0, clip_norm=None, schedule=ScheduleConfig(name="constant", warmup=0))
    ours, _ = run(cfg, hyper(cfg, steps=1), initial(), steps=1)
    mask = weights.map_weights(weights.decays, SPEC)
    reference = by_reference(muon_by_optax(cfg, mask), initial(), steps=1)
    matrices = map_weights(lambda weight, x: x if is_hidden_matrix(weight) else jnp.zeros(()), SPEC, ours)
    theirs = map_weights(lambda weight, x: x if is_hidden_matrix(weight) else jnp.zeros(()), SPEC, reference)
    assert largest_difference(matrices, theirs) <= 1e-6


def test_muon_takes_hidden_matrices_and_steps_as_large_as_adamw():
    routed = {path for path, weight in weights.by_path(SPEC).items() if is_hidden_matrix(weight)}
    assert routed == {"layers/query", "layers/out", "layers/experts", "layers/down"}
    cfg = config("muon", learning_rate=1.0, weight_decay=0, schedule=ScheduleConfig(name="constant", warmup=0))
    end, _ = run(cfg, hyper(cfg, steps=1), initial(), steps=1)
    moved = weights.by_path(jax.tree.map(lambda a, b: float(jnp.sqrt(jnp.mean((a - b) ** 2))), initial(), end))
    for path, size in moved.items():
        assert 0.14 < size < 0.24 if path in routed else size == pytest.approx(cfg.adam_rate, rel=1e-3), (path, size)


def test_adafactor_state_is_small():
    spec = {"query": SPEC["layers"]["query"]}
    state = jax.eval_shape(build(config("adafactor"), spec).init, weights.abstract(spec))
    size = sum(x.size for x in jax.tree.leaves(state))
    assert size == LAYERS * (DIMS["embed"] + DIMS["heads"] * DIMS["head_dim"] + 1)


def test_clip():
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    norm = optax.global_norm(grads)
    clipped = clip(grads, norm, {"clip_norm": jnp.float32(1.0)})
    assert float(optax.global_norm(clipped)) == pytest.approx(1.0, rel=1e-6)
    for bound in (5.0, 6.0, jnp.inf):
        assert largest_difference(clip(grads, norm, {"clip_norm": jnp.float32(bound)}), grads) == 0
    zeros = jax.tree.map(jnp.zeros_like, grads)
    for bound in (1.0, jnp.inf):
        assert largest_difference(clip(zeros, jnp.float32(0), {"clip_norm": jnp.float32(bound)}), zeros) == 0
    tiny = 1e-30
    assert jnp.isfinite(clip(zeros, jnp.float32(tiny), {"clip_norm": jnp.float32(1e30)})["a"]).all()


@pytest.mark.parametrize("fields", [{"name": "adam"}, {"b1": 1.0}, {"eps": 0}, {"learning_rate": 0}, {"clip_norm": 0}])
def test_a_wrong_field_is_refused(fields):
    with pytest.raises(ValueError):
        OptimizerConfig(**fields)


@every_optimizer
def test_state_shardings_follow_the_weights(name):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = build(config(name), SPEC)
    state = optimizer.init(initial())
    placed = jax.device_put(state, state_shardings(optimizer, SPEC, mesh))
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    with_weights_shape = state_shardings(optimizer, SPEC, mesh)
    query = shardings(SPEC, mesh)["layers"]["query"]
    shape = SPEC["layers"]["query"].shape
    for sharding, array in zip(jax.tree.leaves(with_weights_shape), jax.tree.leaves(state), strict=True):
        assert sharding.mesh == mesh
        assert array.shape != shape or sharding.spec == query.spec
