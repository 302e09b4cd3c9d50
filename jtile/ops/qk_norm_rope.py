"""RMSNorm of each head of queries and keys, then their rotary position embedding, in one pass.

With x a head, n = x · rstd and rstd = 1 / √(mean(x²) + ε), a head becomes y = R(n · scale), R the rotation of its
position. Its derivative turns the cotangent back, g = scale · Rᵀ dy, and is RMSNorm's from there:

    dx = rstd · (g − n · mean(g · n)),   dscale = Σ n · Rᵀ dy
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jtile.compiler.params import CompilerParams
from jtile.op import Implementation, TileOp, check_known
from jtile.ops import rope

# Spec. Queries and keys have heads of their own number and a scale of their own: each is one call, and one launch.

forward = TileOp(
    "qk_norm_rope",
    "x: ... s h d, scale: d, positions: ... s, step: f, leap: f -> y: ... s h d; rstd: ... s h",
    whole="d f",
)
backward = TileOp(
    "qk_norm_rope_backward",
    "x: ... s h d, scale: d, positions: ... s, step: f, leap: f, rstd: ... s h, dy: ... s h d "
    "-> dx: ... s h d, dscale: d",
    whole="d f",
)


# Reference.


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@forward.reference
def forward_reference(x, scale, positions, step, leap, *, epsilon, interleaved):
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(_wide(x)), axis=-1) + epsilon)
    scaled = _wide(x) * rstd[..., None] * _wide(scale)
    (y,) = rope.forward_reference(scaled, positions, step, leap, interleaved=interleaved)
    return y.astype(x.dtype), rstd


@backward.reference
def backward_reference(x, scale, positions, step, leap, rstd, dy, *, interleaved):
    (dscaled,) = rope.forward_reference(_wide(dy), positions, -step, -leap, interleaved=interleaved)
    n, g = _wide(x) * rstd[..., None], dscaled * _wide(scale)
    dx = rstd[..., None] * (g - n * jnp.mean(g * n, axis=-1, keepdims=True))
    return dx.astype(x.dtype), jnp.sum(dscaled * n, axis=range(x.ndim - 1)).astype(scale.dtype)


# Kernel. A program owns some heads of some tokens; the backward one takes many blocks of tokens in turn, so that few
# partial `dscale` are left to add. A head is kept as `rope.read_pairs` gives it: in two or three parts.

BLOCK = 4096  # elements
PROGRAMS = 264  # of the backward pass: two for each multiprocessor of the largest chips


def _sum(parts, axis):
    """Over an axis of which the first two parts, the sides of pairs, have as much as each other."""
    a, b, *rest = parts
    return sum((jnp.sum(part, axis=axis) for part in rest), jnp.sum(a + b, axis=axis))


class Blocks:
    """How an array of tokens, heads and elements is shared out: so many blocks of tokens to a program in turn."""

    def __init__(self, x, programs: int | None = None):
        *_, self.heads, self.d = x.shape
        self.tokens = x.size // (self.heads * self.d)
        self.head_block = math.gcd(self.heads, 32)
        widest = BLOCK // (self.head_block * pl.next_power_of_2(self.d))
        self.block = max(1, min(widest, pl.next_power_of_2(self.tokens)))
        count = pl.cdiv(self.tokens, self.block)
        self.steps = pl.cdiv(count, max(1, programs * self.head_block // self.heads)) if programs else 1
        self.grid = pl.cdiv(count, self.steps), self.heads // self.head_block

    @property
    def specs(self) -> dict[str, pl.BlockSpec]:
        """By what an array has one number for."""
        chunk = self.steps * self.block
        return {
            "element": pl.BlockSpec((chunk, self.head_block, self.d), lambda i, j: (i, j, 0)),
            "head": pl.BlockSpec((chunk, self.head_block), lambda i, j: (i, j)),
            "token": pl.BlockSpec((chunk,), lambda i, j: (i,)),
        }

    def call(self, kernel, arrays, results, name: str, **params) -> list[jax.Array]:
        """`arrays` are pairs of what an array has one number for and the array; those of anything else are whole."""
        whole = lambda x: pl.BlockSpec(x.shape, lambda i, j: (0,) * x.ndim)  # noqa: E731
        shape = {"element": (self.tokens, self.heads, self.d), "head": (self.tokens, self.heads), "token": (-1,)}
        partial = pl.BlockSpec((None, None, self.d), lambda i, j: (i, j, 0))
        return pl.pallas_call(
            kernel,
            grid=self.grid,
            in_specs=[self.specs.get(kind) or whole(x) for kind, x in arrays],
            out_specs=[self.specs.get(kind, partial) for kind, _ in results],
            out_shape=[jax.ShapeDtypeStruct(shape.get(kind, (*self.grid, self.d)), dtype) for kind, dtype in results],
            compiler_params=CompilerParams(**params),
            name=name,
        )(*(x.reshape(shape[kind]) if kind in shape else x for kind, x in arrays))


@forward.kernel
def forward_kernel(x, scale, positions, step, leap, *, epsilon, interleaved):
    blocks, f, every = Blocks(x), step.size, (slice(None), slice(None))

    def kernel(x_ref, scale_ref, positions_ref, step_ref, leap_ref, y_ref, rstd_ref):
        sin, cos = rope.sin_cos(positions_ref[...], step_ref[...], leap_ref[...])
        parts = rope.read_pairs(x_ref, every, f, interleaved)
        rstd = jax.lax.rsqrt(_sum([part * part for part in parts], 2) / blocks.d + epsilon)
        scales = rope.read_pairs(scale_ref, (), f, interleaved)
        a, b, *rest = [part * rstd[:, :, None] * scale for part, scale in zip(parts, scales, strict=True)]
        rope.write_pairs(y_ref, every, f, interleaved, *rope.turned(a, b, sin, cos), *rest)
        rstd_ref[...] = rstd

    arrays = [("element", x), ("d", scale), ("token", positions), ("f", step), ("f", leap)]
    y, rstd = blocks.call(
        kernel, arrays, [("element", x.dtype), ("head", jnp.float32)], "qk_norm_rope", num_warps=4, num_stages=1
    )
    return y.reshape(x.shape), rstd.reshape(x.shape[:-1])


@backward.kernel
def backward_kernel(x, scale, positions, step, leap, rstd, dy, *, interleaved):
    blocks, f = Blocks(x, PROGRAMS), step.size

    def kernel(x_ref, scale_ref, positions_ref, step_ref, leap_ref, rstd_ref, dy_ref, dx_ref, dscale_ref):
        scales = rope.read_pairs(scale_ref, (), f, interleaved)

        def some_tokens(i, dscale):
            tokens = pl.ds(i * blocks.block, blocks.block)
            at = tokens, slice(None)
            sin, cos = rope.sin_cos(positions_ref[tokens], step_ref[...], leap_ref[...])
            a, b, *rest = rope.read_pairs(dy_ref, at, f, interleaved)
            dscaled = [*rope.turned(a, b, -sin, cos), *rest]
            rstd = rstd_ref[at][:, :, None]
            n = [part * rstd for part in rope.read_pairs(x_ref, at, f, interleaved)]
            g = [part * scale for part, scale in zip(dscaled, scales, strict=True)]
            mean = (_sum([p * q for p, q in zip(g, n, strict=True)], 2) / blocks.d)[:, :, None]
            dx = [rstd * (p - q * mean) for p, q in zip(g, n, strict=True)]
            rope.write_pairs(dx_ref, at, f, interleaved, *dx)
            return tuple(total + p * q for total, p, q in zip(dscale, dscaled, n, strict=True))

        start = tuple(jnp.zeros((blocks.block, blocks.head_block, part.size)) for part in scales)
        dscale = jax.lax.fori_loop(0, blocks.steps, some_tokens, start)
        rope.write_pairs(dscale_ref, (), f, interleaved, *(jnp.sum(total, axis=(0, 1)) for total in dscale))

    arrays = [("element", x), ("d", scale), ("token", positions), ("f", step), ("f", leap)]
    arrays += [("head", rstd), ("element", dy)]
    # Where shared memory of every chip has room for two blocks of both, they are on their way while one is computed.
    stages = 3 if 4 * blocks.block * blocks.head_block * pl.next_power_of_2(blocks.d) * x.dtype.itemsize <= 2**16 else 1
    dx, partial = blocks.call(
        kernel,
        arrays,
        [("element", x.dtype), ("d", jnp.float32)],
        "qk_norm_rope_backward",
        num_warps=8,
        num_stages=stages,
    )
    return dx.reshape(x.shape), jnp.sum(partial, axis=(0, 1)).astype(scale.dtype)


# Derivative.


@forward.transpose
def forward_transpose(operands, results, cotangents, *, epsilon, interleaved, implementation):
    del epsilon  # it is in rstd
    _, rstd = results
    dx, dscale = backward(*operands, rstd, cotangents[0], interleaved=interleaved, implementation=implementation)
    return dx, dscale, None, None, None


# Public name.


def qk_norm_rope(
    q: Float[Array, "*leading sequence heads head_dim"],
    k: Float[Array, "*leading sequence key_heads head_dim"],
    q_scale: Float[Array, " head_dim"],
    k_scale: Float[Array, " head_dim"],
    positions: Int[Array | np.ndarray, "*#leading sequence"],
    *,
    epsilon: float = 1e-6,
    theta: float = 10000.0,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    frequencies: Float[Array | np.ndarray, " pairs"] | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "*leading sequence heads head_dim"], Float[Array, "*leading sequence key_heads head_dim"]]:
    """RMSNorm over each head of queries and of keys, then rotary position embedding, as Qwen3 and Gemma 3 have it.

    The same as `jtile.rope(jtile.rms_norm(q, q_scale), positions)` and likewise for the keys, but for one rounding
    instead of two, and one pass over memory in place of two, in the backward direction too. Statistics are float32.

    Args:
        q: queries, any leading shape, then sequence, heads and head dim.
        k: keys, of the same leading shape, sequence and head dim.
        q_scale: a factor for each element of a query head.
        k_scale: the same for keys.
        positions: an integer for each token. The leading dimensions of `q` may be missing or 1.
        epsilon: added to the mean square.
        theta, interleaved, rotary_dim, frequencies: as in `jtile.rope`.
        implementation: `None`, `"triton"`, `"xla"` or `"interpret"`, see `jtile.TileOp`.

    Returns:
        Queries and keys, each of the shape and dtype that it came with.

    Raises:
        ValueError: `q` and `k` differ in more than heads, or what `jtile.rope` and `jtile.rms_norm` raise it for.
        NotImplementedError: the named implementation cannot serve the call.

    Source: Qwen Team, Qwen3 Technical Report, 2025 (arXiv:2505.09388), section 2; Dehghani et al., Scaling Vision
    Transformers to 22 Billion Parameters, 2023 (arXiv:2302.05442), section 2, for the norms.

    Example:
        >>> import jax.numpy as jnp
        >>> import jtile
        >>> q, k = jnp.full((2, 4, 4), 3.0), jnp.full((2, 1, 4), 5.0)  # sequence, heads, head_dim
        >>> q, k = jtile.qk_norm_rope(q, k, jnp.ones(4), jnp.ones(4), jnp.array([0, 1]), frequencies=[jnp.pi / 2, 0.0])
        >>> print(q[:, 0].round(), k[:, 0].round())
        [[ 1.  1.  1.  1.]
         [-1.  1.  1.  1.]] [[ 1.  1.  1.  1.]
         [-1.  1.  1.  1.]]
    """
    check_known("qk_norm_rope", epsilon=epsilon)
    q, k = jnp.asarray(q), jnp.asarray(k)
    angles = rope.arguments("qk_norm_rope", "q", q, positions, theta, interleaved, rotary_dim, frequencies)
    if k.dtype != q.dtype or k.ndim != q.ndim or (k.shape[:-2], k.shape[-1]) != (q.shape[:-2], q.shape[-1]):
        raise ValueError(
            f"qk_norm_rope: `k` must be like `q`, {q.dtype} of shape {q.shape}, but for the number of heads; got "
            f"{k.dtype} of shape {k.shape}"
        )

    options: dict[str, Any] = dict(epsilon=float(epsilon), interleaved=bool(interleaved), implementation=implementation)
    (y, _), (z, _) = (forward(x, scale, *angles, **options) for x, scale in ((q, q_scale), (k, k_scale)))
    return y, z
