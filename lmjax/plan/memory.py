"""What one device must hold during a step, and by how much it is too much."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.extend

from lmjax.plan.roofline import local_bytes, local_shape
from lmjax.run.assemble import device_bytes
from lmjax.train.state import TrainState

_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Buffer(NamedTuple):
    name: str
    bytes: float


class Memory(NamedTuple):
    """Bytes on one device. What is None was not found out: the step was not, or could not be, compiled."""

    params: float
    optimizer: float
    """Its state, and the average of the weights where one is kept."""
    inputs: float
    """Batch, hyperparameters, counters."""
    gradients: float
    frozen: float = 0.0
    """Weights that are not trained."""
    activations: float | None = None
    """What the forward pass leaves for the backward pass, by the types of the traced program."""
    padding: float | None = None
    """What the device's tiled layouts add to params, optimizer, frozen weights and inputs."""
    temporaries: float | None = None
    """Gradients, activations, gathered weights: what lives within the step, but for what XLA keeps on the chip."""
    outputs: float | None = None
    """Results that do not take the place of an input, such as metrics."""
    program: float | None = None
    """The compiled code."""
    beyond: float | None = None
    """How far XLA's own peak is above the sum of these, as it is for small programs: it counts what is on the chip."""
    peak: float | None = None
    """The sum, to which gradients and activations add nothing of their own: never below XLA's own peak."""


def of_declaration(state: TrainState, frozen: Any, batch: Any) -> Memory:
    """What follows from shapes and shardings."""
    params = device_bytes(state.params)
    inputs = device_bytes((batch, state.hyper, state.counters))
    optimizer = device_bytes((state.opt_state, state.average))
    return Memory(params, optimizer, inputs, gradients=params, frozen=device_bytes(frozen))


def of_compiled(memory: Memory, compiled: Any) -> Memory:
    """The same with what XLA's buffer assignment says."""
    stats = compiled.memory_analysis()
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    program = stats.generated_code_size_in_bytes
    whole = stats.argument_size_in_bytes + stats.temp_size_in_bytes + outputs + program
    beyond = max(stats.peak_memory_in_bytes - whole, 0)
    return memory._replace(
        padding=stats.argument_size_in_bytes - memory.params - memory.optimizer - memory.inputs - memory.frozen,
        temporaries=stats.temp_size_in_bytes,
        outputs=outputs,
        program=program,
        beyond=beyond,
        peak=whole + beyond,
    )


def largest_arrays(tree: Any, count: int = 8) -> list[Buffer]:
    """The largest arrays of a tree by their paths, on one device."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = [Buffer(jax.tree_util.keystr(path, simple=True, separator="/"), device_bytes(x)) for path, x in leaves]
    return sorted(named, key=lambda buffer: -buffer.bytes)[:count]


def largest_values(jaxpr: Any, count: int = 8) -> list[Buffer]:
    """The largest results of a traced program, each shape once: one device's part, and where it is computed.

    What a loop keeps of all its rounds is one array. XLA may fuse some of them away; what does not fit is among them.
    """
    found: dict[str, Buffer] = {}
    for equation in _equations(jaxpr):
        for variable in equation.outvars:
            value = jax.core.ShapedArray(local_shape(variable.aval), variable.aval.dtype).str_short(short_dtypes=True)
            name = f"{value} {equation.primitive.name} {equation.source_info.name_stack}".rstrip()
            found.setdefault(value, Buffer(name, local_bytes(variable.aval)))
    return sorted(found.values(), key=lambda buffer: -buffer.bytes)[:count]


def saved_for_backward(jaxpr: Any) -> float:
    """Bytes that the loops of a program's forward pass stack up, a row for each round, on one device.

    That is how a scan over layers keeps what its backward pass, a scan in reverse, will need.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan" and equation.params["reverse"]:
            continue
        if equation.primitive.name == "scan":
            body: Any = next(jax.extend.core.jaxprs_in_params(equation.params))
            for whole, of_round in zip(equation.outvars, body.outvars, strict=True):
                total += local_bytes(whole.aval) if whole.aval.ndim > of_round.aval.ndim else 0
        if equation.primitive.name != "pallas_call":
            together = max if equation.primitive.name == "cond" else sum  # of a switch one branch runs
            total += together(map(saved_for_backward, jax.extend.core.jaxprs_in_params(equation.params)))
    return total


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name != "pallas_call":  # whose own values never leave the chip
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from _equations(inner)


class OutOfMemory(NamedTuple):
    """What XLA says when a program does not fit."""

    used: float
    limit: float
    largest: list[Buffer]
    """Empty where XLA names none."""


def parse_out_of_memory(message: str, arguments: float) -> OutOfMemory | None:
    """The sizes and buffers of XLA:TPU's error messages, or None for another error.

    `arguments` are the bytes of the program's inputs: XLA leaves them out when the temporaries are too large already.
    """
    total = re.search(r"Used ([\d.]+\w?) of ([\d.]+\w?) hbm", message)
    temporaries = re.search(r"HLO temporaries \(([\d.]+\w?)\) exceeds available HBM \(([\d.]+\w?)\)", message)
    if temporaries:
        return OutOfMemory(size_in_bytes(temporaries[1]) + arguments, size_in_bytes(temporaries[2]), [])
    if total is None:
        return None
    largest = []
    for block in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
        size = block.split()[0]
        name = re.search(r'op_name="([^"]+)"', block)
        shape = re.search(r"Shape: (\S+?)\{", block)
        kind = re.search(r"Allocation type: (.+)", block)
        words = [match[1] for match in (shape, name or kind) if match]
        largest.append(Buffer(" ".join(words), size_in_bytes(size)))
    return OutOfMemory(size_in_bytes(total[1]), size_in_bytes(total[2]), largest)


def size_in_bytes(text: str) -> float:
    """`17.60G` -> bytes."""
    unit = text[-1] if text[-1] in _UNITS else "B"
    return float(text.rstrip("BKMGT")) * _UNITS[unit]
