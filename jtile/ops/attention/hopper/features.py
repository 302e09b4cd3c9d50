"""A variant's features in the schedule for Hopper: when it has them, and how their operands reach its kernel."""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtile.compiler.target import Target
from jtile.ops.attention import hopper, visits
from jtile.ops.attention.hopper import functions
from jtile.ops.attention.variant import Variant, first_query


class _Blocks(NamedTuple):
    block_q: int
    block_k: int


def band(variant: Variant) -> dict[str, int | None]:
    """The bounds of the band of keys that queries see, where these are the same for all sequences."""
    low, high = (None, None) if variant.has("query_offset") else variant.bounds
    return dict(low=low, high=high)


def _slots(variant: Variant) -> dict[str, int]:
    """The numbers of the arrays that the kernel reads."""
    read = [o.name for o in variant.operands if o.elementwise or o.rank is not None or o.name == "sinks"]
    return {name: i for i, name in enumerate(read)}


@functools.lru_cache(maxsize=256)
def _traced(variant: Variant, types: tuple, sizes: functions.Sizes, *, with_derivative: bool):
    shapes = {o.name: jax.ShapeDtypeStruct(*x) for o, x in zip(variant.operands, types, strict=True)}
    return functions.trace(variant, shapes, _slots(variant), sizes, with_derivative=with_derivative)


def _functions(query, key, arrays, variant: Variant, order: str) -> functions.Functions | None:
    """Those of blocks with these axes, or None where there is no more than a scale and a band."""
    if variant.is_band:
        return None
    return functions.write(*_trace(query, key, arrays, variant, with_derivative=order == "kq"), variant, order)


