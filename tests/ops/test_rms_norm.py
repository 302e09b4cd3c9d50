"""RMS normalisation against its formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtile

IMPLEMENTATIONS = ["interpret", "xla"]


def defined(h, scale, dy, dh, epsilon):
    """y, its gradient with respect to h (with that of h as a result), and that of scale."""
    h, scale, dy, dh = (np.asarray(x, np.float64) for x in (h, scale, dy, dh))
    d = h.shape[-1]
    rstd = 1 / np.sqrt((h**2).sum(axis=-1, keepdims=True) / d + epsilon)
    # ∂yᵢ/∂hⱼ = scaleᵢ (rstd δᵢⱼ − rstd³ hᵢ hⱼ / d)
    g = dy * scale
    dx = rstd * g - rstd**3 * h * (g * h).sum(axis=-1, keepdims=True) / d + dh
    return h * rstd * scale, dx, (dy * h * rstd).sum(axis=tuple(range(h.ndim - 1)))


@functools.cache
def operands(shape, dtype="float32"):
    random = np.random.default_rng(0)
    x, residual, dy, dh = random.standard_normal((4, *shape))
    scale = random.standard_normal(shape[-1:])
    return [jnp.asarray(a, dtype) for a in (x, residual, scale, dy, dh)]


@functools.partial(jax.jit, static_argnames=("epsilon", "implementation"))
def with_gradients(x, residual, scale, dy, dh, epsilon, implementation):
    """Results (y, and h with a residual) and the gradients of what was given."""
    options = dict(epsilon=epsilon, implementation=implementation)
    if residual is None:
        y, pullback = jax.vjp(lambda x, scale: jtile.rms_norm(x, scale, **options), x, scale)
        return y, *pullback(dy)
    call = lambda x, residual, scale: jtile.rms_norm(x, scale, residual=residual, **options)  # noqa: E731
    results, pullback = jax.vjp(call, x, residual, scale)
    return *results, *pullback((dy, dh))


def assert_close(actual, expected, dtype, terms=1):
    """Half a unit of the dtype, and for sums of `terms` numbers of size 1 the square root of that many of float32's."""
    assert actual.dtype == dtype
    allowed = 4 * 2.0**-23 * np.sqrt(terms)
    unit = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=unit + 4 * 2.0**-23, atol=allowed)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 1), (1,), (17, 17), (2, 3, 100), (700, 257), (2300, 8), (5, 4096), (3, 9000)])
def test_values_and_gradients(shape, dtype, implementation):
    """More rows than programs, and fewer than a block holds."""
    x, _, scale, dy, _ = operands(shape, dtype)
    y, dx, dscale = with_gradients(x, None, scale, dy, None, 1e-3, implementation)
    expected = defined(x, scale, dy, 0.0, 1e-3)
    assert_close(y, expected[0], dtype)
    assert_close(dx, expected[1], dtype, 4)
    assert_close(dscale, expected[2], dtype, 4 * x.size // x.shape[-1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1), (17,), (2, 3, 100), (700, 257)])
def test_residual(shape, dtype, implementation):
    """The sum is a result with a gradient of its own; x and the residual share theirs."""
    x, residual, scale, dy, dh = operands(shape, dtype)
    # XLA may keep the sum in float32 on its way to the norm, so choose operands whose sum is exact in any dtype.
    x, residual = (jnp.round(a * 8) / 8 for a in (x, residual))
    y, h, dx, dresidual, dscale = with_gradients(x, residual, scale, dy, dh, 1e-6, implementation)
    np.testing.assert_array_equal(h, x + residual)
    expected = defined(h, scale, dy, dh, 1e-6)
    assert_close(y, expected[0], dtype)
    assert_close(dx, expected[1], dtype, 4)
    np.testing.assert_array_equal(dx, dresidual)
    assert_close(dscale, expected[2], dtype, 4 * x.size // x.shape[-1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_of_either_result_alone(implementation):
    x, residual, scale, dy, dh = operands((6, 100))

    def run(x, which):
        results = jtile.rms_norm(x, scale, residual=residual, implementation=implementation)
        return jnp.sum(results[which] * (dy, dh)[which])

    dx = jax.grad(run)(x, 0)
    assert_close(dx, defined(x + residual, scale, dy, 0.0, 1e-6)[1], "float32", 4)
    np.testing.assert_array_equal(jax.grad(run)(x, 1), dh)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scale_of_another_dtype(implementation):
    """A float32 scale beside bfloat16 activations, as models keep it."""
    x, _, _, dy, _ = operands((9, 100), "bfloat16")
    scale = operands((9, 100))[2]
    y, dx, dscale = with_gradients(x, None, scale, dy, None, 1e-6, implementation)
    expected = defined(x, scale, dy, 0.0, 1e-6)
    assert_close(y, expected[0], "bfloat16")
    assert_close(dx, expected[1], "bfloat16", 4)
    assert_close(dscale, expected[2], "float32", 36)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_size_of_rows(implementation):
    """Only epsilon tells a row from its multiple; squares are summed in float32, far above float16's largest number."""
    x, _, scale, dy, _ = operands((4, 300), "float16")
    x = x * jnp.array([[1e-3], [1.0], [1000.0], [0.0]], "float16")
    for epsilon in 1e-6, 1.0:
        y, dx, dscale = with_gradients(x, None, scale, dy, None, epsilon, implementation)
        expected = defined(x, scale, dy, 0.0, epsilon)
        assert_close(y, expected[0], "float16")
        np.testing.assert_allclose(np.asarray(dx, np.float64), expected[1], rtol=2**-10, atol=1e-3)
        assert_close(dscale, expected[2], "float16", 16)


def test_no_rows():
    x, scale = jnp.zeros((0, 3, 5)), jnp.ones(5)
    y, pullback = jax.vjp(jtile.rms_norm, x, scale)
    dx, dscale = pullback(y)
    assert y.shape == dx.shape == (0, 3, 5)
    np.testing.assert_array_equal(dscale, np.zeros(5))


def test_what_is_refused():
    x, scale = jnp.zeros((3, 4)), jnp.ones(4)
    with pytest.raises(ValueError, match="^rms_norm: dimension `d` must agree: it is 4 in `x` and 5 in `scale`"):
        jtile.rms_norm(x, jnp.ones(5))
    with pytest.raises(ValueError, match="^rms_norm: leading dimensions must agree"):
        jtile.rms_norm(x, scale, residual=jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match="`residual` must have the dtype of `x`, float32, got bfloat16"):
        jtile.rms_norm(x, scale, residual=x.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="^rms_norm: `x` must be floating point, got int32"):
        jtile.rms_norm(jnp.zeros((3, 4), jnp.int32), scale)
    with pytest.raises(ValueError, match="^rms_norm: `x` has dimensions"):
        jtile.rms_norm(jnp.zeros(()), scale)
    with pytest.raises(ValueError, match="^rms_norm: `implementation` must be one of"):
        jtile.rms_norm(x, scale, implementation="cuda")
