"""Rotary position embedding: at position p, pair i of a head's elements turns by the angle p · frequency[i].

Angles are counted in turns of 2⁻³² by 32-bit integers, which wrap around as angles do. So their products with positions
are exact, where p · frequency in float32 is off by up to 0.004 radians at p = 10⁵. What remains is the rounding of the
frequency, by up to half of 2⁻³² turn, at every position. To keep that small too, a position is split into leaps of 1024
and steps of 1 with a frequency each: at p = 131,072 the angle is off by less than 10⁻⁶ radians.
"""

import itertools
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jtile.compiler.params import CompilerParams
from jtile.op import Implementation, TileOp, check_known

# Spec. `step` and `leap` are the angles of 1 and of 1024 positions, 32-bit integers, for each of the f pairs of a head;
# `inverse` turns the other way.

forward = TileOp("rope", "x: ... s h d, positions: ... s, step: f, leap: f -> y: ... s h d", whole="d f")

LEAP = 10  # log2 of the positions in a leap


def _turns(positions, step, leap):
    """Angles in turns of 2⁻³², for each position (rows) and pair (columns)."""
    positions = positions[..., None]
    return (positions >> LEAP) * leap + (positions & (2**LEAP - 1)) * step


# Reference.


@forward.reference
def forward_reference(x, positions, step, leap, *, interleaved, inverse=False):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    angle = _turns(positions, step, leap).astype(wide) * (2 * math.pi / 2**32)
    cos, sin = jnp.cos(angle)[..., None, :], jnp.sin(-angle if inverse else angle)[..., None, :]
    f, axis = step.size, -1 if interleaved else -2
    rotated, rest = jnp.split(x, [2 * f], axis=-1)
    pairs = rotated.reshape(*x.shape[:-1], *((f, 2) if interleaved else (2, f)))
    a, b = jnp.moveaxis(pairs.astype(wide), axis, 0)
    pairs = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=axis)
    return (jnp.concatenate([pairs.reshape(rotated.shape).astype(x.dtype), rest], axis=-1),)


# Kernel. A program owns some heads of some tokens. Angles are whole quarters of a turn and a rest of at most an eighth,
# on which Taylor's series is exact to float32: no range reduction is needed, nor the local memory that a sine's takes.


def _sin_cos(turns):
    quarters = (turns + 2**29) >> 30
    angle = (turns - (quarters << 30)).astype(jnp.float32) * (2 * math.pi / 2**32)
    square = angle * angle

    def series(first):  # Σ (-1)ᵏ angle²ᵏ / (2k + first)!
        *coefficients, value = ((-1) ** k / math.factorial(2 * k + first) for k in range(6))
        for coefficient in reversed(coefficients):
            value = value * square + coefficient
        return value

    sin, cos = angle * series(1), series(0)
    odd = (quarters & 1) == 1
    sin, cos = jnp.where(odd, cos, sin), jnp.where(odd, sin, cos)
    return jnp.where((quarters & 2) == 2, -sin, sin), jnp.where(((quarters + 1) & 2) == 2, -cos, cos)


def sin_cos(positions, step, leap):
    """For a block of tokens, of shape (tokens, 1, f): the same for each of their heads."""
    return (x[:, None, :] for x in _sin_cos(_turns(positions, step, leap)))


def turned(a, b, sin, cos):
    return a * cos - b * sin, a * sin + b * cos


def read_pairs(ref, at: tuple, f: int, interleaved: bool) -> list[jax.Array]:
    """The first elements of pairs, the second ones, and what is in no pair, in float32. `at` leads to heads."""
    d = ref.shape[-1]
    if interleaved:
        pairs = ref[(*at, pl.ds(0, 2 * f))]
        pairs = pairs.reshape(*pairs.shape[:-1], f, 2)
        parts = [pairs[..., 0], pairs[..., 1]]
    else:
        parts = [ref[(*at, pl.ds(0, f))], ref[(*at, pl.ds(f, f))]]
    parts += [ref[(*at, pl.ds(2 * f, d - 2 * f))]] if d > 2 * f else []
    return [part.astype(jnp.float32) for part in parts]


