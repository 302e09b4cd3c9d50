"""The size of blocks. Untuned it is the same for every chip, within the registers of all; how many of them there are at
a time depends on its shared memory."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl

from jtile.compiler.params import CompilerParams
from jtile.compiler.target import Target
from jtile.ops.attention import hopper
from jtile.ops.attention.hopper import features as on_hopper
from jtile.ops.attention.variant import Variant


class Tile(NamedTuple):
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def compiler_params(self) -> CompilerParams:
        # Triton 3.9's pass for specialised warps fails on some of these loops.
        return CompilerParams(num_warps=self.num_warps, num_stages=self.num_stages, warp_specialize=False)


# By the bytes of an element and the widest head dim that a tile serves.
FORWARD = {
    (2, 64): Tile(64, 64, 4, 3),
    (2, 128): Tile(128, 64, 8, 3),
    (2, 256): Tile(128, 64, 8, 2),
    (2, 576): Tile(32, 16, 8, 1),
    (4, 64): Tile(64, 32, 8, 2),
    (4, 128): Tile(32, 16, 8, 2),
    (4, 256): Tile(32, 16, 8, 2),
    (4, 576): Tile(16, 16, 8, 1),
}
DQUERY = {
    (2, 128): Tile(64, 64, 4, 2),
    (2, 256): Tile(64, 32, 4, 1),
    (2, 576): Tile(32, 16, 8, 1),
    (4, 64): Tile(32, 32, 4, 2),
    (4, 128): Tile(32, 32, 8, 2),
    (4, 256): Tile(32, 16, 8, 2),
    (4, 576): Tile(16, 16, 8, 1),
}
DKEY_DVALUE = {
    (2, 128): Tile(64, 64, 4, 2),
    (2, 256): Tile(32, 64, 8, 2),
    (2, 576): Tile(16, 16, 8, 1),
    (4, 64): Tile(32, 32, 8, 2),
    (4, 128): Tile(16, 32, 8, 2),
    (4, 256): Tile(16, 16, 8, 2),
    (4, 576): Tile(16, 16, 8, 1),
}
SMALL_DKEY_DVALUE = DKEY_DVALUE | {(2, 128): Tile(32, 64, 4, 2)}


def before_hopper(target: Target | None) -> bool:
    return target is not None and target.compute_capability < 90


class Problem(NamedTuple):
    """What a call's tiles depend on."""

    query: jax.ShapeDtypeStruct
    value: jax.ShapeDtypeStruct
    arrays: Sequence[jax.ShapeDtypeStruct]
    variant: Variant
    target: Target | None

    def fitted(self, tile: Tile, kernel: str) -> Tile:
        """A tile no larger than the sequences, nor than blocks in lists; a product has at least 16 rows and columns. A
        kernel walks over blocks of keys, or of queries, and has as many at a time as shared memory has room for."""
        most = self.variant.block_size or tile[:2]
        sizes = self.query.shape[1], self.value.shape[1]
        fit = lambda block, most, size: min(block, most, max(16, pl.next_power_of_2(size)))  # noqa: E731
        block_q, block_k = map(fit, tile[:2], most, sizes)
        by_keys = kernel == "dkey_dvalue"
        other, own = (block_q, block_k) if by_keys else (block_k, block_q)
        stages = tile.num_stages
        if self.target is not None:
            row = (self.query.shape[-1] + self.value.shape[-1]) * self.query.dtype.itemsize
            own_row = self.query.shape[-1] * self.query.dtype.itemsize if kernel == "forward" else row
            pairs = zip(self.variant.operands, self.arrays, strict=True)
            pair = sum(x.dtype.itemsize for o, x in pairs if {"q", "k"} <= set(o.axes))
            # Its own block, one without what is not finite, and weights on their way to a product; and each turn's.
            always = lambda own: own * own_row + other * row // 2 + 2 * own * other  # noqa: E731
            turn = lambda own: other * row + pair * own * other  # noqa: E731
            while own > 16 and always(own) + turn(own) > self.target.shared_bytes_per_block:
                own //= 2
            stages = max(1, min(stages, (self.target.shared_bytes_per_block - always(own)) // turn(own)))
        block_q, block_k = (other, own) if by_keys else (own, other)
        return Tile(block_q, block_k, tile.num_warps, stages)

    def of(self, tiles: dict[tuple[int, int], Tile], kernel: str) -> Tile:
        """The tile of one of these tables."""
        size, width = max(2, self.query.dtype.itemsize), max(self.query.shape[-1], self.value.shape[-1])
        tile = next(tile for (bytes_, widest), tile in tiles.items() if bytes_ == size and width <= widest)
        return self.fitted(tile, kernel)

    def others(self, kernel: str, *blocks: tuple[int, int]) -> list[Tile]:
        """What else may be tried: blocks of queries and keys."""
        every = (Tile(*sides, *more) for sides in blocks for more in itertools.product((4, 8), (1, 2, 3, 4)))
        return list(dict.fromkeys(self.fitted(tile, kernel) for tile in every))


class BackwardTiles(NamedTuple):
    dquery: Tile
    dkey_dvalue: Tile


FORWARD_BLOCKS = (64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128), (256, 64)
DQUERY_BLOCKS = (32, 32), (64, 32), (64, 64), (128, 32), (128, 64)
DKEY_DVALUE_BLOCKS = (16, 64), (32, 32), (32, 64), (64, 64), (64, 128)


def forward(query, key, value, *arrays, target, variant: Variant) -> Iterator[Tile | hopper.ForwardTile]:
    if on_hopper.obstacle(query, key, value, *arrays, variant=variant, target=target) is None:
        yield from on_hopper.forward_tiles(query, key, value, variant=variant, target=target)
    problem = Problem(query, value, arrays, variant, target)
    table = FORWARD
    if variant.dropout or variant.masks_by_data:
        table = table | {(2, 128): Tile(64, 64, 4, 2)}
    if before_hopper(target):  # whose shared memory holds no two of the larger one
        table = table | {(2, 256): Tile(64, 32, 4, 2)}
    yield problem.of(table, "forward")
    yield from problem.others("forward", *FORWARD_BLOCKS)


def backward(query, key, value, *rest, target, variant: Variant) -> Iterator[BackwardTiles | hopper.BackwardTile]:
    """One kernel's tile at a time differs from the untuned one; the tuner puts the best of both together."""
    arrays = rest[: len(variant.operands)]
    if on_hopper.obstacle(query, key, value, *arrays, variant=variant, target=target) is None:
        yield from on_hopper.backward_tiles(query, key, value, variant=variant)
    problem = Problem(query, value, arrays, variant, target)
    # Where much is computed of a weight, fewer have room in registers; on Hopper products take none for operands.
    narrow = before_hopper(target) and not variant.is_band
    dquery = DQUERY
    if not variant.is_band:
        dquery = dquery | {(4, 64): Tile(32, 32, 8, 2)}
    if narrow:
        dquery = dquery | {(2, 128): Tile(64, 32, 4, 2)}
    dkey_dvalue = SMALL_DKEY_DVALUE if narrow or variant.masks_anywhere else DKEY_DVALUE
    untuned = BackwardTiles(problem.of(dquery, "dquery"), problem.of(dkey_dvalue, "dkey_dvalue"))
    yield untuned
    yield from (untuned._replace(dquery=tile) for tile in problem.others("dquery", *DQUERY_BLOCKS))
    yield from (untuned._replace(dkey_dvalue=tile) for tile in problem.others("dkey_dvalue", *DKEY_DVALUE_BLOCKS))


def operand_gradient(query, key, value, *rest, target, variant: Variant, operand: str) -> Iterator[Tile]:
    problem = Problem(query, value, rest[: len(variant.operands)], variant, target)
    table = DKEY_DVALUE
    if any(o.name == operand and o.rank is not None for o in variant.operands):  # a loop over elements needs registers
        table = (SMALL_DKEY_DVALUE if before_hopper(target) else table) | {
            (4, 64): Tile(16, 16, 8, 2),
            (4, 128): Tile(16, 16, 8, 2),
        }
    yield problem.of(table, "dkey_dvalue")
    yield from problem.others("dkey_dvalue", *DKEY_DVALUE_BLOCKS)


def notes(query, key, value, *rest, target, tile, variant: Variant) -> str:
    """What `jtile.explain` adds."""
    if isinstance(tile, hopper.ForwardTile | hopper.BackwardTile):
        return "on the schedule for Hopper"
    arrays = rest[: len(variant.operands)]
    obstacle = on_hopper.obstacle(query, key, value, *arrays, variant=variant, target=target)
    return f"on the portable schedule: {obstacle or 'tuning found it faster'}"
