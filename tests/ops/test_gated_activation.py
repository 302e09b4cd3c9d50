"""Gated activations against their formulas in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtile


def sigmoid(x):
    return np.where(x < 0, np.exp(np.minimum(x, 0)), 1) / (1 + np.exp(-np.abs(x)))


def normal_distribution(x):
    return 0.5 * np.vectorize(math.erfc, otypes=[np.float64])(-x / math.sqrt(2))


def tanh_gelu(x):
    u = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    half_sech_squared = 2 / (np.exp(np.minimum(np.abs(u), 300)) + np.exp(-np.abs(u))) ** 2
    y = 0.5 * x * (1 + np.tanh(u))
    return y, 0.5 * (1 + np.tanh(u)) + x * half_sech_squared * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)


# Each activation and its derivative.
ACTIVATIONS = {
    "silu": lambda x: (x * sigmoid(x), sigmoid(x) * (1 + x * sigmoid(-x))),
    "gelu": lambda x: (
        x * normal_distribution(x),
        normal_distribution(x) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi),
    ),
    "gelu_tanh": tanh_gelu,
    "relu": lambda x: (np.maximum(x, 0), np.where(x > 0, 1.0, 0.0)),
    "sigmoid": lambda x: (sigmoid(x), sigmoid(x) * sigmoid(-x)),
}


@functools.cache
def operands(shape, dtype):
    random = np.random.default_rng(0)
    gate, up, dy = random.standard_normal((3, *shape))
    return [jnp.asarray(x, dtype) for x in (4 * gate, up, dy)]


@functools.partial(jax.jit, static_argnames=("activation", "implementation"))
def with_gradients(gate, up, dy, activation, implementation):
    call = functools.partial(jtile.gated_activation, activation=activation, implementation=implementation)
    y, pullback = jax.vjp(call, gate, up)
    return y, *pullback(dy)


def assert_close(actual, expected, sizes):
    """Half a unit of the dtype, and of the factors' product eight units of float32, for what cancels inside."""
    for a, e, size in zip(actual, expected, sizes, strict=True):
        info = jnp.finfo(a.dtype)
        allowed = np.abs(e) * float(info.eps) / 2 + float(info.smallest_subnormal) / 2 + size * 8 * 2.0**-23
        error = np.abs(np.asarray(a, np.float64) - e)
        assert (error <= allowed).all(), f"off by {np.max(error / allowed):.3g} times what is allowed"


def check(shape, activation, dtype, implementation):
    gate, up, dy = operands(shape, dtype)
    actual = with_gradients(gate, up, dy, activation, implementation)
    assert all(a.shape == shape and a.dtype == dtype for a in actual)
    gate, up, dy = (np.asarray(x, np.float64) for x in (gate, up, dy))
    value, derivative = ACTIVATIONS[activation](gate)
    size = np.maximum(1, np.abs(gate))
    expected = value * up, dy * up * derivative, dy * value
    assert_close(actual, expected, (np.abs(size * up), np.abs(dy * up) * size, np.abs(dy) * size))


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients(activation, dtype, implementation):
    check((3, 257), activation, dtype, implementation)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(), (1,), (17,), (2, 3, 100), (4096,), (3, 1, 4097)])
def test_shapes(shape, dtype):
    check(shape, "silu", dtype, "interpret")


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_from_zero(activation, implementation):
    """Beyond where exp overflows, activations are 0 or x (sigmoid: 0 or 1), and derivatives 0 or 1 (sigmoid: 0)."""
    gate = jnp.array([-1e6, -1000.0, -100.0, 0.0, 100.0, 1000.0, 1e6])
    y, dgate, dup = with_gradients(gate, jnp.full(7, 2.0), jnp.ones(7), activation, implementation)
    value, derivative = ACTIVATIONS[activation](np.asarray(gate, np.float64))
    np.testing.assert_allclose(y, 2 * value, rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(dup, value, rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(dgate, 2 * derivative, rtol=1e-6, atol=1e-30)


def test_silu_is_the_default():
    gate, up, dy = operands((17,), "float32")
    np.testing.assert_array_equal(jtile.gated_activation(gate, up), jax.nn.silu(gate) * up)


def test_nothing_but_operands_is_kept():
    gate, up, _ = operands((17,), "float32")
    _, pullback = jax.vjp(jtile.gated_activation, gate, up)
    kept = [x for x in jax.tree.leaves(pullback) if isinstance(x, jax.Array) and x.ndim]
    assert len(kept) == 2
    for x in kept:
        assert any(np.array_equal(x, operand) for operand in (gate, up))


def test_no_elements():
    y, pullback = jax.vjp(jtile.gated_activation, jnp.zeros((0, 3)), jnp.zeros((0, 3)))
    assert y.shape == (0, 3) and [g.shape for g in pullback(y)] == [(0, 3)] * 2


def test_float64_by_the_reference():
    with jax.enable_x64(True):
        gate, up, dy = (jnp.asarray(x, jnp.float64) for x in operands((17,), "float32"))
        for activation, formula in ACTIVATIONS.items():
            y, dgate, dup = with_gradients(gate, up, dy, activation, None)
            value, derivative = formula(np.asarray(gate))
            np.testing.assert_allclose(y, value * np.asarray(up), rtol=1e-13, atol=1e-14)
            np.testing.assert_allclose(dgate, np.asarray(dy * up) * derivative, rtol=1e-13, atol=1e-14)
            np.testing.assert_allclose(dup, value * np.asarray(dy), rtol=1e-13, atol=1e-14)
        with pytest.raises(NotImplementedError, match="float64"):
            jtile.gated_activation(gate, up, implementation="interpret")


def test_what_is_refused():
    x = jnp.zeros((3, 4))
    with pytest.raises(ValueError, match="must be one of 'silu', 'gelu', 'gelu_tanh', 'relu', 'sigmoid', got 'swish'"):
        jtile.gated_activation(x, x, activation="swish")
    with pytest.raises(ValueError, match="^gated_activation: leading dimensions must agree"):
        jtile.gated_activation(x, jnp.zeros((4,)))
    with pytest.raises(ValueError, match="must have one floating-point dtype, got float32 and bfloat16; cast one"):
        jtile.gated_activation(x, x.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="must have one floating-point dtype, got int32 and int32"):
        jtile.gated_activation(x.astype(int), x.astype(int))
    with pytest.raises(ValueError, match="^gated_activation: `implementation` must be one of"):
        jtile.gated_activation(x, x, implementation="cuda")
