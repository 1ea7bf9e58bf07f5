"""The coordinate check: do activations, and what updates change of them, keep their size as a model gets wider?

Yang et al. 2022 (arXiv:2203.03466, appendix D.1). Every site where a weight meets activations is measured. Sites are
found in the traced program, so that the check holds for any architecture. Some updates on one small batch of random
tokens are made; before the first and after each of them we take the root mean square of what a site gives, and of its
difference from what it gave at the start. A number that follows width ** slope has that slope.
"""

import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from lmjax.config import Config
from lmjax.models import architectures
from lmjax.models.config import BaseConfig, ModelConfig, reshaped
from lmjax.models.model import Model
from lmjax.optim import optimizers
from lmjax.optim.config import hyper
from lmjax.registry import without_data
from lmjax.train.objective import scalar_arrays
from lmjax.train.state import TrainState, zero_counters
from lmjax.train.step import make_step
from lmjax.weights import Params, Spec, Weight, by_path, map_weights

MOST = 0.1
"""The slope that counts as none."""
ROWS, TOKENS = 2, 8
"""The shape of the batch. With more tokens than a model is wide, an update moves each of them by chance more than on
purpose, and chance shrinks with width."""
FIXED_AXES, SMALL_START = {"vocab", "routes", "shared_gate"}, 0.01
"""What comes out of heads and routers, and what multiplies their initial values. The change of random logits shrinks
with width, too, and would hide what updates do. Yang et al. start a head at zero (appendix D.2), where its own start
could not be checked."""

# Shapes -----------------------------------------------------------------------------------------------------------


def at_width(cfg: ModelConfig, width: int, *, larger_heads: bool = False) -> ModelConfig:
    """The model with every width in proportion and its base as it was: more heads of the same size, or larger heads.

    Raises ConfigError where a width would not be whole.
    """
    heads = {"heads": cfg.heads, "kv_heads": cfg.dims["kv_heads"]} if larger_heads else {}
    return _at_shape(cfg, BaseConfig(embed=width, **heads), f"width {width}")


def at_depth(cfg: ModelConfig, layers: int) -> ModelConfig:
    """The model with so many layers, and its base as it was."""
    return _at_shape(cfg, BaseConfig(layers=layers), f"{layers} layers")


def _at_shape(cfg: ModelConfig, shape: BaseConfig, where: str) -> ModelConfig:
    model = reshaped(cfg, shape, where)
    if cfg.parametrization == "standard":
        return model
    base = cfg.base_shape
    sizes = {field.name: base.dims.get(field.name, base.layers) for field in dataclasses.fields(BaseConfig)}
    return dataclasses.replace(model, parametrization=cfg.parametrization, base=BaseConfig(**sizes))


# Sites ------------------------------------------------------------------------------------------------------------


class Site(NamedTuple):
    """Where activations are measured."""

    name: str
    """The path of its weight, with the number of its repeat behind that of its segment."""
    kind: str
    """The weight's row in the table of parametrization.py, or its own kind where it has none; `product` of two
    activations; `stream` for the last ones."""
    by_token: bool
    """Whether rows are tokens in their order, so that differences mean something: not those of experts."""


def find_sites(model: Model, params: Params, tokens_BT: jax.Array) -> tuple[list[Site], Callable[[Params], list[Any]]]:
    """The sites of a forward pass, and a function of params (layers unstacked) that gives the activations of each.

    A site is what comes out where something made of a weight alone meets something else; where two activations are
    multiplied; the last activations; the logits.
    """

    def forward(params: Params) -> tuple[jax.Array, jax.Array]:
        x_BTD = model.hidden(params, tokens_BT)[0]
        return x_BTD, model.unembed(params, x_BTD)

    closed = jax.make_jaxpr(forward)(params)
    origin: dict[Any, tuple[str, Weight]] = dict(zip(closed.jaxpr.invars, _declared(model, params), strict=True))
    found: dict[Site, Any] = {}
    for equation in closed.jaxpr.eqns:
        inputs = [x for x in equation.invars if not isinstance(x, core.Literal)]
        weights = [origin[x] for x in inputs if x in origin]
        if not weights:
            if _multiplies(equation) and len(inputs) == 2:
                found[Site(f"product {len(found)}", "product", by_token=True)] = equation.outvars[0]
            continue
        path, weight = weights[0]
        picks_experts = equation.primitive.name == "gather" and weight.kind != "lookup"
        if picks_experts or len(weights) == len(inputs):
            origin |= dict.fromkeys(equation.outvars, weights[0])
        else:
            site = Site(path, weight.scaling.kind or weight.kind, "experts" not in weight.batch_axes)
            found.setdefault(site, equation.outvars[0])
    hidden, logits = closed.jaxpr.outvars
    found |= {Site("hidden", "stream", by_token=True): hidden, Site("logits", "readout", by_token=True): logits}
    measured = closed.jaxpr.replace(outvars=list(found.values()))

    def activations(params: Params) -> list[Any]:
        return jax.core.eval_jaxpr(measured, closed.consts, *jax.tree.leaves(params))

    return list(found), activations


