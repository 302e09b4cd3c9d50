"""Kernels that the fuzzer found wrong, as small as it could make them."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jtile.compiler.params import CompilerParams
from tests.compiler.kernels import case, integers, like, normal, rowwise


@case(integers(3, 2, low=-4, high=4).astype(jnp.float8_e4m3fn))
def fuzzed_ragged_block_of_float8(x):
    """Triton converts no integer to float8, such as the 0 that is read past the edge."""
    return rowwise(lambda x: x.astype(jnp.float32), 2, x, out=like(x, np.float32))


@case(integers(4, 1))
def fuzzed_counter_spread_over_a_tile(x):
    return rowwise(lambda x: lax.fori_loop(0, 3, lambda i, c: c + jnp.broadcast_to(i, c.shape), x), 4, x)


@case(integers(4, 8))
def fuzzed_carry_passed_on(x):
    """Triton takes `b` to stay what it is, since at first it is what `a` is at first."""
    return rowwise(lambda x: lax.fori_loop(0, 3, lambda _, ab: (x * 2, ab[0]), (x, x))[1], 4, x)


@case(integers(12, 1, 1, low=1, high=9).astype(np.float32))
def fuzzed_products_of_single_numbers(x):
    """On a GPU the products from the eighth on were 0."""
    return rowwise(lambda x: jnp.einsum("bij,bjk->bik", x, x), 12, x)


@case(np.ones((2, 32), jnp.bfloat16))
def fuzzed_product_beside_a_block_of_two_rows(x):
    """A block too small for the Tensor Memory Accelerator: an illegal instruction."""
    return rowwise(lambda x: x + jnp.dot(x[:, :16], x[:, 16:].T)[:, :1], 2, x)


@case(normal(8, 24))
def fuzzed_windows_that_begin_anywhere(x):
    """Triton has the Tensor Memory Accelerator take rows from multiples of 16 bytes alone."""

    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...] + pl.program_id(0)

    return pl.pallas_call(
        kernel,
        grid=(9,),
        in_specs=[pl.BlockSpec((8, pl.Element(16)), lambda i: (0, i))],
        out_specs=pl.BlockSpec((None, 8, 16), lambda i: (i, 0, 0)),
        out_shape=like(x, shape=(9, 8, 16)),
        compiler_params=CompilerParams(tma=True),
    )(x)
