"""Reductions and scans, along padded and unpadded axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from tests.compiler.kernels import case, integers, like, normal, rowwise, whole
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
        "cumlogsumexp": lax.cumlogsumexp,
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


def _argmax_of(x, axis):
    """Several results at once: the greatest elements and where they are."""

    def greater(a, b):
        (x, i), (y, j) = a, b
        first = (x > y) | ((x == y) & (i < j))
        return jnp.where(first, x, y), jnp.where(first, i, j)

    operands = x, lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return lax.reduce(operands, (jnp.float32(-jnp.inf), jnp.int32(2**31 - 1)), greater, (axis,))


REDUCED = {
    "by_a_function": (lambda x: lax.reduce(x, np.float32(0), lambda a, b: jnp.hypot(a, b), (0, 1)), normal(3, 5)),
    "several_values": (functools.partial(_argmax_of, axis=1), normal(3, 5)),
    "all_axes_at_once": (lambda x: jnp.argmin(x) * 100 + jnp.argmax(x), normal(3, 5)),
    "parity": (lambda x: lax.reduce_xor(x, axes=(1,)) + lax.reduce_or(x, axes=(1,)), integers(3, 5)),
    "truth": (
        lambda x: jnp.all(x > -1, axis=1) ^ jnp.any(x > 1.5, axis=1) ^ lax.reduce_xor(x > 0, axes=(1,)),
        normal(3, 5),
    ),
    "bytes": (
        lambda x: jnp.max(x, axis=1) - jnp.min(x, axis=1) + jnp.sum(x, axis=1, dtype=np.int8),
        integers(3, 5, dtype=np.int8),
    ),
    "halves": (lambda x: jnp.prod(x.astype(jnp.bfloat16), axis=1).astype(jnp.float32), normal(3, 5)),
    "nothing": (lambda x: lax.reduce_sum(x, axes=()) + 1, normal(3, 5)),
    "variance": (lambda x: jnp.var(x, axis=(0, 2)), normal(3, 5, 2)),
    "logsumexp": (lambda x: jax.nn.logsumexp(x, axis=0), normal(3, 5)),
}
for _name, (_function, _x) in REDUCED.items():
    case(_x, name=f"reduce_{_name}")(functools.partial(whole, _function))

EXTREME = np.array([-np.inf, -np.inf, 1, np.inf, np.inf, -np.inf, np.nan], np.float32)
SCANNED = {
    "cumlogsumexp_of_infinities": (lambda x: lax.cumlogsumexp(x[:6]), EXTREME),
    "cummax_of_nan": (lambda x: lax.cummax(x) + lax.cummin(x, reverse=True), EXTREME),
    "cumsum_of_rows": (lambda x: jnp.cumsum(x, axis=0) + lax.cumsum(x, axis=0, reverse=True), normal(5, 3)),
    "cumsum_of_integers": (lambda x: jnp.cumsum(x) + lax.cummax(x, reverse=True), integers(7)),
    "associative_scan": (
        lambda x: lax.associative_scan(lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1]), (x, x + 1), axis=1),
        normal(2, 7),
    ),
    "associative_scan_reversed": (lambda x: lax.associative_scan(jnp.maximum, x, reverse=True), normal(6)),
}
for _name, (_function, _x) in SCANNED.items():
    case(_x, name=f"scan_{_name}")(functools.partial(whole, _function))
