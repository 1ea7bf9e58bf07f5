"""A Flax module as a model: its logits serve as `hidden`, the identity as `unembed`. It only loses chunking."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from lmjax.models.model import Model
from lmjax.weights import Params, Spec, Weight, by_path

Apply = Callable[[Params, jax.Array], Any]


def from_linen(module: linen.Module, tokens_BT: jax.Array, key: jax.Array) -> tuple[Model, Params]:
    """A linen module that maps tokens_BT to logits_BTV, and its initial params."""
    params = linen.meta.unbox(module.init(key, tokens_BT)["params"])

    def apply(params: Params, tokens_BT: jax.Array) -> Any:
        return module.apply({"params": params}, tokens_BT)

    return _model(params, apply), params


def from_nnx(module: nnx.Module) -> tuple[Model, Params]:
    """An nnx module that maps tokens_BT to logits_BTV, and its present params."""
    graph, state, rest = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
    params = _string_keys(nnx.to_pure_dict(state))

    def apply(params: Params, tokens_BT: jax.Array) -> jax.Array:
        filled = nnx.clone(state)
        nnx.replace_by_pure_dict(filled, nnx.restore_int_paths(params))
        return nnx.merge(graph, filled, rest)(tokens_BT)

    return _model(params, apply), params


def _model(params: Params, apply: Apply) -> Model:
    def hidden(params: Params, tokens_BT: jax.Array, **inputs: Any) -> tuple[jax.Array, None, dict[str, Any]]:
        given = sorted(name for name, value in inputs.items() if value is not None and name != "keys_B")
        if given:
            raise ValueError(f"a Flax module takes tokens alone, not {', '.join(given)}; use data.documents=joined")
        return apply(params, tokens_BT), None, {}

    def unembed(params: Params, logits: jax.Array) -> jax.Array:
        return logits.astype(jnp.float32)

    return Model(_spec(params), hidden, unembed)


def _string_keys(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {str(name): _string_keys(child) for name, child in tree.items()}


def _spec(params: Params) -> Spec:
    """A declaration after the fact: names say what is a table, ranks say what is a matrix."""

    def weight(path: Any, x: jax.Array) -> Weight:
        name = jax.tree_util.keystr(path, simple=True, separator="/").lower()
        axes = [f"axis{i}" for i in range(x.ndim)]
        if "embed" in name and x.ndim == 2:
            return Weight("vocab -> axis1", kind="lookup", sizes=x.shape)
        if x.ndim < 2:
            return Weight(f"-> {' '.join(axes)}", kind="scale" if name.endswith("scale") else "bias", sizes=x.shape)
        return Weight(f"{' '.join(axes[:-1])} -> {axes[-1]}", sizes=x.shape)

    spec = jax.tree_util.tree_map_with_path(weight, params)
    assert len(by_path(spec)) == len(jax.tree.leaves(params))
    return spec
