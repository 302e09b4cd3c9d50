"""The size of blocks. Untuned it is the same for every chip: within the shared memory and the registers of all."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from jax.experimental import pallas as pl

from jtile.compiler.params import CompilerParams
from jtile.ops.attention import hopper
from jtile.ops.attention.hopper import features as on_hopper
from jtile.ops.attention.variant import Variant


class Tile(NamedTuple):
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int

    def fitted(self, query, value, variant: Variant) -> "Tile":
        """No larger than the sequences, nor than blocks in lists; a product has at least 16 rows and columns."""
        most_q, most_k = variant.block_size or (self.block_q, self.block_k)
        fit = lambda block, most, size: min(block, most, max(16, pl.next_power_of_2(size)))  # noqa: E731
        block_q, block_k = fit(self.block_q, most_q, query.shape[1]), fit(self.block_k, most_k, value.shape[1])
        return self._replace(block_q=block_q, block_k=block_k)

    @property
    def compiler_params(self) -> CompilerParams:
        # Triton 3.9's pass for specialised warps fails on some of these loops.
        return CompilerParams(num_warps=self.num_warps, num_stages=self.num_stages, warp_specialize=False)


# By the bytes of an element and the widest head dim that a tile serves.
FORWARD = {
    (2, 128): Tile(128, 64, 8, 3),
    (2, 256): Tile(64, 32, 4, 2),
    (2, 576): Tile(32, 16, 8, 1),
    (4, 64): Tile(64, 32, 8, 2),
    (4, 128): Tile(32, 32, 8, 2),
    (4, 256): Tile(32, 16, 8, 2),
    (4, 576): Tile(16, 16, 8, 1),
}
DQUERY = {
    (2, 128): Tile(128, 64, 8, 2),
    (2, 256): Tile(64, 32, 4, 1),
    (2, 576): Tile(32, 16, 8, 1),
    (4, 64): Tile(32, 32, 4, 2),
    (4, 128): Tile(32, 32, 8, 2),
    (4, 256): Tile(32, 16, 8, 2),
    (4, 576): Tile(16, 16, 8, 1),
}
DKEY_DVALUE = {
    (2, 64): Tile(64, 128, 8, 2),
    (2, 128): Tile(64, 64, 4, 2),
    (2, 256): Tile(16, 64, 8, 2),
    (2, 576): Tile(16, 16, 8, 1),
    (4, 64): Tile(32, 32, 8, 2),
    (4, 128): Tile(16, 32, 8, 2),
    (4, 256): Tile(16, 16, 8, 2),
    (4, 576): Tile(16, 16, 8, 1),
}


def _fitting(tiles: dict[tuple[int, int], Tile], query, value, variant: Variant) -> Tile:
    """The tile of one of these tables for a call."""
    size, width = max(2, query.dtype.itemsize), max(query.shape[-1], value.shape[-1])
    tile = next(tile for (bytes_, widest), tile in tiles.items() if bytes_ == size and width <= widest)
    return tile.fitted(query, value, variant)


def _others(query, value, variant: Variant, *blocks: tuple[int, int]) -> Iterator[Tile]:
    """What else may be tried: blocks of queries and keys."""
    for block_q, block_k in blocks:
        for num_warps, num_stages in itertools.product((4, 8), (1, 2, 3, 4)):
            yield Tile(block_q, block_k, num_warps, num_stages).fitted(query, value, variant)


class BackwardTiles(NamedTuple):
    dquery: Tile
    dkey_dvalue: Tile


FORWARD_BLOCKS = (64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128), (256, 64)
DQUERY_BLOCKS = (32, 32), (64, 32), (64, 64), (128, 32), (128, 64)
DKEY_DVALUE_BLOCKS = (16, 64), (32, 32), (32, 64), (64, 64), (64, 128)


def forward(query, key, value, *rest, target, variant: Variant) -> Iterator[Tile | hopper.ForwardTile]:
    if on_hopper.obstacle(query, key, value, *rest, variant=variant, target=target) is None:
        yield from on_hopper.forward_tiles(query, key, value, variant=variant, target=target)
    yield _fitting(FORWARD, query, value, variant)
    yield from _others(query, value, variant, *FORWARD_BLOCKS)


def backward(query, key, value, *rest, target, variant: Variant) -> Iterator[BackwardTiles | hopper.BackwardTile]:
    """One kernel's tile at a time differs from the untuned one; the tuner puts the best of both together."""
    arrays = rest[: len(variant.operands)]
    if on_hopper.obstacle(query, key, value, *arrays, variant=variant, target=target, widest=128) is None:
        yield from on_hopper.backward_tiles(query, key, value, variant=variant)
    untuned = BackwardTiles(_fitting(DQUERY, query, value, variant), _fitting(DKEY_DVALUE, query, value, variant))
    yield untuned
    dquery, dkey_dvalue = (
        dict.fromkeys(_others(query, value, variant, *blocks)) for blocks in (DQUERY_BLOCKS, DKEY_DVALUE_BLOCKS)
    )
    yield from (untuned._replace(dquery=tile) for tile in dquery)
    yield from (untuned._replace(dkey_dvalue=tile) for tile in dkey_dvalue)


def operand_gradient(query, key, value, *rest, target, variant: Variant, operand: str) -> Iterator[Tile]:
    yield _fitting(DKEY_DVALUE, query, value, variant)
    yield from _others(query, value, variant, *DKEY_DVALUE_BLOCKS)
