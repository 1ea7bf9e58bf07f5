"""Floating-point operations, counted from the declaration: 2 per multiply-add of every matrix product.

Three conventions, always labelled: `6ND` (Kaplan et al. 2020), exact with causal attention (a query counts the keys it
may see), and exact without causality (every query counts every key), which equals what the program executes.
A backward pass costs two forward passes; recomputation (remat) is not counted.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from lmjax.models.config import ModelConfig
from lmjax.models.model import Model
from lmjax.weights import count


class Flops(NamedTuple):
    """Of one training sequence, forward and backward."""

    six_nd: int
    """6 x active parameters x tokens: all parameters but the experts that a token does not pass through."""
    causal: int
    """Matmuls and attention, a query counting only the keys it may see. MFU uses this one."""
    full: int
    """Matmuls and attention, a query counting every key."""


def sequence_flops(model: Model, T: int) -> Flops:
    """Training FLOPs of one sequence of T tokens."""
    counts = count(model.spec)
    matmuls = 2 * counts.matmul * T

    def training(causal: bool) -> int:
        attention = model.attention_flops(T, causal=causal) if model.attention_flops else 0
        return 3 * (matmuls + attention)

    return Flops(six_nd=6 * counts.active * T, causal=training(True), full=training(False))


def attention_flops(cfg: ModelConfig, T: int, *, causal: bool = True) -> int:
    """Forward FLOPs of scores and weighted sums over one sequence: 4 N H per visible (query, key) pair and layer."""
    size = cfg.heads * cfg.dims["head_dim"]
    kinds = [kind for period, repeats in cfg.segments for kind in period * repeats]
    return sum(4 * size * visible_pairs(T, cfg.window_of(kind), causal=causal) for kind in kinds)


def visible_pairs(T: int, window: int | None, *, causal: bool) -> int:
    """How many (query, key) pairs a sequence of T tokens has."""
    if not causal:
        return T * T
    width = min(window or T, T)
    return width * (width + 1) // 2 + (T - width) * width


def program_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """FLOPs of every matrix product in the program that `function` traces to, loops multiplied out.

    What a formula is checked against; arguments may be abstract (`jax.ShapeDtypeStruct`).
    """
    return _jaxpr_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _jaxpr_flops(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            total += _dot_flops(equation)
        if equation.primitive.name == "ragged_dot_general":
            total += _ragged_dot_flops(equation)
        trips = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += trips * sum(_jaxpr_flops(inner) for inner in jax.core.jaxprs_in_params(equation.params))
    return total


def _dot_flops(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _ragged_dot_flops(equation: Any) -> int:
    """Each row meets the matrix of one group: as many as one product of all rows. (CPUs multiply by all groups.)"""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batched) = numbers.dot_dimension_numbers
    left, right = (variable.aval.shape for variable in equation.invars[:2])
    free = set(range(len(right))) - {*contracted, *batched, *numbers.rhs_group_dimensions}
    return 2 * math.prod(left) * math.prod(right[axis] for axis in free)
