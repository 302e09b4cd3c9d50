"""layer_norm, gated_rms_norm and group_norm against their formulas in float64 and against Flax; wide rows of all."""

import functools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtile
from jtile.ops.norm import rows

IMPLEMENTATIONS = ["interpret", "xla"]


@functools.cache
def normal(*shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).standard_normal(shape), dtype)


def silu(z):
    return z / (1 + np.exp(-z))


def normalized(u, axes, epsilon, centred=True):
    """n and 1 / √(var + ε), the variance by differences to the mean."""
    u = u - u.mean(axis=axes, keepdims=True) if centred else u
    rstd = 1 / np.sqrt((u * u).mean(axis=axes, keepdims=True) + epsilon)
    return u * rstd, rstd


def cotangent(n, rstd, g, axes, centred=True):
    """∂nᵢ/∂uⱼ = rstd (δᵢⱼ − 1/d − nᵢ nⱼ / d), the second term where the norm is centred."""
    mean = lambda x: x.mean(axis=axes, keepdims=True)  # noqa: E731
    return rstd * (g - (mean(g) if centred else 0) - n * mean(g * n))


def double(*arrays):
    return [np.asarray(x, np.float64) for x in arrays]


def with_gradients(call, dy, *operands):
    """Results, and the gradients of what was given."""

    @jax.jit
    def run(dy, *operands):
        results, pullback = jax.vjp(call, *operands)
        return results, pullback(dy)

    return run(dy, *operands)


def assert_close(actual, expected, dtype, terms=1):
    """Half a unit of the dtype, and for sums of `terms` numbers of size 1 the square root of that many of float32's."""
    assert actual.dtype == dtype
    unit = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), expected, rtol=unit + 2.0**-21, atol=2.0**-20 * np.sqrt(terms)
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1), (1,), (17, 17), (700, 257), (5, 4097)])
def test_layer_norm(shape, dtype, implementation):
    x, dy = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1)
    scale, bias = normal(shape[-1]), normal(shape[-1], seed=1)
    call = functools.partial(jtile.layer_norm, epsilon=1e-3, implementation=implementation)
    y, (dx, dscale, dbias) = with_gradients(call, dy, x, scale, bias)
    x64, dy64, scale64, bias64 = double(x, dy, scale, bias)
    n, rstd = normalized(x64, -1, 1e-3)
    over_rows = tuple(range(x.ndim - 1))
    assert_close(y, n * scale64 + bias64, dtype)
    assert_close(dx, cotangent(n, rstd, dy64 * scale64, -1), dtype, 4 if shape[-1] > 1 else 1000)
    assert_close(dscale, (dy64 * n).sum(over_rows), "float32", 4 * x.size // shape[-1])
    assert_close(dbias, dy64.sum(over_rows), "float32", 4 * x.size // shape[-1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_layer_norm_of_a_sum(implementation):
    """The sum is a result with a gradient of its own; there is no bias."""
    x, residual, dy, dh = (normal(9, 130, seed=i) for i in range(4))
    scale = normal(130)
    call = lambda x, r, scale: jtile.layer_norm(x, scale, residual=r, implementation=implementation)  # noqa: E731
    (y, h), (dx, dresidual, dscale) = with_gradients(call, (dy, dh), x, residual, scale)
    np.testing.assert_array_equal(h, x + residual)
    h64, dy64, dh64, scale64 = double(h, dy, dh, scale)
    n, rstd = normalized(h64, -1, 1e-6)
    assert_close(y, n * scale64, "float32")
    assert_close(dx, cotangent(n, rstd, dy64 * scale64, -1) + dh64, "float32", 4)
    np.testing.assert_array_equal(dx, dresidual)
    assert_close(dscale, (dy64 * n).sum(0), "float32", 36)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 100), (300, 257)])
