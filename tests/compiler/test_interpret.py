"""`interpret_pallas`, and the rewriting of functions that it stands on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from jtile.compiler.interpret import interpret_pallas
from jtile.compiler.rewrite import map_pallas_calls

X = np.arange(10, dtype=np.float32)


def kernel(x_ref, y_ref):
    y_ref[...] = x_ref[...] * 2 + jnp.sum(x_ref[...])


def blocked(x):
    """On blocks of 4, of which the last hangs over the edge."""
    block = pl.BlockSpec((4,), lambda i: (i,))
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(x.shape[0], 4),),
        in_specs=[block],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    )(x)


def expected(x):
    padded = np.pad(x, (0, -len(x) % 4)).reshape(-1, 4)
    return (padded * 2 + padded.sum(axis=1, keepdims=True)).reshape(-1)[: len(x)]


def test_past_the_edge_reads_zero():
    np.testing.assert_array_equal(interpret_pallas(blocked)(X), expected(X))


def test_blocks_outside_read_zero_and_are_dropped():
    def shift(x_ref, y_ref):
        y_ref[...] = x_ref[...] + 1

    def call(x):
        return pl.pallas_call(
            shift,
            grid=(6,),
            in_specs=[pl.BlockSpec((4,), lambda i: (i - 2,))],
            out_specs=pl.BlockSpec((4,), lambda i: (i * 1,)),
            out_shape=jax.ShapeDtypeStruct((16,), x.dtype),
        )(x)

    padded = np.concatenate([np.zeros(8), X])[:16] + 1
    np.testing.assert_array_equal(interpret_pallas(call)(X), padded)


def test_aliased_operands():
    def add(x_ref, y_ref, out_ref):
        out_ref[...] = x_ref[...] + y_ref[...]

    block = pl.BlockSpec((4,), lambda i: (i,))
    call = pl.pallas_call(
        add,
        grid=(3,),
        in_specs=[block, block],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct((10,), jnp.float32),
        input_output_aliases={1: 0},
    )
    np.testing.assert_array_equal(interpret_pallas(call)(X, X * 3), X * 4)


@jax.custom_vjp
def with_derivative(x, scale):
    return blocked(x) * scale


with_derivative.defvjp(
    lambda x, scale: (with_derivative(x, scale), scale),
    lambda scale, g: (blocked(g) * scale, None),
)


@jax.custom_jvp
def with_jvp(x):
    return blocked(x)


with_jvp.defjvp(lambda p, t: (with_jvp(*p), blocked(*t)))

WRAPPED = {
    "jit": jax.jit(blocked),
    "vmap": lambda x: jax.vmap(blocked)(jnp.stack([x, x]))[1],
    "checkpoint": jax.checkpoint(blocked),
    "scan": lambda x: lax.scan(lambda c, _: (c, blocked(x)), 0, None, length=2)[1][1],
    "while": lambda x: lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, blocked(c[1])), (0, x))[1],
    "cond": lambda x: lax.cond(x[1] > 0, blocked, lambda x: x, x),
    "custom_vjp": lambda x: with_derivative(x, 1.0),
    "custom_jvp": with_jvp,
    "nested": lambda x: jax.jit(lambda x: lax.fori_loop(0, 1, lambda i, c: jax.jit(blocked)(c), x))(x),
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("outer", [lambda f: f, jax.jit, lambda f: lambda x: jax.vmap(f)(x[None])[0]])
def test_kernels_are_found_everywhere(name, outer):
    found = outer(interpret_pallas(WRAPPED[name]))(jnp.asarray(X))
    np.testing.assert_array_equal(found, expected(X))


def test_kernels_are_found_under_shard_map():
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("x",))
    split = functools.partial(jax.shard_map, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    both = np.concatenate([expected(X[:5]), expected(X[5:])])
    np.testing.assert_array_equal(interpret_pallas(split(lambda x: blocked(x)))(X), both)
    np.testing.assert_array_equal(jax.jit(interpret_pallas(split(lambda x: blocked(x))))(X), both)


def test_custom_derivatives_are_rewritten_too():
    # Each row of 4 sums to itself four times over, and twice: the derivative of the sum is 4 + 2, or 2 + 2 at the edge.
    gradient = np.array([6.0] * 8 + [4.0] * 2) * 3
    loss = lambda f: lambda x: f(x, 3.0).sum()  # noqa: E731
    for f in (
        jax.grad(loss(interpret_pallas(with_derivative))),
        interpret_pallas(jax.grad(loss(with_derivative))),
        jax.jit(jax.grad(loss(interpret_pallas(jax.checkpoint(jax.jit(with_derivative)))))),
    ):
        np.testing.assert_array_equal(f(jnp.asarray(X)), gradient)
    primal, tangent = jax.jvp(interpret_pallas(with_jvp), (X,), (X,))
    np.testing.assert_array_equal(primal, tangent)


def test_rules_of_derivatives_get_their_symbolic_zeros():
    @jax.custom_jvp
    def scaled(x, scale):
        return blocked(x) * scale

    def jvp(primals, tangents):
        (x, scale), (x_dot, scale_dot) = primals, tangents
        assert isinstance(scale_dot, SymbolicZero) and scale_dot.shape == ()
        return scaled(x, scale), blocked(x_dot) * scale

    scaled.defjvp(jvp, symbolic_zeros=True)
    primal, tangent = jax.jvp(interpret_pallas(lambda x: scaled(x, 3.0)), (X,), (X,))
    np.testing.assert_array_equal(primal, tangent)


def test_arguments_and_results_are_pytrees():
    def f(pair, *, how, scale=None):
        assert how == "twice" and scale is None
        return {"y": blocked(pair[0]), "how": how, "rest": (pair[1], None)}

    found = interpret_pallas(f)((X, 7), how="twice")
    np.testing.assert_array_equal(found["y"], expected(X))
    assert found["how"] == "twice" and found["rest"] == (7, None)


def test_replace_takes_parameters_and_operands():
    def double(params, x):
        assert params["grid_mapping"].grid == (3,)
        return [x * 2]

    np.testing.assert_array_equal(map_pallas_calls(lambda x: blocked(x) + 1, double)(X), X * 2 + 1)
