"""Products of matrices whose tiles are finished while they are in registers."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jtile.compiler.params import CompilerParams


class Tile(NamedTuple):
    """What a program makes of a product at a time: its sides, how many terms are added in a step, how many steps are on
    their way; and how many tiles below each other are made at the same time, so that what they read stays in the
    cache."""

    rows: int
    columns: int
    terms: int
    num_warps: int = 8
    num_stages: int = 3
    group: int = 16


def tiles(rows: int, columns: int, terms: int, dtype) -> Iterator[Tile]:
    """For a product of this size. Sides that are powers of two up to 256 divide what is made in several products."""
    narrow = (
        *(Tile(128, 256, 64, 8, stages, group) for stages, group in ((3, 16), (3, 12), (3, 8), (3, 32), (4, 16))),
        *(Tile(128, 128, 64, 4, stages) for stages in (3, 4)),
        Tile(256, 128, 64),
    )
    wide = Tile(64, 64, 32), Tile(64, 64, 32, 4), Tile(64, 128, 32), Tile(128, 64, 32)
    for tile in narrow if dtype.itemsize <= 2 else wide:
        fit = [
            min(side, max(16, pl.next_power_of_2(n))) for side, n in zip(tile[:3], (rows, columns, terms), strict=True)
        ]
        yield tile._replace(rows=fit[0], columns=fit[1], terms=fit[2])


@dataclasses.dataclass(frozen=True)
class Part:
    """An operand, or the shape of a result, and the block of it that belongs to a tile.

    `index(row, column, part)` is the block's place, as a `BlockSpec` has it, for the tile in this row and column of the
    product's tiles, in this part of what is made in several products.
    """

    array: Any
    block: tuple[int | None, ...]
    index: Callable[[Any, Any, Any], tuple]


def dot(a, b, contract: tuple, dtype):
    """The product that sums over these axes of a and of b, accumulated in float32 and rounded once."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=dtype)


def on_tiles(
    name: str,
    finish: Callable,
    sizes: tuple[int, int, int],
    tile: Tile,
    a: Part,
    b: Part,
    contract: tuple[int, int],
    inputs: Sequence[Part] = (),
    outputs: Sequence[Part] = (),
    *,
    part=None,
    aliases: Mapping[int, int] = MappingProxyType({}),
    persistent: bool = True,
) -> list[jax.Array]:
    """`finish(product, place, inputs, outputs)` on every tile of a product, with the refs to the tile's blocks.

    Args:
        name: the kernel's.
        finish: `place` is the tile's row and column among tiles and the part.
        sizes: rows, columns and terms of the product.
        tile: one that is offered for it.
        a: blocks of the tile's rows and all terms, rounded up to whole steps.
        b: blocks of the tile's columns and all terms.
        contract: the axes of a and of b along which terms lie.
        inputs: what else is read.
        outputs: what is written.
        part: an integer, traced or not, which places depend on.
        aliases: which of `inputs` gives its memory to which of `outputs`.
        persistent: whether programs take several tiles in turn. Where `finish` reads what it writes to, Triton would
            then load nothing ahead.
    """
    (rows, columns, terms), (block, lanes, step, *_, group) = sizes, tile
    down, across, steps = pl.cdiv(rows, block), pl.cdiv(columns, lanes), pl.cdiv(terms, step)
    prefetched = [] if part is None else [jnp.reshape(part, (1,)).astype(jnp.int32)]

    def place(i, part_ref=None):
        first = i // (group * across) * group
        within, height = i % (group * across), jnp.minimum(down - first, group)
        return first + within % height, within // height, 0 if part_ref is None else part_ref[0]

    def kernel(*refs):
        part_ref, (a_ref, b_ref, *others) = refs[: len(prefetched)], refs[len(prefetched) :]
        ins, outs = others[: len(inputs)], others[len(inputs) :]

        def add(i, total):
            at = pl.ds(i * step, step)
            a_step, b_step = (
                ref[:, at] if axis else ref[at, :] for ref, axis in zip((a_ref, b_ref), contract, strict=True)
            )
            return total + dot(a_step, b_step, ([contract[0]], [contract[1]]), jnp.float32)

        total = lax.fori_loop(0, steps, add, jnp.zeros((block, lanes), jnp.float32))
        finish(total, place(pl.program_id(0), *part_ref), ins, outs)

    def spec(part: Part):
        return pl.BlockSpec(part.block, lambda i, *part_ref: part.index(*place(i, *part_ref)))

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(down * across,),
            in_specs=[spec(p) for p in (a, b, *inputs)],
            out_specs=[spec(p) for p in outputs],
        ),
        out_shape=[jax.ShapeDtypeStruct(p.array.shape, p.array.dtype) for p in outputs],
        input_output_aliases={len(prefetched) + 2 + i: o for i, o in aliases.items()},
        compiler_params=CompilerParams(
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            persistent=persistent,
            max_registers=None if persistent else 255,  # what `finish` reads needs them
        ),
        name=name,
    )(*prefetched, *(p.array for p in (a, b, *inputs)))
