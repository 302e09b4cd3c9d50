"""Norms of rows too wide for registers, read in chunks: the statistics first, then again what they are needed for.

The second time a row mostly comes from the level-2 cache.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jtile.compiler.params import CompilerParams
from jtile.ops.norm.common import combined, updated, wide
from jtile.ops.norm.rows import Gradient, after, before

# Elements of a chunk, and warps that share it.
CHUNK, WARPS = 8192, 16

# Of the backward pass' second kernel: a tile of rows and columns, and how many programs share the rows.
TILE, STRIPS = (4, 1024), 32


def _by_rows(kernel, given, out_shape, name):
    """A program for each row, which sees it whole."""
    rows, d = given["x"].shape
    chunks = pl.cdiv(d, CHUNK)

    def over_chunks(step, start=None):
        """`step(row and columns, columns, carried)` for each chunk; returns what is carried at the end."""

        def turn(i, carried):
            columns = pl.ds(i * CHUNK, CHUNK)
            return step((slice(None), columns), columns, carried)

        return jax.lax.fori_loop(0, chunks, turn, start)

    def spec(name, x):
        if name in ("scale", "bias"):
            return pl.BlockSpec((chunks * CHUNK,), lambda i: (0,))
        if x.ndim == 1:
            return pl.BlockSpec((1,), lambda i: (i,))
        return pl.BlockSpec((1, chunks * CHUNK), lambda i: (i, 0))

    return pl.pallas_call(
        lambda refs, out: kernel(refs, out, over_chunks),
        grid=(rows,),
        in_specs=[{n: spec(n, x) for n, x in given.items()}],
        out_specs={n: spec(n, x) for n, x in out_shape.items()},
        out_shape=out_shape,
        compiler_params=CompilerParams(num_warps=WARPS, num_stages=1),
        name=name,
    )(given)


def forward(name, given, centred, epsilon, gate_last) -> dict[str, jax.Array]:
    rows, d = given["x"].shape
    zeros = lambda: jnp.zeros((1, CHUNK), jnp.float32)  # noqa: E731

    def kernel(refs, out, over_chunks):
        lanes = jax.lax.broadcasted_iota(jnp.int32, (1, CHUNK), 1)

        def moments(at, columns, carried):
            """Of each lane on its own, over the chunks."""
            inside, count = columns.start + lanes < d, columns.start // CHUNK + 1
            return updated(carried, before(refs, at, gate_last, out), inside, count)

        def square(at, _, sums):
            u = before(refs, at, gate_last, out)
            return sums + u * u

        if centred:
            counts = ((d - 1 - lanes) // CHUNK + 1).astype(jnp.float32)
            mean, squares = combined(counts, *over_chunks(moments, (zeros(), zeros())), axis=1, size=d)
            out["mean"][...] = mean[:, 0]
        else:
            mean, squares = 0.0, jnp.sum(over_chunks(square, zeros()), axis=1, keepdims=True)
        rstd = jax.lax.rsqrt(squares / d + epsilon)
        out["rstd"][...] = rstd[:, 0]

        def write(at, columns, _):
            y = after((before(refs, at, gate_last) - mean) * rstd, refs, at, columns, gate_last)
            out["y"][at] = y.astype(out["y"].dtype)

        over_chunks(write)

    number = jax.ShapeDtypeStruct((rows,), jnp.float32)
    out_shape = {"y": given["x"], "rstd": number}
    if "residual" in given:
        out_shape["h"] = given["x"]
    if centred:
        out_shape["mean"] = number
    return _by_rows(kernel, given, out_shape, name)


def backward(name, given, biased, gate_last) -> dict[str, jax.Array]:
    """The means over rows by one kernel, then all gradients by one whose programs own columns, over which they sum."""
    rows, d = given["x"].shape
    centred = "mean" in given
    number = jax.ShapeDtypeStruct((rows,), jnp.float32)
    means = ["mean_gn", "mean_g"] if centred else ["mean_gn"]

    def means_kernel(refs, out, over_chunks):
        rstd = refs["rstd"][...][:, None]
        mean = refs["mean"][...][:, None] if centred else None

        def step(at, columns, sums):
            part = Gradient(refs, at, wide(refs["scale"][columns]), mean, rstd, gate_last)
            terms = {"mean_gn": part.g * part.n, "mean_g": part.g}
            return {name: sums[name] + terms[name] for name in means}

        for name, total in over_chunks(step, {n: jnp.zeros((1, CHUNK), jnp.float32) for n in means}).items():
            out[name][...] = jnp.sum(total, axis=1) / d

    read = {n: x for n, x in given.items() if n != "dh"}
    given = given | _by_rows(means_kernel, read, dict.fromkeys(means, number), f"{name}_means")
    return _by_columns(name, given, biased, gate_last)


def _by_columns(name, given, biased, gate_last) -> dict[str, jax.Array]:
    (rows, d), (block, lanes) = given["x"].shape, TILE
    block = min(block, pl.next_power_of_2(rows))
    steps = pl.cdiv(pl.cdiv(rows, block), STRIPS)
    strips = pl.cdiv(pl.cdiv(rows, block), steps)
    names = ["dscale", "dbias"] if biased else ["dscale"]

    def kernel(refs, out):
        scale = wide(refs["scale"][...])

        def step(i, sums):
            strip = pl.ds(i * block, block)
            number = {n: refs[n][strip][:, None] for n in ("mean", "rstd", "mean_gn", "mean_g") if n in refs}
            part = Gradient(refs, (strip, slice(None)), scale, number.get("mean"), number["rstd"], gate_last)
            part.store(out, number["mean_gn"], number.get("mean_g"))
            more = part.sums(names)
            return {name: sums[name] + more[name] for name in names}

        zeros = {name: jnp.zeros(lanes, jnp.float32) for name in names}
        for name, total in jax.lax.fori_loop(0, steps, step, zeros).items():
            out[name][...] = total[None]

    partial = jax.ShapeDtypeStruct((strips, d), jnp.float32)
    out_shape = {"dx": given["x"], **dict.fromkeys(names, partial)}
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
    return {**out, **{name: jnp.sum(out[name], axis=0) for name in names}}
