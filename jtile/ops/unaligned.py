"""Matrices whose rows begin at odd addresses, as logits of 50,257 classes do: a thread would load 2 bytes at a time.

A program that needs a row reads it from the last multiple of 16 bytes before it. What it writes goes out 16 bytes at a
time as well, but for the row's ends, which share theirs with the neighbours.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jtile.compiler.params import CompilerParams
from jtile.compiler.primitives import store

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
    """A row of a matrix, which the kernel has by `spec`, in parts of `lanes` elements."""

    def __init__(self, row, d: int, lanes: int, dtype):
        self.d, self.lanes = d, lanes
        self.near = WIDEST_LOAD // dtype.itemsize
        self.begin, self.shift = row * d // self.near * self.near, row * d % self.near

    @staticmethod
    def spec(x, lanes: int) -> pl.BlockSpec:
        """Of `x.reshape(1, -1)`; past its end it reads 0."""
        return pl.BlockSpec((1, x.size + lanes), lambda *_: (0, 0))

    @staticmethod
    def parts(d: int, lanes: int, dtype) -> int:
        return pl.cdiv(d + WIDEST_LOAD // dtype.itemsize - 1, lanes)

    def read(self, ref, part):
        """A part of the row, and which of it is inside."""
        columns = self._columns(part * self.lanes, self.lanes)
        return ref[self._at(part * self.lanes, self.lanes)], (columns >= 0) & (columns < self.d)

    def map(self, function: Callable, refs: Sequence, out_ref, part) -> None:
        """Stores `function(columns, *elements)` of a part of the row in each of `refs`."""

        def value(first, count):
            columns = self._columns(first, count)
            return columns, function(columns, *(ref[self._at(first, count)] for ref in refs))

        first = part * self.lanes
        _, whole = value(first, self.lanes)
        group = first - self.shift + jax.lax.broadcasted_iota(jnp.int32, (1, self.lanes), 1) // self.near * self.near
        inside = (group >= 0) & (group + self.near <= self.d)
        store(out_ref.at[self._at(first, self.lanes)], whole, mask=inside)

        def end(first):
            columns, few = value(first, self.near)
            store(out_ref.at[self._at(first, self.near)], few, mask=(columns >= 0) & (columns < self.d))

        pl.when(part == 0)(lambda: end(0))
        pl.when(part == pl.num_programs(0) - 1)(lambda: end((self.shift + self.d) // self.near * self.near))

    def _at(self, first, count: int):
        return slice(None), pl.ds(self.begin + first, count)

    def _columns(self, first, count: int):
        return first - self.shift + jax.lax.broadcasted_iota(jnp.int32, (1, count), 1)


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
    """`function(columns, numbers, *elements)` of all elements of matrices, `numbers` those of their row in `of_row`.

    It gives a matrix like the first, in its memory if that is to be overwritten.
    """
    rows, d = matrices[0].shape

    def kernel(row, part, refs, numbers, out_ref):
        row.map(lambda columns, *elements: function(columns, numbers, *elements), refs, out_ref, part)

    out = _call(kernel, matrices, of_row, [matrices[0].reshape(1, -1)], lanes, num_warps, name, overwrite)
    return out[0].reshape(rows, d)


def reduce(
    function: Callable, matrices: Sequence[jax.Array], count: int, *, lanes: int, num_warps: int, name: str
) -> list[jax.Array]:
    """`function(inside, *elements)` of all parts of rows: for each of them `count` numbers in float32."""
    rows, d = matrices[0].shape
    numbers = jax.ShapeDtypeStruct((rows, Row.parts(d, lanes, matrices[0].dtype)), jnp.float32)

    def kernel(row, part, refs, _, *out_refs):
        read = [row.read(ref, part) for ref in refs]
        for ref, value in zip(out_refs, function(read[0][1], *(x for x, _ in read)), strict=True):
            ref[...] = value

    return _call(kernel, matrices, [], [numbers] * count, lanes, num_warps, name, False)


def _call(kernel, matrices, of_row, out_shape, lanes, num_warps, name, overwrite) -> list[jax.Array]:
    """A program for each part of each row."""
    rows, d = matrices[0].shape
    dtype, n = matrices[0].dtype, len(matrices)

    def on_row(*refs):
        numbers = [ref[...][:, None] for ref in refs[n : n + len(of_row)]]
        row = Row(pl.program_id(1), d, lanes, dtype)
        kernel(row, pl.program_id(0), refs[:n], numbers, *refs[n + len(of_row) :])

    matrix, number = Row.spec(matrices[0], lanes), pl.BlockSpec((1,), lambda j, i: (i,))
    return pl.pallas_call(
        on_row,
        grid=(Row.parts(d, lanes, dtype), rows),
        in_specs=[matrix] * n + [number] * len(of_row),
        out_specs=[matrix if x.shape[0] == 1 else pl.BlockSpec((1, 1), lambda j, i: (i, j)) for x in out_shape],
        out_shape=out_shape,
        input_output_aliases={0: 0} if overwrite else {},
        compiler_params=CompilerParams(num_warps=num_warps, num_stages=1),
        name=name,
    )(*(x.reshape(1, -1) for x in matrices), *of_row)
