"""Control flow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from tests.compiler.kernels import case, integers, like, normal, rowwise


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


SCANS = {
    "sums_of_rows": lambda x: lax.scan(lambda total, row: (total + row, total * row), jnp.zeros(12), x),
    "in_reverse": lambda x: lax.scan(lambda total, row: (total + row, total * row), jnp.zeros(12), x, reverse=True),
    "unrolled": lambda x: lax.scan(lambda total, row: (total * 0.5 + row, total), jnp.zeros(12), x, unroll=2),
    "of_several": lambda x: lax.scan(
        lambda c, z: ((c[0] + jnp.where(z[1], z[0], 0), c[1] + z[2]), (c[1], z[1] & (c[1] > 2))),
        (jnp.zeros(12), 0),
        (x, x[:, 0] > 0, jnp.arange(6)),
    ),
    "without_carry": lambda x: lax.map(lambda row: row - jnp.max(row), x),
    "of_scalars": lambda x: lax.scan(lambda c, z: (c * 0.5 + z, c), 1.0, jnp.sum(x, axis=1)),
    "nested": lambda x: lax.scan(
        lambda c, row: (c + jnp.sum(lax.scan(lambda a, z: (a + z, a * z), 0.0, row)[1]), c), jnp.float32(0), x
    ),
}
for _name, _function in SCANS.items():

    @case(normal(6, 12), name=f"scan_{_name}")
    def _scan(x, function=_function):
        outs = jax.eval_shape(lambda x: jax.tree.leaves(function(x)), x)

        def kernel(x_ref, *out_refs):
            for ref, out in zip(out_refs, jax.tree.leaves(function(x_ref[...])), strict=True):
                ref[...] = out

        return pl.pallas_call(kernel, out_shape=outs)(x)


@case(normal(6, 12))
def scan_that_reads_and_writes_refs(x):
    def kernel(x_ref, o_ref):
        def step(total, i):
            row = x_ref[i]
            o_ref[i] = row + total
            return total + jnp.sum(row), jnp.max(row)

        total, largest = lax.scan(step, 0.0, jnp.arange(6)[::-1])
        o_ref[0] = jnp.full(12, total + jnp.sum(largest))

    return pl.pallas_call(kernel, out_shape=like(x))(x)


@case(integers(4, low=0, high=6))
def while_loop_of_no_turns(limits):
    """Its counter stays where it was."""

    def kernel(limits_ref, o_ref):
        @pl.loop(0, 4)
        def _(i):
            limit = limits_ref[i]
            o_ref[i], o_ref[4 + i] = lax.while_loop(lambda c: c[0] < limit, lambda c: (c[0] + 1, c[1] * 2), (3, i))

    return pl.pallas_call(kernel, out_shape=like(limits, shape=(8,)))(limits)


@case(integers(8, low=1, high=100))
def while_loops_of_any_carry(x):
    def kernel(x_ref, o_ref):
        def collatz(c):
            n, steps, going = c
            n = jnp.where(n % 2 == 0, n // 2, 3 * n + 1)
            return n, steps + going.astype(jnp.int32), going & (n != 1)

        start = x_ref[...], jnp.zeros(8, jnp.int32), x_ref[...] != 1
        o_ref[...] = lax.while_loop(lambda c: jnp.any(c[2]), collatz, start)[1]

    return pl.pallas_call(kernel, out_shape=like(x))(x)


@case(normal(8, 12), integers(4, low=0, high=4))
def branches_in_loops(x, kinds):
    """Branches that write refs, hold loops, give several values, and stand in branches."""

    def kernel(x_ref, kinds_ref, o_ref):
        def step(i, total):
            row = x_ref[2 * i + 1]

            def doubled(row):
                o_ref[i] = row
                return row * 2, 1, row > 0

            def looped(row):
                return lax.fori_loop(0, i, lambda j, r: r + j, row), i, row > 1

            def nested(row):
                return lax.cond(i > 1, lambda: doubled(row), lambda: (row, 2, row < 0))

            row, count, positive = lax.switch(kinds_ref[i], [doubled, looped, nested], row)
            return total + jnp.where(positive, row, count)

        o_ref[...] = jnp.zeros(o_ref.shape)
        o_ref[4] = lax.fori_loop(0, 4, step, jnp.zeros(12))

    return pl.pallas_call(kernel, out_shape=like(x, shape=(5, 12)))(x, kinds)


# What functions may be wrapped in

_logged = lax.composite(lambda x: jnp.log(x * x + 1), name="jtile.test")


@jax.custom_batching.custom_vmap
def _mapped(x):
    return x * 3


@_mapped.def_vmap
def _(size, mapped, x):
    return _mapped(x), mapped[0]


WRAPPED = {
    "composite": _logged,
    "custom_vmap": _mapped,
    "platform_dependent": lambda x: lax.platform_dependent(x, tpu=jnp.cos, default=jnp.sin),
    "named": lambda x: checkpoint_name(x * 2, "doubled") + 1,
    "traced_before": lambda x: jax.jit(jnp.exp).trace(x)(x),
    "stop_gradient": lambda x: jax.grad(lambda y: jnp.sum(y * lax.stop_gradient(y) + y * y))(x),
    "vjp": lambda x: jax.vjp(lambda y: jnp.sin(y) * y, x)[1](x)[0],
    "checkpointed_vjp": lambda x: jax.vjp(jax.checkpoint(lambda y: jnp.exp(y) * y), x)[1](x)[0],
    "known_multiples": lambda x: x + pl.multiple_of(pl.program_id(0) * 8, 8) + plgpu.max_contiguous(jnp.arange(12), 4),
    "even_constant": jax.jit(lambda x: x + np.arange(12) * 3 + np.arange(7, 55).reshape(4, 12)),
    "listed_constant": jax.jit(
        lambda x: x * np.array([2.0, 3.0, 5.0, 7.0] * 3, np.float32) + np.eye(4, 12, dtype=np.int32)
    ),
    "uniform_constant": jax.jit(lambda x: x + np.full((4, 12), 2.5, np.float32)),
    "constant_indices": jax.jit(lambda x: x[:, np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8])]),
    "empty": lambda x: jnp.where(x > -100, x, lax.empty(x.shape, x.dtype)),
}
for _name, _function in WRAPPED.items():
    case(normal(6, 12), name=f"wrapped_{_name}")(functools.partial(rowwise, _function, 4))


@case(normal(6, 12), native=True)
def prints_and_checks(x):
    def body(x):
        pl.debug_print("x is {}", x)
        pl.debug_check(jnp.all(x < 9), "x is small")
        return x

    return rowwise(body, 4, x)


@case(normal(6, 12), native=True)
def grid_axes_with_names(x):
    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...] + lax.axis_index("rows")

    spec = pl.BlockSpec((2, 12), lambda i: (i, 0))
    return pl.pallas_call(kernel, grid=(("rows", 3),), in_specs=[spec], out_specs=spec, out_shape=like(x))(x)


@case(normal(8, 16), native=True)
def values_on_a_mesh(x):
    """What is left of shardings where a kernel is written under explicit axes: nothing."""
    mesh = AbstractMesh((1,), ("data",), (AxisType.Explicit,))

    def kernel(x_ref, o_ref):
        with jax.sharding.use_abstract_mesh(mesh):
            o_ref[...] = jax.sharding.reshard(x_ref[...], PartitionSpec()) + 1

    return pl.pallas_call(kernel, out_shape=like(x))(x)
