"""Kernels that the fuzzer found wrong, as small as it could make them."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.compiler.kernels import case, integers, like, rowwise


@case(integers(3, 2, low=-4, high=4).astype(jnp.float8_e4m3fn))
def fuzzed_ragged_block_of_float8(x):
    """Triton converts no integer to float8, such as the 0 that is read past the edge."""
    return rowwise(lambda x: x.astype(jnp.float32), 2, x, out=like(x, np.float32))


@case(integers(4, 1))
def fuzzed_counter_spread_over_a_tile(x):
    return rowwise(lambda x: lax.fori_loop(0, 3, lambda i, c: c + jnp.broadcast_to(i, c.shape), x), 4, x)