def _trace(query, key, arrays, variant: Variant, *, with_derivative: bool) -> tuple[Any, float, functions.Sizes]:
    types = tuple((x.shape if x.ndim else (1,), x.dtype) for x in arrays)
    sizes = functions.Sizes(query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    jaxpr, slope = _traced(variant, types, sizes, with_derivative=with_derivative)
    return jaxpr, slope, sizes


def obstacle(query, key, value, *arrays, variant: Variant, target: Target | None) -> str | None:
    """Why this schedule does not serve a call, as a clause, or None."""
    scale = 1.0 if variant.modifies else variant.scale
    if found := hopper.obstacle(query, key, value, scale, target):
        return found
    if variant.dropout:
        return "it has no dropout"
    if variant.block_size and (variant.block_size[0] % 128 or variant.block_size[1] % 128):
        return f"its blocks are 128 by 128, and those in lists are {variant.block_size}"
    if whole := [o.name for o in variant.operands if set("qk") <= set(o.axes)]:
        return f"`{whole[0]}` has an element for every score"
    if len(_slots(variant)) > hopper.ARRAYS:
        return f"it reads up to {hopper.ARRAYS} arrays"
    jaxpr, _, _ = _trace(query, key, arrays, variant, with_derivative=True)
    return functions.obstacle(jaxpr)


def forward_tiles(query, key, value, *, variant: Variant, target: Target) -> Iterator[hopper.ForwardTile]:
    sides = variant.block_size or (0, 0)
    told = variant.block_size is not None or variant.has(*visits.TELLING)
    for tile in hopper.forward_tiles(query, key, value, **band(variant), target=target):
        if told:  # blocks of queries differ in length, and see but a part of the keys
            together = min(16 * tile.together, query.shape[0] * query.shape[2])
            tile = tile._replace(programs=target.sms, together=together)
        if tile.groups == 3 and (variant.modifies or variant.masks_by_data):
            tile = tile._replace(groups=2, stages=3)  # functions of scores need the registers that three do not have
        if not (sides[0] % (64 * tile.groups) or sides[1] % tile.block_k):
            yield tile


def _ranges(query, key, named, variant: Variant, blocks: _Blocks, *, of_keys: bool):
    """The ranges of blocks to visit, (batch or 1, blocks, 4), where operands tell them."""
    axes = {o.name: o.axes for o in variant.operands}
    x = {n: a if axes[n].startswith("b") else a[None] for n, a in named.items() if n in visits.TELLING}
    x |= {"origin": named["origin"]} if "origin" in named else {}
    return visits.ranges(variant, x, query.shape[1], key.shape[1], blocks, of_keys=of_keys)


def _steps(array, axes: int) -> int:
    """Rows, of the last `axes` axes, from one element of the first axis to the next; 0 if there is but one for all."""
    return math.prod(array.shape[1:-axes]) if array.shape[0] > 1 else 0


def _with_heads(named, variant: Variant, *names: str):
    """Lists with axes for batch and heads, of size 1 where they hold for all."""
    for name in names:
        axes = next(o.axes for o in variant.operands if o.name == name)
        array = named[name]
        array = array if "b" in axes else array[None]
        yield array if axes.strip("b")[0] in "hg" else array[:, None]


def _call(variant: Variant, named, options: dict[str, Any]) -> dict[str, Any]:
    """What both passes are called with."""
    arrays = [jnp.atleast_1d(named[name]) for name in _slots(variant)]
    origin = first_query(named) if "origin" in named else None
    about = dict(origin=origin, scale=variant.scale, **band(variant), flags=variant.masks)
    return about | dict(arrays=arrays, options=options)


def _layout(lists, block_size: tuple[int, int], blocks: _Blocks) -> hopper.Lists:
    """How the kernels find a block's list, and the kernels' blocks in those of lists."""
    return hopper.Lists(
        batch=_steps(lists, 1),
        head=_steps(lists[0], 1),
        rows=block_size[0] // blocks.block_q,
        columns=block_size[1] // blocks.block_k,
        length=lists.shape[-1],
    )


def forward(query, key, value, *arrays, tile: hopper.ForwardTile, variant: Variant):
    """The output and the log-sum-exp; and where there are masks, the number that tells of NaN, which may have come from
    a masked value to queries in its block."""
    named: dict[str, Any] = variant.named(arrays)
    blocks = _Blocks(64 * tile.groups, tile.block_k)
    options: dict[str, Any] = dict(
        functions=_functions(query, key, arrays, variant, "qk"),
        masks_anywhere=variant.masks_anywhere,
        sinks=_slots(variant).get("sinks"),
    )
    at = lists = None
    if variant.has(*visits.TELLING):
        at = _ranges(query, key, named, variant, blocks, of_keys=True)
        options |= dict(ranges=_steps(at, 1))
    elif variant.block_size:
        lists, at = _with_heads(named, variant, "key_blocks", "key_counts")
        options |= dict(lists=_layout(lists, variant.block_size, blocks))
    return hopper.forward(query, key, value, visits=(at, lists), tile=tile, **_call(variant, named, options))


def backward_tiles(query, key, value, *, variant: Variant) -> Iterator[hopper.BackwardTile]:
    # Blocks of keys of one head wait for each other's turns, and those of a document or a list for all of these.
    factor = 16 if variant.has(*visits.TELLING) else 2 if variant.block_size else 1
    for tile in hopper.backward_tiles(query, key, value, **band(variant)):
        yield tile._replace(together=min(factor * tile.together, key.shape[0] * key.shape[2]))


def backward(query, key, value, *arrays, out, lse, dout, dlse, tile: hopper.BackwardTile, variant: Variant):
    """The gradients of query, key and value; and where there are masks, the number that tells of NaN."""
    named: dict[str, Any] = variant.named(arrays)
    blocks = _Blocks(tile.block_q, hopper.backward_block_k(query, value))
    options: dict[str, Any] = dict(
        functions=_functions(query, key, arrays, variant, "kq"), masks_anywhere=variant.masks_anywhere
    )
    count = -(-query.shape[1] // blocks.block_q)
    at = lists = numbers = None
    if variant.has(*visits.TELLING):
        at = _ranges(query, key, named, variant, blocks, of_keys=False)
        options |= dict(ranges=_steps(at, 1))
        visited = _between(at[:, None, :, 0], at[:, None, :, 3], count)
    elif variant.block_size:
        lists, counts = _with_heads(named, variant, "query_blocks", "query_counts")
        lists, at, visited = _in_order(lists, counts)
        options |= dict(lists=_layout(lists, variant.block_size, blocks))
        key_blocks = -(-key.shape[1] // blocks.block_k)
        visited = jnp.repeat(visited, options["lists"].columns, axis=2)[:, :, :key_blocks]
        visited = jnp.repeat(visited, options["lists"].rows, axis=3)
    if at is not None:
        # A block of queries gets what its blocks of keys add one after the other. (A product: XLA's sums are slower.)
        earlier = jnp.tri(visited.shape[2], k=-1, dtype=jnp.bfloat16)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        numbers = product("ij,bhjq->bhiq", earlier, visited.astype(earlier.dtype))
        numbers = numbers.astype(jnp.int32)
        options |= dict(numbers=(_steps(numbers, 2), _steps(numbers[0], 2)))
    gradients = hopper.backward(
        *(query, key, value, out, lse, dout, dlse),
        visits=(at, lists, numbers),
        tile=tile,
        **_call(variant, named, options),
    )
    if at is None:
        return gradients
    dquery, *rest = gradients
    seen = jnp.repeat(jnp.any(visited, axis=2), blocks.block_q, axis=2)[..., : query.shape[1]]
    seen = jnp.repeat(seen, query.shape[2] // seen.shape[1], axis=1)
    return jnp.where(jnp.swapaxes(seen, 1, 2)[..., None], dquery, 0), *rest


def _between(start, stop, count: int):
    places = jnp.arange(count, dtype=jnp.int32)
    return (places >= start[..., None]) & (places < stop[..., None])


def _in_order(lists, counts):
    """Lists with their blocks in order, as 2 · block + whether it is to be masked; their lengths; and which blocks are
    in them, (batch, heads, blocks of keys, blocks of queries)."""
    put = functools.partial(jnp.put_along_axis, axis=-1, inplace=False)  # XLA folds these sooner than sorts
    blocks = jnp.broadcast_to(jnp.arange(lists.shape[-1], dtype=jnp.int32), lists.shape)
    place = put(jnp.zeros_like(lists), lists, blocks)  # of each block in its list
    whole, count = counts[..., :1], counts[..., 1:]
    visited = place < count
    at = jnp.where(visited, jnp.cumsum(visited, axis=-1) - 1, lists.shape[-1])
    return put(jnp.zeros_like(lists), at, 2 * blocks + (place >= whole), mode="drop"), count[..., 0], visited
