"""Control flow."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from tests.compiler.kernels import case, like, normal, rowwise


@case(normal(6, 12))
def loop_with_several_carries(x):
    def body(x):
        def step(i, carry):
            a, b, total, fixed = carry
            return b, a + i, total + jnp.sum(a, axis=1), fixed

        a, b, total, _ = lax.fori_loop(1, 5, step, (x, x * 2, jnp.zeros(x.shape[0]), 3))
        return a + b * total[:, None]

    return rowwise(body, 4, x)


@case(normal(6, 12))
def loop_with_traced_bounds(x):
    def body(x):
        i = pl.program_id(0)
        return lax.fori_loop(i, 2 * i + 3, lambda j, c: c + j * x, x)

    return rowwise(body, 4, x)


@case(normal(6, 12))
def loop_without_counter(x):
    return rowwise(lambda x: lax.scan(lambda c, _: (c * 1.5, None), x, None, length=3)[0], 4, x)


@case(normal(6, 12))
def loop_nested(x):
    def body(x):
        inner = lambda i, c: lax.fori_loop(0, i + 1, lambda j, c: c + i * j, c)  # noqa: E731
        return lax.fori_loop(0, 4, inner, x)

    return rowwise(body, 4, x)


@case(normal(6, 12))
def loop_unrolled(x):
    return rowwise(lambda x: lax.fori_loop(0, 4, lambda i, c: c + i, x, unroll=2), 4, x)


@case(normal(6, 12))
def while_loop(x):
    def body(x):
        return lax.while_loop(lambda c: jnp.sum(jnp.abs(c[0])) < 500.0, lambda c: (c[0] * 2, c[1] + 1), (x, 0))[0]

    return rowwise(body, 4, x)


@case(normal(6, 12))
def branches(x):
    def body(x):
        i = pl.program_id(0)
        y = lax.cond(i > 0, lambda x: x * 2, lambda x: x - 1, x)
        return lax.switch(i, [lambda y: y + 1, lambda y: jnp.zeros_like(y), lambda y: y * y], y)

    return rowwise(body, 2, x)


@case(normal(6, 12))
def when(x):
    def kernel(x_ref, o_ref):
        o_ref[...] = jnp.zeros(o_ref.shape)

        @pl.when(pl.program_id(0) != 1)
        def _():
            o_ref[...] = x_ref[...]

    spec = pl.BlockSpec((2, 12), lambda i: (i, 0))
    return pl.pallas_call(kernel, grid=(3,), in_specs=[spec], out_specs=spec, out_shape=like(x))(x)


@case(normal(6, 12))
def custom_derivatives(x):
    @jax.custom_jvp
    def double(x):
        return 2 * x

    double.defjvp(lambda p, t: (double(*p), t[0]))

    @jax.custom_vjp
    def triple(x):
        return 3 * x

    triple.defvjp(lambda x: (triple(x), None), lambda _, g: (g,))
    return rowwise(lambda x: jax.checkpoint(jax.jit(double))(triple(x)), 4, x)
