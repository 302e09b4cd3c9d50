"""The kernels of norms over rows.

A program owns a block of rows. As long as registers hold them, every element is read once and written once. Wider rows
are read in chunks, first for their statistics and then again, when they mostly come from a cache, for what follows.

In the backward pass few programs take many blocks in turn: the next ones are on their way while one is computed, and
there are few partial sums of the scale's gradient left to add. A program keeps such sums in registers for all columns.
Where these do not suffice, one kernel takes the means over rows and a second, whose programs own columns, the rest.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jtile.compiler.params import CompilerParams
from jtile.compiler.primitives import approx_exp2, load
from jtile.compiler.target import Target
from jtile.ops.norm import wide as wide_rows
from jtile.ops.norm.common import moments, summed, totals, wide

Arrays = dict[str, jax.Array]  # operands or results, by name


@dataclasses.dataclass(frozen=True)
class Tile:
    """A block of rows.

    Attributes:
        rows: of the block.
        columns: that are in registers at once: all of them, or a chunk.
        num_warps: that share the block.
        programs: that take all blocks in turn; 0 is a program for each.
        num_stages: blocks of a program on their way, and the one that it works on.
        max_registers: of a thread, so that more programs run at once.
    """

    rows: int
    columns: int
    num_warps: int
    programs: int = 0
    num_stages: int = 1
    max_registers: int | None = None

    def params(self) -> CompilerParams:
        return CompilerParams(num_warps=self.num_warps, num_stages=self.num_stages, max_registers=self.max_registers)


BY_THEMSELVES = 1024  # columns from which on it pays to take a row by itself
# Columns that registers hold in the backward pass: the row itself, and sums over rows of a row's width.
WIDEST_ROW, WIDEST_SUM = 8192, 16384


def forward_tiles(given: Arrays, centred: bool, target: Target | None) -> Iterator[Tile]:
    rows, d = given["x"].shape
    lanes, sum_too = pl.next_power_of_2(d), "residual" in given
    best = {  # elements of a block, and warps
        4096: [(8192, 16 if sum_too else 8), (4096, 8)],
        8192: [(8192, 16), (16384, 16)],
        16384: [(16384, 16)],
    }.get(lanes, [(2048, 4), (4096, 8)])
    blocks = dict.fromkeys((*best, *((n, n // e // 32) for n in (2048, 4096, 8192, 16384) for e in (16, 32))))
    held = [Tile(_rows(rows, n // lanes, target), lanes, warps) for n, warps in blocks if lanes <= n and warps >= 4]
    chunk = 4096 if lanes <= 16384 else 8192
    chunks = [Tile(n, columns, 16) for n, columns in ((1, chunk), (2, 4096), (1, 12288 - chunk)) if columns < lanes]
    if centred and BY_THEMSELVES <= lanes <= 16384:
        held = [tile for tile in held if tile.rows <= 4]
        first = [Tile(1, lanes, min(32, lanes // 512))]
        if _rows(rows, 2, target) == 2:
            # Two rows read the weights once. Wide ones are read again, from the first-level cache: where registers held
            # them, fewer programs would run at once.
            columns, warps = {8192: (4096, 16), 16384: (4096, 32)}.get(lanes, (lanes, lanes // 512))
            first = [Tile(2, columns, warps), Tile(2, lanes // 2, lanes // 512), *first]
        if sum_too and lanes > 4096:  # twice the bytes for a row keep memory busy, if a second program has registers
            first.insert(0, Tile(1, lanes, 16, max_registers=64))
        held = first + held
    elif centred and not sum_too:
        held, chunks = [], chunks + held
    yield from dict.fromkeys(held + chunks)


def backward_tiles(given: Arrays, biased: bool, target: Target | None) -> Iterator[Tile | wide_rows.WideTile]:
    x, gated = given["x"], "gate" in given
    rows, d = x.shape
    lanes, sms = pl.next_power_of_2(d), target.sms if target else MULTIPROCESSORS
    share = 2 if gated else 1  # a gate takes as much again
    if lanes <= WIDEST_ROW // share:
        # With two sums in registers a multiprocessor has fewer threads.
        if biased and lanes in (2048, 8192):
            warps, at_once = {2048: (4, 3), 8192: (8, 1)}[lanes]
            yield Tile(1, lanes, warps, at_once * sms, _stages(given, 1, at_once, target))
        if gated and lanes >= 1024:  # 8 elements to a thread: there are many numbers for each
            at_once, most = 4096 // lanes, 4 if lanes == 4096 else 3
            yield Tile(1, lanes, lanes // 256, at_once * sms, _stages(given, 1, at_once, target, most))
        for elements in (4096, 8192, 2048) if gated else (max(2048, lanes), 4096, 8192, 2048):
            if lanes <= elements:
                block, warps, at_once = _rows(rows, elements // lanes, target), elements // 512, 8192 // elements
                yield Tile(block, lanes, warps, at_once * sms, _stages(given, block, at_once, target))
        return
    columns_apart = Tile(1, 8192, 16)
    if (
        rows <= 4 * sms
    ):  # a program's sums would be much beside its rows, which the level-2 cache holds for a second kernel
        yield columns_apart
    yield from wide_rows.tiles(given, biased, target)
    if lanes <= WIDEST_SUM // share:
        # Larger chunks spill registers on some chip: the sums of a row's width take half of them.
        columns = (2048 if "mean" in given or "dh" in given else 4096) // x.dtype.itemsize
        yield from (Tile(1, n, 16, sms) for n in (columns, 2 * columns, columns // 2))
    yield columns_apart


MULTIPROCESSORS = 132  # of an H100 or H200


def _rows(rows: int, most: int, target: Target | None) -> int:
    """Rows of a block: a power of two, as many as leave every multiprocessor one."""
    sms = target.sms if target else MULTIPROCESSORS
    return max(1, min(most, pl.next_power_of_2(rows // sms + 1) // 2))


def _stages(given: Arrays, block: int, at_once: int, target: Target | None, most: int = 3) -> int:
    """`most` where shared memory has room for that many blocks of every operand but one, for all programs at once."""
    elements = block * pl.next_power_of_2(given["x"].shape[1])
    needed = (most - 1) * elements * sum(x.dtype.itemsize for x in given.values() if x.ndim == 2)
    return most if target and (needed + 1024) * at_once <= target.shared_bytes_per_block else 1


# What a kernel computes of a part of the rows: `at` are rows and columns, `columns` the same without the rows. Numbers
# of a row have shape (rows, 1).


def _before(refs, at, gate_last: bool, out=None, policy: str | None = None):
    """u, of which the statistics are taken; stores the sum with a residual in `out`."""
    h = load(refs["x"].at[at], eviction_policy=policy)
    if "residual" in refs:
        h = h + load(refs["residual"].at[at], eviction_policy=policy)
        if out is not None:
            out["h"][at] = h
    return wide(h) * _silu(wide(refs["gate"][at])) if "gate" in refs and not gate_last else wide(h)


def _sigmoid(x):
    if x.dtype != jnp.float32:
        return jax.nn.sigmoid(x)
    # A reciprocal of two instructions, where a division has seven.
    return jnp.square(jax.lax.rsqrt(1 + approx_exp2(-math.log2(math.e) * x)))


def _silu(x):
    return x * _sigmoid(x)


def _weight(refs, name: str, columns):
    """The scale or bias: read for every block, and so to stay in a cache."""
    return wide(load(refs[name].at[:, columns], eviction_policy="evict_last"))


def _after(n, weights: Arrays, refs, at, gate_last: bool):
    """y."""
    y = n * weights["scale"]
    if "bias" in weights:
        y = y + weights["bias"]
    return y * _silu(wide(refs["gate"][at])) if "gate" in refs and gate_last else y


class _Part:
    """A part of the rows in the backward pass: n, its cotangent g, and what follows when the rows' means are known."""

    def __init__(self, refs, at, scale, mean, rstd, gate_last: bool, policy: str | None = None):
        self.refs, self.at, self.rstd, self.gate_last = refs, at, rstd, gate_last
        self.x, self.dy = (wide(load(refs[name].at[at], eviction_policy=policy)) for name in ("x", "dy"))
        u = self.x
        if "gate" in refs:
            gate = wide(refs["gate"][at])
            self.sigmoid = _sigmoid(gate)
            self.silu = gate * self.sigmoid
            if not gate_last:
                u = self.x * self.silu
        self.n = u * rstd if mean is None else u * rstd - mean * rstd  # one instruction for each element
        if "gate" in refs and gate_last:
            self.dgated = self.dy * self.n * scale
            self.dy = self.dy * self.silu
        self.g = self.dy * scale

    def store(self, out, mean_gn, mean_g) -> None:
        means = self.n * (self.rstd * mean_gn)
        dx = self.g * self.rstd - (means if mean_g is None else means + self.rstd * mean_g)
        if "gate" in self.refs:
            dgated = self.dgated if self.gate_last else dx * self.x
            dgate = dgated * (self.sigmoid + self.silu * (1 - self.sigmoid))
            out["dgate"][self.at] = dgate.astype(out["dgate"].dtype)
            dx = dx if self.gate_last else dx * self.silu
        if "dh" in self.refs:
            dx = dx + wide(self.refs["dh"][self.at])
        out["dx"][self.at] = dx.astype(out["dx"].dtype)

    def added(self, sums: Arrays) -> Arrays:
        """To sums over rows, the cotangents of scale and bias."""
        terms = {"dscale": lambda: self.dy * self.n, "dbias": lambda: self.dy}
        return {name: total + jnp.sum(terms[name](), axis=0) for name, total in sums.items()}


