"""Softmax and its logarithm over rows: one pass over memory forward, one backward, which reads the result alone.

With z = scale · x where a score counts and −∞ elsewhere, and lse = log Σ exp(z) of a row:

    softmax:      y = exp(z − lse)     dx = scale · y · (dy − Σ y dy)
    log_softmax:  y = z − lse          dx = scale · (dy − exp(y) · Σ dy)

A place that does not count has y = 0, or −∞ of the logarithm, and is known by that to the backward pass.
"""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from jtile.compiler.params import CompilerParams
from jtile.compiler.primitives import approx_exp2
from jtile.op import Implementation, TileOp, check_known
from jtile.ops.unaligned import WIDEST_LOAD, elementwise, reduce, unaligned

# Spec. A mask has some of the dimensions of x; `of_mask` tells whether it has the leading ones, each of those that have
# a name, and the last. So nothing is repeated in memory, and devices split the mask as they split x.


@functools.cache
def forward(name: str, of_mask: tuple[bool, ...]) -> TileOp:
    dims = ["...", *(f"n{i}" for i in range(len(of_mask) - 3)), *["q"] * (len(of_mask) > 2), "d"]
    mask = [dim for dim, has in zip(dims, of_mask, strict=True) if has]
    text = f"x: {' '.join(dims)}, mask?: {' '.join(mask)}, query?: q -> y: {' '.join(dims)}"
    op = TileOp(name, text, whole="d")
    op.reference(forward_reference)
    op.kernel(forward_kernel)
    op.tiles(forward_tiles)
    op.transpose(forward_transpose)
    return op


backward = TileOp("softmax_backward", "y: ... d, dy: ... d -> dx: ... d", whole="d")


# What reference and kernel share: the scores, the result for them, and the gradient.


def _scores(x, mask, query, columns, scale):
    """z; queries and what else there is one of for a row have a last dimension of 1."""
    z = x.astype(jnp.promote_types(x.dtype, jnp.float32)) * scale
    z = z if mask is None else jnp.where(mask, z, -jnp.inf)
    return z if query is None else jnp.where(columns <= query, z, -jnp.inf)


def _normalized(z, top, total, log, exp=jnp.exp):
    """`top` is finite, and `total` = Σ exp(z − top), which is 0 where nothing counts."""
    total = jnp.where(total == 0, 1.0, total)
    return z - top - jnp.log(total) if log else exp(z - top) * (1 / total)


def _summand(y, dy, log):
    """Of the sum that the gradient takes over a row; nothing where y does not count, whatever dy is."""
    wide = jnp.promote_types(y.dtype, jnp.float32)
    y, dy = y.astype(wide), dy.astype(wide)
    return jnp.where(y == -jnp.inf, 0.0, dy) if log else jnp.where(y == 0, 0.0, y * dy)


def _gradient(y, dy, total, scale, log, exp=jnp.exp):
    wide, dtype = total.dtype, y.dtype
    y, dy = y.astype(wide), dy.astype(wide)
    dz = jnp.where(y == -jnp.inf, 0.0, dy - exp(y) * total) if log else jnp.where(y == 0, 0.0, y * (dy - total))
    return (scale * dz).astype(dtype)


def _least(dtype) -> float:
    """In place of a maximum of -inf, from which -inf - -inf would arise."""
    return float(jnp.finfo(dtype).min)


def _aligned(mask, shape, of_mask):
    """The mask with as many dimensions as x, of size 1 where it lacks them."""
    has = [of_mask[0]] * (len(shape) - len(of_mask) + 1) + list(of_mask[1:])
    return mask.reshape([n if h else 1 for n, h in zip(shape, has, strict=True)])


# Reference.


