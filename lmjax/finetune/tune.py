"""From a task to one that trains a part of its weights, or small ones beside them: what `tune` in a config says.

    train, freeze    which weights are trained themselves (select.py)
    store            how the others are held (storage.py)
    adapter          what is trained beside them (adapters.py)

Any task will do: its own functions are called with all weights, as they are without `tune`. The params of the new task
are the weights that are trained, at their own paths, and under `adapter/` what stands beside weights, at theirs.
"""

import dataclasses
import logging
from collections.abc import Mapping
from functools import reduce
from operator import getitem
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmjax.devices.mesh import LAYOUTS
from lmjax.errors import ConfigError
from lmjax.finetune.adapters import ADAPTERS
from lmjax.finetune.select import matching
from lmjax.finetune.storage import stored
from lmjax.tasks.start import Start, drawn
from lmjax.tasks.task import Evaluate, Frozen, Task
from lmjax.train.accounting import Cost
from lmjax.train.config import AdapterConfig, TuneConfig
from lmjax.train.objective import Keys
from lmjax.weights import Params, Spec, Weight, by_path, count, initialize, merge, nested, path_hash

logger = logging.getLogger(__name__)

ADAPTER = "adapter"
BASE, OWN = "base", "own"
"""The frozen weights of the new task: those that it has made frozen, and those that the task had frozen itself."""


class Parts(NamedTuple):
    """A task's weights by what becomes of them."""

    spec: Spec
    """All of them."""
    trained: list[str]
    frozen: list[str]
    targets: list[str]
    """Those with an adapter beside them."""
    cfg: TuneConfig

    @property
    def frozen_spec(self) -> Spec:
        return self._of(self.frozen)

    @property
    def params_spec(self) -> Spec:
        """What is trained."""
        return {**self._of(self.trained), **({ADAPTER: self.adapter_spec} if self.targets else {})}

    @property
    def adapter_spec(self) -> Spec:
        assert self.cfg.adapter is not None
        make, weights = ADAPTERS[self.cfg.adapter.name].weights, by_path(self.spec)
        spec: Spec = nested({path: make(weights[path], self.cfg.adapter) for path in self.targets})
        return spec

    def whole(self, frozen: Params, params: Params, keys_B: Keys = None) -> Params:
        """All weights, as the task's own functions take them; `keys_B` mean training, and so dropout."""
        beside = params.get(ADAPTER, {})
        held = by_path(merge(frozen, {name: w for name, w in params.items() if name != ADAPTER}))
        weights, cfg = by_path(self.spec), self.cfg.adapter
        for path in self.targets:
            assert cfg is not None
            keys = copy_keys(keys_B, path, weights[path]) if keys_B is not None and cfg.dropout else None
            own = reduce(getitem, path.split("/"), beside)
            held[path] = ADAPTERS[cfg.name].attached(weights[path], cfg, held[path], own, keys)
        everything: Params = nested(held)
        return everything

    def _of(self, paths: list[str]) -> Spec:
        weights = by_path(self.spec)
        spec: Spec = nested({path: weights[path] for path in paths})
        return spec


def copy_keys(keys_B: jax.Array, path: str, weight: Weight) -> jax.Array:
    """Keys for each layer of a stack of weights, [L, B], named by the path and the layer's place in the stack."""
    (L,) = weight.shape[: len(weight.batch_axes)]

    def of_layer(layer: jax.Array) -> jax.Array:
        return jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, path_hash(path)), layer))(keys_B)

    return jax.vmap(of_layer)(jnp.arange(L))


# The choice -------------------------------------------------------------------------------------------------------


def parts(task: Task) -> Parts:
    """What becomes of a task's weights.

    Raises ConfigError for patterns that match nothing, for weights that are asked to be two things at once, and where
    nothing is left to train.
    """
    cfg, spec = task.cfg.tune, task.spec
    targets = adapter_targets(task) if cfg.adapter is not None else []
    every = [] if targets else list(by_path(spec))
    if cfg.freeze and targets and cfg.train is None:
        raise ConfigError(
            "tune.freeze means nothing beside tune.adapter, with which no weight is trained itself; leave it out, or "
            "name in tune.train what is trained, too"
        )
    trained = every if cfg.train is None else matching(spec, cfg.train, "tune.train")
    frozen = set(matching(spec, cfg.freeze, "tune.freeze"))
    trained = [path for path in trained if path not in frozen]
    if both := sorted({*trained} & {*targets}):
        raise ConfigError(
            f"tune: {both[0]} would be trained, and have an adapter beside it; take it out of one of both"
        )
    if not trained and not targets:
        raise ConfigError("tune leaves nothing to train; let tune.freeze match less, or set tune.adapter")
    kept = [path for path in by_path(spec) if path not in {*trained}]
    if cfg.store != "float32" and not kept:
        raise ConfigError(f"tune.store={cfg.store} is how frozen weights are held, and none is frozen; leave it out")
    return Parts(spec, trained, kept, targets, cfg)


