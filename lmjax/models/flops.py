"""Floating-point operations, counted from the declaration: 2 per multiply-add of every matrix product.

Three conventions, always labelled: `6ND` (Kaplan et al. 2020), exact with causal attention (a query counts the keys it
may see), and exact without causality (every query counts every key), which equals what the program executes.
A backward pass costs two forward passes; recomputation (remat) is not counted.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.extend

from lmjax.models.model import Model
from lmjax.weights import count


class Flops(NamedTuple):
    """The FLOPs of one training sequence, forward and backward."""

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
        mixing = model.mixing_flops(T, causal=causal) if model.mixing_flops else 0
        return 3 * (matmuls + mixing)

    return Flops(six_nd=6 * counts.active * T, causal=training(True), full=training(False))


def visible_pairs(T: int, window: int | None, *, causal: bool) -> int:
    """How many (query, key) pairs a sequence of T tokens has."""
    if not causal:
        return T * T
    width = min(window or T, T)
    return width * (width + 1) // 2 + (T - width) * width


class Product(NamedTuple):
    """One matrix product of a traced program."""

    equation: Any
    times: int
    """How often it runs, loops multiplied out."""
    in_kernel: bool
    """Inside a Pallas kernel: its operands are tiles that never leave the chip."""


def matrix_products(jaxpr: Any, times: int = 1, in_kernel: bool = False) -> Iterator[Product]:
    """Every matrix product that a program runs.

    Of the branches of a switch that with most FLOPs counts: which one runs, only the run knows. A kernel's grid counts
    whole, tiles that it skips included, and a loop whose rounds the data decides as one round.
    """
    for equation in jaxpr.eqns:
        if equation.primitive.name in _PRODUCT_FLOPS:
            yield Product(equation, times, in_kernel)
        trips, kernel = 1, equation.primitive.name == "pallas_call"
        if equation.primitive.name == "scan":
            trips = equation.params["length"]
        elif kernel:
            trips = math.prod(equation.params["grid_mapping"].grid)
        inner = [
            list(matrix_products(program, times * trips, in_kernel or kernel))
            for program in jax.extend.core.jaxprs_in_params(equation.params)
        ]
        if equation.primitive.name == "cond":
            inner = [max(inner, key=lambda products: sum(map(product_flops, products)))]
        yield from itertools.chain.from_iterable(inner)


def product_flops(product: Product, shape_of: Callable[[Any], tuple[int, ...]] = lambda aval: aval.shape) -> int:
    """FLOPs of all runs of a product; with `shape_of` the shape of one device's part, those of that device."""
    equation = product.equation
    left, right, out = (shape_of(variable.aval) for variable in (*equation.invars[:2], equation.outvars[0]))
    return product.times * _PRODUCT_FLOPS[equation.primitive.name](equation.params, left, right, out)


Shape = tuple[int, ...]


def _dot_flops(params: dict[str, Any], left: Shape, right: Shape, out: Shape) -> int:
    (contracted, _), _ = params["dimension_numbers"]
    return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _ragged_dot_flops(params: dict[str, Any], left: Shape, right: Shape, out: Shape) -> int:
    """Each row meets the matrix of one group: as many as one product of all rows. (CPUs multiply by all groups.)"""
    numbers = params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batched) = numbers.dot_dimension_numbers
    free = set(range(len(right))) - {*contracted, *batched, *numbers.rhs_group_dimensions}
    return 2 * math.prod(left) * math.prod(right[axis] for axis in free)


_PRODUCT_FLOPS = {"dot_general": _dot_flops, "ragged_dot_general": _ragged_dot_flops}


def program_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """FLOPs of every matrix product in the program that `function` traces to, loops multiplied out.

    What a formula is checked against; arguments may be abstract (`jax.ShapeDtypeStruct`).
    """
    return sum(map(product_flops, matrix_products(jax.make_jaxpr(function)(*arguments).jaxpr)))
