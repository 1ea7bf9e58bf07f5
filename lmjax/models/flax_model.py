"""A Flax module as a model: its logits serve as `hidden`, the identity as `unembed`. It only loses chunking.

What each array of the module is, a declaration after the fact says, from its name, its shape, and that of the bias
beside it:

    bias, *_bias                           bias, of any rank
    scale, and vectors of other names      scale
    embedding, in a name without a kernel  lookup; tied if it has as many rows as there are logits, and no head is found
    all others                             matmul: with a bias of n axes beside it, the last n are those out; without
                                           one, all but the first of a query, key or value, else the last

The head, which Muon leaves to Adam, is a matmul whose axes out are the logits: of several, those whose names speak of
a head, of logits, or of unembedding; all of them if none does. Where this is wrong, say it:

    from_linen(module, tokens_BT, key, declared={"decoder/mixer": "mixers | embed -> mixed"})

An axis of the head, or of a table of tokens, is named `vocab`; `declared` may also give a Weight, for another kind.
"""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from lmjax.models.model import Model
from lmjax.models.read import as_array
from lmjax.weights import Params, Spec, Weight, by_path, map_weights

Apply = Callable[[Params, jax.Array], Any]
Declared = Mapping[str, str | Weight]
"""Path, as in `a/b/kernel`, to a weight or its axes."""


def from_linen(
    module: linen.Module, tokens_BT: jax.Array, key: jax.Array, declared: Declared | None = None
) -> tuple[Model, Params]:
    """A linen module that maps tokens_BT to logits_BTV, and its initial params. Raises ValueError as `declare` does."""
    params = linen.meta.unbox(module.init(key, tokens_BT)["params"])

    def apply(params: Params, tokens_BT: jax.Array) -> Any:
        return module.apply({"params": params}, tokens_BT)

    return _model(params, apply, tokens_BT, declared), params


def from_nnx(module: nnx.Module, declared: Declared | None = None) -> tuple[Model, Params]:
    """An nnx module that maps tokens_BT to logits_BTV, and its present params. Raises ValueError as `declare` does."""
    graph, state, rest = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
    params = _string_keys(nnx.to_pure_dict(state))

    def apply(params: Params, tokens_BT: jax.Array) -> jax.Array:
        filled = nnx.clone(state)
        nnx.replace_by_pure_dict(filled, nnx.restore_int_paths(params))
        return nnx.merge(graph, filled, rest)(tokens_BT)

    return _model(params, apply, jnp.zeros((1, 1), jnp.int32), declared), params


def _model(params: Params, apply: Apply, tokens_BT: jax.Array, declared: Declared | None) -> Model:
    def hidden(params: Params, tokens_BT: jax.Array, **inputs: Any) -> tuple[jax.Array, None, dict[str, Any]]:
        given = sorted(
            name for name, value in inputs.items() if value is not None and name not in ("keys_B", "scalars")
        )
        if given:
            raise ValueError(f"a Flax module takes tokens alone, not {', '.join(given)}; use data.documents=joined")
        return apply(map_weights(as_array, spec, params), tokens_BT), None, {}

    def unembed(params: Params, x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32)

    spec = declare(params, jax.eval_shape(apply, params, tokens_BT).shape[-1], declared)
    return Model(spec, hidden, unembed, start=lambda key, scalars: params)


def _string_keys(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {str(name): _string_keys(child) for name, child in tree.items()}


# Kinds ------------------------------------------------------------------------------------------------------------


def declare(params: Params, vocab: int, declared: Declared | None = None) -> Spec:
    """The spec of a module's params, as the head of this file says.

    Raises ValueError when `declared` names no param, or more or fewer axes than it has.
    """
    arrays = by_path(params)
    unknown = sorted({*(declared or {})} - {*arrays})
    if unknown:
        raise ValueError(f"declared names {unknown[0]}, which is no param; there are {', '.join(arrays)}")
    spec = {path: _weight(path, x.shape, arrays) for path, x in arrays.items()}
    heads = [path for path, weight in spec.items() if weight.kind == "matmul" and _outputs(weight) == (vocab,)]
    named = [path for path in heads if re.search(r"head|logit|unembed", path.lower())]
    for path in named or heads:
        spec[path] = replace(spec[path], axes=spec[path].axes.replace(spec[path].out_axes[-1], "vocab"))
    for path, weight in spec.items():
        if weight.kind == "lookup" and weight.shape[0] == vocab and len(weight.shape) == 2:
            spec[path] = replace(weight, axes=weight.axes.replace("axis0", "vocab"), tied=not heads)
    for path, given in (declared or {}).items():
        weight = Weight(given) if isinstance(given, str) else given
        if len(weight.names) != arrays[path].ndim:
            raise ValueError(f"declared['{path}'] has the axes '{weight.axes}', the param {arrays[path].shape}")
        spec[path] = replace(weight, sizes=arrays[path].shape)
    of_path = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return jax.tree_util.tree_map_with_path(lambda path, _: spec[of_path(path)], params)


def _weight(path: str, shape: tuple[int, ...], arrays: Mapping[str, jax.Array]) -> Weight:
    *module, name = path.lower().split("/")
    axes = [f"axis{i}" for i in range(len(shape))]

    def between(inputs: int, kind: Any = "matmul") -> Weight:
        return Weight(f"{' '.join(axes[:inputs])} -> {' '.join(axes[inputs:])}", kind=kind, sizes=shape)

    if name.endswith("bias"):
        return between(0, "bias")
    if name.endswith("scale") or len(shape) < 2:
        return between(0, "scale")
    if "embed" in name or (name != "kernel" and any("embed" in part for part in module)):
        return between(len(shape) - 1, "lookup")
    bias = arrays.get(path[: len(path) - len(name)] + "bias")
    if bias is not None and bias.ndim < len(shape) and shape[-bias.ndim :] == bias.shape:
        return between(len(shape) - bias.ndim)
    return between(1 if module and module[-1] in ("query", "key", "value") else len(shape) - 1)


def _outputs(weight: Weight) -> tuple[int, ...]:
    return weight.shape[len(weight.shape) - len(weight.out_axes) :]