def adapter_targets(task: Task) -> list[str]:
    """The weights that get an adapter.

    Raises ConfigError for patterns without one, settings that this kind does not read, and dropout where there is none.
    """
    cfg = task.cfg.tune.adapter
    assert cfg is not None
    kind = ADAPTERS[cfg.name]
    for setting, default in dataclasses.asdict(AdapterConfig()).items():
        if setting not in ("name", "targets", *kind.settings) and getattr(cfg, setting) != default:
            raise ConfigError(f"tune.adapter.{setting} means nothing to tune.adapter.name={cfg.name}; leave it out")
    fitting = {path: weight for path, weight in by_path(task.spec).items() if kind.fits(weight)}
    targets = matching(nested(fitting), cfg.targets, "tune.adapter.targets")
    if cfg.dropout and (outside := [path for path in targets if len(fitting[path].batch_axes) != 1]):
        raise ConfigError(
            f"tune.adapter.dropout acts on what matrices of layers read, not on '{outside[0]}'; set it to 0, or leave "
            "that out of tune.adapter.targets"
        )
    mesh = task.cfg.mesh
    if cfg.dropout and ("pipeline" in LAYOUTS[mesh.layout] or (mesh.pipeline or 1) > 1):
        raise ConfigError("tune.adapter.dropout: the stages of a pipeline do not know it; set it to 0")
    return targets


# The task ---------------------------------------------------------------------------------------------------------


def tuned(task: Task) -> Task:
    """The task training what `tune` in its config leaves of its weights. Raises what `parts` does."""
    if task.cfg.tune == TuneConfig():
        return task
    chosen = parts(task)
    if task.cfg.train.init_from is None and chosen.frozen:
        logger.warning("tune: what is frozen stays as it is drawn; set train.init_from to stand on trained weights")
    objective, language = task.objective, task.language

    def loss(params: Params, frozen: Params, batch: Any, keys_B: Keys, hyper: Any) -> Any:
        return objective.loss(chosen.whole(frozen[BASE], params, keys_B), frozen[OWN], batch, keys_B, hyper)

    def whole(params: Params, frozen: Params) -> tuple[Params, Params]:
        return chosen.whole(frozen[BASE], params), frozen[OWN]

    def evaluated(evaluate: Evaluate) -> Evaluate:
        return lambda params, frozen, **named: evaluate(*whole(params, frozen), **named)

    sample = task.sample
    return task._replace(
        spec=chosen.params_spec,
        start=start(task, chosen),
        frozen=frozen_part(task, chosen),
        objective=objective._replace(loss=loss),
        evaluations={name: evaluated(evaluate) for name, evaluate in task.evaluations.items()},
        sample=None if sample is None else lambda params, frozen: sample(*whole(params, frozen)),
        language=language
        and language._replace(
            weights=lambda frozen, params: language.weights(*reversed(whole(params, frozen))), needs_frozen=True
        ),
        cost=cost(task, chosen),
    )


def start(task: Task, chosen: Parts) -> Start:
    """Trained weights start as the task's do, adapters as they are declared."""

    def make(key: jax.Array, scalars: Mapping[str, Any], shardings: Any) -> Params:
        own = {name: one for name, one in shardings.items() if name != ADAPTER}
        params = task.start(key, scalars, own) if own else {}
        if chosen.targets:
            beside = {ADAPTER: chosen.adapter_spec}
            params |= drawn(lambda key, _: initialize(beside, key))(key, scalars, {ADAPTER: shardings[ADAPTER]})
        return params

    return Start(make, task.start.check, task.start.digest)


def frozen_part(task: Task, chosen: Parts) -> Frozen:
    """What is frozen now, and what the task had frozen itself."""
    before = task.frozen or Frozen({}, Start(lambda key, scalars, shardings: {}))

    def make(key: jax.Array, scalars: Mapping[str, Any], shardings: Any) -> Params:
        return {
            BASE: task.start(key, scalars, shardings[BASE]) if chosen.frozen else {},
            OWN: before.start(key, scalars, shardings[OWN]),
        }

    def hold(weights: Params) -> Params:
        held = stored(chosen.frozen_spec, weights[BASE], chosen.cfg.store)
        return {BASE: held, OWN: before.hold(weights[OWN])}

    return Frozen({BASE: chosen.frozen_spec, OWN: before.spec}, Start(make, task.start.check, task.start.digest), hold)


def cost(task: Task, chosen: Parts) -> Cost:
    """What a sample costs: a frozen weight needs no gradient of its own, a third of what it costs in training, and
    adapters cost what any weight does. All tokens are taken to pass through both."""
    one, frozen = task.cost, count(chosen.frozen_spec)
    beside = count(chosen.params_spec.get(ADAPTER, {}))
    exact = one.tokens * (6 * beside.matmul - 2 * frozen.matmul)
    by_six_nd = one.tokens * (6 * beside.active - 2 * frozen.active)
    return one._replace(
        flops_6nd=one.flops_6nd + by_six_nd,
        flops_causal=one.flops_causal + exact,
        flops_full=one.flops_full + exact,
    )
