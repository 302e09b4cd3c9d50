"""Rotary embedding against the same rotation in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtile
from jtile.compiler.rewrite import equations
from jtile.ops import rope

IMPLEMENTATIONS = ["interpret", "xla"]


def rotated(x, positions, *, interleaved=False, rotary_dim=None, theta=10000.0, frequencies=None, sign=1):
    """Pairs as complex numbers, turned by e^(iφ)."""
    x = np.asarray(x, np.float64)
    n = rotary_dim or x.shape[-1]
    if frequencies is None:
        frequencies = theta ** (-2.0 * np.arange(n // 2) / n)
    turn = np.exp(sign * 1j * np.asarray(positions, np.float64)[..., None, None] * np.asarray(frequencies, np.float64))
    first, second = (slice(0, n, 2), slice(1, n, 2)) if interleaved else (slice(0, n // 2), slice(n // 2, n))
    pairs = (x[..., first] + 1j * x[..., second]) * turn
    y = x.copy()
    y[..., first], y[..., second] = pairs.real, pairs.imag
    return y


def normal(shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def assert_close(actual, expected, x):
    """Sine and cosine are off by an angle of at most 10⁻⁶, which moves a pair by that share of its length."""
    length = np.abs(np.asarray(x, np.float64)).max(initial=0) * math.sqrt(2)
    unit = float(jnp.finfo(actual.dtype).eps) / 2
    assert actual.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=unit, atol=1.3e-6 * length)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "shape, rotary_dim",
    [
        ((1, 1, 2), None),
        ((17, 1, 6), None),
        ((3, 5, 8), 2),
        ((2, 100, 3, 20), None),
        ((2, 1, 7, 12, 80), 32),
        ((257, 4, 96), 40),
        ((2, 9, 40, 128), None),
    ],
)
def test_values_and_gradients(shape, rotary_dim, interleaved, dtype, implementation):
    x, dy = normal(shape, dtype), normal(shape, dtype, seed=1)
    positions = np.random.default_rng(2).integers(-131_072, 131_073, shape[:-2])
    options = dict(interleaved=interleaved, rotary_dim=rotary_dim)

    @jax.jit
    def run(x, positions, dy):
        call = functools.partial(jtile.rope, positions=positions, implementation=implementation, **options)
        y, pullback = jax.vjp(call, x)
        return y, *pullback(dy)

    y, dx = run(x, positions, dy)
    assert_close(y, rotated(x, positions, **options), x)
    assert_close(dx, rotated(dy, positions, sign=-1, **options), dy)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_error_of_the_angle(implementation):
    """The bound that the docstring gives, at any position that int32 holds, beside the rounding of sine and cosine."""
    frequencies = 500_000.0 ** (-np.arange(64) / 64)
    ends = [2**n + i for n in range(10, 31) for i in (-1, 0, 1)]
    positions = np.array([0, 1, -1, 1023, *ends, *(-p for p in ends), 2**31 - 1, -(2**31)], np.int32)
    x = jnp.zeros((positions.size, 1, 128)).at[..., :64].set(1.0)
    y = np.asarray(jtile.rope(x, positions, frequencies=frequencies, implementation=implementation), np.float64)
    angle = np.remainder(
        positions[:, None].astype(np.longdouble) * frequencies, 2 * np.longdouble("3.14159265358979323846")
    )
    error = np.abs(y[:, 0, :64] + 1j * y[:, 0, 64:] - np.exp(1j * angle.astype(np.float64)))
    bound = (np.abs(positions.astype(np.int64)) / 1024 + 1023) * 2.0**-33 * 2 * math.pi
    assert (error <= bound[:, None] + 3e-7).all()
    assert error[np.abs(positions.astype(np.int64)) <= 131_072].max() < 1.2e-6


def test_sine_and_cosine_of_every_octant():
    turns = np.concatenate(
        [np.arange(-(2**31), 2**31, 2**20), np.arange(-8, 8) * 2**29 + 1, np.arange(-8, 8) * 2**29 - 1]
    )
    turns = turns.astype(np.int64).astype(np.int32)
    sin, cos = rope._sin_cos(jnp.asarray(turns))
    angle = turns * (2 * math.pi / 2**32)
    np.testing.assert_allclose(sin, np.sin(angle), rtol=0, atol=1.2e-7)
    np.testing.assert_allclose(cos, np.cos(angle), rtol=0, atol=1.2e-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scores_depend_on_the_distance_alone(implementation):
    query, key = normal((1, 1, 64)), normal((1, 1, 64), seed=1)
    turn = functools.partial(jtile.rope, implementation=implementation)
    scores = [jnp.vdot(turn(query, jnp.array([p + 5])), turn(key, jnp.array([p]))) for p in (0, 1000, 131_072)]
    np.testing.assert_allclose(scores[1:], [scores[0]] * 2, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 7), (1, 1, 7), (2, 1, 7), (2, 3, 7)])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32", "int32"])
def test_shapes_and_dtypes_of_positions(shape, dtype):
    x = normal((2, 3, 7, 2, 4))
    positions = np.random.default_rng(1).integers(0, 128, shape).astype(dtype)
    expected = rotated(x, np.broadcast_to(positions, x.shape[:-2]))
    assert_close(jtile.rope(x, positions, implementation="interpret"), expected, x)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["float64", "float32", "list", "traced"])
def test_frequencies(kind, implementation):
    """float64 is used in full; float32, known or traced, means the number it holds."""
    frequencies = 500_000.0 ** (-np.arange(16) / 16) / np.linspace(1, 8, 16)
    given = {"float64": frequencies, "list": list(frequencies)}.get(kind, jnp.asarray(frequencies, jnp.float32))
    if isinstance(given, jax.Array):
        frequencies = np.asarray(given)
    x, positions = normal((4, 3, 40)), np.array([1, 1000, 131_072, -77])
    call = functools.partial(jtile.rope, rotary_dim=32, implementation=implementation)
    if kind == "traced":
        y = jax.jit(lambda x, positions, frequencies: call(x, positions, frequencies=frequencies))(x, positions, given)
    else:
        y = call(x, positions, frequencies=given)
    assert_close(y, rotated(x, positions, frequencies=frequencies, rotary_dim=32), x)


def test_theta_gives_the_frequencies():
    x, positions = normal((5, 2, 8)), np.arange(5) * 1000
    for theta in 10.0, 500_000.0:
        y = jtile.rope(x, positions, theta=theta)
        assert_close(y, rotated(x, positions, theta=theta), x)
        np.testing.assert_array_equal(y, jtile.rope(x, positions, frequencies=theta ** (-np.arange(4) / 4)))


def test_no_gradient_of_frequencies():
    x, frequencies = normal((5, 2, 8)), jnp.ones(4)
    gradient = jax.jit(jax.grad(lambda f: jtile.rope(x, jnp.arange(5), frequencies=f).sum()))(frequencies)
    np.testing.assert_array_equal(gradient, np.zeros(4))


def test_frequencies_under_vmap():
    x, frequencies = normal((2, 5, 2, 8)), normal((2, 4), seed=1)
    call = jax.vmap(lambda x, f: jtile.rope(x, jnp.arange(5), frequencies=f, implementation="interpret"))
    y = call(x, frequencies)
    for i in range(2):
        assert_close(y[i], rotated(x[i], np.arange(5), frequencies=frequencies[i]), x[i])


def test_no_tokens():
    y, pullback = jax.vjp(lambda x: jtile.rope(x, jnp.zeros((2, 0), int)), jnp.zeros((2, 0, 3, 8)))
    assert y.shape == (2, 0, 3, 8) and pullback(y)[0].shape == (2, 0, 3, 8)


def test_float64_by_the_reference():
    with jax.enable_x64(True):
        x, positions = normal((4, 2, 8), "float64"), np.array([1, 10, 1000, 100_000])
        y = jtile.rope(x, positions)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, rotated(x, positions), rtol=0, atol=4e-6)
        with pytest.raises(NotImplementedError, match="float64"):
            jtile.rope(x, positions, implementation="interpret")


def test_no_table_in_memory():
    """Angles exist only in the blocks of a program."""
    x = jax.ShapeDtypeStruct((4, 65536, 1, 128), jnp.bfloat16)
    positions, pairs = jax.ShapeDtypeStruct(x.shape[:2], jnp.int32), jax.ShapeDtypeStruct((64,), jnp.int32)
    kernel = functools.partial(
        rope.forward_kernel, tile=next(rope.forward_tiles(x, positions)), interleaved=False, inverse=False
    )
    jaxpr = jax.make_jaxpr(kernel)(x, positions, pairs, pairs).jaxpr
    sizes = {math.prod(v.aval.shape) for e in equations(jaxpr) for v in e.outvars if hasattr(v.aval, "shape")}
    blocks = sizes - {math.prod(x.shape), math.prod(positions.shape)}
    assert 64 <= max(blocks) <= 4096


@pytest.mark.parametrize(
    "x, positions, options, message",
    [
        ((8, 16), (8,), {}, r"`x` must be floating point .* got float32 of shape \(8, 16\)"),
        ((8, 2, 16), (9,), {}, r"`positions` must have shape \(8,\) .* got \(9,\)"),
        ((2, 8, 2, 16), (3, 8), {}, r"`positions` must have shape \(8,\) or \(2, 8\)"),
        ((2, 8, 2, 16), (1,), {}, r"got \(1,\)"),
        ((2, 8, 2, 16), (), {}, r"got \(\)"),
        ((8, 2, 16), (1, 8), {}, r"got \(1, 8\)"),
        ((8, 2, 15), (8,), {}, "`rotary_dim` must be even, from 2 to head_dim, 15; got 15"),
        ((8, 2, 16), (8,), dict(rotary_dim=18), "from 2 to head_dim, 16; got 18"),
        ((8, 2, 16), (8,), dict(rotary_dim=0), "got 0"),
        ((8, 2, 16), (8,), dict(theta=0.0), "`theta` must be positive and finite, got 0.0"),
        ((8, 2, 16), (8,), dict(frequencies=np.ones(7)), r"`frequencies` must have shape \(8,\), .* got \(7,\)"),
        ((8, 2, 16), (8,), dict(rotary_dim=4, frequencies=np.ones(8)), r"`frequencies` must have shape \(2,\)"),
        ((8, 2, 16), (8,), dict(implementation="cuda"), "`implementation` must be one of"),
    ],
)
def test_what_is_refused(x, positions, options, message):
    with pytest.raises(ValueError, match=f"^rope: .*{message}"):
        jtile.rope(jnp.zeros(x), jnp.zeros(positions, int), **options)


def test_dtypes_that_are_refused():
    with pytest.raises(ValueError, match="`x` must be floating point .* got int32"):
        jtile.rope(jnp.zeros((8, 2, 16), int), jnp.arange(8))
    with pytest.raises(ValueError, match="`positions` must be integers, got float32; cast them to int32"):
        jtile.rope(jnp.zeros((8, 2, 16)), jnp.arange(8.0))
