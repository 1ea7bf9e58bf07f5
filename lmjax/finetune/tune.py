"""From a task to one that trains a part of its weights, or small ones beside them: what `tune` in a config says.

    train, freeze    which weights are trained themselves (select.py)
    last_layers      of which layers (last_layers.py)
    fresh            which do not start from trained ones (fresh.py)
    store            how the others are held (storage.py)
    adapter          what is trained beside them (adapters.py)

Any task will do: its own functions are called with all weights, as they are without `tune`. The params of the new task
are the weights that are trained, at their own paths, and under `adapter/` what stands beside weights, at theirs.
"""

import dataclasses
import functools
import logging
from collections.abc import Mapping
from operator import getitem
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from lmjax.devices import mesh as meshes
from lmjax.devices.mesh import LAYOUTS
from lmjax.errors import ConfigError
from lmjax.finetune.adapters import ADAPTERS
from lmjax.finetune.fresh import with_fresh
from lmjax.finetune.last_layers import Halves, cuts, joined, one_after_the_other, sized, trained_repeats
from lmjax.finetune.select import matching
from lmjax.finetune.storage import stored
from lmjax.tasks.start import Start, drawn
from lmjax.tasks.task import Evaluate, Frozen, Task
from lmjax.train.accounting import Cost
from lmjax.train.config import AdapterConfig, TuneConfig
from lmjax.train.objective import Keys
from lmjax.weights import Params, Spec, Weight, by_path, count, initialize, map_weights, nested, part, path_hash

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
    cut: Mapping[str, int] = MappingProxyType({})
    """The weights that are both: so many of their last layers are trained, the others frozen."""

    @property
    def frozen_spec(self) -> Spec:
        return self._of(self.frozen, {path: self._layers(path) - count for path, count in self.cut.items()})

    @property
    def params_spec(self) -> Spec:
        """What is trained."""
        return {**self._of(self.trained, self.cut), **({ADAPTER: self.adapter_spec} if self.targets else {})}

    @property
    def targets_spec(self) -> Spec:
        """What has an adapter beside it."""
        return self._of(self.targets, {})

    @property
    def adapter_spec(self) -> Spec:
        assert self.cfg.adapter is not None
        make, weights = ADAPTERS[self.cfg.adapter.name].weights, by_path(self.spec)
        spec: Spec = nested({path: make(weights[path], self.cfg.adapter) for path in self.targets})
        return spec

    def whole(self, frozen: Params, params: Params, keys_B: Keys = None, *, cut: bool = False) -> Params:
        """All weights, as the task's own functions take them; `keys_B` mean training, and so dropout. Stacks that are
        cut are joined, but where they are to stay `cut`."""
        beside = params.get(ADAPTER, {})
        own = by_path({name: w for name, w in params.items() if name != ADAPTER})
        held = by_path(frozen)
        held |= {path: Halves(held[path], w) if path in self.cut else w for path, w in own.items()}
        weights, cfg = by_path(self.spec), self.cfg.adapter
        for path in self.targets:
            assert cfg is not None
            keys = copy_keys(keys_B, path, weights[path]) if keys_B is not None and cfg.dropout else None
            small = functools.reduce(getitem, path.split("/"), beside)
            held[path] = ADAPTERS[cfg.name].attached(weights[path], cfg, held[path], small, keys)
        return one_after_the_other(held) if cut and self.cut else joined(self.spec, held)

    def layers_of(self, weights: Params, *, last: bool) -> Params:
        """Whole weights with the last, or the first, layers of those that are cut."""

        def half(path: str, w: jax.Array) -> jax.Array:
            first = self._layers(path) - self.cut.get(path, 0)
            return w if path not in self.cut else w[first:] if last else w[:first]

        halves: Params = nested({path: half(path, w) for path, w in by_path(weights).items()})
        return halves

    def _layers(self, path: str) -> int:
        layers: int = by_path(self.spec)[path].shape[0]
        return layers

    def _of(self, paths: list[str], cut: Mapping[str, int]) -> Spec:
        weights = by_path(self.spec)
        spec: Spec = nested({path: sized(weights[path], cut[path]) if path in cut else weights[path] for path in paths})
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
    every = [] if targets else list(by_path(spec)) if cfg.last_layers is None else matching(spec, ("segments/*",), "")
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
    cut = {} if cfg.last_layers is None else cut_stacks(task, trained)
    trained = [path for path in trained if cut.get(path) != 0]
    kept = [path for path in by_path(spec) if path in cut or path not in {*trained}]
    if cfg.store != "float32" and not kept:
        raise ConfigError(f"tune.store={cfg.store} is how frozen weights are held, and none is frozen; leave it out")
    return Parts(spec, trained, kept, targets, cfg, {path: count for path, count in cut.items() if count})


def cut_stacks(task: Task, trained: list[str]) -> dict[str, int]:
    """How many of its last layers are trained, for each trained weight of which not all are.

    Raises ConfigError beside adapters, where stages of a pipeline hold the layers, and as `trained_repeats` does.
    """
    cfg, mesh = task.cfg, task.cfg.mesh
    assert cfg.tune.last_layers is not None
    if cfg.tune.adapter is not None:
        raise ConfigError("tune.last_layers is of weights that are trained themselves, not of tune.adapter; use one")
    if "pipeline" in LAYOUTS[mesh.layout] or (mesh.pipeline or 1) > 1:
        raise ConfigError("tune.last_layers: the stages of a pipeline hold whole stacks; use another mesh.layout")
    return cuts(task.spec, trained, trained_repeats(cfg.model, cfg.tune.last_layers))