def test_gated_rms_norm(shape, dtype, norm_before_gate, implementation):
    x, gate, dy = (normal(*shape, dtype=dtype, seed=i) for i in range(3))
    scale = normal(shape[-1])
    options = dict(norm_before_gate=norm_before_gate, epsilon=1e-2, implementation=implementation)
    y, (dx, dgate, dscale) = with_gradients(functools.partial(jtile.gated_rms_norm, **options), dy, x, gate, scale)
    x64, z, dy64, scale64 = double(x, gate, dy, scale)
    slope = 1 / (1 + np.exp(-z))
    slope = slope * (1 + z * (1 - slope))  # of silu
    n, rstd = normalized(x64 if norm_before_gate else x64 * silu(z), -1, 1e-2, centred=False)
    dn = dy64 * silu(z) if norm_before_gate else dy64
    du = cotangent(n, rstd, dn * scale64, -1, centred=False)
    assert_close(y, n * scale64 * (silu(z) if norm_before_gate else 1), dtype, 4)
    assert_close(dx, du if norm_before_gate else du * silu(z), dtype, 16)
    assert_close(dgate, (dy64 * n * scale64 if norm_before_gate else du * x64) * slope, dtype, 16)
    assert_close(dscale, (dn * n).sum(tuple(range(x.ndim - 1))), "float32", 4 * x.size // shape[-1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape, groups",
    [((2, 12), 3), ((1, 1, 1), 1), ((2, 3, 3, 3, 40), 40), ((1, 33, 65), 1), ((2, 17, 1100), 11)],
)
def test_group_norm(shape, groups, dtype, implementation):
    x, dy = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1)
    scale, bias = normal(shape[-1]), normal(shape[-1], seed=1)
    options = dict(groups=groups, epsilon=1e-2, implementation=implementation)
    y, (dx, dscale, dbias) = with_gradients(functools.partial(jtile.group_norm, **options), dy, x, scale, bias)
    grouped = (shape[0], -1, groups, shape[-1] // groups)
    x64, dy64, scale64 = double(x, dy, scale)
    n, rstd = normalized(x64.reshape(grouped), (1, 3), 1e-2)
    g = (dy64 * scale64).reshape(grouped)
    n, du = n.reshape(shape), cotangent(n, rstd, g, (1, 3)).reshape(shape)
    assert_close(y, n * scale64 + double(bias)[0], dtype, 4)
    assert_close(dx, du, dtype, 64)
    over_places = tuple(range(x.ndim - 1))
    assert_close(dscale, (dy64 * n).sum(over_places), "float32", 4 * x.size // shape[-1])
    assert_close(dbias, dy64.sum(over_places), "float32", 4 * x.size // shape[-1])


def test_flax_names_and_order():
    """Parameters of Flax's modules do here what they do there."""
    x, scale, bias = normal(3, 4, 5, 24), normal(24), normal(24, seed=1)
    of_flax = {"params": {"scale": scale, "bias": bias}}
    for module, y in (
        (flax.linen.LayerNorm(), jtile.layer_norm(x, scale, bias)),
        (flax.linen.GroupNorm(num_groups=6), jtile.group_norm(x, scale, bias, groups=6)),
    ):
        np.testing.assert_allclose(y, module.apply(of_flax, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("columns", [1024, 128])
def test_far_from_zero(monkeypatch, columns, implementation):
    """The mean square less the square of the mean would lose the variance of 10⁴ + noise altogether."""
    monkeypatch.setattr(rows, "forward_tiles", lambda *_: iter([rows.Tile(2, columns, 4)]))
    x = normal(4, 700) + 1e4
    (x64,) = double(x)
    y = jtile.layer_norm(x, jnp.ones(700), implementation=implementation)
    np.testing.assert_allclose(y, normalized(x64, -1, 1e-6)[0], atol=2e-3)  # of rounding x to float32 and the mean
    places = x.reshape(4, 5, 140)
    y = jtile.group_norm(places, jnp.ones(140), groups=7, implementation=implementation)
    expected = normalized(double(places)[0].reshape(4, 5, 7, 20), (1, 3), 1e-6)[0].reshape(places.shape)
    np.testing.assert_allclose(y, expected, atol=2e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_zeros(implementation):
    """Zero results and finite gradients, 1 / √ε of what comes in."""
    x, dy, ones = jnp.zeros((3, 64)), normal(3, 64), jnp.ones(64)
    options = dict(epsilon=1e-4, implementation=implementation)
    dy64 = double(dy)[0]
    centred = 100 * (dy64 - dy64.mean(-1, keepdims=True))
    for call, expected in (
        (lambda x: jtile.rms_norm(x, ones, **options), 100 * dy64),
        (lambda x: jtile.layer_norm(x, ones, **options), centred),
        (lambda x: jtile.group_norm(x, ones, groups=1, **options), centred),
        (lambda x: jtile.gated_rms_norm(x, x, ones, **options), 0 * dy64),
    ):
        y, (dx,) = with_gradients(call, dy, x)
        np.testing.assert_array_equal(y, 0)
        np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-4)


WIDE = {
    "rms_norm": lambda x, other, scale, bias, **o: jtile.rms_norm(x, scale, residual=other, **o),
    "layer_norm": lambda x, other, scale, bias, **o: jtile.layer_norm(x, scale, bias, residual=other, **o),
    "gated": lambda x, other, scale, bias, **o: jtile.gated_rms_norm(x, other, scale, **o),
    "gated last": lambda x, other, scale, bias, **o: jtile.gated_rms_norm(x, other, scale, norm_before_gate=True, **o),
}


def compare(name, shape):
    """Results and gradients of the kernels and of the reference, from random cotangents."""
    x, other, scale, bias = normal(*shape), normal(*shape, seed=1), normal(shape[1]), normal(shape[1], seed=1)

    def run(implementation):
        call = functools.partial(WIDE[name], implementation=implementation)
        results = jax.eval_shape(call, x, other, scale, bias)
        dy = jax.tree.map(lambda y, i: normal(*shape, seed=5 + i), results, _numbered(results))
        return with_gradients(call, dy, x, other, scale, bias)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), run("interpret"), run("xla"))


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("shape", [(2, 262_144), (5, 12_001)])
def test_wide_rows(shape, name):
    """Rows that no program holds at once, against the reference, whose formulas the tests above hold to float64."""
    compare(name, shape)


TILES = [  # forward and backward
    (rows.Tile(1, 512, 4), rows.Tile(2, 512, 4, programs=3)),
    (rows.Tile(4, 128, 4), rows.Tile(4, 128, 4, programs=2)),
    (rows.Tile(4, 512, 4), rows.Tile(2, 128, 4)),
]


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("forward, backward", TILES)
def test_every_kind_of_tile(monkeypatch, forward, backward, name):
    """Rows at once and in chunks, each program with one block or with several: the same."""
    monkeypatch.setattr(rows, "forward_tiles", lambda *_: iter([forward]))
    monkeypatch.setattr(rows, "backward_tiles", lambda *_: iter([backward]))
    monkeypatch.setattr(rows, "STRIPS", 2)
    compare(name, (11, 300))


def _numbered(tree):
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, range(len(leaves)))


@pytest.mark.parametrize("width", [8192, 16_384, 262_144])
@pytest.mark.parametrize("name", WIDE)
def test_no_registers_are_spilled(name, width):
    """By any of the kernels, each of which serves one of these widths. The laws compile narrower rows, for any chip."""
    x, scale = (
        jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (((512, width), "bfloat16"), ((width,), "float32"))
    )
    call = functools.partial(WIDE[name], implementation="triton")
    results = jax.eval_shape(call, x, x, scale, scale)
    reports = jtile.inspect(lambda dy, *operands: jax.vjp(call, *operands)[1](dy), results, x, x, scale, scale)
    # Two addresses of a thread, beside two sums of a row's width in registers, which are read once for a row.
    most = 8 if name == "layer_norm" and width == 16_384 else 0
    assert reports and all(report.spill_bytes <= most for report in reports), reports


def test_no_rows():
    scale = jnp.ones(6)
    for call in (
        lambda x: jtile.layer_norm(x, scale, scale),
        lambda x: jtile.gated_rms_norm(x, x, scale),
        lambda x: jtile.group_norm(x, scale, scale, groups=2),
    ):
        y, pullback = jax.vjp(call, jnp.zeros((0, 3, 6)))
        assert y.shape == pullback(y)[0].shape == (0, 3, 6)


def test_what_is_refused():
    x, scale = jnp.zeros((3, 4)), jnp.ones(4)
    with pytest.raises(ValueError, match="^layer_norm: dimension `d` must agree: it is 4 in `x` and 5 in `bias`"):
        jtile.layer_norm(x, scale, jnp.ones(5))
    with pytest.raises(ValueError, match="`residual` must have the dtype of `x`, float32, got bfloat16"):
        jtile.layer_norm(x, scale, residual=x.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="^layer_norm: `x` must be floating point, got int32"):
        jtile.layer_norm(x.astype(int), scale)
    with pytest.raises(ValueError, match="`gate` must have the dtype of `x`, float32, got float16"):
        jtile.gated_rms_norm(x, x.astype(jnp.float16), scale)
    with pytest.raises(ValueError, match="^gated_rms_norm: leading dimensions must agree"):
        jtile.gated_rms_norm(x, x[0], scale)
    with pytest.raises(ValueError, match="^group_norm: `groups` must divide the 4 channels of `x`, got 3"):
        jtile.group_norm(x, scale, groups=3)
    with pytest.raises(ValueError, match=r"^group_norm: `x` has dimensions \(batch ... channels\), so at least 2"):
        jtile.group_norm(scale, scale, groups=2)
    with pytest.raises(ValueError, match="^group_norm: dimension `c` must agree: it is 4 in `x` and 3 in `scale`"):
        jtile.group_norm(x, scale[:3], groups=2)
    with pytest.raises(ValueError, match="`epsilon` must be known when tracing"):
        jax.jit(lambda epsilon: jtile.layer_norm(x, scale, epsilon=epsilon))(1e-6)