def _multiplies(equation: Any) -> bool:
    return "dot_general" in equation.primitive.name or "einsum" in str(equation.params.get("name", ""))


def _declared(model: Model, params: Params) -> list[tuple[str, Weight]]:
    """The path and the declaration of each leaf of params whose layers are unstacked."""
    spec, found = by_path(model.spec), []
    for keys, _ in jax.tree_util.tree_leaves_with_path(params):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        parts = path.split("/")
        if parts[0] == "segments":  # segments/SEGMENT/REPEAT/SLOT/...: the spec knows no repeats
            declared = "/".join([*parts[:2], *parts[3:]])
        else:
            declared = path if path in spec else "embed"  # a tied head may have its own copy
        found.append((path, spec[declared]))
    return found


# Measuring --------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """What the sites of one model gave, root mean squares over seeds and tokens."""

    sites: list[Site]
    size: np.ndarray
    """[updates + 1, sites]"""
    change: np.ndarray
    """[updates + 1, sites]: of the difference from the start, where it is 0."""


def measure(cfg: Config, *, updates: int = 10, seeds: int = 3) -> Sizes:
    """Train on one batch of random tokens, again and again, at the peak rate.

    `cfg.model.vocab` is known. All seeds see the same tokens.
    """
    schedule = dataclasses.replace(cfg.optimizer.schedule, name="constant", warmup=0)
    cfg = dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, seq_len=TOKENS),
        train=dataclasses.replace(cfg.train, batch=ROWS, microbatches=1, noise_scale=False),
        optimizer=dataclasses.replace(cfg.optimizer, schedule=schedule),
    )
    task, model = without_data(cfg), architectures.build(cfg.model)
    optimizer = optimizers.build(cfg.optimizer, task.spec)
    ids_BU = np.random.default_rng(0).integers(cfg.model.dims["vocab"], size=(ROWS, TOKENS + 1), dtype=np.int32)
    batch = dataclasses.replace(task.batch, tokens_BT=ids_BU[:, :-1], targets_BT=ids_BU[:, 1:])
    shapes = jax.eval_shape(lambda: model.unstack(model.start(jax.random.key(0), model.scalars)))
    sites, activations = find_sites(model, shapes, batch.tokens_BT)
    step = make_step(task.objective, optimizer)
    scalars = hyper(cfg.optimizer, steps=updates) | scalar_arrays(task.objective.scalars)

    def of_seed(seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        params = _with_small_outputs(model.start(jax.random.key(seed), model.scalars), model.spec)
        state = TrainState(params, optimizer.init(params), scalars, zero_counters())

        def update(carry: Any, count: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            state, first = carry
            now = [x.astype(jnp.float32) for x in activations(model.unstack(state.params))]
            first = jax.tree.map(lambda x, y: jnp.where(count == 0, x, y), now, first)
            moved = jax.tree.map(jnp.subtract, now, first)
            return (step(state, {}, batch)[0], first), (_mean_squares(now), _mean_squares(moved))

        first = [jnp.zeros(x.shape) for x in jax.eval_shape(activations, model.unstack(params))]
        return jax.lax.scan(update, (state, first), jnp.arange(updates + 1))[1]

    size, change = jax.jit(lambda: jax.lax.map(of_seed, jnp.arange(seeds)))()
    return Sizes(sites, *(np.sqrt(np.asarray(x, np.float64).mean(axis=0)) for x in (size, change)))


def _with_small_outputs(params: Params, spec: Spec) -> Params:
    """Heads and routers; a tied table starts as it does."""
    return map_weights(
        lambda weight, w: SMALL_START * w if weight.kind == "matmul" and FIXED_AXES & {*weight.out_axes} else w,
        spec,
        params,
    )


def _mean_squares(activations: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.mean(jnp.square(x)) for x in activations])


# Slopes -----------------------------------------------------------------------------------------------------------


class Slopes(NamedTuple):
    """The slopes of one site over widths, or over depths."""

    site: Site
    start: float
    """The slope of what the site gives before the first update; infinite where that is not finite."""
    change: float
    """The slope of what the updates have changed of that in the end."""
    tied: bool = False
    """Whether the head is the table: what a token gives to its own logit is no chance, and does not shrink."""

    @property
    def allowed(self) -> tuple[float, float]:
        """The slopes that `start` may have.

        Logits and all that a parametrization calls an output begin as 1 / sqrt(width), by design: what their inputs
        learn adds up over the width. Scores do where heads get larger.
        """
        low = {"readout": -0.5, "output": -0.5, "product": -0.5}.get(self.site.kind, 0.0)
        high = 0.0 if self.site.kind == "product" or (self.site.kind == "readout" and self.tied) else low
        # A tied table is a readout, which as a lookup gives what an input does.
        return (low, high) if self.site.name != "embed" else (0.0, 0.0)

    @property
    def holds(self) -> bool:
        """Whether the site keeps its size. A size that is always 0, of biases, has no slope."""
        low, high = self.allowed
        starts = np.isnan(self.start) or low - MOST < self.start < high + MOST
        return bool(starts and (abs(self.change) < MOST or not self.site.by_token))


def slopes(sizes: Sequence[int], measured: Sequence[Sizes]) -> list[Slopes]:
    """The slopes of each site that all models share; `sizes` are their widths or their depths."""
    kinds = {site.name: site for site in measured[-1].sites}  # a size that has not grown yet has no kind
    common = [name for name in kinds if all(name in {site.name for site in one.sites} for one in measured)]

    def slope(of: Callable[[Sizes, int], float], name: str) -> float:
        values = np.array([of(one, [site.name for site in one.sites].index(name)) for one in measured])
        if not np.all(np.isfinite(values)):
            return float("inf")
        return float(np.polyfit(np.log(sizes), np.log(values), 1)[0]) if np.all(values > 0) else float("nan")

    tied = "embed" in kinds and kinds["embed"].kind == "readout"
    return [
        Slopes(
            kinds[name],
            start=slope(lambda one, site: one.size[0, site], name),
            change=slope(lambda one, site: one.change[-1, site], name),
            tied=tied,
        )
        for name in common
    ]


# Showing ----------------------------------------------------------------------------------------------------------


def table(found: Sequence[Slopes]) -> str:
    """One line for each site, and what they come to."""
    lines = [f"{'site':44} {'kind':8} {'start':>7} {'change':>7}"]
    for one in found:
        mark = "" if one.holds else "  <--"
        change = _slope(one.change) if one.site.by_token else f"{'':7}"
        lines.append(f"{one.site.name:44} {one.site.kind:8} {_slope(one.start)} {change}{mark}")
    wrong = sum(not one.holds for one in found)
    verdict = f"{wrong} of {len(found)} sites do not keep their size" if wrong else "every site keeps its size"
    return "\n".join([*lines, f"slopes over width; {verdict} (within {MOST})"])


def _slope(value: float) -> str:
    """A size that is always 0, of biases, has none."""
    return f"{'-':>7}" if np.isnan(value) else f"{value:+7.2f}"


def figure(sizes: Sequence[int], measured: Sequence[Sizes], title: str) -> bytes:
    """PNG: what each site gives at the start, and what each update has changed of it, over width."""
    from matplotlib.figure import Figure

    found = slopes(sizes, measured)
    page = Figure(figsize=(9, 4.2), dpi=150, layout="constrained")
    left, right = page.subplots(1, 2)
    colours = {kind: f"C{i}" for i, kind in enumerate(dict.fromkeys(one.site.kind for one in found))}
    for one in found:
        at = [[site.name for site in sized.sites].index(one.site.name) for sized in measured]
        colour, label = colours[one.site.kind], one.site.kind
        start = [sized.size[0, i] for sized, i in zip(measured, at, strict=True)]
        left.plot(sizes, start, "o-", color=colour, label=label, markersize=3, linewidth=1, alpha=0.7)
        if one.site.by_token:
            change = [sized.change[-1, i] for sized, i in zip(measured, at, strict=True)]
            right.plot(sizes, change, "o-", color=colour, label=label, markersize=3, linewidth=1, alpha=0.7)
    updates = len(measured[0].change) - 1
    for axes, what in ((left, "at the start"), (right, f"changed by {updates} updates")):
        axes.set(xscale="log", yscale="log", xlabel="width", title=what, xticks=sizes, xticklabels=map(str, sizes))
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("root mean square")
    handles = dict(zip(left.get_legend_handles_labels()[1], left.get_legend_handles_labels()[0], strict=True))
    left.legend(handles.values(), handles.keys(), frameon=False)
    page.suptitle(title)
    png = io.BytesIO()
    page.savefig(png, format="png")
    return png.getvalue()
