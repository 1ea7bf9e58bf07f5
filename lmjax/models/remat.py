"""What a scanned layer keeps for its backward pass; the rest is computed again (rematerialization)."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from lmjax.devices.mesh import GATHER, current_mesh

Body = Callable[..., Any]


# `prevent_cse=False`: common subexpressions of the forward and the backward pass of a scan's body cannot be merged, so
# a guard against that would only cost time. When a scan is unrolled, or has a single repeat, XLA does merge them.


def none(body: Body) -> Body:
    """Keep everything but all-gathered weights, which are gathered again: of all layers they would be the model."""
    if current_mesh() is None:
        return body

    # The steps inside `gather` are not kept either. The results of `constrain` are kept by their own name.
    moves = {"reshard", "all_gather", "all_gather_reduced", "reshape", "transpose"}

    def keep(primitive: Any, *_: Any, **params: Any) -> bool:
        return primitive.name not in moves and params.get("name") != GATHER

    return jax.checkpoint(body, policy=keep, prevent_cse=False)


REMAT: dict[str, Callable[[Body], Body]] = {
    "none": none,
    "dots": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable, prevent_cse=False
    ),
    "full": functools.partial(jax.checkpoint, prevent_cse=False),
}
