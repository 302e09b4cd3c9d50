"""Softmax and its logarithm against their formulas in float64, and against JAX's own."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jtile
from jtile.compiler.interpret import interpret_pallas
from jtile.ops import softmax as op
from jtile.testing.programs import launching, repeated_operands

IMPLEMENTATIONS = ["interpret", "xla"]
OPS = {"softmax": jtile.softmax, "log_softmax": jtile.log_softmax}
JAXS = {"softmax": jax.nn.softmax, "log_softmax": jax.nn.log_softmax}


def counting(shape, mask, is_causal):
    counts = np.ones(shape, bool) if mask is None else np.broadcast_to(mask, shape)
    return counts & np.tri(*shape[-2:], dtype=bool) if is_causal else counts


def defined(name, x, dy, scale, counts):
    """The result and the gradient."""
    x, dy = (np.where(counts, np.asarray(a, np.float64), 0) for a in (x, dy))
    z = np.where(counts, x * scale, -np.inf)
    shifted = z - np.where(counts.any(-1, keepdims=True), z.max(-1, keepdims=True), 0)
    total = np.exp(shifted).sum(-1, keepdims=True)
    share = np.exp(shifted) / np.where(total == 0, 1, total)
    if name == "softmax":
        return share, scale * share * (dy - (share * dy).sum(-1, keepdims=True))
    return shifted - np.log(np.where(total == 0, 1, total)), scale * (dy - share * dy.sum(-1, keepdims=True))


@functools.cache
def operands(shape, dtype="float32"):
    x, dy = np.random.default_rng(0).standard_normal((2, *shape))
    return jnp.asarray(3 * x, dtype), jnp.asarray(dy, dtype)


def a_mask(shape):
    return jnp.asarray(np.random.default_rng(1).random(shape) < 0.6)


@functools.partial(jax.jit, static_argnames=("name", "options"))
def with_gradient(name, x, dy, mask, options):
    y, pullback = jax.vjp(lambda x: OPS[name](x, mask=mask, **dict(options)), x)
    return y, pullback(dy)[0]


def check(name, shape, implementation, mask=None, dtype="float32", **options):
    x, dy = operands(shape, dtype)
    y, dx = with_gradient(name, x, dy, mask, (*options.items(), ("implementation", implementation)))
    assert y.dtype == dx.dtype == x.dtype
    counts = counting(shape, mask, options.get("is_causal", False))
    expected_y, expected_dx = defined(name, x, dy, options.get("scale", 1.0), counts)
    unit = float(jnp.finfo(dtype).eps) / 2
    tolerance = dict(rtol=unit + 5e-6, atol=2e-6)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected_y, **tolerance)
    if dtype != "float32":  # from the result as it was rounded
        size = np.abs(expected_dx).max() if name == "softmax" else np.abs(np.asarray(dy, np.float64).sum(-1)).max()
        tolerance["atol"] = 4 * unit * size
    np.testing.assert_allclose(np.asarray(dx, np.float64), expected_dx, **tolerance)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", [(1,), (17,), (257,), (17, 1), (5, 17), (3, 1, 100), (33, 257), (2, 3000)])
def test_shapes(name, shape, implementation):
    check(name, shape, implementation, scale=0.7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", OPS)
def test_rounded_once(name, dtype):
    check(name, (9, 257), "interpret", dtype=dtype)


@pytest.mark.parametrize("name, is_causal", [("softmax", True), ("log_softmax", False)])
@pytest.mark.parametrize(
    "whole", list(itertools.product([False, True], repeat=4)), ids=lambda w: "".join("-x"[h] for h in w)
)
def test_masks_of_every_broadcast_shape(name, is_causal, whole):
    """Queries and keys differ in number. The gradient knows nothing of masks."""
    x, _ = operands((2, 3, 5, 9))
    mask = a_mask([n if h else 1 for n, h in zip(x.shape, whole, strict=True)])
    y = jax.jit(functools.partial(OPS[name], is_causal=is_causal, implementation="interpret"))(x, mask=mask)
    expected, _ = defined(name, x, x, 1.0, counting(x.shape, mask, is_causal))
    np.testing.assert_allclose(y, expected, rtol=5e-6, atol=2e-6)


@pytest.mark.parametrize(
    "shape, masked", [((4, 7), ()), ((4, 7), (7,)), ((3, 1, 6, 20), (6, 20)), ((1, 4, 1, 8), (4, 1, 1))]
)
def test_masks_of_fewer_dimensions(shape, masked):
    for name, implementation in zip(OPS, IMPLEMENTATIONS, strict=True):
        check(name, shape, implementation, a_mask(masked))


@pytest.mark.parametrize("log", [False, True], ids=OPS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
def test_wide_rows(log, is_causal):
    """In chunks, the last one ragged; a whole chunk is masked, too."""
    x, dy = operands((3, 2500))
    mask = a_mask((2500,)).at[:1024].set(False)
    query = jnp.arange(2000, 2003) if is_causal else None
    counts = np.asarray(mask) & (np.arange(2500) <= (np.arange(2000, 2003)[:, None] if is_causal else 2500))
    expected = defined(list(OPS)[log], x, dy, 0.5, counts)
    tile = op.Tile(1, 1024, 4)
    options = dict(tile=tile, scale=0.5, log=log)
    of_mask = (False, True, True) if is_causal else (False, True)
    forward = interpret_pallas(functools.partial(op.forward_kernel, of_mask=of_mask, **options))
    if is_causal:  # without leading dimensions there is one of 1
        (y,) = forward(x[None], jnp.broadcast_to(mask, (3, 2500)), query)
        y = y[0]
    else:
        (y,) = forward(x, mask, None)
    (dx,) = interpret_pallas(functools.partial(op.backward_kernel, **options))(y, dy)
    np.testing.assert_allclose(y, expected[0], rtol=5e-6, atol=2e-6)
    np.testing.assert_allclose(dx, expected[1], rtol=5e-6, atol=2e-6)


@pytest.mark.parametrize("log", [False, True], ids=OPS)
def test_wide_rows_at_odd_addresses(log):
    """Read from aligned addresses, in blocks that have parts of two rows."""
    x, dy = operands((8, 2501))
    options = dict(tile=op.Tile(1, 512, 4), scale=0.5, log=log)
    (y,) = interpret_pallas(functools.partial(op.forward_kernel, of_mask=(True, True), **options))(x, None, None)
    (dx,) = interpret_pallas(functools.partial(op.backward_kernel, **options))(y, dy)
    expected = defined(list(OPS)[log], x, dy, 0.5, np.ones(x.shape, bool))
    np.testing.assert_allclose(y, expected[0], rtol=5e-6, atol=2e-6)
    np.testing.assert_allclose(dx, expected[1], rtol=5e-6, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", OPS)
def test_means_what_jax_does(name, implementation):
    x, dy = operands((6, 100))
    mask = a_mask((6, 100)).at[3].set(False)
    y, dx = with_gradient(name, x, dy, mask, (("implementation", implementation),))
    jaxs = lambda x: JAXS[name](x, where=mask)  # noqa: E731
    np.testing.assert_allclose(y, jaxs(x), rtol=1e-5, atol=2e-6)
    some = np.array([0, 1, 2, 4, 5])
    _, pullback = jax.vjp(lambda x: jnp.where(mask, jaxs(x), 0), x)
    np.testing.assert_allclose(dx[some], pullback(dy)[0][some], rtol=1e-5, atol=2e-6)
    assert not dx[3].any()  # where JAX's own is NaN


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_does_not_count_does_not_leak(name, wrong, implementation):
    """Neither from scores nor from cotangents."""
    x, dy = operands((6, 100))
    mask = a_mask((6, 100)).at[3].set(False)
    options = (("implementation", implementation),)
    clean = with_gradient(name, x, dy, mask, options)
    spoilt = with_gradient(name, jnp.where(mask, x, wrong), jnp.where(mask, dy, wrong), mask, options)
    for a, b in zip(spoilt, clean, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.isfinite(spoilt[1]).all() and (spoilt[0][3] == (0 if name == "softmax" else -np.inf)).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", OPS)
def test_infinite_scores(name, implementation):
    """−∞ is as good as masked, in a whole row too; where +∞ or NaN counts all is NaN, as in JAX."""
    x, dy = operands((6, 40))
    options = (("implementation", implementation),)
    clean = with_gradient(name, x, dy, None, options)
    least = a_mask((40,)).at[0].set(True)
    spoilt = (
        x.at[1, 5].set(jnp.inf).at[2, 7].set(jnp.nan).at[3].set(-jnp.inf).at[4].set(jnp.where(least, x[4], -jnp.inf))
    )
    y, dx = with_gradient(name, spoilt, dy, None, options)
    masked = with_gradient(name, x, dy, jnp.ones((6, 40), bool).at[3].set(False).at[4].set(least), options)
    for actual, expected in zip((y, dx), clean, strict=True):
        assert np.isnan(actual[1:3]).all()
        np.testing.assert_array_equal(actual[np.array([0, 5])], expected[np.array([0, 5])])
    for actual, expected in zip((y, dx), masked, strict=True):
        np.testing.assert_array_equal(actual[3:5], expected[3:5])
    assert np.isnan(JAXS[name](spoilt[1:3])).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", OPS)
def test_large_scores(name, implementation):
    """Far beyond where exp overflows; the least finite number, which some use to mask, is one as any other."""
    x, dy = operands((3, 300))
    x = x * jnp.array([[1e4], [1e-30], [1.0]])
    x = x.at[2, :200].set(float(jnp.finfo(jnp.float32).min))
    y, dx = with_gradient(name, x, dy, None, (("implementation", implementation),))
    expected = defined(name, x, dy, 1.0, np.ones(x.shape, bool))
    np.testing.assert_allclose(y, expected[0], rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(dx, expected[1], rtol=2e-5, atol=1e-4)
    assert np.isfinite(dx).all()


def test_a_mask_is_not_repeated_in_memory():
    x, mask = jnp.zeros((4, 6, 32, 64), jnp.bfloat16), jnp.zeros((4, 1, 1, 64), bool)
    function = launching(lambda x, mask: jtile.softmax(x, mask=mask, implementation="triton"))
    jaxpr = jax.make_jaxpr(function)(x, mask).jaxpr
    assert not any(repeated_operands(jaxpr, {mask.size}, n) for n in (6, 32, 6 * 32))


def test_devices_that_share_queries_know_their_places():
    x, _ = operands((2, 3, 16, 24))
    mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,))
    split = jax.device_put(x, NamedSharding(mesh, P(None, None, "i")))
    y = jax.jit(functools.partial(jtile.softmax, is_causal=True, implementation="interpret"))(split)
    np.testing.assert_allclose(y, defined("softmax", x, x, 1.0, counting(x.shape, None, True))[0], rtol=5e-6, atol=1e-7)


def test_float64_by_the_reference():
    with jax.enable_x64(True):
        x, dy = (jnp.asarray(np.asarray(a, np.float64)) for a in operands((5, 300)))
        for name in OPS:
            y, dx = with_gradient(name, x, dy, None, ())
            expected = defined(name, x, dy, 1.0, np.ones(x.shape, bool))
            np.testing.assert_allclose(y, expected[0], rtol=1e-13)
            np.testing.assert_allclose(dx, expected[1], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,)])
def test_nothing(shape):
    for call in OPS.values():
        y, pullback = jax.vjp(call, jnp.zeros(shape))
        assert y.shape == pullback(y)[0].shape == shape


@pytest.mark.parametrize("name", OPS)
def test_what_is_refused(name):
    x, call = jnp.zeros((3, 4)), OPS[name]
    for mask in jnp.ones((3, 4)), jnp.ones((4, 3), bool), jnp.ones((1, 3, 4), bool):
        with pytest.raises(
            ValueError, match=rf"^{name}: `mask` must be boolean, .* broadcast to `x`, .* \(3, 4\); got"
        ):
            call(x, mask=mask)
    with pytest.raises(ValueError, match=f"^{name}: `x` must be floating point and have a dimension, got int32"):
        call(jnp.zeros((3, 4), int))
    with pytest.raises(ValueError, match=f"^{name}: `x` must be floating point and have a dimension, got float32"):
        call(jnp.zeros(()))
    with pytest.raises(ValueError, match=f"^{name}: `scale` must be finite, got inf"):
        call(x, scale=float("inf"))
    with pytest.raises(ValueError, match=rf"^{name}: causal scores have dimensions .*\(4,\)"):
        call(x[0], is_causal=True)
    with pytest.raises(ValueError, match=f"^{name}: `scale` must be known when tracing"):
        jax.jit(lambda x, scale: call(x, scale=scale))(x, 2.0)
    with pytest.raises(ValueError, match=f"^{name}: `implementation` must be one of"):
        call(x, implementation="cuda")