def forward_reference(x, mask, query, *, of_mask, scale, log):
    mask = None if mask is None else _aligned(mask, x.shape, of_mask)
    query = None if query is None else query[:, None]
    z = _scores(x, mask, query, jnp.arange(x.shape[-1]), scale)
    top = jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True, initial=_least(z.dtype)))
    y = _normalized(z, top, jnp.sum(jnp.exp(z - top), axis=-1, keepdims=True), log)
    return (jnp.where(z == -jnp.inf, jax.lax.stop_gradient(y), y).astype(x.dtype),)


@backward.reference
def backward_reference(y, dy, *, scale, log):
    return (_gradient(y, dy, jnp.sum(_summand(y, dy, log), axis=-1, keepdims=True), scale, log),)


# Kernel. A program owns whole rows, and registers hold them. Of wider rows it owns a chunk: one kernel makes statistics
# of the chunks, another one reads them again.

WIDEST = 32768
CHUNK = 8192


def _exp(x):
    """In kernels: what is less than the least normal number is 0."""
    return approx_exp2(x * math.log2(math.e))


class Tile(NamedTuple):
    """The rows and lanes that a program has, and the most registers of a thread."""

    rows: int
    lanes: int
    num_warps: int
    max_registers: int | None = None

    def params(self) -> CompilerParams:
        return CompilerParams(num_warps=self.num_warps, num_stages=1, max_registers=self.max_registers)


