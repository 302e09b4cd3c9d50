"""The size of blocks. Untuned it is the same for every chip: within the shared memory and the registers of all."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from jax.experimental import pallas as pl

from jtile.compiler.params import CompilerParams
from jtile.ops.attention import hopper


class Tile(NamedTuple):
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int

    def fitted(self, queries: int, keys: int) -> "Tile":
        """No larger than the sequences; a product of blocks has at least 16 rows and columns."""
        fit = lambda block, size: min(block, max(16, pl.next_power_of_2(size)))  # noqa: E731
        return self._replace(block_q=fit(self.block_q, queries), block_k=fit(self.block_k, keys))

    @property
    def compiler_params(self) -> CompilerParams:
        return CompilerParams(num_warps=self.num_warps, num_stages=self.num_stages)


# By the bytes of an element and the widest head dim that a tile serves.
FORWARD = {
    (2, 64): Tile(128, 64, 8, 3),
    (2, 128): Tile(128, 64, 8, 3),
    (2, 256): Tile(64, 32, 4, 2),
    (4, 64): Tile(64, 32, 8, 2),
    (4, 128): Tile(32, 32, 8, 2),
    (4, 256): Tile(32, 16, 8, 2),
}
DQUERY = {
    (2, 64): Tile(128, 64, 8, 2),
    (2, 128): Tile(128, 64, 8, 2),
    (2, 256): Tile(64, 32, 4, 1),
    (4, 64): Tile(32, 32, 4, 2),
    (4, 128): Tile(32, 32, 8, 2),
    (4, 256): Tile(32, 16, 8, 2),
}
DKEY_DVALUE = {
    (2, 64): Tile(64, 128, 8, 2),
    (2, 128): Tile(64, 64, 4, 2),
    (2, 256): Tile(16, 64, 8, 2),
    (4, 64): Tile(32, 32, 8, 2),
    (4, 128): Tile(16, 32, 8, 2),
    (4, 256): Tile(16, 16, 8, 2),
}


def _fitting(tiles: dict[tuple[int, int], Tile], query, value) -> Tile:
    """The tile of one of these tables for a call."""
    size, width = query.dtype.itemsize, max(query.shape[-1], value.shape[-1])
    tile = next(tile for (bytes_, widest), tile in tiles.items() if bytes_ == size and width <= widest)
    return tile.fitted(query.shape[1], value.shape[1])


def _others(query, value, *blocks: tuple[int, int]) -> Iterator[Tile]:
    """What else may be tried: blocks of queries and keys."""
    for block_q, block_k in blocks:
        for num_warps, num_stages in itertools.product((4, 8), (1, 2, 3, 4)):
            yield Tile(block_q, block_k, num_warps, num_stages).fitted(query.shape[1], value.shape[1])


class BackwardTiles(NamedTuple):
    dquery: Tile
    dkey_dvalue: Tile


def forward_tiles(query, key, value, origin, *, target, scale) -> Iterator[Tile | hopper.ForwardTile]:
    if hopper.obstacle(query, key, value, scale, target) is None:
        yield from hopper.forward_tiles(query, key, value, low=None, high=None if origin is None else 0, target=target)
    yield _fitting(FORWARD, query, value)
    yield from _others(query, value, (64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128), (256, 64))


def backward_tiles(query, key, value, origin, *rest, target, scale) -> Iterator[BackwardTiles | hopper.BackwardTile]:
    """One kernel's tile at a time differs from the untuned one; the tuner puts the best of both together."""
    if hopper.obstacle(query, key, value, scale, target, widest=128) is None:
        yield from hopper.backward_tiles(query, key, value, low=None, high=None if origin is None else 0)
    untuned = BackwardTiles(_fitting(DQUERY, query, value), _fitting(DKEY_DVALUE, query, value))
    yield untuned
    dquery = _others(query, value, (32, 32), (64, 32), (64, 64), (128, 32), (128, 64))
    dkey_dvalue = _others(query, value, (16, 64), (32, 32), (32, 64), (64, 64), (64, 128))
    first, second = list(dict.fromkeys(dquery)), list(dict.fromkeys(dkey_dvalue))
    yield from (untuned._replace(dquery=tile) for tile in first)
    yield from (untuned._replace(dkey_dvalue=tile) for tile in second)
