"""Gradients of what scores depend on: of biases, and of arrays that a `score_mod` reads. Sums in one order: no atomics.

Scores and their derivatives are computed once more, as in the backward pass, and summed over the axes that the operand
lacks, within a program where a program can own what the sum goes to, and over programs by XLA.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jtile.ops.attention import kernels, visits
from jtile.ops.attention.reference import row_sums
from jtile.ops.attention.tiles import Tile
from jtile.ops.attention.variant import LOG2_E, Operand, Variant

CHUNK = 1024  # elements of an array that are set to 0 at once
PARTS = 8  # of the queries of one head, for an array that all of them read


def operand_gradient(query, key, value, *rest, tile: Tile, variant: Variant, operand: str):
    *arrays, out, lse, dout, dlse = rest
    delta = row_sums(out, dout, dlse)
    sizes = kernels._sizes(tile, query, value)
    lists = (*kernels.OF_KEYS, *kernels.OF_QUERIES)
    refs = kernels._refs(variant, arrays, *kernels.NOT_OF_SCORES, *lists)
    program = _Program(variant, next(o for o in variant.operands if o.name == operand), sizes, query.shape, key.shape)
    gradient = program.launch(query, key, value, lse, delta, dout, refs, tile)
    return (gradient.reshape(variant.named(arrays)[operand].shape),)


class _Program:
    """What one program sums: along the axes in `looped`, of those that the gradient of its operand lacks."""

    def __init__(self, variant: Variant, operand: Operand, sizes: kernels.Sizes, query_shape, key_shape):
        self.variant, self.operand, self.sizes = variant, operand, sizes
        batch, _, heads, _ = query_shape
        self.group = heads // key_shape[2]
        self.counts = {
            "b": batch,
            "h": heads,
            "q": pl.cdiv(sizes.queries, sizes.block_q),
            "k": pl.cdiv(sizes.keys, sizes.block_k),
        }
        self.reads = operand.rank is not None
        owned = set("bh") if self.reads or not set("qk") <= set(operand.axes) else set("qk")
        self.looped = "".join(a for a in "bhqk" if a not in operand.axes and a not in owned)
        self.grid_axes = [a for a in "kqhb" if a not in self.looped]
        self.parts = min(PARTS, self.counts["q"]) if self.reads else 1
        self.padded = {"q": self.counts["q"] * sizes.block_q, "k": self.counts["k"] * sizes.block_k}

    def place(self, *ids):
        """For each axis the block that a program has of an array, and its index."""
        at: dict[str, Any] = dict.fromkeys("bhqk", 0)
        at |= zip(self.grid_axes, ids[self.reads :], strict=True) if ids else ()
        whole = self.counts | self.padded
        block = {"b": None, "h": None, "q": self.sizes.block_q, "k": self.sizes.block_k}
        return {a: (whole[a], 0) if a in self.looped else (block[a], at[a]) for a in "bhqk"}

    def spec(self, axes: str, *rest: int) -> pl.BlockSpec:
        """Of an array with these axes; `g` are heads of keys."""

        def sides(place):
            group = place["h"][0], place["h"][1] if "h" in self.looped else lax.div(place["h"][1], self.group)
            heads = group[0] if group[0] is None else group[0] // self.group
            return place | {"g": (heads, group[1])}

        return pl.BlockSpec(
            (*(sides(self.place())[a][0] for a in axes), *rest),
            lambda *ids: (*(sides(self.place(*ids))[a][1] for a in axes), *(0 for _ in rest)),
        )

    def kernel(self, query_ref, key_ref, value_ref, lse_ref, delta_ref, dout_ref, refs, out_ref):
        variant, sizes, looped = self.variant, self.sizes, self.looped
        elements = kernels.Elements(variant, refs, "qk", sizes, looped, whole_rows=True)
        own = {a: pl.program_id(i + self.reads) for i, a in enumerate(self.grid_axes)}

        def step(n, acc):
            found = dict(own)
            for a in reversed(looped):
                count = self.counts[a]
                found[a] = lax.rem(n, count)
                n = lax.div(n, count)
            b, h, i, j = (found[a] for a in "bhqk")
            here = lambda a, start, size: pl.ds(start * size, size) if a in looped else slice(None)  # noqa: E731
            rows, columns = here("q", i, sizes.block_q), here("k", j, sizes.block_k)
            batch = (b,) if "b" in looped else ()
            head, key_head = ((h,), (lax.div(h, self.group),)) if "h" in looped else ((), ())
            read = lambda ref, at, head: [ref[(*batch, at, *head, c)] for c in kernels._chunks(ref)]  # noqa: E731
            products = kernels._inner(read(query_ref, rows, head), read(key_ref, columns, key_head))
            dweights = kernels._inner(read(dout_ref, rows, head), read(value_ref, columns, key_head))
            lse = LOG2_E * kernels._exponent(lse_ref[(*batch, rows, *head)], variant)
            block = elements.at(i * sizes.block_q, j * sizes.block_k, h, b)
            delta = delta_ref[(*batch, rows, *head)]
            dscores, _ = kernels._dscores(variant, block, products, dweights, lse, delta, True)
            products = jnp.where(block.visible(), products, 0.0) if variant.masks else products
            return self.sum(block, variant.scale * products, dscores, acc, out_ref)

        if self.reads:
            self.clear(out_ref)
        first, last = self.turns(own, elements.first)
        self.write(out_ref, lax.fori_loop(first, last, step, self.zero()))

    def turns(self, own, first_query):
        """The numbers of the blocks to sum, one range. Blocks that nothing sees are left out where that is easy."""
        count = math.prod(self.counts[a] for a in self.looped)
        sizes = self.sizes
        if self.reads:
            share = pl.cdiv(self.counts["q"], self.parts) * self.counts["k"]
            first = pl.program_id(0) * share
            return jnp.minimum(first, count), jnp.minimum(first + share, count)
        if self.variant.has("query_offset"):
            return 0, count
        seen = functools.partial(visits.static_range, self.variant, first_query)
        if "k" in own and "q" not in own:
            start = own["k"] * sizes.block_k
            found = seen(start, sizes.queries, sizes.block_k, sizes.block_q, of_keys=False)
            return found.start, found.stop
        if "q" not in own:
            return 0, count
        found = seen(own["q"] * sizes.block_q, sizes.keys, sizes.block_q, sizes.block_k, of_keys=True)
        if "k" not in own:
            return found.start, found.stop
        return 0, jnp.where((found.start <= own["k"]) & (own["k"] < found.stop), count, 0)

    # What is summed: a block of a bias, without the axes that it lacks; or each element of an array that is read.

    def zero(self):
        if self.reads:
            return 0
        sides = {"q": self.sizes.block_q, "k": self.sizes.block_k}
        return jnp.zeros([sides[a] for a in "qk" if a in self.operand.axes] or [1], jnp.float32)

    def sum(self, block, products, dscores, acc, out_ref):
        if not self.reads:
            terms = dscores * block.by_operand(products, self.operand.name)
            lacking = tuple(i for i, a in enumerate("qk") if a not in self.operand.axes)
            return acc + (jnp.sum(terms, axis=lacking) if lacking else terms)
        for places, slopes in block.by_reads(products, self.operand.name):
            terms = dscores * slopes

            def add(r, carry, places=places, terms=terms):
                out_ref[pl.ds(r, 1)] += jnp.full(1, jnp.sum(jnp.where(places == r, terms, 0.0)))
                return carry

            lax.fori_loop(jnp.min(places), jnp.max(places) + 1, add, 0)
        return acc

    def clear(self, out_ref):
        def clear(c, carry):
            out_ref[pl.ds(c * CHUNK, CHUNK)] = jnp.zeros(CHUNK, jnp.float32)
            return carry

        lax.fori_loop(0, out_ref.shape[0] // CHUNK, clear, 0)

    def write(self, out_ref, acc):
        if not self.reads:
            out_ref[...] = acc

    def launch(self, query, key, value, lse, delta, dout, refs, tile):
        operand, array, lengths = self.operand, refs[self.operand.name], dict(self.counts)
        lengths |= {"q": self.sizes.queries, "k": self.sizes.keys}
        if self.reads:
            size = kernels._round_up(math.prod(array.shape), CHUNK)
            grid = (self.parts, *(self.counts[a] for a in self.grid_axes))
            out_shape = (*grid[::-1], size)
            out_spec = pl.BlockSpec((None, None, None, size), lambda p, h, b: (b, h, p, 0))
        else:
            grid = tuple(self.counts[a] for a in self.grid_axes)
            axes = operand.axes if set("qk") <= set(operand.axes) else "bh" + operand.axes.strip("bh")
            rest = () if set("qk") & set(operand.axes) else (1,)
            out_shape, out_spec = (*(lengths[a] for a in axes), *rest), self.spec(axes, *rest)
        axes_of = {o.name: o.axes for o in self.variant.operands if o.rank is None}

        def named(name):
            if axes_of.get(name):
                return self.spec(axes_of[name])
            return pl.BlockSpec(refs[name].shape, lambda *ids: (0,) * refs[name].ndim)

        query_spec, key_spec = self.spec("bqh", query.shape[-1]), self.spec("bkg", key.shape[-1])
        value_spec, dout_spec, row = (
            self.spec("bkg", value.shape[-1]),
            self.spec("bqh", dout.shape[-1]),
            self.spec("bqh"),
        )
        out = kernels._call(
            functools.partial(_kernel, self),
            [query, key, value, lse, delta, dout],
            refs,
            [query_spec, key_spec, value_spec, row, row, dout_spec],
            named,
            grid=grid,
            out_specs=out_spec,
            out_shape=jax.ShapeDtypeStruct(out_shape, jnp.float32),
            compiler_params=tile.compiler_params,
            name=f"attention_d{operand.name}",
        )
        if self.reads:
            return jnp.sum(out, axis=(0, 1, 2))[: math.prod(array.shape)].reshape(array.shape).astype(array.dtype)
        if not set("qk") <= set(operand.axes):
            lacking = tuple(i for i, a in enumerate("bh") if a not in operand.axes)
            out = jnp.sum(out, axis=lacking) if lacking else out
        return out.reshape(array.shape).astype(array.dtype)


def _kernel(program: _Program, *refs):
    program.kernel(*refs)
