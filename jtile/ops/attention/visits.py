"""Which blocks a block visits: of keys for a block of queries, and of queries for a block of keys.

Where positions tell, they are a range, and those that are visible as a whole are a range in it:

    start <= whole_start <= whole_stop <= stop

A kernel computes it from its own place, or where lengths and segments tell too, reads it from a small array of int32
that is computed beside. In general they are a list, `BlockMask`: first the blocks that are visible as a whole, then
those where `visible` must be asked, and how many there are of each and of both.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jtile.ops.attention.variant import Variant, first_query


class Range(NamedTuple):
    """Blocks from `start` to `stop`; those from `whole_start` to `whole_stop` are visible as a whole."""

    start: Any
    whole_start: Any
    whole_stop: Any
    stop: Any

    @property
    def parts(self) -> list[tuple[Any, Any, bool]]:
        """Ranges, each with whether `visible` must be asked in it. Those known to be empty are left out."""
        cuts = [(self.start, self.whole_start, True), (self.whole_start, self.whole_stop, False)]
        cuts.append((self.whole_stop, self.stop, True))
        return [(low, high, masked) for low, high, masked in cuts if not _same(low, high)]


def _same(low, high) -> bool:
    return low is high or (isinstance(low, int) and isinstance(high, int) and low == high)


def _smaller(a, b):
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def _larger(a, b):
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)


def _blocks_before(position, block: int):
    """How many whole blocks end before a position."""
    if isinstance(position, int):
        return max(position, 0) // block
    return lax.div(jnp.maximum(position, 0), jnp.int32(block))


class Band(NamedTuple):
    """Position i of one sequence sees positions i + low to i + high of the other; None is no bound."""

    low: Any
    high: Any

    def range(self, start, stop, size, block: int, own_size=None) -> Range:
        """The blocks of a sequence of this size that positions from `start` to before `stop` of the other see.

        Of the other those before `own_size` count alone.
        """
        first, last, whole_first, whole_last = 0, size, 0, size
        if self.low is not None:
            first, whole_first = start + self.low, stop - 1 + self.low
        if self.high is not None:
            last, whole_last = _smaller(stop + self.high, size), _smaller(start + self.high + 1, size)
        begin, end = _blocks_before(first, block), _blocks_before(last + block - 1, block)
        whole_begin, whole_end = _blocks_before(whole_first + block - 1, block), _blocks_before(whole_last, block)
        if own_size is not None:
            end = jnp.where(start < own_size, end, 0)
            whole_end = jnp.where(stop <= own_size, whole_end, 0)
        return _ordered(begin, whole_begin, whole_end, end)


def _ordered(begin, whole_begin, whole_end, end) -> Range:
    stop = _larger(begin, end)
    whole_start = begin if _same(begin, whole_begin) else _smaller(_larger(begin, whole_begin), stop)
    whole_stop = stop if _same(end, whole_end) else _smaller(_larger(whole_start, whole_end), stop)
    return Range(begin, whole_start, whole_stop, stop)


def band(variant: Variant, offset, *, of_keys: bool) -> Band:
    """Which keys a query sees; or which queries a key is seen by. `offset` is added to the variant's."""
    low, high = (None if bound is None else bound + offset for bound in variant.bounds)
    return Band(low, high) if of_keys else Band(None if high is None else -high, None if low is None else -low)


def static_range(variant: Variant, first, start, size: int, own_block: int, block: int, *, of_keys: bool) -> Range:
    """The blocks that `own_block` positions from `start` visit of the other sequence, where no operand tells.

    Queries count from a device's first, whose number is `first`.
    """
    found = band(variant, first, of_keys=of_keys).range(start, start + own_block, size, block)
    if variant.masks_anywhere:
        return found._replace(whole_start=found.start, whole_stop=found.start)
    return found


# Operands that tell ranges, each with a batch axis first.
TELLING = ("query_lengths", "key_lengths", "query_segments", "key_segments", "query_offset")


