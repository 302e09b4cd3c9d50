"""Matrices whose rows begin at odd addresses, as logits of 50,257 classes do: a thread would load 2 bytes at a time.

A program that needs a row reads it from the last multiple of 16 bytes before it, `Row`. One that computes every element
for itself takes so many of all elements, wherever rows begin, and finds parts of two in them: `elementwise`.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jtile.compiler.params import CompilerParams

WIDEST_LOAD = 16  # bytes of a thread, at a multiple of as many


def unaligned(x, lanes: int) -> bool:
    """Whether rows of x begin at odd addresses, and blocks of so many elements help."""
    rows, d = x.shape
    size = x.dtype.itemsize
    return (
        d * size % WIDEST_LOAD != 0
        and rows * d * size % WIDEST_LOAD == 0  # else the array's end is at an odd address
        and d >= lanes
        and rows * d + lanes < 2**31
    )


class Row:
    """A row of a matrix of which `spec` is given to the kernel, read `lanes` elements at a time."""

    def __init__(self, row, d: int, lanes: int, dtype):
        self.d, self.lanes = d, lanes
        self.near = WIDEST_LOAD // dtype.itemsize
        self.begin, self.shift = row * d // self.near * self.near, row * d % self.near

    @staticmethod
    def spec(x, lanes: int) -> pl.BlockSpec:
        """Of `x.reshape(1, -1)`; past its end it reads 0."""
        return pl.BlockSpec((1, x.size + lanes), lambda *_: (0, 0))

    @staticmethod
    def steps(d: int, lanes: int, dtype) -> int:
        """So many parts of `lanes` elements have all of the row."""
        return pl.cdiv(d + WIDEST_LOAD // dtype.itemsize - 1, lanes)

    def read(self, ref, step):
        """A part of the row, and which of it is inside."""
        first = step * self.lanes
        at = first - self.shift + jax.lax.broadcasted_iota(jnp.int32, (1, self.lanes), 1)
        return ref[:, pl.ds(self.begin + first, self.lanes)], (at >= 0) & (at < self.d)


def elementwise(
    function: Callable,
    matrices: Sequence[jax.Array],
    of_row: Sequence[jax.Array],
    *,
    lanes: int,
    num_warps: int,
    name: str,
    overwrite: bool = False,
) -> jax.Array:
    """`function(columns, elements, numbers)` of every element of the matrices, and its row's number in each `of_row`.

    It gives a matrix like the first, in its memory if that is to be overwritten. Rows are no shorter than `lanes`.
    """
    rows, d = matrices[0].shape

    def kernel(*refs):
        *given, out_ref = refs
        elements, numbers = [ref[...] for ref in given[: len(matrices)]], given[len(matrices) :]
        begin = pl.program_id(0) * lanes
        row, start = begin // d, begin % d
        columns = start + jnp.arange(lanes)

        def of_one_row():
            out_ref[...] = function(columns, elements, [ref[row] for ref in numbers])

        def of_two_rows():
            second, following = columns >= d, jnp.minimum(row + 1, rows - 1)
            values = [jnp.where(second, ref[following], ref[row]) for ref in numbers]
            out_ref[...] = function(jnp.where(second, columns - d, columns), elements, values)

        jax.lax.cond(start + lanes <= d, of_one_row, of_two_rows)

    block, whole = pl.BlockSpec((lanes,), lambda i: (i,)), pl.BlockSpec((rows,), lambda i: (0,))
    out = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(rows * d, lanes),),
        in_specs=[*[block] * len(matrices), *[whole] * len(of_row)],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct((rows * d,), matrices[0].dtype),
        input_output_aliases={0: 0} if overwrite else {},
        compiler_params=CompilerParams(num_warps=num_warps, num_stages=1),
        name=name,
    )(*(x.reshape(-1) for x in matrices), *of_row)
    return out.reshape(rows, d)
