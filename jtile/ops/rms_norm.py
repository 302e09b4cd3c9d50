"""RMSNorm over the last dimension: y = h · rstd · scale with rstd = 1 / √(mean(h²) + ε), where h = x (+ residual)."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jtile.compiler.params import CompilerParams
from jtile.op import Implementation, TileOp, check_known

# Spec. `h` is a result only with a residual: without one it is x, and need not be written.

forward = TileOp("rms_norm", "x: ... d, scale: d, residual?: ... d -> y: ... d, h?: ... d; rstd: ...", whole="d")
backward = TileOp(
    "rms_norm_backward",
    "h: ... d, scale: d, rstd: ..., dy: ... d, dh?: ... d -> dx: ... d, dscale: d",
    whole="d",
)


# Reference.


def _rounded(h):
    """`h` as the next layer will read it, in its dtype: XLA may keep more digits of a sum than it writes."""
    return jax.lax.reduce_precision(h, jnp.finfo(h.dtype).nexp, jnp.finfo(h.dtype).nmant)


@forward.reference
def forward_reference(x, scale, residual, *, epsilon):
    h = x if residual is None else _rounded(x + residual)
    h32 = h.astype(jnp.float32)
    rstd = jax.lax.rsqrt(jnp.mean(h32 * h32, axis=-1) + epsilon)
    y = (h32 * rstd[..., None] * scale.astype(jnp.float32)).astype(x.dtype)
    return y, None if residual is None else h, rstd


@backward.reference
def backward_reference(h, scale, rstd, dy, dh):
    normalized = h.astype(jnp.float32) * rstd[..., None]
    dy = dy.astype(jnp.float32)
    dnormalized = dy * scale.astype(jnp.float32)
    # h̄ = rstd · (g − n · mean(g · n)), g = dy · scale, n = h · rstd
    dx = rstd[..., None] * (dnormalized - normalized * jnp.mean(dnormalized * normalized, axis=-1, keepdims=True))
    if dh is not None:
        dx = dx + dh.astype(jnp.float32)
    dscale = jnp.sum(dy * normalized, axis=range(h.ndim - 1))
    return dx.astype(h.dtype), dscale


# Kernel. A program owns whole rows; the backward one strides over many, so that few partial `dscale` are left to add.


def _rows_per_block(d: int) -> int:
    return max(1, 8192 // pl.next_power_of_2(d))


def _warps(d: int) -> int:
    return min(16, max(4, pl.next_power_of_2(d) // 1024))


@forward.kernel
def forward_kernel(x, scale, residual, *, epsilon):
    rows, d = x.shape
    block = min(_rows_per_block(d), pl.next_power_of_2(rows))

    def rms_norm_kernel(x_ref, scale_ref, *refs):
        residual_ref, y_ref, h_ref, rstd_ref = refs if residual is not None else (None, refs[0], None, refs[1])
        h = x_ref[...]
        if residual_ref is not None:
            h = h + residual_ref[...]
            h_ref[...] = h
        h = h.astype(jnp.float32)
        rstd = jax.lax.rsqrt(jnp.sum(h * h, axis=1) / d + epsilon)
        y_ref[...] = (h * rstd[:, None] * scale_ref[...].astype(jnp.float32)).astype(y_ref.dtype)
        rstd_ref[...] = rstd

    row = pl.BlockSpec((block, d), lambda i: (i, 0))
    sums = [] if residual is None else [residual]
    out = pl.pallas_call(
        rms_norm_kernel,
        grid=(pl.cdiv(rows, block),),
        in_specs=[row, pl.BlockSpec((d,), lambda i: (0,)), *[row] * len(sums)],
        out_specs=[row, *[row] * len(sums), pl.BlockSpec((block,), lambda i: (i,))],
        out_shape=[x, *sums, jax.ShapeDtypeStruct((rows,), jnp.float32)],
        compiler_params=CompilerParams(num_warps=_warps(d), num_stages=1),
        name="rms_norm",
    )(x, scale, *sums)
    return out if residual is not None else (out[0], None, out[1])


@backward.kernel
def backward_kernel(h, scale, rstd, dy, dh):
    rows, d = h.shape
    block = max(1, min(_rows_per_block(d) // 2, pl.next_power_of_2(rows)))
    programs = min(pl.cdiv(rows, block), 264)  # two for each multiprocessor of the largest chips
    steps = pl.cdiv(pl.cdiv(rows, block), programs)

    def rms_norm_backward_kernel(h_ref, scale_ref, rstd_ref, dy_ref, *refs):
        dh_ref, dx_ref, dscale_ref = refs if dh is not None else (None, *refs)
        scale = scale_ref[...].astype(jnp.float32)

        def step(i, dscale):
            at = pl.ds(i * block, block)
            rstd = rstd_ref[at]
            normalized = h_ref[at, :].astype(jnp.float32) * rstd[:, None]
            dy = dy_ref[at, :].astype(jnp.float32)
            dnormalized = dy * scale
            mean = jnp.sum(dnormalized * normalized, axis=1) / d
            dx = rstd[:, None] * (dnormalized - normalized * mean[:, None])
            if dh_ref is not None:
                dx = dx + dh_ref[at, :].astype(jnp.float32)
            dx_ref[at, :] = dx.astype(dx_ref.dtype)
            return dscale + jnp.sum(dy * normalized, axis=0)

        dscale_ref[...] = jax.lax.fori_loop(0, steps, step, jnp.zeros((d,), jnp.float32))

    chunk = pl.BlockSpec((steps * block, d), lambda i: (i, 0))
    scalars = pl.BlockSpec((steps * block,), lambda i: (i,))
    given = [] if dh is None else [dh]
    dx, partial = pl.pallas_call(
        rms_norm_backward_kernel,
        grid=(programs,),
        in_specs=[chunk, pl.BlockSpec((d,), lambda i: (0,)), scalars, chunk, *[chunk] * len(given)],
        out_specs=[chunk, pl.BlockSpec((None, d), lambda i: (i, 0))],
        out_shape=[h, jax.ShapeDtypeStruct((programs, d), jnp.float32)],
        compiler_params=CompilerParams(num_warps=_warps(d), num_stages=1),
        name="rms_norm_backward",
    )(h, scale, rstd, dy, *given)
    return dx, jnp.sum(partial, axis=0)


# Derivative. With a residual the rule needs h alone; x and the residual share its cotangent.


@forward.transpose
def forward_transpose(operands, results, cotangents, *, epsilon, implementation):
    del epsilon  # it is in rstd
    x, scale, residual = operands
    _, h, rstd = results
    dy, dh, _ = cotangents
    dx, dscale = backward(x if residual is None else h, scale, rstd, dy, dh, implementation=implementation)
    return dx, dscale, None if residual is None else dx


# Public name.


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
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"rms_norm: `x` must be floating point, got {x.dtype}; cast it to the dtype to compute in")
    if residual is not None and residual.dtype != x.dtype:
        raise ValueError(
            f"rms_norm: `residual` must have the dtype of `x`, {x.dtype}, got {residual.dtype}; cast one of them"
        )
    y, h, _ = forward(x, scale, residual, epsilon=float(epsilon), implementation=implementation)
    return y if residual is None else (y, h)
