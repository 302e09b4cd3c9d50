"""Memory that a program has for itself, and operands that index maps read."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tests.compiler.kernels import by_tiles, case, integers, like, normal


@case(normal(40, 48), normal(48, 56, seed=1))
def scratch_matmul(a, b, bm=16, bn=32, bk=16):
    """The accumulator is a scratch ref, as Pallas kernels for TPUs have it."""

    def kernel(a_ref, b_ref, o_ref, acc_ref):
        acc_ref[...] = jnp.zeros_like(acc_ref)

        @pl.loop(0, a.shape[1] // bk)
        def _(k):
            here = pl.ds(k * bk, bk)
            acc_ref[...] += jnp.dot(a_ref[:, here], b_ref[here, :], preferred_element_type=jnp.float32)

        o_ref[...] = acc_ref[...].astype(o_ref.dtype)

    return by_tiles(kernel, a, b, bm, bn, scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)])


@case(normal(6, 12))
def scratch_in_loops_and_branches(x):
    def kernel(x_ref, o_ref, total_ref, count_ref, *, swapped_ref):
        count_ref[...] = jnp.int32(0)
        swapped_ref[...] = x_ref[...]
        total_ref[...] = x_ref[...]

        @pl.loop(0, 5)
        def _(i):
            @pl.when(i % 2 == 0)
            def _():
                total_ref[...], swapped_ref[...] = swapped_ref[...] * 0.5, total_ref[...]
                count_ref[...] += 1

            total_ref[...] = jnp.where(x_ref[...] > 0, total_ref[...] + i, total_ref[...])

        lax.while_loop(lambda c: c > 1, lambda c: (count_ref.__setitem__(..., count_ref[...] + c), c - 1)[1], 4)
        o_ref[...] = total_ref[...] - swapped_ref[...] * count_ref[...]

    spec = pl.BlockSpec((4, 12), lambda i: (i, 0))
    return pl.pallas_call(
        kernel,
        grid=(2,),
        in_specs=[spec],
        out_specs=spec,
        out_shape=like(x),
        scratch_shapes=dict(
            total_ref=pl.ANY((4, 12), jnp.float32),
            count_ref=pl.ANY((), jnp.int32),
            swapped_ref=pl.ANY((4, 12), jnp.float32),
        ),
    )(x)


@case(normal(8, 16), integers(8, low=0, high=8))
def scratch_by_parts(x, rows):
    """Rows, columns, strides, arrays and masks of a scratch ref, and a ref of a ref."""

    def kernel(x_ref, rows_ref, o_ref, s_ref):
        s_ref[...] = jnp.zeros_like(s_ref)
        s_ref[:, 3] = x_ref[:, 3]
        s_ref[pl.ds(0, 4), pl.ds(8, 8)] = x_ref[4:, :8]

        @pl.loop(0, 8)
        def _(i):
            s_ref[i] += x_ref[rows_ref[i]] * i
            s_ref[rows_ref[i], i] = s_ref[i, rows_ref[i]] + 1

        s_ref.at[pl.ds(4, 4)][1:3, ::2] = jnp.full((2, 8), 7.0)
        s_ref.at[pl.ds(rows_ref[1], 1)][...] *= 2
        o_ref[...] = s_ref[...] + s_ref[rows_ref[...], :] + s_ref[jnp.arange(8), rows_ref[...]][:, None]

    return pl.pallas_call(kernel, out_shape=like(x), scratch_shapes=[pl.ANY(x.shape, x.dtype)])(x, rows)


@case(normal(8, 16))
def scratch_for_a_while(x):
    """`pl.run_scoped`, in a loop and in another; `jax.new_ref`."""

    def kernel(x_ref, o_ref):
        def turn(i, total):
            def body(a_ref, b_ref):
                a_ref[...] = x_ref[...] * i
                b_ref[...] = jnp.zeros_like(b_ref)
                pl.run_scoped(lambda c_ref: (c_ref.__setitem__(..., a_ref[...]), b_ref.__setitem__(..., c_ref[...])), s)
                return total + b_ref[...] * 2

            s = pl.ANY(x.shape, x.dtype)
            return pl.run_scoped(body, s, b_ref=s)

        total = jax.new_ref(lax.fori_loop(0, 3, turn, x_ref[...]))
        total[...] += 1
        o_ref[...] = jax.freeze(total)

    return pl.pallas_call(kernel, out_shape=like(x))(x)


@case(np.array([2, 0, 1], np.int32), np.array([[1], [-3], [5]], np.int32), normal(10, 12))
def prefetched_operands(order, shifts, x):
    """Index maps and the kernel read them; the last block hangs over, and output blocks are chosen as well."""

    def kernel(order_ref, shifts_ref, x_ref, _, o_ref):
        i = pl.program_id(0)
        o_ref[...] = x_ref[...] + order_ref[i] * 10 + jnp.sum(shifts_ref[...])

    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(3,),
        in_specs=[
            pl.BlockSpec((4, 12), lambda i, order, shifts: (order[i], 0)),
            pl.BlockSpec((4, 12), lambda i, order, shifts: (order[order[i]], 0)),
        ],
        out_specs=pl.BlockSpec((4, 12), lambda i, order, shifts: (order[order[i]], 0)),
    )
    zeros = jnp.zeros(x.shape, x.dtype)
    return pl.pallas_call(kernel, grid_spec=grid_spec, out_shape=like(x), input_output_aliases={3: 0})(
        order, shifts, x, zeros
    )


@case(normal(4, 6, 16), np.array([3, 5, 0, 6], np.int32))
def prefetched_lengths(x, lengths):
    """Under `jax.vmap`, with as many turns as each program is told."""

    def call(x, shift):
        def kernel(lengths_ref, x_ref, o_ref, total_ref):
            total_ref[...] = jnp.zeros_like(total_ref)

            @pl.loop(0, lengths_ref[pl.program_id(0)])
            def _(i):
                total_ref[...] += x_ref[i]

            o_ref[...] = total_ref[...] + shift.shape[0]

        grid_spec = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(4,),
            in_specs=[pl.BlockSpec((None, 6, 16), lambda i, lengths: (i, 0, 0))],
            out_specs=pl.BlockSpec((None, 16), lambda i, lengths: (i, 0)),
            scratch_shapes=[pltpu.VMEM((16,), jnp.float32)],
        )
        return pl.pallas_call(kernel, grid_spec=grid_spec, out_shape=like(x, shape=(4, 16)))(lengths, x)

    return jax.vmap(call, in_axes=(0, None))(jnp.stack([x, 2 * x]), jnp.zeros(3))


@case(normal(10, 36), np.int32(3), np.int32(3))
def grid_of_traced_sizes(x, rows, columns):
    """Sizes that are known when the kernel runs, beside one that is known before, and one that `jax.vmap` adds."""

    def call(x):
        def kernel(x_ref, o_ref):
            o_ref[...] = x_ref[...] + pl.program_id(0) + 10 * pl.program_id(2)

        block = pl.BlockSpec((4, 8), lambda i, j, k: (i, 2 * k + j))
        return pl.pallas_call(kernel, grid=(rows, 2, columns), in_specs=[block], out_specs=block, out_shape=like(x))(x)

    return jax.vmap(call)(jnp.stack([x, -x]))


@case(normal(8, 16), np.array([1, 0], np.int32), np.int32(2))
def grid_of_traced_size_with_prefetch(x, order, size):
    def kernel(order_ref, x_ref, _, o_ref, s_ref):
        s_ref[...] = x_ref[...]
        o_ref[...] = s_ref[...] + order_ref[pl.program_id(0)] * pl.num_programs(0)

    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(size,),
        in_specs=[pl.BlockSpec((4, 16), lambda i, order: (order[i], 0))] * 2,
        out_specs=pl.BlockSpec((4, 16), lambda i, order: (i, 0)),
        scratch_shapes=[pl.ANY((4, 16), jnp.float32)],
    )
    return pl.pallas_call(kernel, grid_spec=grid_spec, out_shape=like(x), input_output_aliases={2: 0})(
        order, x, jnp.zeros_like(x)
    )