def _tiles(x, each: int) -> Iterator[Tile]:
    """Best where a thread has so many elements: several loads of 16 bytes in flight, and registers to hold them."""
    d = x.shape[-1]
    width = pl.next_power_of_2(d)
    if d > WIDEST and d * x.dtype.itemsize % WIDEST_LOAD:
        yield Tile(1, 2048, 4)
        yield Tile(1, 4096, 8)
    for lanes in [width] if width <= CHUNK else [width, CHUNK] if width <= WIDEST else [CHUNK, CHUNK // 2]:
        for elements in max(2048, lanes), max(4096, lanes):
            for warps in (elements // (32 * n) for n in (each, each // 2, each * 2)):
                yield Tile(elements // lanes, lanes, min(32, max(1, warps)))


def forward_tiles(x, *rest, **options):
    # Rows of 32 KiB leave a multiprocessor waiting unless it has three of them.
    three = [Tile(1, 16384, 8, 80)] if pl.next_power_of_2(x.shape[-1]) == 16384 else []
    return dict.fromkeys([*three, *_tiles(x, 32)])


def forward_kernel(x, mask, query, *, tile, of_mask, scale, log):
    *sizes, d = x.shape
    mask = None if mask is None else _aligned(mask, x.shape, of_mask)
    # Inner rows are those along which the mask has all or one; for each outer one, an index map finds the mask's.
    has = [True] * len(sizes) if mask is None else [n == m for n, m in zip(sizes, mask.shape, strict=False)]
    cut = len(sizes) - 1
    while cut and query is None and has[cut - 1] == has[-1]:
        cut -= 1
    outer, rows = math.prod(sizes[:cut]), math.prod(sizes[cut:])
    block, lanes = min(tile.rows, pl.next_power_of_2(rows)), tile.lanes
    chunks = pl.cdiv(d, lanes)

    def of_outer(k):
        index, stride = 0, 1
        for n, h in reversed(list(zip(sizes[:cut], has, strict=False))):
            if h:
                index, stride = index + k % n * stride, stride * n
            k = k // n
        return index

    spec = pl.BlockSpec((None, block, lanes), lambda c, r, k: (k, r, c))
    operands, specs = [x.reshape(outer, rows, d)], [spec]
    if mask is not None:
        operands.append(mask.reshape(-1, rows if has[-1] else 1, mask.shape[-1]))
        shape = (None, block if has[-1] else 1, lanes if mask.shape[-1] > 1 else 1)
        at = lambda c, r, k: (of_outer(k), r if has[-1] else 0, c if mask.shape[-1] > 1 else 0)  # noqa: E731
        specs.append(pl.BlockSpec(shape, at))
    if query is not None:
        operands.append(query)
        specs.append(pl.BlockSpec((block,), lambda c, r, k: (r,)))

    def scores(x_ref, *refs):
        columns = pl.program_id(0) * lanes + jax.lax.broadcasted_iota(jnp.int32, (1, lanes), 1)
        given = iter(refs)
        counts = None if mask is None else next(given)[...]
        queries = None if query is None else next(given)[...][:, None]
        if d % lanes:
            counts = columns < d if counts is None else counts & (columns < d)
        return _scores(x_ref[...], counts, queries, columns, scale)

    def softmax_kernel(*refs):
        *given, y_ref = refs
        z = scores(*given)
        top, total = _statistics(z)
        y_ref[...] = _normalized(z, top, total, log, _exp).astype(y_ref.dtype)

    def statistics_kernel(*refs):
        *given, top_ref, total_ref = refs
        top_ref[...], total_ref[...] = _statistics(scores(*given))

    def normalize_kernel(*refs):
        *given, top_ref, total_ref, y_ref = refs
        y_ref[...] = _normalized(scores(*given), top_ref[...], total_ref[...], log, _exp).astype(y_ref.dtype)

    def call(kernel, more, more_specs, out_specs, out_shape, name=""):
        return pl.pallas_call(
            kernel,
            grid=(chunks, pl.cdiv(rows, block), outer),
            in_specs=[*specs, *more_specs],
            out_specs=out_specs,
            out_shape=out_shape,
            compiler_params=tile.params(),
            name=f"{'log_' * log}softmax{name}",
        )(*operands, *more)

    if chunks == 1:
        y = call(softmax_kernel, [], [], spec, operands[0])
    elif mask is None and query is None and unaligned(rows_of_x := x.reshape(-1, d), lanes):
        y = _at_odd_addresses(rows_of_x, tile, scale, log)
    else:
        of_chunk = pl.BlockSpec((None, block, 1), lambda c, r, k: (k, r, c))
        of_chunks = jax.ShapeDtypeStruct((outer, rows, chunks), jnp.float32)
        tops, totals = call(statistics_kernel, [], [], [of_chunk] * 2, [of_chunks] * 2, "_statistics")
        of_row = pl.BlockSpec((None, block, 1), lambda c, r, k: (k, r, 0))
        y = call(normalize_kernel, _combined(tops, totals), [of_row] * 2, spec, operands[0])
    return (y.reshape(x.shape),)


def _statistics(z):
    top = jnp.maximum(jnp.max(z, axis=1, keepdims=True), _least(z.dtype))
    return top, jnp.sum(_exp(z - top), axis=1, keepdims=True)


def _combined(tops, totals):
    """The statistics of rows, from those of their parts."""
    top = jnp.max(tops, axis=-1, keepdims=True)
    return top, jnp.sum(totals * jnp.exp(tops - top), axis=-1, keepdims=True)


def _at_odd_addresses(x, tile, scale, log):
    options, name = dict(lanes=tile.lanes, num_warps=tile.num_warps), f"{'log_' * log}softmax"

    def statistics(inside, x):
        return _statistics(_scores(x, inside, None, None, scale))

    def normalize(_, of_row, x):
        top, total = of_row
        return _normalized(_scores(x, None, None, None, scale), top, total, log, _exp).astype(x.dtype)

    found = _combined(*reduce(statistics, [x], 2, name=f"{name}_statistics", **options))
    return elementwise(normalize, [x], [number[:, 0] for number in found], name=f"{name}_normalize", **options)


@backward.tiles
def backward_tiles(y, *rest, **options):
    return dict.fromkeys(_tiles(y, 16))


@backward.kernel
def backward_kernel(y, dy, *, tile, scale, log):
    rows, d = y.shape
    block, lanes = min(tile.rows, pl.next_power_of_2(rows)), tile.lanes
    chunks = pl.cdiv(d, lanes)

    def sum_of_row(y, dy):
        return jnp.sum(_summand(y, dy, log), axis=1, keepdims=True)

    def softmax_backward_kernel(y_ref, dy_ref, dx_ref):
        y, dy = y_ref[...], dy_ref[...]
        dx_ref[...] = _gradient(y, dy, sum_of_row(y, dy), scale, log, _exp)

    def total_kernel(y_ref, dy_ref, total_ref):
        total_ref[...] = sum_of_row(y_ref[...], dy_ref[...])

    def gradient_kernel(y_ref, dy_ref, total_ref, dx_ref):
        dx_ref[...] = _gradient(y_ref[...], dy_ref[...], total_ref[...], scale, log, _exp)

    def call(kernel, more, more_specs, out_spec, out_shape, name=""):
        return pl.pallas_call(
            kernel,
            grid=(chunks, pl.cdiv(rows, block)),
            in_specs=[spec, spec, *more_specs],
            out_specs=out_spec,
            out_shape=out_shape,
            compiler_params=tile.params(),
            name=f"{'log_' * log}softmax_backward{name}",
        )(y, dy, *more)

    spec = pl.BlockSpec((block, lanes), lambda c, r: (r, c))
    if chunks == 1:
        return (call(softmax_backward_kernel, [], [], spec, y),)
    if unaligned(y, lanes):
        options, name = dict(lanes=lanes, num_warps=tile.num_warps), f"{'log_' * log}softmax_backward"

        def total(inside, y, dy):
            return [jnp.sum(jnp.where(inside, _summand(y, dy, log), 0.0), axis=1, keepdims=True)]

        def gradient(_, of_row, y, dy):
            return _gradient(y, dy, of_row[0], scale, log, _exp)

        (totals,) = reduce(total, [y, dy], 1, name=f"{name}_total", **options)
        return (elementwise(gradient, [y, dy], [jnp.sum(totals, axis=-1)], name=f"{name}_gradient", **options),)
    shape = jax.ShapeDtypeStruct((rows, chunks), jnp.float32)
    totals = call(total_kernel, [], [], pl.BlockSpec((block, 1), lambda c, r: (r, c)), shape, "_total")
    of_row = pl.BlockSpec((block, 1), lambda c, r: (r, 0))
    return (call(gradient_kernel, [jnp.sum(totals, axis=-1, keepdims=True)], [of_row], spec, y),)


# Derivative.


def forward_transpose(operands, results, cotangents, *, of_mask, **options):
    del of_mask  # what does not count shows in the result
    (dx,) = backward(results[0], cotangents[0], **options)
    return dx, None, None


# Public names.


def softmax(
    x: Float[Array, "*shape"],
    *,
    scale: float = 1.0,
    mask: Bool[Array, "*#shape"] | None = None,
    is_causal: bool = False,
    implementation: Implementation = None,
) -> Float[Array, "*shape"]:
    """Softmax over the last dimension: exp(scale · x) as a share of its sum over the places that count.

    Scores are scaled first, then masked; sums are taken in float32 (float64 for float64 scores), and the result rounded
    once. The gradient is computed from the result alone, in one pass over it and its cotangent.

    What does not count, by `mask`, by `is_causal` or as a score of −∞, is 0 in the result and in the gradient, whatever
    `x` and the cotangent are there, NaN included. A row in which nothing counts is 0 throughout, and one in which +∞ or
    NaN counts is NaN throughout.

    Args:
        x: scores, of any shape with at least one dimension; softmax runs over the last. For another, move it there by
            `jnp.moveaxis`, which XLA fuses with what made the scores where it can.
        scale: what scores are multiplied by, a finite Python number.
        mask: True where a score counts. Of the shape of `x`, or 1 in any of its dimensions, or with leading ones
            missing; it is not repeated in memory.
        is_causal: the last two dimensions are queries and keys, and of key j and query i counts j ≤ i.
        implementation: `None`, `"triton"`, `"xla"` or `"interpret"`, see `jtile.TileOp`.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        ValueError: `x` is a scalar or not floating point, the mask is not boolean or does not broadcast to `x`, `scale`
            is not finite, or causal scores have no dimension of queries.
        NotImplementedError: the named implementation cannot serve the call.

    Source: the running maximum of wide rows, Milakov and Gimelshein, Online normalizer calculation for softmax, 2018
    (arXiv:1805.02867), section 3.

    Example:
        >>> import jax.numpy as jnp
        >>> import jtile
        >>> print(jtile.softmax(jnp.array([1.0, 1.0, 5.0]), mask=jnp.array([True, True, False])))
        [0.5 0.5 0. ]
    """
    return _softmax("softmax", x, scale, mask, is_causal, implementation)


def log_softmax(
    x: Float[Array, "*shape"],
    *,
    scale: float = 1.0,
    mask: Bool[Array, "*#shape"] | None = None,
    is_causal: bool = False,
    implementation: Implementation = None,
) -> Float[Array, "*shape"]:
    """The logarithm of softmax over the last dimension: scale · x − log Σ exp(scale · x), sums of what counts.

    As `jtile.softmax`, but that the result is −∞ where a score does not count, and so throughout a row in which nothing
    does. It is a constant there: the gradient is 0 and the cotangent is left out, whatever it is.

    The gradient takes exp(y) of the result y as it was rounded: in bfloat16 this is off by up to 2⁻⁹ · |y| of itself.

    Args:
        x, scale, mask, is_causal, implementation: see `jtile.softmax`.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        ValueError, NotImplementedError: as `jtile.softmax` does.

    Example:
        >>> import jax.numpy as jnp
        >>> import jtile
        >>> print(jtile.log_softmax(jnp.log(jnp.array([[1.0, 7.0], [4.0, 4.0]])), is_causal=True).round(3))
        [[ 0.       -inf]
         [-0.693 -0.693]]
    """
    return _softmax("log_softmax", x, scale, mask, is_causal, implementation)


def _softmax(name: str, x, scale, mask, is_causal, implementation):
    check_known(name, scale=scale, is_causal=is_causal)
    x = jnp.asarray(x)
    if x.ndim == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name}: `x` must be floating point and have a dimension, got {x.dtype} of shape {x.shape}")
    if not math.isfinite(scale):
        raise ValueError(f"{name}: `scale` must be finite, got {scale}")
    if is_causal and x.ndim < 2:
        raise ValueError(f"{name}: causal scores have dimensions (..., queries, keys), but `x` has shape {x.shape}")
    rows = x.shape[:-2] if is_causal else x.shape[:-1]
    has = [True] * x.ndim
    if mask is not None:
        mask = jnp.asarray(mask)
        whole = (1,) * (x.ndim - mask.ndim) + mask.shape
        broadcasts = len(whole) == x.ndim and all(m in (1, n) for n, m in zip(x.shape, whole, strict=True))
        if mask.dtype != bool or not broadcasts:
            raise ValueError(
                f"{name}: `mask` must be boolean, True where a score counts, and broadcast to `x`, whose shape is "
                f"{x.shape}; got {mask.dtype} of shape {mask.shape}"
            )
        for i, (n, m) in enumerate(zip(x.shape, whole, strict=True)):
            has[i] = n == m if n > 1 or i == 0 else has[i - 1]  # a dimension of 1 joins its neighbour
        mask = mask.reshape([n for n, h in zip(x.shape, has, strict=True) if h])
    leading = next((i for i, h in enumerate(has[: len(rows)]) if h != has[0]), len(rows))
    of_mask = has[0], *has[leading:]
    (y,) = forward(name, of_mask)(
        x,
        mask,
        jnp.arange(x.shape[-2], dtype=jnp.int32) if is_causal else None,
        scale=float(scale),
        log=name == "log_softmax",
        of_mask=of_mask,
        implementation=implementation,
    )
    return y
