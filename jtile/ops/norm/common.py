"""What all norms share: their dtypes, and means and variances put together from parts."""

import jax
import jax.numpy as jnp


def wide(x):
    """`x` in the type that sums are taken in."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_dtypes(name: str, x: jax.Array, **others: jax.Array | None) -> None:
    """Refuse an `x` that is not floating point, and operands like it that have another dtype."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name}: `x` must be floating point, got {x.dtype}; cast it to the dtype to compute in")
    for other, array in others.items():
        if array is not None and array.dtype != x.dtype:
            raise ValueError(
                f"{name}: `{other}` must have the dtype of `x`, {x.dtype}, got {array.dtype}; cast one of them"
            )


# The mean of values, and the sum of squares of their differences to it: exact where the mean is large beside them, as
# the mean square less the square of the mean is not. Sources: Welford 1962 (one value more), and Chan, Golub and
# LeVeque 1979 (two sets together).


def updated(moments, value, inside, count):
    """The moments of `count` values, of which `value` is the last; as they were where it is not `inside`."""
    mean, squares = moments
    difference = jnp.where(inside, value - mean, 0.0)
    mean = mean + difference / count
    return mean, squares + difference * (value - mean)


def combined(counts, mean, squares, axis, size):
    """The moments of sets along `axis` together, `size` values in all; a set of 0 values counts for nothing."""
    whole = jnp.sum(counts * mean, axis=axis, keepdims=True) / size
    return whole, jnp.sum(squares + counts * (mean - whole) ** 2, axis=axis, keepdims=True)
