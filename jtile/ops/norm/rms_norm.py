"""RMSNorm: rows divided by the root of their mean square."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jtile.op import Implementation, check_known
from jtile.ops.norm.common import check_dtypes
from jtile.ops.norm.family import row_norm

# `h` is a result only with a residual: without one it is x, and need not be written.
op = row_norm(
    "rms_norm",
    "x: ... d, scale: d, residual?: ... d -> y: ... d, h?: ... d; rstd: ...",
    "x: ... d, scale: d, rstd: ..., dy: ... d, dh?: ... d -> dx: ... d, dscale: d",
)


def rms_norm(
    x: Float[Array, "*leading d"],
    scale: Float[Array, " d"],
    *,
    residual: Float[Array, "*leading d"] | None = None,
    epsilon: float = 1e-6,
    implementation: Implementation = None,
) -> Float[Array, "*leading d"] | tuple[Float[Array, "*leading d"], Float[Array, "*leading d"]]:
    """Root-mean-square normalisation of every row, after adding a residual if there is one.

    Sums are taken in float32; results have the dtype of `x`.

    Args:
        x: any leading shape, then the dimension to normalise.
        scale: one factor for each element of a row.
        residual: like `x`, added to it before the normalisation, in the same pass over memory.
        epsilon: added to the mean square.
        implementation: `None`, `"triton"`, `"xla"` or `"interpret"`, see `jtile.TileOp`.

    Returns:
        `y`, or `(y, x + residual)` with a residual.

    Raises:
        ValueError: `x` is not floating point, shapes or dtypes of `x` and `residual` differ, or `scale` does not match
            the last dimension of `x`.
        NotImplementedError: the named implementation cannot serve the call.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, section 3.

    Example:
        >>> import jax.numpy as jnp
        >>> import jtile
        >>> print(jtile.rms_norm(jnp.array([[3.0, 4.0]]), jnp.full(2, 100.0)).round())
        [[ 85. 113.]]
    """
    check_known("rms_norm", epsilon=epsilon)
    x = jnp.asarray(x)
    check_dtypes("rms_norm", x, residual=residual)
    y, h, _ = op(x, scale, residual, epsilon=float(epsilon), implementation=implementation)
    return y if residual is None else (y, h)
