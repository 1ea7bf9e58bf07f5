"""Chunking and masking change memory, never a number."""

import functools
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.losses import Sums, chunked_token_sums, token_logprobs, token_sums

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T, D, V = 3, 13, 5, 11
Z_WEIGHT = 0.3


def unembed(head: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ head["w_DV"]) * 4 + head["bias_V"]


def random_inputs(T: int = T) -> tuple[dict[str, jax.Array], jax.Array, jax.Array, jax.Array]:
    """A head, activations, targets, and weights that are ragged and not only 0 and 1."""
    rng = np.random.default_rng(0)
    head = {"w_DV": jnp.asarray(rng.standard_normal((D, V)), jnp.float32), "bias_V": jnp.linspace(-1, 1, V)}
    x_BTD = jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32)
    targets_BT = jnp.asarray(rng.integers(V, size=(B, T)))
    weights_BT = np.where(np.arange(T) < np.array([[T], [T // 2], [1]]), rng.uniform(0.5, 2, (B, T)), 0.0)
    return head, x_BTD, targets_BT, jnp.asarray(weights_BT, jnp.float32)


def test_token_sums_is_its_definition() -> None:
    head, x_BTD, targets_BT, weights_BT = random_inputs()
    sums = token_sums(unembed(head, x_BTD), targets_BT, weights_BT, Z_WEIGHT)
    logits_BTV = np.asarray(unembed(head, x_BTD), np.float64)
    nll = z_loss = correct = 0.0
    for b, t in np.ndindex(B, T):
        log_z = np.log(np.exp(logits_BTV[b, t]).sum())
        nll += float(weights_BT[b, t]) * (log_z - logits_BTV[b, t, targets_BT[b, t]])
        z_loss += float(weights_BT[b, t]) * Z_WEIGHT * log_z**2
        correct += float(weights_BT[b, t]) * (logits_BTV[b, t].argmax() == targets_BT[b, t])
    np.testing.assert_allclose(sums, Sums(nll + z_loss, nll, z_loss, correct), rtol=1e-6)


@pytest.mark.parametrize(("length", "chunk"), [(13, 1), (13, 4), (13, 12), (13, 13), (13, 50), (12, 4), (1, 1), (2, 1)])
def test_chunked_equals_plain(length: int, chunk: int) -> None:
    head, x_BTD, targets_BT, weights_BT = random_inputs(length)

    def plain(head: Any, x_BTD: jax.Array) -> tuple[jax.Array, Sums]:
        sums = token_sums(unembed(head, x_BTD), targets_BT, weights_BT, Z_WEIGHT)
        return 0.7 * sums.minimized, sums

    def chunked(head: Any, x_BTD: jax.Array) -> tuple[jax.Array, Sums]:
        sums = chunked_token_sums(unembed, head, x_BTD, targets_BT, weights_BT, chunk=chunk, z_weight=Z_WEIGHT)
        return 0.7 * sums.minimized, sums

    def differentiate(function: Any) -> Any:
        return jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True))(head, x_BTD)

    (_, expected_sums), expected = differentiate(plain)
    (_, sums), gradients = differentiate(chunked)
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-6)
    for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * float(jnp.abs(want).max()))
    np.testing.assert_allclose(chunked(head, x_BTD)[1], expected_sums, rtol=1e-6)  # also when not differentiated


@pytest.mark.parametrize("chunk", [4, 50])
def test_a_traced_z_weight_gives_the_same_numbers_from_one_program(chunk: int) -> None:
    head, x_BTD, targets_BT, weights_BT = random_inputs()

    def loss(head: Any, x_BTD: jax.Array, z_weight: Any) -> tuple[jax.Array, Sums]:
        sums = chunked_token_sums(unembed, head, x_BTD, targets_BT, weights_BT, chunk=chunk, z_weight=z_weight)
        return sums.minimized, sums

    differentiate = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    traced = jax.jit(differentiate)
    want = jax.jit(functools.partial(differentiate, z_weight=Z_WEIGHT))(head, x_BTD)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        traced(head, x_BTD, jnp.float32(Z_WEIGHT)),
        want,
    )
    programs = {traced.lower(head, x_BTD, jnp.float32(value)).as_text() for value in (0.0, Z_WEIGHT)}
    assert len(programs) == 1


