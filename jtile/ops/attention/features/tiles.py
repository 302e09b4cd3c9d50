"""The size of blocks, for every chip the same: they keep to the shared memory and the registers of all."""

from typing import NamedTuple

from jax.experimental import pallas as pl

from jtile.compiler.params import CompilerParams


class Tile(NamedTuple):
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int

    def fitted(self, queries: int, keys: int, most: tuple[int, int] | None) -> "Tile":
        """No larger than the sequences, nor than `most`; a product of blocks has at least 16 rows and columns."""
        fit = lambda block, size: min(block, max(16, pl.next_power_of_2(size)))  # noqa: E731
        tile = self._replace(block_q=fit(self.block_q, queries), block_k=fit(self.block_k, keys))
        return (
            tile
            if most is None
            else tile._replace(**dict(zip(("block_q", "block_k"), map(min, tile[:2], most), strict=True)))
        )

    @property
    def compiler_params(self) -> CompilerParams:
        return CompilerParams(num_warps=self.num_warps, num_stages=self.num_stages, warp_specialize=False)


# By the bytes of an element and the widest head dim that a tile serves.
FORWARD = {
    (2, 64): Tile(128, 64, 8, 3),
    (2, 128): Tile(128, 64, 8, 3),
    (2, 256): Tile(64, 32, 4, 2),
    (2, 576): Tile(32, 16, 8, 1),
    (4, 64): Tile(64, 32, 8, 2),
    (4, 128): Tile(32, 32, 8, 2),
    (4, 256): Tile(32, 16, 8, 2),
    (4, 576): Tile(16, 16, 8, 1),
}
DQUERY = {
    (2, 64): Tile(128, 64, 8, 2),
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


def choose(tiles: dict[tuple[int, int], Tile], query, value, most: tuple[int, int] | None = None) -> Tile:
    """The tile of one of these tables for a call. `most` queries and keys make a block in lists of blocks."""
    size, width = max(2, query.dtype.itemsize), max(query.shape[-1], value.shape[-1])
    tile = next(tile for (bytes_, widest), tile in tiles.items() if bytes_ == size and width <= widest)
    return tile.fitted(query.shape[1], value.shape[1], most)