def adapter_targets(task: Task) -> list[str]:
    """The weights that get an adapter.

    Raises ConfigError for patterns without one, settings that this kind does not read, and dropout where there is none.
    """
    cfg = task.cfg.tune.adapter
    assert cfg is not None
    kind = ADAPTERS[cfg.name]
    read = ("name", *kind.settings) if kind.place else ("name", "targets", *kind.settings)
    for setting, default in dataclasses.asdict(AdapterConfig()).items():
        if setting not in read and getattr(cfg, setting) != default:
            raise ConfigError(f"tune.adapter.{setting} means nothing to tune.adapter.name={cfg.name}; leave it out")
    fitting = {path: weight for path, weight in by_path(task.spec).items() if kind.fits(weight)}
    targets = matching(nested(fitting), kind.place or cfg.targets, "tune.adapter.targets")
    kind.check(targets)
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
    task, chosen = with_fresh(task) if task.cfg.tune.fresh else task, parts(task)
    if not chosen.frozen and not chosen.targets:
        return task
    if task.cfg.train.init_from is None and chosen.frozen:
        logger.warning("tune: what is frozen stays as it is drawn; set train.init_from to stand on trained weights")
    objective, language = task.objective, task.language

    def loss(params: Params, frozen: Params, batch: Any, keys_B: Keys, hyper: Any) -> Any:
        return objective.loss(chosen.whole(frozen[BASE], params, keys_B, cut=True), frozen[OWN], batch, keys_B, hyper)

    def whole(params: Params, frozen: Params) -> tuple[Params, Params]:
        return chosen.whole(frozen[BASE], params), frozen[OWN]

    def evaluated(evaluate: Evaluate) -> Evaluate:
        return lambda params, frozen, **named: evaluate(*whole(params, frozen), **named)

    sample = task.sample
    return task._replace(
        spec=chosen.params_spec,
        start=start(task, chosen),
        frozen=frozen_part(task, chosen, task.frozen),
        objective=objective._replace(loss=loss),
        evaluations={name: evaluated(evaluate) for name, evaluate in task.evaluations.items()},
        sample=None if sample is None else lambda params, frozen: sample(*whole(params, frozen)),
        language=language
        and language._replace(
            weights=lambda frozen, params: language.weights(*reversed(whole(params, frozen))),
            frozen=frozen_part(task, chosen, language.frozen),
        ),
        cost=cost(task, chosen),
    )


def start(task: Task, chosen: Parts) -> Start:
    """Trained weights start as the task's do, adapters as they are declared, or from what they stand beside."""

    def make(key: jax.Array, scalars: Mapping[str, Any], shardings: Any) -> Params:
        own = {name: one for name, one in shardings.items() if name != ADAPTER}
        params = chosen.layers_of(task.start(key, scalars, own), last=True) if own else {}
        if chosen.targets:
            beside = {ADAPTER: chosen.adapter_spec}
            params |= drawn(lambda key, _: initialize(beside, key))(key, scalars, {ADAPTER: shardings[ADAPTER]})
            params[ADAPTER] = from_base(key, scalars, params[ADAPTER], shardings[ADAPTER])
        return params

    def from_base(key: jax.Array, scalars: Mapping[str, Any], beside: Params, shardings: Any) -> Params:
        """The adapters, with what starts from the weights beside them, as these are held, in its place."""
        assert chosen.cfg.adapter is not None
        values, spec = ADAPTERS[chosen.cfg.adapter.name].start, chosen.targets_spec
        if values is None:
            return beside

        def of_all(base: Params) -> Params:
            found: Params = map_weights(values, spec, stored(spec, base, chosen.cfg.store))
            return found

        base = task.start(key, scalars, on_devices_of(shardings, spec))
        laid_out = part(shardings, jax.eval_shape(of_all, base))
        whole: Params = nested(by_path(beside) | by_path(jax.jit(of_all, out_shardings=laid_out)(base)))
        return whole

    return Start(make, task.start.check, task.start.digest)


def on_devices_of(shardings: Any, spec: Spec) -> Any:
    """A tree of shardings for weights where others are that have these."""
    one = jax.tree.leaves(shardings)[0]
    if not isinstance(one, NamedSharding):
        return map_weights(lambda _: one, spec)
    assert isinstance(one.mesh, Mesh)
    return meshes.shardings(spec, one.mesh)


def frozen_part(task: Task, chosen: Parts, own: Frozen | None) -> Frozen:
    """What is frozen now, and what had been frozen before."""
    before = own or Frozen({}, Start(lambda key, scalars, shardings: {}))

    def make(key: jax.Array, scalars: Mapping[str, Any], shardings: Any) -> Params:
        return {
            BASE: chosen.layers_of(task.start(key, scalars, shardings[BASE]), last=False) if chosen.frozen else {},
            OWN: before.start(key, scalars, shardings[OWN]),
        }

    def hold(weights: Params) -> Params:
        held = stored(chosen.frozen_spec, weights[BASE], chosen.cfg.store)
        return {BASE: held, OWN: before.hold(weights[OWN])}

    def digest() -> str | None:
        return "+".join(filter(None, (task.start.digest(), before.start.digest()))) or None

    def check() -> None:
        task.start.check()
        before.start.check()

    return Frozen({BASE: chosen.frozen_spec, OWN: before.spec}, Start(make, check, digest), hold)


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
