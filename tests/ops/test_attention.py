"""Attention against the same thing written with the whole score matrix in float32."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jtile.compiler.rewrite import equations
from jtile.compiler.target import Target
from jtile.ops import attention
from jtile.ops.attention import dot_product_attention
from jtile.ops.attention.op import ORIGIN
from jtile.ops.attention.variant import Variant
from jtile.testing.programs import collectives, exchanged

# Roundings of the result, and of weights and dscores before their products: a few units of the dtype. In float32 sums
# of some hundred terms add up.
TOLERANCE = {"float32": 4e-6, "bfloat16": 4 * 2**-8, "float16": 4 * 2**-11}


def plain_attention(query, key, value, *, scale=None, is_causal=False):
    """Output and log-sum-exp, with key heads repeated."""
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    group = query.shape[-2] // key.shape[-2]
    key, value = (jnp.repeat(x, group, axis=-2) for x in (key, value))
    scores = jnp.einsum("...shd,...thd->...hst", query, key, precision="highest")
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = jnp.where(jnp.arange(scores.shape[-2])[:, None] >= jnp.arange(scores.shape[-1]), scores, -jnp.inf)
    out = jnp.einsum("...hst,...the->...she", jax.nn.softmax(scores), value, precision="highest")
    return out, jnp.swapaxes(jax.nn.logsumexp(scores, axis=-1), -1, -2)


def operands(batch, queries, keys, heads, key_heads, head_dim, value_dim=None, dtype="float32"):
    random = np.random.default_rng(0)
    value_dim = value_dim or head_dim
    shapes = (queries, heads, head_dim), (keys, key_heads, head_dim), (keys, key_heads, value_dim)
    return [jnp.asarray(random.standard_normal((*batch, *shape)), dtype) for shape in shapes]


def with_gradients(function, *inputs):
    """Results of `function` and the gradients of a random combination of them, all in float32."""
    random = np.random.default_rng(1)

    def run(*inputs):
        results, pullback = jax.vjp(function, *inputs)
        cotangents = [jnp.asarray(random.standard_normal(r.shape), r.dtype) for r in results]
        return *results, *pullback(tuple(cotangents))

    return [x.astype(jnp.float32) for x in jax.jit(run)(*inputs)]


def assert_same(actual, expected, tolerance):
    for name, a, e in zip(("out", "lse", "dquery", "dkey", "dvalue"), actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * float(jnp.abs(e).max(initial=0)), err_msg=name)


def check(
    batch, queries, keys, heads, key_heads, head_dim, value_dim=None, dtype="float32",
    implementations=("interpret", "xla"), **options,
):  # fmt: skip
    """Kernels and reference, results and gradients."""
    inputs = operands(batch, queries, keys, heads, key_heads, head_dim, value_dim, dtype)
    wide = [x.astype(jnp.float32) for x in inputs]
    expected = with_gradients(functools.partial(plain_attention, **options), *wide)
    for implementation in implementations:
        call = functools.partial(dot_product_attention, return_lse=True, implementation=implementation, **options)
        more = max(1.0, math.sqrt(keys / 257))  # rounding errors of sums grow as the root of the number of terms
        assert_same(with_gradients(call, *inputs), expected, more * TOLERANCE[dtype])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("queries, keys", [(1, 257), (257, 1), (17, 64), (64, 17), (130, 130)])
def test_lengths(queries, keys, is_causal):
    check((1,), queries, keys, 2, 1, 16, is_causal=is_causal)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("length", [1, 17, 257, 4092])
def test_lengths_on_gpu(length, dtype):
    check((1,), length, length, 2, 1, 64, dtype=dtype, is_causal=True, implementations=["triton"])


@pytest.mark.parametrize(
    "length, implementation", [(1024, "xla"), pytest.param(2**20, "triton", marks=pytest.mark.gpu)]
)
def test_a_long_sequence(length, implementation):
    """A million tokens on a GPU: early, late and some in between, of results and gradients, against sums over all that
    they see."""
    *inputs, dout = jax.random.normal(jax.random.key(0), (4, 1, length, 1, 64)).astype(jnp.bfloat16)

    @jax.jit
    def everything(*inputs):
        call = functools.partial(dot_product_attention, is_causal=True, return_lse=True, implementation=implementation)
        (out, lse), pullback = jax.vjp(call, *inputs)
        return out, lse, *pullback((dout, jnp.zeros_like(lse)))

    out, lse, dquery, dkey, dvalue = (x.astype(jnp.float32)[0, :, 0] for x in everything(*inputs))
    query, key, value, dout_rows = (x.astype(jnp.float32)[0, :, 0] for x in (*inputs, dout))
    product = functools.partial(jnp.dot, precision="highest")
    delta, numbers = jnp.sum(out * dout_rows, axis=-1), jnp.arange(length)

    def of_query(i):
        scores = jnp.where(numbers <= i, product(key, query[i]) / 8, -jnp.inf)
        weights = jax.nn.softmax(scores)
        dscores = weights * (product(value, dout_rows[i]) - delta[i])
        return product(weights, value), jax.nn.logsumexp(scores), product(dscores, key) / 8

    def of_key(j):
        weights = jnp.where(numbers >= j, jnp.exp(product(query, key[j]) / 8 - lse), 0)
        dscores = weights * (product(dout_rows, value[j]) - delta)
        return product(dscores, query) / 8, product(weights, dout_rows)

    for i in 1, length // 256 - 1, length // 2 + 1, length - 2:  # the first query's gradient is 0
        found, expected = (out[i], lse[i], dquery[i], dkey[i], dvalue[i]), (*of_query(i), *of_key(i))
        for name, a, e in zip(("out", "lse", "dquery", "dkey", "dvalue"), found, expected, strict=True):
            tolerance = 2**-6 * float(jnp.abs(e).max())
            np.testing.assert_allclose(a, e, rtol=0, atol=tolerance, err_msg=f"{name} of {i}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_operands(dtype):
    check((1,), 257, 257, 2, 1, 16, dtype=dtype, is_causal=True)


@pytest.mark.parametrize(
    "head_dim, dtype",
    [(64, "bfloat16"), (80, "float32"), (80, "bfloat16"), (96, "float16"), (256, "float32"), (256, "bfloat16")],
)
def test_head_dims(head_dim, dtype):
    check((1,), 40, 70, 1, 1, head_dim, dtype=dtype, is_causal=True)


def test_value_head_dim_of_its_own():
    check((1,), 20, 30, 2, 1, 32, value_dim=144)


@pytest.mark.parametrize("heads, key_heads", [(4, 4), (6, 2), (3, 1)])
def test_grouped_heads(heads, key_heads):
    check((2,), 40, 40, heads, key_heads, 16, is_causal=True)


@pytest.mark.parametrize("batch", [(), (2, 1, 3)])
def test_leading_shapes(batch):
    check(batch, 10, 20, 2, 1, 16)


@pytest.mark.parametrize("scale", [0.01, -0.3, 0.0])
def test_scale(scale):
    """A negative scale turns the order of the scores round; a zero one is the mean of the values, without kernels."""
    inputs = operands((1,), 40, 40, 1, 1, 16)
    call = functools.partial(dot_product_attention, scale=scale, is_causal=True, return_lse=True)
    expected = with_gradients(functools.partial(plain_attention, scale=scale, is_causal=True), *inputs)
    assert_same(with_gradients(call, *inputs), expected, TOLERANCE["float32"])
    if scale:
        call = functools.partial(call, implementation="interpret")
        assert_same(with_gradients(call, *inputs), expected, TOLERANCE["float32"])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("queries, keys", [(24, 24), (16, 24), (24, 16)])
def test_means_what_jax_nn_does(queries, keys, is_causal):
    inputs = operands((2,), queries, keys, 4, 2, 16)
    for options in dict(is_causal=is_causal), dict(is_causal=is_causal, scale=0.2):
        actual = dot_product_attention(*inputs, **options)
        np.testing.assert_allclose(actual, jax.nn.dot_product_attention(*inputs, **options), rtol=0, atol=4e-6)


def test_gradient_of_the_log_sum_exp_alone():
    query, key, value = operands((1,), 40, 40, 2, 1, 16)

    def lse(function):
        return jax.grad(lambda *inputs: jnp.sum(jnp.sin(function(*inputs)[1])), argnums=(0, 1, 2))(query, key, value)

    call = functools.partial(dot_product_attention, return_lse=True, implementation="interpret")
    for actual, expected in zip(lse(call), lse(plain_attention), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=4e-6)


def test_large_scores_do_not_overflow():
    """Scores of 10⁴ are far above the 88 at which exp overflows float32, and those of keys past the end far from 0."""
    query, key, value = operands((1,), 70, 70, 1, 1, 16)
    key = key.at[..., 0].set(100.0)
    for shift in 100.0, -100.0:
        inputs = query.at[..., 0].set(shift), key, value
        call = functools.partial(dot_product_attention, scale=1.0, return_lse=True, implementation="interpret")
        actual = with_gradients(call, *inputs)
        assert all(jnp.isfinite(x).all() for x in actual)
        # Scores have 10⁴ · 2⁻²⁴ = 6e-4 of rounding each, and so have the weights.
        assert_same(actual, with_gradients(functools.partial(plain_attention, scale=1.0), *inputs), 4e-3)


@pytest.mark.parametrize("is_causal", [False, True])
def test_nothing_to_attend_to(is_causal):
    """Zeros, a log-sum-exp of -inf, and gradients of zero."""
    inputs = operands((2,), 3, 0, 2, 1, 16)
    call = functools.partial(dot_product_attention, is_causal=is_causal, return_lse=True)
    out, lse, *gradients = with_gradients(call, *inputs)
    assert out.shape == (2, 3, 2, 16) and not out.any()
    assert jnp.all(lse == -jnp.inf)
    assert all(not g.any() and g.shape == x.shape for g, x in zip(gradients, inputs, strict=True))


def test_nothing_to_attend_from():
    inputs = operands((2,), 0, 3, 2, 1, 16)
    out, lse, *gradients = with_gradients(functools.partial(dot_product_attention, return_lse=True), *inputs)
    assert out.shape == (2, 0, 2, 16) and lse.shape == (2, 0, 2)
    assert all(not g.any() and g.shape == x.shape for g, x in zip(gradients, inputs, strict=True))


def test_log_sum_exp_is_float32():
    query, key, value = operands((1,), 20, 20, 2, 1, 16, dtype="bfloat16")
    for implementation in "interpret", "xla":
        out, lse = dot_product_attention(query, key, value, return_lse=True, implementation=implementation)
        assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32


def test_float64_by_the_reference():
    with jax.enable_x64(True):
        query, key, value = operands((1,), 20, 20, 2, 1, 16, dtype="float64")
        out, lse = dot_product_attention(query, key, value, return_lse=True)
        assert out.dtype == lse.dtype == jnp.float64
        scores = np.einsum("bshd,btkd->bhst", query, key) / 4
        np.testing.assert_allclose(lse, np.log(np.exp(scores).sum(-1)).swapaxes(1, 2), rtol=1e-14)
        with pytest.raises(NotImplementedError, match="float64"):
            dot_product_attention(query, key, value, implementation="interpret")


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_array_of_sequence_times_sequence(is_causal):
    """Nothing in the forward or the backward program, kernels included, comes near the size of the score matrix."""
    sequence, shape = 65536, (1, 65536, 1, 64)
    x, row = jax.ShapeDtypeStruct(shape, jnp.bfloat16), jax.ShapeDtypeStruct(shape[:-1], jnp.float32)
    origin = [jax.ShapeDtypeStruct((), jnp.int32)] if is_causal else []
    variant = Variant(0.125, (ORIGIN,) if is_causal else (), window=(None, 0 if is_causal else None))
    for kernel, tiles, inputs in (
        (attention.kernels.forward, attention.tiles.forward, (x, x, x, *origin)),
        (attention.kernels.backward, attention.tiles.backward, (x, x, x, *origin, x, row, x, row)),
    ):
        tile = next(tiles(*inputs, target=Target.named("NVIDIA A100"), variant=variant))
        jaxpr = jax.make_jaxpr(functools.partial(kernel, tile=tile, variant=variant))(*inputs).jaxpr
        sizes = [math.prod(v.aval.shape) for e in equations(jaxpr) for v in e.outvars if hasattr(v.aval, "shape")]
        assert len(sizes) > 30
        assert max(sizes) == math.prod(shape) < sequence**2 / 1000


@pytest.mark.parametrize("choose", ["forward", "backward"])
@pytest.mark.parametrize("dropout", [0, 6554])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_tiles_do_not_depend_on_which_chips_were_asked_for_before(choose, dropout, head_dim):
    x, row = jax.ShapeDtypeStruct((1, 4096, 2, head_dim), jnp.float16), jax.ShapeDtypeStruct((1, 4096, 2), jnp.float32)
    variant = Variant(0.125, dropout=dropout)
    inputs = (x, x, x) if choose == "forward" else (x, x, x, x, row, x, row)

    def tiles(name: str) -> list:
        return list(getattr(attention.tiles, choose)(*inputs, target=Target.named(name), variant=variant))

    before = tiles("NVIDIA H200")
    assert tiles("NVIDIA A100") != before
    assert tiles("NVIDIA H200") == before


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_split_sequence_gathers_keys_and_scatters_their_gradients(kind):
    """And no more, in a program for four H100s: queries, outputs and their gradients stay where they are."""
    mesh = Target.named("NVIDIA H100").make_mesh((4,), ("i",), (kind,))
    split = NamedSharding(mesh, PartitionSpec(None, "i"))
    x = jax.ShapeDtypeStruct((2, 64, 4, 16), jnp.bfloat16, sharding=split)

    def gradient(*inputs):
        out, vjp = jax.vjp(functools.partial(dot_product_attention, is_causal=True), *inputs)
        return out, vjp(out)

    with jax.set_mesh(mesh):
        compiled = jax.jit(gradient, out_shardings=split).lower(x, x, x).compile()
    part, whole = 2 * x.size // 4, 2 * x.size
    assert collectives(compiled) == {"all-gather": 1, "reduce-scatter": 1}
    assert exchanged(compiled) == part + whole  # each device gives its keys and values, and its sums for all of them


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(key=(1, 8, 3, 16), value=(1, 8, 3, 16)), r"\(k g\) of `query` must be a multiple of 3"),
        (dict(key=(1, 8, 2, 32)), r"dimension `d` must agree: it is 16 in `query` and 32 in `key`"),
        (dict(value=(1, 9, 2, 16)), r"dimension `t` must agree: it is 8 in `key` and 9 in `value`"),
        (dict(query=(2, 8, 4, 16)), r"leading dimensions must agree"),
        (dict(query=(4, 16)), r"`query` has dimensions \(... s \(k g\) d\), so at least 3 of them"),
        (dict(query=()), r"`query` has dimensions"),
    ],
)
def test_shapes_that_do_not_match(change, message):
    shapes = dict(query=(1, 8, 4, 16), key=(1, 8, 2, 16), value=(1, 8, 2, 16)) | change
    with pytest.raises(ValueError, match=f"^dot_product_attention: {message}"):
        dot_product_attention(**{name: jnp.zeros(shape) for name, shape in shapes.items()})


def test_dtypes_that_do_not_match():
    x = jnp.zeros((1, 8, 2, 16))
    with pytest.raises(ValueError, match="must have one dtype, got float32, bfloat16 and float32; cast them"):
        dot_product_attention(x, x.astype(jnp.bfloat16), x)
    with pytest.raises(ValueError, match="must be floating point, got int32"):
        dot_product_attention(*[x.astype(jnp.int32)] * 3)


def test_scales_that_are_refused():
    x = jnp.zeros((1, 8, 2, 16))
    with pytest.raises(ValueError, match="must be a number known when tracing.*multiply `query`"):
        jax.jit(lambda scale: dot_product_attention(x, x, x, scale=scale))(0.1)
    with pytest.raises(ValueError, match="must be finite, got nan"):
        dot_product_attention(x, x, x, scale=math.nan)


@pytest.mark.parametrize(
    "head_dim, value_dim, scale, message",
    [
        (8, 16, 1.0, "head_dim is 8, and its kernels take 16 to 576"),
        (16, 577, 1.0, "value_dim is 577, and its kernels take 16 to 576"),
        (16, 16, 0.0, "scale is 0.0, and its kernels divide by it"),
    ],
)
def test_what_the_kernels_cannot_serve(head_dim, value_dim, scale, message):
    inputs = operands((1,), 8, 8, 1, 1, head_dim, value_dim)
    with pytest.raises(NotImplementedError, match=message):
        dot_product_attention(*inputs, scale=scale, implementation="interpret")
    assert_same(
        with_gradients(functools.partial(dot_product_attention, scale=scale, return_lse=True), *inputs),
        with_gradients(functools.partial(plain_attention, scale=scale), *inputs),
        TOLERANCE["float32"],
    )
