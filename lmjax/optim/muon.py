"""Muon's step: about the nearest orthogonal matrix to the momentum.

Jordan et al. 2024, kellerjordan.github.io/posts/muon.
"""

import math

import jax
import jax.numpy as jnp

from lmjax.devices import gather, mesh
from lmjax.weights import Weight

# Quintic with the steepest slope at zero that still maps [0, 1] into about [0.7, 1.2] (Jordan et al.).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# A step of AdamW has entries of about this root mean square, so Muon's learning rates mean the same
# (Liu et al. 2025, arXiv:2502.16982, equation 4).
ADAMW_RMS = 0.2


def is_hidden_matrix(weight: Weight) -> bool:
    """Matmuls between hidden activations; not the head and the embeddings, whose rows belong to single tokens."""
    return weight.kind == "matmul" and "vocab" not in weight.in_axes + weight.out_axes


def newton_schulz(x: jax.Array) -> jax.Array:
    """Approximately U V' where x = U S V', with singular values in about [0.7, 1.2]; x and result [..., in, out].

    Five iterations of X <- aX + b(XX')X + c(XX')^2 X in the dtype of x, on the shorter side.
    """
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def orthogonalize(weight: Weight, update: jax.Array) -> jax.Array:
    """0.2 sqrt(max side) U V' of the update of a matrix [inputs, outputs], and of each in a stack.

    Its entries have the size of AdamW's. But AdamW's step has one large singular value, which grows as the square root
    of both sides, and U V' has all of them alike. So the step of a parametrized weight is that of its base shape times
    sqrt(grown in * grown out): then the rate, 1 / grown in, leaves a spectral norm that changes as sqrt(grown out /
    grown in), which is what keeps activations of one size (Yang et al. 2023, arXiv:2310.17813, condition 1).

    All heads of a projection form one matrix. On a mesh a device holds whole matrices while it iterates: some of the
    layers, where their number allows.
    """
    single, copies = weight.unstacked(), weight.shape[: len(weight.batch_axes)]
    sides = single.fan_in, math.prod(single.shape) // single.fan_in
    matrices = gather.gather_copies(update, weight.batch_axes).reshape(*copies, *sides)
    grown_in, grown_out = weight.scaling.grown_in, weight.scaling.grown_out
    largest = max(sides[0] / grown_in, sides[1] / grown_out) * grown_in * grown_out
    step = ADAMW_RMS * math.sqrt(largest) * newton_schulz(matrices)
    return mesh.constrain(step.reshape(weight.shape), *weight.names)
