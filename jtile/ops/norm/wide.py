"""When the backward kernel for wide rows serves, its tiles, and how a call becomes a launch. It needs Triton 3.9."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jtile.compiler.target import Target
from jtile.compiler.triton_call import has_gluon, triton_call
from jtile.ops.norm.common import summed

NARROWEST, WIDEST = 8192, 16384  # rows are wider than the one, and up to the other


class WideTile(NamedTuple):
    """
    Attributes:
        programs: that take all rows in turn.
        num_warps: that share a row.
        parts: of a row, in which it is computed.
        slots: rows that shared memory holds.
    """

    programs: int
    num_warps: int
    parts: int
    slots: int


@dataclasses.dataclass(frozen=True)
class Wide:
    """What the kernel is compiled for: `steps` of the rows to a program, in `parts` of `lanes` elements."""

    rows: int
    steps: int
    width: int
    parts: int
    lanes: int
    slots: int
    centred: bool
    residual: bool
    biased: bool

    @property
    def ragged(self) -> bool:
        return self.width < self.parts * self.lanes


def tiles(given: dict[str, jax.Array], biased: bool, target: Target | None) -> Iterator[WideTile]:
    x = given["x"]
    d = x.shape[1]
    if target is None or "gate" in given or x.dtype.itemsize != 2 or d % 8 or not NARROWEST < d <= WIDEST:
        return
    if not has_gluon():
        return
    lanes = pl.next_power_of_2(d)
    # Of two sums and the scale, which registers hold, a thread has less to hold beside them where threads are few.
    shapes = [(8, 4), (8, 8), (16, 4)] if biased else [(16, 4), (16, 2), (8, 4), (32, 2)]
    if target.compute_capability >= 100 and not biased:
        shapes.pop(0)  # it spills there
    for slots, (num_warps, parts) in itertools.product((2, 3), shapes):
        rows = 2 * slots + ("dh" in given)  # in shared memory, where the kernel's own sums have a KiB
        if 2 * lanes * rows + 1024 <= target.shared_bytes_per_block:
            yield WideTile(target.sms, num_warps, parts, slots)


def backward(name: str, given: dict[str, jax.Array], biased: bool, tile: WideTile) -> dict[str, jax.Array]:
    from jtile.ops.norm.wide_kernel import wide_backward

    x = given["x"]
    rows, d = x.shape
    steps = pl.cdiv(rows, tile.programs)
    programs = pl.cdiv(rows, steps)
    lanes = pl.next_power_of_2(d) // tile.parts
    options = dict(centred="mean" in given, residual="dh" in given, biased=biased)
    part = jax.ShapeDtypeStruct((programs, d), jnp.float32)
    dx, dscale, dbias = triton_call(
        # What the kernel has no use for may be anything.
        *(given.get(name, given["rstd"]) for name in ("x", "scale", "rstd", "mean", "dy", "dh")),
        kernel=wide_backward,
        out_shape=[x, part, part if biased else jax.ShapeDtypeStruct((1,), jnp.float32)],
        grid=programs,
        num_warps=tile.num_warps,
        S=Wide(rows, steps, d, tile.parts, lanes, tile.slots, **options),
    )
    sums = {"dscale": dscale, "dbias": dbias} if biased else {"dscale": dscale}
    return {"dx": dx} | summed(f"{name}_sums", sums)