def write_pairs(ref, at: tuple, f: int, interleaved: bool, a, b, *rest) -> None:
    """Puts what `read_pairs` took apart together again."""
    a, b, *others = (part.astype(ref.dtype) for part in (a, b, *rest))
    if interleaved:
        pairs = jnp.stack([a, b], axis=-1)
        ref[(*at, pl.ds(0, 2 * f))] = pairs.reshape(*pairs.shape[:-2], 2 * f)
    else:
        ref[(*at, pl.ds(0, f))], ref[(*at, pl.ds(f, f))] = a, b
    for part in others:
        ref[(*at, pl.ds(2 * f, part.shape[-1]))] = part


class Tile(NamedTuple):
    """The tokens and heads that a program has."""

    tokens: int
    heads: int
    num_warps: int


@forward.tiles
def forward_tiles(x, positions, *_, **options):
    """All heads of a token, or of several tokens where they are few, and 32 elements to a thread."""
    *_, heads, d = x.shape
    heads = math.gcd(heads, 32)
    of_token = heads * pl.next_power_of_2(d)
    for elements, each in itertools.product((1024, 2048, 4096), (32, 64, 16)):
        tokens = max(1, elements // of_token)
        warps = min(8, max(1, tokens * of_token // (32 * each)))
        yield Tile(min(tokens, pl.next_power_of_2(positions.size)), heads, warps)


@forward.kernel
def forward_kernel(x, positions, step, leap, *, tile, interleaved, inverse):
    *_, heads, d = x.shape
    tokens, f = positions.size, step.size
    block, head_block, num_warps = tile
    every = slice(None), slice(None)

    def rope_kernel(x_ref, positions_ref, step_ref, leap_ref, y_ref):
        sin, cos = sin_cos(positions_ref[...], step_ref[...], leap_ref[...])
        a, b, *rest = read_pairs(x_ref, every, f, interleaved)
        write_pairs(y_ref, every, f, interleaved, *turned(a, b, -sin if inverse else sin, cos), *rest)

    part = pl.BlockSpec((block, head_block, d), lambda i, j: (i, j, 0))
    pairs = pl.BlockSpec((f,), lambda i, j: (0,))
    (y,) = pl.pallas_call(
        rope_kernel,
        grid=(pl.cdiv(tokens, block), heads // head_block),
        in_specs=[part, pl.BlockSpec((block,), lambda i, j: (i,)), pairs, pairs],
        out_specs=[part],
        out_shape=[jax.ShapeDtypeStruct((tokens, heads, d), x.dtype)],
        compiler_params=CompilerParams(num_warps=num_warps, num_stages=1),
        name="rope",
    )(x.reshape(tokens, heads, d), positions.reshape(tokens), step, leap)
    return (y.reshape(x.shape),)


# Derivative. The transpose of a rotation is the rotation by the opposite angle.


@forward.transpose
def forward_transpose(operands, results, cotangents, *, inverse, **options):
    (dx,) = forward(cotangents[0], *operands[1:], inverse=not inverse, **options)
    return dx, None, None, None


# Public name.


def rope(
    x: Float[Array, "*leading sequence heads head_dim"],
    positions: Int[Array | np.ndarray, "*#leading sequence"],
    *,
    theta: float = 10000.0,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    frequencies: Float[Array | np.ndarray, " pairs"] | Sequence[float] | None = None,
    implementation: Implementation = None,
) -> Float[Array, "*leading sequence heads head_dim"]:
    """Rotary position embedding of queries or keys.

    The first `rotary_dim` elements of a head are pairs. Pair i of them, (a, b), becomes
    (a cos φ − b sin φ, a sin φ + b cos φ) at position p, where φ = p · theta^(−2i / rotary_dim).

    Sines and cosines come in float32 from the positions, inside the kernel: no table is in memory. Angles are off by at
    most (|p| / 1024 + 1023) · 2⁻³³ turn, 8.4e-7 radians at 131,072, besides what rounding to float32 makes of a sine.

    Args:
        x: queries or keys.
        positions: an integer for each token, negative ones turn backwards. The leading dimensions of `x` may be missing
            or 1.
        theta: the base of the frequencies.
        interleaved: pairs are the neighbours 2i and 2i + 1, as in the paper; else elements i and i + rotary_dim / 2, as
            in GPT-NeoX and Hugging Face's Llama.
        rotary_dim: how many elements of a head are rotated, the first ones; the others pass unchanged. All by default.
        frequencies: rotary_dim / 2 numbers in place of theta's, in radians a position: Llama 3.1's scaled ones, for
            example. They are constants, to which no gradient flows; NumPy's float64 is used in full.
        implementation: `None`, `"triton"`, `"xla"` or `"interpret"`, see `jtile.TileOp`.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        ValueError: shapes that do not match, `x` that is not floating point, positions that are not integers, a
            `rotary_dim` that is odd or not within a head, or a `theta` that is not positive.
        NotImplementedError: the named implementation cannot serve the call.

    Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021 (arXiv:2104.09864),
    section 3.2.

    Example:
        >>> import jax.numpy as jnp
        >>> import jtile
        >>> x = jnp.array([[[10.0, 1.0]]] * 3)  # sequence, heads, head_dim
        >>> print(jtile.rope(x, jnp.arange(3), frequencies=[jnp.pi / 2]).round()[:, 0])
        [[ 10.   1.]
         [ -1.  10.]
         [-10.  -1.]]
    """
    x = jnp.asarray(x)
    angles = arguments("rope", "x", x, positions, theta, interleaved, rotary_dim, frequencies)
    (y,) = forward(x, *angles, interleaved=bool(interleaved), implementation=implementation)
    return y


def arguments(op: str, name: str, x, positions, theta, interleaved, rotary_dim, frequencies) -> tuple:
    """Checks what the user gave, of which the operand `name` is to be turned; returns positions, step and leap."""
    check_known(op, theta=theta, interleaved=interleaved, rotary_dim=rotary_dim)
    positions = jnp.asarray(positions)
    if x.ndim < 3 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{op}: `{name}` must be floating point with dimensions (..., sequence, heads, head_dim), got "
            f"{x.dtype} of shape {x.shape}"
        )
    tokens, d = x.shape[:-2], x.shape[-1]
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"{op}: `positions` must be integers, got {positions.dtype}; cast them to int32")
    if positions.shape[-1:] != tokens[-1:] or not _broadcasts(positions.shape, tokens):
        raise ValueError(
            f"{op}: `positions` must have shape {tokens[-1:]} or {tokens}, one for each token of `{name}`, whose shape "
            f"is {x.shape}; got {positions.shape}"
        )
    rotary_dim = d if rotary_dim is None else operator.index(rotary_dim)
    if rotary_dim % 2 or not 0 < rotary_dim <= d:
        raise ValueError(f"{op}: `rotary_dim` must be even, from 2 to head_dim, {d}; got {rotary_dim}")
    if frequencies is None:
        if not 0 < theta < math.inf:
            raise ValueError(f"{op}: `theta` must be positive and finite, got {theta}")
        frequencies = theta ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    elif np.shape(frequencies) != (rotary_dim // 2,):
        raise ValueError(
            f"{op}: `frequencies` must have shape ({rotary_dim // 2},), one for each pair of the {rotary_dim} elements "
            f"that turn, got {np.shape(frequencies)}; `rotary_dim` tells how many turn"
        )
    positions = jnp.broadcast_to(positions.astype(jnp.int32), tokens)
    return positions, _angle(frequencies, 1), _angle(frequencies, 2**LEAP)


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(shape[::-1], to[::-1], strict=False))


def _angle(frequencies, positions: int):
    """How far pairs turn in so many positions, less whole turns, in units of 2⁻³² turn."""
    np_or_jnp = jnp if isinstance(frequencies, jax.Array) else np
    with jax.enable_x64(True):
        turns = np_or_jnp.asarray(frequencies, np.float64) * (positions / (2 * math.pi))
        return np_or_jnp.round((turns - np_or_jnp.round(turns)) * 2**32).astype(np.int64).astype(np.int32)
