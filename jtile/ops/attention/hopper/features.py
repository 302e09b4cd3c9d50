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


def _trace(query, key, arrays, variant: Variant, *, with_derivative: bool):
    types = tuple((x.shape if x.ndim else (1,), x.dtype) for x in arrays)
    sizes = functions.Sizes(query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    return *_traced(variant, types, sizes, with_derivative=with_derivative), sizes


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
    for tile in hopper.forward_tiles(query, key, value, **band(variant), target=target):
        if tile.groups == 3 and (variant.modifies or variant.masks_by_data):
            tile = tile._replace(groups=2, stages=3)  # functions of scores need the registers that three do not have
        if not (sides[0] % (64 * tile.groups) or sides[1] % tile.block_k):
            yield tile


def forward(query, key, value, *arrays, tile: hopper.ForwardTile, variant: Variant):
    """The output and the log-sum-exp. Where operands mask keys, NaN in a value that is masked may reach the output of
    queries in its block, and their log-sum-exp then."""
    named: dict[str, Any] = variant.named(arrays)
    slots = _slots(variant)
    options: dict[str, Any] = dict(
        functions=_functions(query, key, arrays, variant, "qk"),
        masks_anywhere=variant.masks_anywhere,
        sinks=slots.get("sinks"),
        tells_nan=variant.masks_by_data,
    )
    at = at_lists = None
    if variant.has(*visits.TELLING):
        axes = {o.name: o.axes for o in variant.operands}
        x = {n: a if axes[n].startswith("b") else a[None] for n, a in named.items() if n in visits.TELLING}
        x |= {"origin": named["origin"]} if "origin" in named else {}
        blocks = _Blocks(64 * tile.groups, tile.block_k)
        at = visits.ranges(variant, x, query.shape[1], key.shape[1], blocks, of_keys=True)
        options |= dict(ranges=at.shape[1] if at.shape[0] > 1 else 0)
    elif variant.block_size:
        at_lists, at = named["key_blocks"], named["key_counts"]
        axes = next(o.axes for o in variant.operands if o.name == "key_blocks")
        rows, length = at_lists.shape[-2:]
        options |= dict(
            lists=hopper.Lists(
                batch=math.prod(at_lists.shape[1:-1]) if "b" in axes and at_lists.shape[0] > 1 else 0,
                head=rows if "h" in axes else 0,
                rows=variant.block_size[0] // (64 * tile.groups),
                columns=variant.block_size[1] // tile.block_k,
                length=length,
            )
        )
    return hopper.forward(
        query,
        key,
        value,
        first_query(named) if "origin" in named else None,
        tile=tile,
        scale=variant.scale,
        **band(variant),
        features=(at, at_lists, [jnp.atleast_1d(named[name]) for name in slots], options),
    )
