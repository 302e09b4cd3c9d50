"""LayerNorm: rows less their mean, divided by their standard deviation."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jtile.op import Implementation, check_known
from jtile.ops.norm.common import check_dtypes
from jtile.ops.norm.family import row_norm

op = row_norm(
    "layer_norm",
    "x: ... d, scale: d, bias?: d, residual?: ... d -> y: ... d, h?: ... d; mean: ..., rstd: ...",
    "x: ... d, scale: d, mean: ..., rstd: ..., dy: ... d, dh?: ... d -> dx: ... d, dscale: d, dbias?: d",
    centred=True,
)


def layer_norm(
    x: Float[Array, "*leading d"],
    scale: Float[Array, " d"],
    bias: Float[Array, " d"] | None = None,
    *,
    residual: Float[Array, "*leading d"] | None = None,
    epsilon: float = 1e-6,
    implementation: Implementation = None,
) -> Float[Array, "*leading d"] | tuple[Float[Array, "*leading d"], Float[Array, "*leading d"]]:
    """Layer normalisation of every row, after adding a residual if there is one.

    With h = x + residual, y = (h − mean(h)) / √(var(h) + ε) · scale + bias. Sums are taken in float32, the variance
    from differences to the mean, so that it stays right where the mean is large; results have the dtype of `x`.

    Args:
        x: any leading shape, then the dimension to normalise.
        scale: one factor for each element of a row.
        bias: one summand for each element of a row.
        residual: like `x`, added to it before the normalisation, in the same pass over memory.
        epsilon: added to the variance.
        implementation: `None`, `"triton"`, `"xla"` or `"interpret"`, see `jtile.TileOp`.

    Returns:
        `y`, or `(y, x + residual)` with a residual.

    Raises:
        ValueError: `x` is not floating point, shapes or dtypes of `x` and `residual` differ, or `scale` or `bias` does
            not match the last dimension of `x`.
        NotImplementedError: the named implementation cannot serve the call.

    Source: Ba, Kiros and Hinton, Layer Normalization, 2016 (arXiv:1607.06450), section 3.

    Example:
        >>> import jax.numpy as jnp
        >>> import jtile
        >>> print(jtile.layer_norm(jnp.array([[1.0, 3.0]]), jnp.full(2, 10.0), jnp.array([0.0, 5.0])).round())
        [[-10.  15.]]
    """
    check_known("layer_norm", epsilon=epsilon)
    x = jnp.asarray(x)
    check_dtypes("layer_norm", x, residual=residual)
    y, h, *_ = op(x, scale, bias, residual, epsilon=float(epsilon), implementation=implementation)
    return y if residual is None else (y, h)