def ranges(variant: Variant, x: dict[str, jax.Array], queries: int, keys: int, tile, *, of_keys: bool) -> jax.Array:
    """The ranges of all blocks of queries, or of all blocks of keys: int32, (batch, blocks, 4)."""
    own_size, size = (queries, keys) if of_keys else (keys, queries)
    own_block, block = (tile.block_q, tile.block_k) if of_keys else (tile.block_k, tile.block_q)
    own, other = ("query", "key") if of_keys else ("key", "query")
    first = first_query(x)
    lengths: dict[str, Any] = {"query": None, "key": None}
    if "query_lengths" in x:
        lengths["query"] = x["query_lengths"][:, None] - first
    if "key_lengths" in x:
        lengths["key"] = x["key_lengths"][:, None]
    limit = lengths[other]
    start = own_block * jnp.arange(pl.cdiv(own_size, own_block), dtype=jnp.int32)[None]
    offset = first + (x["query_offset"][:, None] if "query_offset" in x else 0)
    found = band(variant, offset, of_keys=of_keys).range(
        start,
        jnp.minimum(start + own_block, own_size),
        jnp.int32(size) if limit is None else jnp.clip(limit, 0, size),
        block,
        lengths[own],
    )
    if "query_segments" in x:
        found = _within_segments(found, x[f"{own}_segments"], x[f"{other}_segments"], own_block, block)
    if variant.masks_anywhere:
        found = found._replace(whole_start=found.start, whole_stop=found.start)
    batch = max(x[name].shape[0] for name in TELLING if name in x)
    shape = batch, start.shape[1]
    return jnp.stack([jnp.broadcast_to(jnp.asarray(n, jnp.int32), shape) for n in found], axis=-1)


def _within_segments(found: Range, own, other, own_block: int, block: int) -> Range:
    """What is left of ranges where blocks without a segment in common do not see each other.

    A block's segments are taken to be all from its least to its greatest. Counted from a sequence's first segment on,
    and round from the greatest number to the least, ids in order stay in order, and so do those of documents that are
    followed by padding of id 0 or −1.
    """
    first = own[:, :1]
    (low, high), (other_low, other_high) = _extremes(own - first, own_block), _extremes(other - first, block)
    low, high, other_low, other_high = (
        low[..., None],
        high[..., None],
        other_low[..., None, :],
        other_high[..., None, :],
    )
    meet = (low <= other_high) & (other_low <= high)
    count = other_low.shape[-1]
    start, stop = _hull(meet, count)
    alike = (low == high) & (other_low == other_high) & (low == other_low)
    whole_start, whole_stop = _hull(alike, count)
    whole = whole_stop - whole_start == jnp.sum(alike, axis=-1, dtype=jnp.int32)  # and not with others between
    begin, end = jnp.maximum(found.start, start), jnp.minimum(found.stop, stop)
    return _ordered(
        begin,
        jnp.maximum(found.whole_start, whole_start),
        jnp.where(whole, jnp.minimum(found.whole_stop, whole_stop), 0),
        end,
    )


def _extremes(ids, block: int):
    """The least and the greatest of each block, as unsigned numbers."""
    ids = lax.bitcast_convert_type(ids.astype(jnp.int32), jnp.uint32)
    padding = -ids.shape[-1] % block
    blocks = lambda fill: jnp.pad(ids, ((0, 0), (0, padding)), **fill).reshape(*ids.shape[:-1], -1, block)  # noqa: E731
    return jnp.min(blocks(dict(mode="edge")), axis=-1), jnp.max(blocks(dict(mode="edge")), axis=-1)


def _hull(mask, count: int):
    """The first place where it holds, and one past the last; an empty range where it holds nowhere."""
    places = jnp.arange(count, dtype=jnp.int32)
    start = jnp.min(jnp.where(mask, places, count), axis=-1)
    stop = jnp.max(jnp.where(mask, places + 1, 0), axis=-1)
    return start, jnp.maximum(start, stop)
