"""What a scanned layer leaves for its backward pass; the rest is computed again."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from lmjax.devices.mesh import GATHER, current_mesh

Body = Callable[..., Any]


# In a scan's body nothing can be merged across the checkpoint, so its guard against that would only cost. Of a scan
# that is unrolled, or has a single repeat, XLA merges what is computed again with what was computed first.


def none(body: Body) -> Body:
    """Keep everything, but of weights that devices share only the own part: all layers whole would be the model."""
    if current_mesh() is None:
        return body

    # Of what `gather` does, no step is to be kept either. What `constrain` gives has its own name.
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