def test_masked_targets_have_no_influence() -> None:
    head, x_BTD, targets_BT, weights_BT = random_inputs()
    masked_BT = weights_BT == 0
    other_targets = jnp.where(masked_BT, (targets_BT + 1) % V, targets_BT)
    other_x = jnp.where(masked_BT[..., None], x_BTD + 1, x_BTD)

    def loss(x_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
        return chunked_token_sums(unembed, head, x_BTD, targets_BT, weights_BT, chunk=4, z_weight=Z_WEIGHT).minimized

    value, gradient = jax.value_and_grad(loss)(x_BTD, targets_BT)
    other_value, other_gradient = jax.value_and_grad(loss)(other_x, other_targets)
    assert value == other_value
    np.testing.assert_array_equal(gradient, other_gradient)
    assert not np.any(gradient[masked_BT])


def test_stacked_runs_go_through_vmap() -> None:
    """Many runs in one program: heads, activations and data on a leading axis."""
    head, x_BTD, targets_BT, weights_BT = random_inputs()

    def gradient(scale: jax.Array, targets_BT: jax.Array) -> Any:
        def loss(head: Any) -> jax.Array:
            return chunked_token_sums(unembed, head, scale * x_BTD, targets_BT, weights_BT, chunk=4).minimized

        return jax.grad(loss)(head)

    scales, targets = jnp.asarray([1.0, 2.0]), jnp.stack([targets_BT, (targets_BT + 1) % V])
    stacked = jax.vmap(gradient)(scales, targets)
    for run in range(2):
        alone = gradient(scales[run], targets[run])
        for name in head:
            np.testing.assert_allclose(stacked[name][run], alone[name], rtol=1e-5, atol=1e-6)


def test_low_precision_activations_get_their_own_dtype_back() -> None:
    head, x_BTD, targets_BT, weights_BT = random_inputs()

    def loss(head: Any, x_BTD: jax.Array) -> jax.Array:
        return chunked_token_sums(unembed, head, x_BTD, targets_BT, weights_BT, chunk=4).minimized

    value, (head_gradient, x_gradient) = jax.value_and_grad(loss, argnums=(0, 1))(head, x_BTD.astype(jnp.bfloat16))
    assert value.dtype == jnp.float32
    assert x_gradient.dtype == jnp.bfloat16
    assert head_gradient["w_DV"].dtype == jnp.float32


@pytest.mark.parametrize("chunk", [1, 4, 13, 50])
def test_token_logprobs_are_log_softmax(chunk: int) -> None:
    head, x_BTD, targets_BT, _ = random_inputs()

    def plain(head: Any) -> jax.Array:
        logprobs_BTV = jax.nn.log_softmax(unembed(head, x_BTD))
        return jnp.take_along_axis(logprobs_BTV, targets_BT[..., None], axis=-1)[..., 0]

    logprobs_BT, correct_BT = token_logprobs(unembed, head, x_BTD, targets_BT, chunk=chunk)
    np.testing.assert_allclose(logprobs_BT, plain(head), atol=2e-6)
    np.testing.assert_array_equal(correct_BT, jnp.argmax(unembed(head, x_BTD), axis=-1) == targets_BT)
    direction_BT = jnp.linspace(-1, 1, B * T).reshape(B, T)
    got = jax.grad(
        lambda head: jnp.sum(direction_BT * token_logprobs(unembed, head, x_BTD, targets_BT, chunk=chunk)[0])
    )
    want = jax.grad(lambda head: jnp.sum(direction_BT * plain(head)))
    for name in head:
        np.testing.assert_allclose(jax.jit(got)(head)[name], jax.jit(want)(head)[name], atol=1e-5)


def test_all_logits_at_once_never_exist() -> None:
    head, x_BTD, targets_BT, weights_BT = random_inputs()

    def chunked(head: Any, x_BTD: jax.Array, chunk: int) -> jax.Array:
        return chunked_token_sums(unembed, head, x_BTD, targets_BT, weights_BT, chunk=chunk, z_weight=0.1).minimized

    def scored(head: Any, x_BTD: jax.Array, chunk: int) -> jax.Array:
        return token_logprobs(unembed, head, x_BTD, targets_BT, chunk=chunk)[0].sum()

    for function in (chunked, scored):
        program = jax.make_jaxpr(jax.grad(function, argnums=(0, 1)), static_argnums=2)
        assert largest_array(program(head, x_BTD, T).jaxpr) >= B * T * V  # the measure sees them in one whole chunk
        assert largest_array(program(head, x_BTD, 2).jaxpr) < B * T * V


def largest_array(jaxpr: Any) -> int:
    """Elements of the largest array with a vocabulary axis, loops and all that they stack included."""
    sizes = [v.aval.size for equation in jaxpr.eqns for v in equation.outvars if V in v.aval.shape]
    inner = [largest_array(j) for equation in jaxpr.eqns for j in jax.extend.core.jaxprs_in_params(equation.params)]
    return max(sizes + inner, default=0)
