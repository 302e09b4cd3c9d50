"""Dropout without a mask in memory: the gradient draws the same bits again, on any tile and any number of devices.

An element's bits are a function of the key, of its row's number and of its column (`random_bits`). Rows and columns are
operands, which are split as the array is: so a device that has a part of it knows which part.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Key, UInt

from jtile.compiler.params import CompilerParams
from jtile.op import Implementation, TileOp, check_known
from jtile.ops.random_bits import BITS, COLUMNS, key_words, random_bits

# Spec. Of every e columns, which stay together, `column` holds the number of the first; they follow each other.

forward = TileOp(
    "dropout",
    "x: ... (c e), residual?: ... (c e), row: ..., column: c, key: two -> y: ... (c e)",
    whole="e two",
)


# What reference and kernel share: a tile of the result. Bits are counted from the multiple of 8 that columns begin at.


def _dropped(x, residual, rows, groups, key, threshold):
    keep = random_bits((key[0], key[1]), rows, groups)[:, : x.shape[1]] >= jnp.uint32(threshold)
    # Bits tell probabilities in units of 2⁻¹⁶. The factor undoes the one that they make, so that the mean is right.
    factor = 2**BITS / (2**BITS - threshold) if threshold < 2**BITS else 0.0
    y = jnp.where(keep, x.astype(jnp.promote_types(x.dtype, jnp.float32)) * factor, 0.0)
    return (y if residual is None else y + residual.astype(y.dtype)).astype(x.dtype)


# Reference.


@forward.reference
def forward_reference(x, residual, row, column, key, *, threshold):
    d = x.shape[-1]
    e = d // max(1, column.size)
    groups = (column[:, None] + jnp.arange(0, e, COLUMNS)).reshape(1, -1) // COLUMNS
    flat = lambda x: None if x is None else x.reshape(row.size, d)  # noqa: E731
    return (_dropped(flat(x), flat(residual), row.reshape(row.size, 1), groups, key, threshold).reshape(x.shape),)


# Kernel. A stream: every thread has several loads of 16 bytes in flight.


class Tile(NamedTuple):
    """The rows and lanes that a program has."""

    rows: int
    lanes: int
    num_warps: int


@forward.tiles
def forward_tiles(x, *rest, **options):
    rows, d = x.shape
    for size, num_warps in (2048, 4), (1024, 2), (4096, 4), (4096, 8):
        lanes = max(COLUMNS, min(size, pl.next_power_of_2(d)))
        yield Tile(min(size // lanes, pl.next_power_of_2(rows)), lanes, num_warps)


@forward.kernel
def forward_kernel(x, residual, row, column, key, *, tile, threshold):
    rows, d = x.shape
    block, lanes, num_warps = tile

    def dropout_kernel(x_ref, row_ref, column_ref, key_ref, *refs):
        *residual_refs, y_ref = refs
        first = column_ref[0] // COLUMNS + pl.program_id(0) * (lanes // COLUMNS)
        groups = first + jnp.arange(lanes // COLUMNS, dtype=jnp.int32)[None]
        added = residual_refs[0][...] if residual_refs else None
        y_ref[...] = _dropped(x_ref[...], added, row_ref[...][:, None], groups, key_ref, threshold)

    spec = pl.BlockSpec((block, lanes), lambda j, i: (i, j))
    whole = lambda array: pl.BlockSpec(array.shape, lambda j, i: (0,))  # noqa: E731
    added = [] if residual is None else [residual]
    return (
        pl.pallas_call(
            dropout_kernel,
            grid=(pl.cdiv(d, lanes), pl.cdiv(rows, block)),
            in_specs=[spec, pl.BlockSpec((block,), lambda j, i: (i,)), whole(column), whole(key), *[spec] * len(added)],
            out_specs=spec,
            out_shape=x,
            compiler_params=CompilerParams(num_warps=num_warps, num_stages=1),
            name="dropout",
        )(x, row, column, key, *added),
    )


# Derivative. It is linear, and its own transpose.


@forward.transpose
def forward_transpose(operands, results, cotangents, **options):
    _, residual, *place = operands
    (dy,) = cotangents
    (dx,) = forward(dy, None, *place, **options)
    return dx, None if residual is None else dy, None, None, None


# Public name.


def dropout(
    x: Float[Array, "*shape"],
    rate: float,
    key: Key[Array, ""] | UInt[Array, " words"],
    *,
    residual: Float[Array, "*shape"] | None = None,
    split: Mapping[int, str | tuple[str, ...]] = MappingProxyType({}),
    implementation: Implementation = None,
) -> Float[Array, "*shape"]:
    """Zeros in place of a share `rate` of the elements, and the others times 1 / (1 − rate); then adds a residual.

    What is dropped depends on the key, on the shape of `x` and on an element's place in it, and on nothing else: not on
    dtypes, nor on how devices share out the array. No mask is in memory. The gradient draws the same bits once more.

    Bits are 16 to an element, so `rate` counts as the nearest multiple of 2⁻¹⁶, in the factor too.

    Under `jax.vmap` calls that share a key drop the same elements, as they draw the same numbers from `jax.random`:
    split the key and map over it for others. A dropped element is 0 whatever it was, NaN included.

    Args:
        x: of any shape with up to 2³² rows, which are what the last dimension holds.
        rate: the probability that an element is dropped, from 0, which drops none, to 1, which drops all.
        key: from `jax.random.key` or `jax.random.PRNGKey`, of any generator; of its words alone are the bits made.
        residual: like `x`, added to the result in the same pass over memory.
        split: inside `jax.shard_map` and `jax.pmap`, the mesh axes that split each dimension of the array of which `x`
            is a part, `{0: "data"}`: the device then drops what would be dropped of the whole. Elsewhere arrays know
            how they are split.
        implementation: `None`, `"triton"`, `"xla"` or `"interpret"`, see `jtile.TileOp`.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        ValueError: `x` is a scalar or not floating point, shapes or dtypes of `x` and `residual` differ, `rate` is not
            from 0 to 1, `key` is not one key, or `split` names a dimension that `x` lacks.
        NotImplementedError: the named implementation cannot serve the call.

    Source: Srivastava et al., Dropout: A Simple Way to Prevent Neural Networks from Overfitting, 2014, section 10.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jtile
        >>> y = jtile.dropout(jnp.ones((100, 1000)), 0.5, jax.random.key(0))
        >>> print(y.max(), (y == 0).mean().round(2))
        2.0 0.5
    """
    check_known("dropout", rate=rate)
    x = jnp.asarray(x)
    if x.ndim == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"dropout: `x` must be floating point and have a dimension, got {x.dtype} of shape {x.shape}")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"dropout: `residual` must be like `x`, {x.dtype} of shape {x.shape}, got {residual.dtype} of shape "
            f"{residual.shape}; cast or broadcast one of them"
        )
    if not 0 <= rate <= 1:
        raise ValueError(f"dropout: `rate` must be from 0 to 1, the probability that an element is dropped; got {rate}")
    *leading, d = x.shape
    if -1 in split or x.ndim - 1 in split:
        if d % COLUMNS:
            raise ValueError(
                f"dropout: parts of a last dimension that is split are multiples of {COLUMNS}, this one has {d}; pad "
                "it, or gather it by jax.lax.all_gather"
            )
    threshold = round(rate * 2**BITS)
    if threshold == 0 or x.size == 0:
        return x if residual is None else x + residual
    row = jnp.zeros(leading, jnp.int32)
    places = _places(x.shape, split)
    for axis, (place, size) in enumerate(places[:-1]):
        row = row * size + jax.lax.broadcast_in_dim(place, leading, (axis,))
    e = d if d % COLUMNS else COLUMNS
    (y,) = forward(
        x,
        residual,
        row,
        places[-1][0][::e],
        key_words(_one(key)),
        threshold=threshold,
        implementation=implementation,
    )
    return y


def _places(shape: tuple[int, ...], split: Mapping[int, str | tuple[str, ...]]) -> list[tuple[jax.Array, int]]:
    """For each dimension the numbers of its indices in the whole array, and the whole array's size."""
    axes = {}
    for dim, names in split.items():
        if not -len(shape) <= dim < len(shape):
            raise ValueError(f"dropout: `split` names dimension {dim}, and `x` has {len(shape)}, of shape {shape}")
        axes[dim % len(shape)] = names

    def place(dim: int, size: int) -> tuple[jax.Array, int]:
        numbers = jnp.arange(size, dtype=jnp.int32)
        if dim not in axes:
            return numbers, size
        return numbers + jax.lax.axis_index(axes[dim]) * size, size * jax.lax.axis_size(axes[dim])

    return [place(dim, size) for dim, size in enumerate(shape)]


def _one(key: jax.Array) -> jax.Array:
    array = hasattr(key, "dtype")
    typed = array and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0
    if not (typed or array and key.dtype == jnp.uint32 and key.ndim == 1 and key.size >= 2):
        raise ValueError(
            "dropout: `key` must be one key, from jax.random.key or jax.random.PRNGKey, got "
            f"{f'{key.dtype} of shape {key.shape}' if array else key}; of several, map over them with jax.vmap"
        )
    return key
