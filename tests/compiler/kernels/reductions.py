"""Reductions and scans, along padded and unpadded axes."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from tests.compiler.kernels import case, integers, like, normal, rowwise
from tests.compiler.kernels.elementwise import SPECIAL

REDUCTIONS = {
    "sum": jnp.sum,
    "max": jnp.max,
    "min": jnp.min,
    "prod": jnp.prod,
    "argmax": jnp.argmax,
    "argmin": jnp.argmin,
}
for _name, _function in REDUCTIONS.items():

    def _reduce(x, function=_function):
        kernel = lambda x: function(x + 1, axis=-1).astype(jnp.float32)  # noqa: E731
        return rowwise(kernel, 4, x, out=like(x, jnp.float32, x.shape[:-1]))

    case(normal(10, 24), name=f"{_name}_of_padded")(_reduce)
    case(normal(8, 16), name=f"{_name}_of_whole")(_reduce)
    case(integers(10, 24, low=-3, high=3), name=f"{_name}_of_integers")(_reduce)

case(np.where(SPECIAL == np.inf, np.nan, SPECIAL)[:, :7].copy(), name="nan_is_the_maximum")(
    lambda x: rowwise(lambda x: jnp.max(x, 1) + jnp.argmax(x, 1), 4, x, out=like(x, shape=(4,)))
)


@case(normal(10, 24))
def reduce_over_rows(x):
    return rowwise(lambda x: x + jnp.sum(x * 2 + 1, axis=0, keepdims=True), 10, x)


@case(normal(6, 3, 12))
def reduce_two_axes(x):
    return rowwise(lambda x: jnp.max(x + 1, axis=(1, 2)) + jnp.sum(x + 1, axis=(1, 2)), 4, x, out=like(x, shape=(6,)))


@case(normal(5, 12))
def reduce_everything(x):
    def kernel(x_ref, o_ref):
        x = x_ref[...]
        o_ref[0] = jnp.sum(x + 1)
        o_ref[1] = jnp.max(x - 5)
        o_ref[2] = jnp.all(x > -10).astype(jnp.float32) + jnp.any(x > 10)

    return pl.pallas_call(kernel, out_shape=like(x, shape=(3,)))(x)


@case(normal(6, 12))
def integer_logic_reductions(x):
    def body(x):
        bits = (x * 100).astype(jnp.int32) | 1
        return jnp.bitwise_and.reduce(bits, axis=1) + jnp.bitwise_or.reduce(bits, axis=1)

    return rowwise(body, 4, x, out=like(x, jnp.int32, (6,)))


for _reverse in (False, True):
    for _name, _function in {
        "cumsum": lax.cumsum,
        "cumprod": lax.cumprod,
        "cummax": lax.cummax,
        "cummin": lax.cummin,
    }.items():

        @case(normal(6, 12), name=f"{_name}{'_reversed' * _reverse}")
        def _scan(x, function=_function, reverse=_reverse):
            return rowwise(lambda x: function(x + 1, axis=1, reverse=reverse), 4, x)


@case(normal(6, 24))
def softmax(x):
    return rowwise(lambda x: jax.nn.softmax(x, axis=-1), 4, x)


@case(normal(6, 24), normal(24, seed=3))
def layer_norm(x, scale):
    def body(x, scale):
        mean = jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean((x - mean) ** 2, axis=-1, keepdims=True)
        return (x - mean) * lax.rsqrt(variance + 1e-6) * scale

    # The mean is over 24 lanes of 32: the others must not enter the variance.
    return rowwise(body, 4, x, scale)


@case(normal(6, 24), integers(6, low=0, high=24))
def cross_entropy(logits, labels):
    def body(x, label):
        logsumexp = jax.nn.logsumexp(x, axis=-1)
        hit = lax.broadcasted_iota(jnp.int32, x.shape, 1) == label[:, None]
        return logsumexp - jnp.sum(jnp.where(hit, x, 0.0), axis=-1)

    return rowwise(body, 4, logits, labels, out=like(logits, shape=(6,)))
