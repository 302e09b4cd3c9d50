"""RMSNorm beside a gate, as Mamba-2 and gated linear attention end a layer."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jtile.op import Implementation, check_known
from jtile.ops.norm.common import check_dtypes
from jtile.ops.norm.family import row_norm

op = row_norm(
    "gated_rms_norm",
    "x: ... d, gate: ... d, scale: d -> y: ... d; rstd: ...",
    "x: ... d, gate: ... d, scale: d, rstd: ..., dy: ... d -> dx: ... d, dgate: ... d, dscale: d",
)


def gated_rms_norm(
    x: Float[Array, "*leading d"],
    gate: Float[Array, "*leading d"],
    scale: Float[Array, " d"],
    *,
    norm_before_gate: bool = False,
    epsilon: float = 1e-6,
    implementation: Implementation = None,
) -> Float[Array, "*leading d"]:
    """`rms_norm(x * silu(gate), scale)`, or `rms_norm(x, scale) * silu(gate)`, in one pass.

    Mamba-2 normalises what is gated already, which is the default. Gated DeltaNet, and the models that follow it, gate
    what is normalised: `norm_before_gate=True`, as Mamba-2's own code calls it. Computed in float32 and rounded once;
    the gradients of `x` and `gate` are one pass, too.

    Args:
        x: any leading shape, then the dimension to normalise.
        gate: the shape and dtype of `x`.
        scale: one factor for each element of a row.
        norm_before_gate: whether the gate multiplies what is normalised already.
        epsilon: added to the mean square.
        implementation: `None`, `"triton"`, `"xla"` or `"interpret"`, see `jtile.TileOp`.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        ValueError: `x` is not floating point, shapes or dtypes of `x` and `gate` differ, or `scale` does not match the
            last dimension of `x`.
        NotImplementedError: the named implementation cannot serve the call.

    Sources: Dao and Gu, Transformers are SSMs, 2024 (arXiv:2405.21060), section 7; Yang, Kautz and Hatamizadeh, Gated
    Delta Networks, 2024 (arXiv:2412.06464), section 3.

    Example:
        >>> import jax.numpy as jnp
        >>> import jtile
        >>> x, gate = jnp.array([3.0, 4.0]), jnp.array([0.0, 100.0])
        >>> print(jtile.gated_rms_norm(x, gate, jnp.ones(2)), jtile.gated_rms_norm(-x, x, jnp.zeros(2)))
        [0.        1.4142135] [-0. -0.]
    """
    check_known("gated_rms_norm", norm_before_gate=norm_before_gate, epsilon=epsilon)
    x, gate = jnp.asarray(x), jnp.asarray(gate)
    check_dtypes("gated_rms_norm", x, gate=gate)
    y, _ = op(x, gate, scale, epsilon=float(epsilon), gate_last=bool(norm_before_gate), implementation=implementation)
    return y
