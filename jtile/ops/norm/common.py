"""What all norms share: their dtypes, and means and variances put together from parts."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jtile.compiler.params import CompilerParams
from jtile.compiler.primitives import joint_sums


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
# the mean square less the square of the mean is not.


def totals(terms: Sequence[jax.Array], axis: int) -> list[jax.Array]:
    """The sums of arrays over an axis, which stays."""
    return [jnp.expand_dims(total, axis) for total in joint_sums(terms, axis)]


def moments(total, squares, size):
    """The mean, and the sum of squares of differences to it, of `size` values less some number near them, from the sums
    of these differences and of their squares. Neither sum waits for the other.

    As many digits are lost as the square of the mean outweighs the variance by. So the number should be the mean s of
    some k of the values: since sum (x - μ)² ≥ k (s - μ)², no more than size / k times.
    """
    mean = total / size
    return mean, jnp.maximum(squares - total * mean, 0.0)


def combined(counts, mean, squares, axis, size):
    """The moments of sets along `axis` together, `size` values in all; a set of 0 values counts for nothing.

    Source: Chan, Golub and LeVeque, 1979.
    """
    # Sums of differences to the first mean: large means would be rounded as sums of all values are.
    first = jax.lax.slice_in_dim(mean, 0, 1, axis=axis[0])
    for dim in axis[1:]:
        first = jax.lax.slice_in_dim(first, 0, 1, axis=dim)
    whole = first + jnp.sum(counts * (mean - first), axis=axis, keepdims=True) / size
    return whole, jnp.sum(squares + counts * (mean - whole) ** 2, axis=axis, keepdims=True)


def summed(name: str, parts: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Sums over the first axis, few numbers to a program, all of which are read at once: XLA would launch two kernels
    for each of the arrays."""
    count, d = next(iter(parts.values())).shape
    lanes = min(64, max(8, pl.next_power_of_2(d // 256)))
    step = min(pl.next_power_of_2(count), 16384 // lanes)

    def kernel(refs, out):
        for key, ref in refs.items():
            add = lambda i, total, ref=ref: total + ref[pl.ds(i * step, step), :]  # noqa: E731
            total = jax.lax.fori_loop(0, pl.cdiv(count, step), add, jnp.zeros((step, lanes), jnp.float32))
            out[key][...] = jnp.sum(total, axis=0)

    rows = pl.cdiv(count, step) * step
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(d, lanes),),
        in_specs=[{key: pl.BlockSpec((rows, lanes), lambda i: (0, i)) for key in parts}],
        out_specs={key: pl.BlockSpec((lanes,), lambda i: (i,)) for key in parts},
        out_shape={key: jax.ShapeDtypeStruct((d,), jnp.float32) for key in parts},
        compiler_params=CompilerParams(num_warps=8, num_stages=1),
        name=name,
    )(parts)
