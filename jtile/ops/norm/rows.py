"""Norms of rows that fit into registers: every element is read once and written once.

A program owns whole rows, a block of them at a time. In the backward pass, and in the forward pass where it pays, few
programs take many blocks in turn: the next block is on its way while one is computed, the scale is read once, and there
are few partial sums of its gradient left to add.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jtile.compiler.params import CompilerParams
from jtile.ops.norm.common import wide


@dataclasses.dataclass(frozen=True)
class Tile:
    """How rows are shared out.

    Attributes:
        rows: of one block.
        num_warps: that share a block.
        programs: how many take the blocks in turn; None is one for each block.
        num_stages: blocks of a program on their way, and the one that it works on.
    """

    rows: int
    num_warps: int
    programs: int | None = None
    num_stages: int = 1

    def params(self) -> CompilerParams:
        return CompilerParams(num_warps=self.num_warps, num_stages=self.num_stages)


WIDEST = {"forward": 16384, "backward": 8192}


def hold(given: dict[str, jax.Array], *, forward: bool) -> bool:
    """Whether registers hold the rows."""
    return given["x"].shape[1] <= WIDEST["forward" if forward else "backward"]


def forward_tile(given: dict[str, jax.Array]) -> Tile:
    rows, d = given["x"].shape
    lanes = pl.next_power_of_2(d)
    # A block for each multiprocessor comes before large blocks, which read the scale seldom.
    block = _rows(rows, most=16384 // lanes)
    return Tile(block, num_warps=min(16, max(4, block * lanes // 1024)))


def backward_tile(given: dict[str, jax.Array]) -> Tile:
    rows, d = given["x"].shape
    lanes = pl.next_power_of_2(d)
    block = _rows(rows, most=8192 // lanes)
    return Tile(block, num_warps=min(16, max(4, block * lanes // 512)), programs=MULTIPROCESSORS, num_stages=3)


def forward_tiles(given: dict[str, jax.Array]) -> Iterator[Tile]:
    """What runs untuned, and what else may be tried."""
    yield forward_tile(given)
    yield from _others(given, (None, 1), (2 * MULTIPROCESSORS, 2), (4 * MULTIPROCESSORS, 2))


def backward_tiles(given: dict[str, jax.Array]) -> Iterator[Tile]:
    yield backward_tile(given)
    yield from _others(given, *itertools.product((MULTIPROCESSORS, 2 * MULTIPROCESSORS), (1, 3)))


def _others(given: dict[str, jax.Array], *turns: tuple[int | None, int]) -> Iterator[Tile]:
    """Blocks of at most 64 elements a thread: programs and stages for each."""
    rows, d = given["x"].shape
    for num_warps, elements in itertools.product((4, 8, 16), (16, 32, 64)):
        block = elements * 32 * num_warps // pl.next_power_of_2(d)
        if 1 <= block <= pl.next_power_of_2(rows):
            yield from (Tile(block, num_warps, programs, num_stages) for programs, num_stages in turns)


MULTIPROCESSORS = 132  # of an H100 or H200; an A100 has 108, a B200 148


def _rows(rows: int, most: int) -> int:
    """Rows of a block: a power of two, as many as leave every multiprocessor one."""
    return max(1, min(most, pl.next_power_of_2(rows // MULTIPROCESSORS + 1) // 2))


# What a kernel computes of a part of the rows: `at` are rows and columns, `columns` the same without the rows. Numbers
# of a row have shape (rows, 1).


def before(refs, at, gate_last: bool, out=None):
    """u, of which the statistics are taken; stores the sum with a residual in `out`."""
    h = refs["x"][at]
    if "residual" in refs:
        h = h + refs["residual"][at]
        if out is not None:
            out["h"][at] = h
    u = wide(h)
    return u * jax.nn.silu(wide(refs["gate"][at])) if "gate" in refs and not gate_last else u


def after(n, refs, at, columns, gate_last: bool):
    """y."""
    y = n * wide(refs["scale"][columns])
    if "bias" in refs:
        y = y + wide(refs["bias"][columns])
    return y * jax.nn.silu(wide(refs["gate"][at])) if "gate" in refs and gate_last else y


class Gradient:
    """A part of the rows in the backward pass: n, its cotangent g, and what follows when the rows' means are known."""

    def __init__(self, refs, at, scale, mean, rstd, gate_last: bool):
        self.refs, self.at, self.rstd, self.gate_last = refs, at, rstd, gate_last
        self.x, self.dy = wide(refs["x"][at]), wide(refs["dy"][at])
        u = self.x
        if "gate" in refs:
            self.gate = wide(refs["gate"][at])
            self.sigmoid = jax.nn.sigmoid(self.gate)
            if not gate_last:
                u = self.x * self.gate * self.sigmoid
        self.n = (u if mean is None else u - mean) * rstd
        if "gate" in refs and gate_last:
            self.dgated = self.dy * self.n * scale
            self.dy = self.dy * self.gate * self.sigmoid
        self.g = self.dy * scale

    def store(self, out, mean_gn, mean_g) -> None:
        dx = self.g - self.n * mean_gn
        dx = self.rstd * (dx if mean_g is None else dx - mean_g)
        if "gate" in self.refs:
            dgated = self.dgated if self.gate_last else dx * self.x
            dgate = dgated * self.sigmoid * (1 + self.gate * (1 - self.sigmoid))
            out["dgate"][self.at] = dgate.astype(out["dgate"].dtype)
            dx = dx if self.gate_last else dx * self.gate * self.sigmoid
        if "dh" in self.refs:
            dx = dx + wide(self.refs["dh"][self.at])
        out["dx"][self.at] = dx.astype(out["dx"].dtype)

    def sums(self, names) -> dict[str, jax.Array]:
        """Over the rows, for the cotangents of scale and bias."""
        terms = {"dscale": lambda: self.dy * self.n, "dbias": lambda: self.dy}
        return {name: jnp.sum(terms[name](), axis=0) for name in names}


