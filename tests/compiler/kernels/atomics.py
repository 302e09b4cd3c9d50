"""jtile's own operations on refs."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

import jtile
from tests.compiler.kernels import case, integers, like, normal

OPERATIONS = {
    "add": (jtile.atomic_add, ["int32", "uint32", "float32", "float16"]),
    "max": (jtile.atomic_max, ["int32", "uint32", "float32"]),
    "min": (jtile.atomic_min, ["int32", "uint32", "float32"]),
    "and": (jtile.atomic_and, ["int32", "uint32"]),
    "or": (jtile.atomic_or, ["int32"]),
    "xor": (jtile.atomic_xor, ["uint32"]),
}


def changed(kernel, x, start):
    """`kernel` on blocks of 4 rows of `x` and the whole of an output that begins as `start`."""

    def body(x_ref, _, o_ref):
        kernel(x_ref, o_ref)

    whole = pl.BlockSpec(start.shape, lambda i: (0,) * start.ndim)
    return pl.pallas_call(
        body,
        grid=(pl.cdiv(x.shape[0], 4),),
        in_specs=[pl.BlockSpec((4, x.shape[1]), lambda i: (i, 0)), whole],
        out_specs=whole,
        out_shape=like(start),
        input_output_aliases={1: 0},
    )(x, start)


for _name, (_function, _dtypes) in OPERATIONS.items():
    for _dtype in _dtypes:

        @case(
            integers(10, 12, low=-50 if _dtype == "float32" else 0).astype(_dtype),
            integers(12, low=0).astype(_dtype),
            name=f"atomic_{_name}_{_dtype}",
        )
        def _atomic(x, start, function=_function):
            def kernel(x_ref, o_ref):
                here = pl.program_id(0) * 4 + jnp.arange(4) < 10
                for row in range(4):  # rows past the end read 0, which not every operation ignores
                    mask = (x_ref[row] > 7) & here[row]
                    function(o_ref, (pl.ds(0, 12),), x_ref[row], mask=mask)
                    function(o_ref.at[pl.ds(2, 4)], ..., x_ref[row, pl.ds(4, 4)], mask=here[row])

            return changed(kernel, x, start)


@case(integers(7, 12), integers(7, 12, seed=1))
def atomic_results(x, start):
    """What was there before."""

    def kernel(x_ref, _, o_ref, old_ref):
        operations = [function for function, _ in OPERATIONS.values()] + [jtile.atomic_xchg]
        for i, function in enumerate(operations):
            old_ref[i] = function(o_ref.at[i], ..., x_ref[i])

    return pl.pallas_call(kernel, out_shape=[like(x)] * 2, input_output_aliases={1: 0})(x, start)


@case(normal(10, 12), integers(10, 12, low=0, high=5))
def atomic_histogram(x, bins):
    """Several lanes add to one element."""

    def kernel(x_ref, bins_ref, sums_ref, counts_ref, o_sums_ref, o_counts_ref):
        here = pl.program_id(0) * 4 + lax.broadcasted_iota(jnp.int32, (4, 12), 0) < 10
        jtile.atomic_add(o_sums_ref, bins_ref[...], x_ref[...], mask=here)
        jtile.atomic_add(o_counts_ref, (bins_ref[...],), 1, mask=here)

    rows = pl.BlockSpec((4, 12), lambda i: (i, 0))
    whole = pl.BlockSpec((5,), lambda i: (0,))
    return pl.pallas_call(
        kernel,
        grid=(3,),
        in_specs=[rows, rows, whole, whole],
        out_specs=[whole, whole],
        out_shape=[like(x, shape=(5,)), like(bins, shape=(5,))],
        input_output_aliases={2: 0, 3: 1},
    )(x, bins, jnp.zeros(5), jnp.zeros(5, jnp.int32))


@case(integers(4, 4, low=0, high=4), integers(4, low=0, high=4))
def atomic_compare_and_swap(x, start):
    def kernel(x_ref, o_ref):
        first = jtile.atomic_cas(o_ref.at[0], x_ref[0, 0], 7)
        jtile.atomic_cas(o_ref, x_ref[1], x_ref[2] + first)

    return changed(kernel, x, start)


@case(normal(10, 12))
def masked_loads_and_stores(x):
    def kernel(x_ref, o_ref):
        mask = lax.broadcasted_iota(jnp.int32, (4, 12), 1) % 3 > 0
        o_ref[...] = jnp.ones((4, 12))
        jtile.store(o_ref, jtile.load(x_ref, mask=mask, other=x_ref[...] * 2) + jtile.load(x_ref), mask=x_ref[...] < 1)
        column = jtile.load(o_ref.at[:, pl.ds(3, 1)], mask=mask[:, 1:2], other=0.0)
        jtile.store(o_ref.at[:, pl.ds(1, 1)], column, mask=True)

    block = pl.BlockSpec((4, 12), lambda i: (i, 0))
    return pl.pallas_call(kernel, grid=(3,), in_specs=[block], out_specs=block, out_shape=like(x))(x)


@case(normal(16, 32), normal(16, 24, seed=1), integers(32, 16, dtype=np.int8), integers(16, 16, dtype=np.int8, seed=1))
def products(a, b, x, y):
    def kernel(a_ref, b_ref, x_ref, y_ref, o_ref, n_ref):
        o_ref[...] = jtile.dot(a_ref[...], b_ref[...], trans_a=True, allow_tf32=False)
        n_ref[...] = jtile.dot(x_ref[...], y_ref[...], False, True)

    outs = [like(a, shape=(32, 24)), like(x, jnp.int32, (32, 16))]
    return pl.pallas_call(kernel, out_shape=outs)(a, b, x, y)