# Kernels


def forward(name, given: Arrays, centred, epsilon, gate_last, tile: Tile) -> Arrays:
    rows, d = given["x"].shape
    chunk, count = min(d, tile.columns), pl.cdiv(d, tile.columns)
    # Wide rows that have a mean are taken by themselves, each by all threads: their sums need few exchanges, all at
    # once, and what is read of the weights serves for all of them.
    apart = centred and chunk >= BY_THEMSELVES // 2
    each = [pl.ds(i, 1) for i in range(tile.rows)] if apart else [slice(None)]

    def kernel(refs, out):
        def chunks(step, start=None):
            """`step(j, columns, carried)` for each chunk; returns what is carried at the end."""
            turn = lambda j, carried: step(j, pl.ds(j * chunk, chunk), carried)  # noqa: E731
            return jax.lax.fori_loop(0, count, turn, start)

        def read(columns, policy=None, to=None):
            us = [_before(refs, (r, columns), gate_last, to, policy) for r in each]
            return [u - n for u, n in zip(us, near, strict=True)] if centred else us

        def terms(us):
            return [term for u in us for term in ((u, u * u) if centred else (u * u,))]

        def add(j, columns, sums):
            us = read(columns, "evict_last", out)
            if centred and d % chunk:
                us = [jnp.where(j * chunk + lanes < d, u, 0.0) for u in us]
            return [total + term for total, term in zip(sums, terms(us), strict=True)]

        def write(us, columns):
            weights = {name: _weight(refs, name, columns) for name in ("scale", "bias") if name in refs}
            for r, u, m, s in zip(each, us, mean, rstd, strict=True):
                y = _after(u * s - m * s if centred else u * s, weights, refs, (r, columns), gate_last)
                out["y"][r, columns] = y.astype(out["y"].dtype)

        if centred:
            ends = [[_before(refs, (r, pl.ds(i * d // 4, 1)), gate_last) for i in range(4)] for r in each]
            near = [sum(values) / 4 for values in ends]
        if count == 1:
            us = read(slice(None), to=out)
            sums = terms(us)
        else:
            lanes = jax.lax.broadcasted_iota(jnp.int32, (1, chunk), 1)
            zeros = jnp.zeros((tile.rows // len(each), chunk))
            sums = chunks(add, [zeros] * len(each) * (2 if centred else 1))
        sums = totals(sums, axis=1)
        mean, squares = [0.0] * len(each), sums
        if centred:
            pairs = [moments(a, b, d) for a, b in zip(sums[::2], sums[1::2], strict=True)]
            mean, squares = [m for m, _ in pairs], [s for _, s in pairs]
        rstd = [jax.lax.rsqrt(of_row / d + epsilon) for of_row in squares]
        for i, r in enumerate(each):
            out["rstd"][r] = rstd[i][:, 0]
            if centred:
                out["mean"][r] = (near[i] + mean[i])[:, 0]
        if count == 1:
            write(us, slice(None))
        else:
            chunks(lambda _, columns, __: write(read(columns, "evict_first"), columns))

    number = jax.ShapeDtypeStruct((rows,), jnp.float32)
    out_shape: dict[str, Any] = {"y": given["x"], "rstd": number}
    if "residual" in given:
        out_shape["h"] = given["x"]
    if centred:
        out_shape["mean"] = number
    return _call(kernel, given, out_shape, name, tile, pl.cdiv(rows, tile.rows), tile.rows)


def backward(name, given: Arrays, biased, gate_last, tile: Tile) -> Arrays:
    if isinstance(tile, wide_rows.WideTile):
        return wide_rows.backward(name, given, biased, tile)
    if not tile.programs:
        return _means_and_columns(name, given, biased, gate_last, tile)
    rows, d = given["x"].shape
    chunk, count = min(d, tile.columns), pl.cdiv(d, tile.columns)
    blocks = pl.cdiv(rows, tile.rows)
    steps = pl.cdiv(blocks, tile.programs)
    programs = pl.cdiv(blocks, steps)
    names = ["dscale", "dbias"] if biased and count == 1 else ["dscale"]
    centred = "mean" in given

    def kernel(refs, out):
        held = wide(refs["scale"][...]) if count == 1 else None

        def step(i, sums):
            block = pl.ds(i * tile.rows, tile.rows)
            rstd, mean = refs["rstd"][block][:, None], refs["mean"][block][:, None] if centred else None

            def part(j, policy):
                columns = pl.ds(j * chunk, chunk)
                scale = _weight(refs, "scale", columns) if held is None else held
                return _Part(refs, (block, columns), scale, mean, rstd, gate_last, policy)

            gn, g, more = 0.0, 0.0, []
            for j, of_chunk in enumerate(sums):
                last = part(j, None)
                gn, g = gn + last.g * last.n, g + last.g
                more.append(last.added(of_chunk))
            mean_gn = jnp.sum(gn, axis=1, keepdims=True) / d
            mean_g = jnp.sum(g, axis=1, keepdims=True) / d if centred else None
            if count == 1:
                last.store(out, mean_gn, mean_g)
            else:
                jax.lax.fori_loop(0, count, lambda j, _: part(j, "evict_first").store(out, mean_gn, mean_g), None)
            return more

        zeros = {name: jnp.zeros(chunk) for name in names}
        for j, of_chunk in enumerate(jax.lax.fori_loop(0, steps, step, [zeros] * count)):
            for name, total in of_chunk.items():
                out[name][:, pl.ds(j * chunk, chunk)] = total[None]

    out_shape: dict[str, Any] = {
        "dx": given["x"],
        **dict.fromkeys(names, jax.ShapeDtypeStruct((programs, d), jnp.float32)),
    }
    if "gate" in given:
        out_shape["dgate"] = given["gate"]
    out = _call(kernel, given, out_shape, name, tile, programs, steps * tile.rows)
    out |= summed(f"{name}_sums", {n: out[n] for n in names})
    if biased and count > 1:  # two sums of such a width are more than registers hold
        out["dbias"] = jnp.sum(wide(given["dy"]), axis=0)
    return out


def _call(
    kernel, given: Arrays, out_shape: Mapping[str, Any], name: str, tile: Tile, programs: int, rows: int
) -> Arrays:
    """Launches programs that own so many rows each."""
    d = given["x"].shape[1]
    columns = pl.cdiv(d, tile.columns) * min(d, tile.columns)
    # Of two dimensions like what they are multiplied with, weights are read by the threads that have use for them.
    given = {n: x[None] if n in ("scale", "bias") else x for n, x in given.items()}

    def spec(name, x):
        if name in ("scale", "bias"):
            return pl.BlockSpec((1, columns), lambda i: (0, 0))
        if x.ndim == 1:
            return pl.BlockSpec((rows,), lambda i: (i,))
        return pl.BlockSpec((1 if name in ("dscale", "dbias") else rows, columns), lambda i: (i, 0))

    return pl.pallas_call(
        kernel,
        grid=(programs,),
        in_specs=[{n: spec(n, x) for n, x in given.items()}],
        out_specs={n: spec(n, x) for n, x in out_shape.items()},
        out_shape=out_shape,
        compiler_params=tile.params(),
        name=name,
    )(given)


# Of the kernel that owns columns: rows and columns of a block, and how many programs share the rows.
BLOCK, STRIPS = (4, 1024), 32


def _means_and_columns(name, given: Arrays, biased, gate_last, tile: Tile) -> Arrays:
    rows, d = given["x"].shape
    chunk = tile.columns
    centred = "mean" in given
    means = ["mean_gn", "mean_g"] if centred else ["mean_gn"]

    def means_kernel(refs, out):
        rstd, mean = refs["rstd"][...][:, None], refs["mean"][...][:, None] if centred else None

        def step(j, sums):
            columns = pl.ds(j * chunk, chunk)
            part = _Part(refs, (slice(None), columns), wide(refs["scale"][:, columns]), mean, rstd, gate_last)
            terms = {"mean_gn": part.g * part.n, "mean_g": part.g}
            return {name: sums[name] + terms[name] for name in means}

        zeros = {name: jnp.zeros((tile.rows, chunk)) for name in means}
        for name, total in jax.lax.fori_loop(0, pl.cdiv(d, chunk), step, zeros).items():
            out[name][...] = jnp.sum(total, axis=1) / d

    read = {n: x for n, x in given.items() if n != "dh"}
    number = jax.ShapeDtypeStruct((rows,), jnp.float32)
    blocks = pl.cdiv(rows, tile.rows)
    found = _call(means_kernel, read, dict.fromkeys(means, number), f"{name}_means", tile, blocks, tile.rows)
    return _by_columns(name, given | found, biased, gate_last)


def _by_columns(name, given: Arrays, biased, gate_last) -> Arrays:
    (rows, d), (block, lanes) = given["x"].shape, BLOCK
    block = min(block, pl.next_power_of_2(rows))
    steps = pl.cdiv(pl.cdiv(rows, block), STRIPS)
    strips = pl.cdiv(pl.cdiv(rows, block), steps)
    names = ["dscale", "dbias"] if biased else ["dscale"]

    def kernel(refs, out):
        scale = wide(refs["scale"][...])

        def step(i, sums):
            strip = pl.ds(i * block, block)
            number = {n: refs[n][strip][:, None] for n in ("mean", "rstd", "mean_gn", "mean_g") if n in refs}
            part = _Part(refs, (strip, slice(None)), scale, number.get("mean"), number["rstd"], gate_last)
            part.store(out, number["mean_gn"], number.get("mean_g"))
            return part.added(sums)

        zeros = {name: jnp.zeros(lanes) for name in names}
        for name, total in jax.lax.fori_loop(0, steps, step, zeros).items():
            out[name][...] = total[None]

    out_shape: dict[str, Any] = {
        "dx": given["x"],
        **dict.fromkeys(names, jax.ShapeDtypeStruct((strips, d), jnp.float32)),
    }
    if "gate" in given:
        out_shape["dgate"] = given["gate"]

    def spec(name, x):
        if name in ("dscale", "dbias"):
            return pl.BlockSpec((1, lanes), lambda j, i: (i, j))
        if name == "scale":
            return pl.BlockSpec((lanes,), lambda j, i: (j,))
        if x.ndim == 1:
            return pl.BlockSpec((steps * block,), lambda j, i: (i,))
        return pl.BlockSpec((steps * block, lanes), lambda j, i: (i, j))

    out = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(d, lanes), strips),  # neighbouring programs read neighbouring columns
        in_specs=[{n: spec(n, x) for n, x in given.items()}],
        out_specs={n: spec(n, x) for n, x in out_shape.items()},
        out_shape=out_shape,
        compiler_params=CompilerParams(num_warps=4, num_stages=1),
        name=name,
    )(given)
    return out | summed(f"{name}_sums", {n: out[n] for n in names})