# Kernels


def forward(name, given, tile: Tile, centred, epsilon, gate_last) -> dict[str, jax.Array]:
    rows, d = given["x"].shape
    plan = Plan.of(tile, rows, d)

    def kernel(refs, out):
        def step(block, at, _):
            u = before(refs, at, gate_last, out)
            if centred:
                mean = jnp.sum(u, axis=1) / d
                out["mean"][block] = mean
                u = u - mean[:, None]
            rstd = jax.lax.rsqrt(jnp.sum(u * u, axis=1) / d + epsilon)
            out["rstd"][block] = rstd
            y = after(u * rstd[:, None], refs, at, slice(None), gate_last)
            out["y"][at] = y.astype(out["y"].dtype)

        plan.turns(step)

    number = jax.ShapeDtypeStruct((rows,), jnp.float32)
    out_shape = {"y": given["x"], "rstd": number}
    if "residual" in given:
        out_shape["h"] = given["x"]
    if centred:
        out_shape["mean"] = number
    return plan.call(kernel, given, out_shape, name)


def backward(name, given, tile: Tile, biased, gate_last) -> dict[str, jax.Array]:
    rows, d = given["x"].shape
    plan = Plan.of(tile, rows, d)
    names = ["dscale", "dbias"] if biased else ["dscale"]

    def kernel(refs, out):
        scale = wide(refs["scale"][...])

        def step(block, at, sums):
            mean = refs["mean"][block][:, None] if "mean" in refs else None
            part = Gradient(refs, at, scale, mean, refs["rstd"][block][:, None], gate_last)
            mean_gn = jnp.sum(part.g * part.n, axis=1, keepdims=True) / d
            part.store(out, mean_gn, None if mean is None else jnp.sum(part.g, axis=1, keepdims=True) / d)
            more = part.sums(names)
            return {name: sums[name] + more[name] for name in names}

        for name, total in plan.turns(step, {name: jnp.zeros(d, jnp.float32) for name in names}).items():
            out[name][...] = total[None]

    out_shape = {"dx": given["x"], **dict.fromkeys(names, jax.ShapeDtypeStruct((plan.programs, d), jnp.float32))}
    if "gate" in given:
        out_shape["dgate"] = given["gate"]
    out = plan.call(kernel, given, out_shape, name)
    return {**out, **{name: jnp.sum(out[name], axis=0) for name in names}}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A grid of programs that take blocks of rows in turn."""

    tile: Tile
    rows: int
    d: int
    programs: int
    steps: int

    @classmethod
    def of(cls, tile: Tile, rows: int, d: int) -> "Plan":
        blocks = pl.cdiv(rows, tile.rows)
        steps = pl.cdiv(blocks, tile.programs) if tile.programs else 1
        return cls(tile, rows, d, pl.cdiv(blocks, steps), steps)

    def turns(self, step, start=None):
        """`step(rows, rows and columns, carried)` for each block of a program; returns what is carried at the end."""

        def turn(i, carried):
            block = pl.ds(i * self.tile.rows, self.tile.rows)
            return step(block, (block, slice(None)), carried)

        return turn(0, start) if self.steps == 1 else jax.lax.fori_loop(0, self.steps, turn, start)

    def call(self, kernel, given, out_shape, name):
        chunk = self.steps * self.tile.rows

        def spec(name, x):
            if name in ("scale", "bias"):
                return pl.BlockSpec((self.d,), lambda i: (0,))
            if x.ndim == 1:
                return pl.BlockSpec((chunk,), lambda i: (i,))
            return pl.BlockSpec((1 if name in ("dscale", "dbias") else chunk, self.d), lambda i: (i, 0))

        return pl.pallas_call(
            kernel,
            grid=(self.programs,),
            in_specs=[{n: spec(n, x) for n, x in given.items()}],
            out_specs={n: spec(n, x) for n, x in out_shape.items()},
            out_shape=out_shape,
            compiler_params=self.tile.params(),
            name=name,
        )(given)
