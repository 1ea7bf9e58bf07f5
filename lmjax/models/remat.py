"""What a scanned layer leaves for its backward pass; the rest is computed again."""

import functools
from collections.abc import Callable
from typing import Any

import jax

Body = Callable[..., Any]


def none(body: Body) -> Body:
    """Keep everything."""
    return body


# Inside a scan nothing can be merged across the checkpoint anyway, so its guard against that would only cost.
REMAT: dict[str, Callable[[Body], Body]] = {
    "none": none,
    "dots": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable, prevent_cse=False
    ),
    "full": functools.partial(jax.checkpoint, prevent_cse=False),
}
