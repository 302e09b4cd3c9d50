"""Attention by blocks. The names of arrays are those of FlashAttention-2's algorithms, written out.

Lanes past the end of an array read as 0. A query past the end is therefore harmless where scores are plain: its row of
query and of dout is 0, and it adds nothing to a gradient. A key past the end would count as one of score 0 in sums over
keys, and is masked there.

What a call asks for beyond plain attention is in its `Variant`; what that leaves out is not in the kernel.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jtile.ops.attention import hopper, visits
from jtile.ops.attention.hopper import features as on_hopper
from jtile.ops.attention.reference import row_sums
from jtile.ops.attention.tiles import DQUERY, FORWARD, SMALL_DKEY_DVALUE, BackwardTiles, Problem, Tile
from jtile.ops.attention.variant import FLOOR, LOG2_E, Place, Variant, both, first_query, over, with_slope


class Sizes(NamedTuple):
    queries: int
    keys: int
    block_q: int
    block_k: int


# Products


def _dot(a, b, axes):
    """The product of two blocks along one axis of each, in float32; not in TF32, for operands that are float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _chunks(ref) -> list[slice]:
    """The head dim of a block. A wide one in parts whose sides are powers of two but for the last, which would else be
    padded to twice; of float32, small ones, since a thread holds all that it multiplies along them."""
    width = ref.shape[-1]
    if width <= 256:
        return [slice(None)]
    most = 128 if ref.dtype.itemsize == 4 else width
    parts, start = [], 0
    while start < width:
        size = max(16, min(most, 2 ** int(math.log2(width - start))))
        parts.append(slice(start, min(width, start + size)))
        start += size
    return parts


def _read(ref, rows, *head) -> list:
    """Rows of a block, in the chunks of its width."""
    return [ref[(rows, *head, chunk)] for chunk in _chunks(ref)]


def _inner(a: list, b: list):
    """The products of all rows of `a` with all rows of `b`."""
    return functools.reduce(lambda x, y: x + y, (_dot(x, y, (1, 1)) for x, y in zip(a, b, strict=True)))


def _add(total: tuple, weights, rows: list) -> tuple:
    """`total` plus `weights` times rows, chunk by chunk."""
    return tuple(acc + _dot(weights.astype(x.dtype), x, (1, 0)) for acc, x in zip(total, rows, strict=True))


def _zeros(ref) -> tuple:
    """Sums for a block, in the chunks of its width."""
    sizes = [ref.shape[-1] if c == slice(None) else c.stop - c.start for c in _chunks(ref)]
    return tuple(jnp.zeros((ref.shape[0], size), jnp.float32) for size in sizes)


def _write(ref, total: tuple, factor=1.0) -> None:
    for acc, chunk in zip(total, _chunks(ref), strict=True):
        ref[:, chunk] = (factor * acc).astype(ref.dtype)


def _wide(rows: list) -> list:
    """Float8 rows as bfloat16: the softmax's weights need its bits."""
    return [x.astype(jnp.bfloat16) if x.dtype.itemsize == 1 else x for x in rows]


def _finite(rows: list) -> tuple[list, jax.Array]:
    """0 in place of rows in which something is not finite, for a weight of 0 times NaN would be NaN; and which.

    That costs registers, and so is done in blocks alone in which something is hidden from some query.
    """
    bad = ~both(*(jnp.all(jnp.isfinite(x.astype(jnp.float32)), axis=1) for x in rows))
    return [jnp.where(bad[:, None], jnp.zeros_like(x), x) for x in rows], bad


# The functions of a variant, on blocks


class Elements:
    """Score, visibility and dropout of a kernel's blocks, whose axes are `qk` or `kq`.

    `refs` holds what the program has of the operands. Along the axes in `looped` it has more than one block, batch or
    head, and takes one after the other; what has none of these is read once.
    """

    def __init__(self, variant: Variant, refs, axes: str, sizes: Sizes, looped: str, *, whole_rows: bool = False):
        # Whether rows of queries past the end would count: they see keys that no other query does.
        self.rows_count = (variant.modifies or variant.masks) and (axes == "kq" or whole_rows)
        self.variant, self.refs, self.axes, self.sizes, self.looped = variant, refs, axes, sizes, looped
        self.first = first_query(refs)
        self.operands = [o for o in variant.operands if o.elementwise]
        self.readers = {o.name: _reader(refs[o.name]) for o in variant.operands if o.rank is not None}
        self.fixed = {o.name: self._load(o, {}) for o in self.operands if not set(o.axes) & set(looped)}

    def _load(self, operand, index: dict[str, Any]):
        at = tuple(index[a] if a in self.looped else slice(None) for a in operand.axes if a in f"qk{self.looped}")
        value = self.refs[operand.name][at or (... if operand.axes else 0)]
        own = "".join(a for a in self.axes if a in operand.axes)
        return (value.T if own == "kq" else value), own

    def at(self, query_start, key_start, head=None, batch=None) -> "Elements.Block":
        rows, columns = pl.ds(query_start, self.sizes.block_q), pl.ds(key_start, self.sizes.block_k)
        index = {"b": batch, "h": head, "q": rows, "k": columns}
        x = {o.name: self.fixed.get(o.name) or self._load(o, index) for o in self.operands}
        queries = self.first + query_start + lax.iota(jnp.int32, self.sizes.block_q)
        keys = key_start + lax.iota(jnp.int32, self.sizes.block_k)
        return Elements.Block(self, x, queries, keys)

    class Block(NamedTuple):
        of: "Elements"
        x: dict[str, Any]
        queries: jax.Array
        keys: jax.Array

        def map(self, function: Callable, *first):
            """`function` of numbers: those in `first`, the place, and the operands."""
            own = {name: value for name, value in self.x.items() if name not in ("batch_index", "head_index")}
            number = lambda name: self.x.get(name, (jnp.int32(0), ""))  # noqa: E731
            place = number("batch_index"), number("head_index"), (self.queries, "q"), (self.keys, "k")

            def call(*values):
                given, numbers, rest = values[: len(first)], values[len(first) :][:4], values[len(first) + 4 :]
                return function(*given, Place(*numbers), {**self.of.readers, **dict(zip(own, rest, strict=True))})

            return over(self.of.axes, call, *((value, self.of.axes) for value in first), *place, *own.values())

        def scores(self, products, *, with_derivative: bool = False):
            """Scores of scaled products, and with them their derivatives."""
            score = self.of.variant.score
            return self.map(with_slope(score) if with_derivative else score, products)

        def by_operand(self, products, name: str):
            """The derivative of scores by an operand."""

            def slope(product, place, x):
                score = lambda value: self.of.variant.score(product, place, {**x, name: value})  # noqa: E731
                return jax.jvp(score, (x[name],), (jnp.ones_like(x[name]),))[1]

            return self.map(slope, products)

        def by_reads(self, products, name: str) -> list[tuple[jax.Array, jax.Array]]:
            """For each time that scores read an array: which element, and the derivative by it."""
            shape = self.of.refs[name].shape

            def slopes(product, place, x):
                reads = []

                def record(*indices):
                    value = x[name](*indices)
                    reads.append((functools.reduce(lambda r, i: r * shape[i[0]] + i[1], enumerate(indices), 0), value))
                    return value

                def given(values):
                    order = iter(values)
                    return self.of.variant.score(product, place, {**x, name: lambda *_: next(order)})

                self.of.variant.score(product, place, {**x, name: record})
                values = [value for _, value in reads]
                found = []
                for k, (at, value) in enumerate(reads):
                    score = lambda v, k=k: given([*values[:k], v, *values[k + 1 :]])  # noqa: E731
                    found.append((jnp.int32(at), jax.jvp(score, (value,), (jnp.ones_like(value),))[1]))
                return found

            return self.map(slopes, products)

        def visible(self):
            """Which scores count, or True for all."""
            variant, sizes = self.of.variant, self.of.sizes

            def test(place, x):
                ends = []
                if self.of.axes == "qk" and sizes.keys % sizes.block_k:
                    ends.append(place.key < sizes.keys)
                if self.of.rows_count and sizes.queries % sizes.block_q:
                    ends.append(place.query < self.of.first + sizes.queries)
                return both(*ends, variant.visible(place, x))

            if not variant.masks and not (self.of.axes == "qk" or self.of.rows_count):
                return True
            return self.map(test)

        def kept(self):
            """Which weights dropout leaves."""
            key, (plane, _) = self.of.readers["dropout_key"], self.x["plane"]
            keep = self.of.variant.keep((key(0), key(1)), plane, self.queries, self.keys)
            return keep if self.of.axes == "qk" else keep.T


def _reader(ref) -> Callable:
    return lambda *indices: ref[indices or (0,)]


def _loop(step: Callable, carry, refs: Mapping[str, Any], lists: str, side: int, found: Callable, each: int = 1):
    """Run `step(number, carry, masked)` for every block to visit, `each` times in turn.

    Blocks are those of a list, of `side` of the kernel's blocks a block in it, or else of a range.
    """
    if f"{lists}_blocks" in refs:
        blocks, counts = refs[f"{lists}_blocks"], refs[f"{lists}_counts"]
        turns = side * each

        def listed(n, carry, masked):
            at, rest = (n, 0) if turns == 1 else (lax.div(n, jnp.int32(turns)), lax.rem(n, jnp.int32(turns)))
            return step(blocks[at] * turns + rest, carry, masked=masked)

        parts = [(0, counts[0] * turns, False), (counts[0] * turns, counts[1] * turns, True)]
        for low, high, masked in parts:
            carry = lax.fori_loop(low, high, functools.partial(listed, masked=masked), carry)
        return carry
    given = refs.get(f"{lists}_range")
    range_ = found() if given is None else visits.Range(*(given[i] for i in range(4)))
    for low, high, masked in range_.parts:
        carry = lax.fori_loop(low * each, high * each, functools.partial(step, masked=masked), carry)
    return carry


def _over_keys(step, carry, elements: Elements, query_start):
    """For each block of keys that some query of a block sees. Those that all of them see need no mask."""
    variant, sizes = elements.variant, elements.sizes

    def found():
        own_block, block = sizes.block_q, sizes.block_k
        return visits.static_range(variant, elements.first, query_start, sizes.keys, own_block, block, of_keys=True)

    side = variant.block_size[1] // sizes.block_k if variant.block_size else 1
    return _loop(step, carry, elements.refs, "key", side, found)


def _query_block(i, blocks, variant: Variant):
    """The block of queries of the i-th program. Under a causal mask the last ones see the most keys, and go first."""
    return blocks - 1 - i if variant.window == (None, 0) else i


# Forward


def _forward_kernel(query_ref, key_ref, value_ref, refs, out_ref, lse_ref, *, variant: Variant, sizes: Sizes):
    block_q, block_k = sizes.block_q, sizes.block_k
    query_start = block_q * _query_block(pl.program_id(0), pl.cdiv(sizes.queries, block_q), variant)
    elements, scale = Elements(variant, refs, "qk", sizes, "k"), variant.scale
    # exp(scale · s − max(scale · s)) = 2^(slope · s − slope · max(s)), slope = |scale| · log₂ e: one multiply-add an
    # element. The query takes the sign of scale. Scores that are modified have their log₂ e already.
    slope = 1.0 if variant.modifies else abs(scale) * LOG2_E
    query = _read(query_ref, slice(None))
    query = query if scale > 0 or variant.modifies else [-x for x in query]
    scaled = lambda x: x if slope == 1.0 else slope * x  # noqa: E731

    def step(j, carry, masked):
        total, peak, acc = carry
        rows = pl.ds(j * block_k, block_k)
        here = elements.at(query_start, j * block_k)
        scores = _inner(query, _read(key_ref, rows))
        if variant.modifies:
            scores = LOG2_E * here.scores(scale * scores)
        visible = here.visible() if masked else True
        if visible is not True:
            scores = jnp.where(visible, scores, -jnp.inf)
        new_peak = jnp.maximum(peak, scaled(jnp.max(scores, axis=1)))
        weights = jnp.exp2(scaled(scores) - new_peak[:, None])
        shrink = jnp.exp2(peak - new_peak)
        value, counted = _wide(_read(value_ref, rows)), weights
        if masked and variant.masks:  # to the queries that see it, the sum tells that a value is not finite
            value, bad = _finite(value)
            counted = jnp.where(visible & bad[None, :], jnp.nan, weights)
        total = shrink * total + jnp.sum(counted, axis=1)
        if variant.dropout:
            weights = jnp.where(here.kept(), weights, 0.0)
        return total, new_peak, _add(tuple(shrink[:, None] * x for x in acc), weights, value)

    # Where every query sees a key in the first block, `peak` rises above its floor there.
    peak = jnp.full(block_q, FLOOR, jnp.float32)
    total = jnp.zeros(block_q, jnp.float32)
    if variant.has("sinks"):  # a key more, of this score and of no value
        peak, total = peak * 0 + LOG2_E * refs["sinks"][...].astype(jnp.float32), total + 1.0
    carry = total, peak, _zeros(out_ref)
    total, peak, acc = _over_keys(step, carry, elements, query_start)
    lse = math.log(2) * (peak + jnp.log2(total))
    if variant.empties_rows or variant.modifies:
        empty = total == 0
        total, lse = jnp.where(empty, 1.0, total), jnp.where(empty, -jnp.inf, lse)
    factor = variant.kept_factor if variant.dropout else 1.0
    _write(out_ref, tuple(x / total[:, None] for x in acc), factor)
    lse_ref[...] = lse


def _exponent(lse, variant: Variant):
    """What to take from scores, for weights that are 0 in rows that see nothing."""
    return jnp.where(lse == -jnp.inf, jnp.inf, lse) if variant.empties_rows or variant.modifies else lse


def _dscores(variant: Variant, here: Elements.Block, products, dweights, lse, delta, masked: bool):
    """The derivative by scores, of (block_q, block_k), and the one of scores by scaled products, None for 1.

    `products` are those of query and key, `dweights` those of dout and value; `lse` has the factor log₂ e.
    """
    visible, hides = here.visible() if masked else True, masked and variant.masks
    if variant.modifies:
        products = jnp.where(visible, products, 0.0) if hides else products  # the slope at NaN is NaN
        scores, slope = here.scores(variant.scale * products, with_derivative=True)
        scores = LOG2_E * scores - lse[:, None]
    else:
        scores, slope = (variant.scale * LOG2_E) * products - lse[:, None], None
    if visible is not True:
        scores = jnp.where(visible, scores, -jnp.inf)
    if variant.dropout:
        dweights = jnp.where(here.kept(), variant.kept_factor * dweights, 0.0)
    dscores = jnp.exp2(scores) * (dweights - delta[:, None])
    return jnp.where(visible, dscores, 0.0) if hides else dscores, slope


def _dquery_kernel(
    query_ref, key_ref, value_ref, lse_ref, delta_ref, dout_ref, refs, dquery_ref, *, variant: Variant, sizes: Sizes
):
    block_q, block_k = sizes.block_q, sizes.block_k
    query_start = block_q * _query_block(pl.program_id(0), pl.cdiv(sizes.queries, block_q), variant)
    elements = Elements(variant, refs, "qk", sizes, "k")
    query, dout, delta = _read(query_ref, slice(None)), _read(dout_ref, slice(None)), delta_ref[...]
    lse = LOG2_E * _exponent(lse_ref[...], variant)

    def step(j, acc, masked):
        rows = pl.ds(j * block_k, block_k)
        key = _read(key_ref, rows)
        products, dweights = _inner(query, key), _inner(dout, _read(value_ref, rows))
        here = elements.at(query_start, j * block_k)
        dscores, slope = _dscores(variant, here, products, dweights, lse, delta, masked)
        dscores = dscores if slope is None else dscores * slope
        return _add(acc, dscores, _finite(key)[0] if masked and variant.masks else key)

    acc = _over_keys(step, _zeros(dquery_ref), elements, query_start)
    _write(dquery_ref, acc, variant.scale)


def _dkey_dvalue_kernel(
    query_ref, key_ref, value_ref, minus_lse_ref, minus_delta_ref, dout_ref, refs, dkey_ref, dvalue_ref,
    *, variant: Variant, group: int, sizes: Sizes,
):  # fmt: skip
    block_q, block_k, scale = sizes.block_q, sizes.block_k, variant.scale
    key_start = block_k * pl.program_id(0)
    elements = Elements(variant, refs, "kq", sizes, "qh")
    slope = scale * LOG2_E
    key, value = _read(key_ref, slice(None)), _read(value_ref, slice(None))

    def step(n, carry, masked):
        dkey, dvalue = carry
        i, head = lax.div(n, group), lax.rem(n, group)
        block = pl.ds(i * block_q, block_q)
        query, dout = _read(query_ref, block, head), _read(dout_ref, block, head)
        here = elements.at(i * block_q, key_start, head)
        visible, hides = here.visible() if masked else True, masked and variant.masks
        # Blocks are (block_k, block_q), so that weights and dscores are left operands of the last products as they
        # stand. The first products start from a row statistic, which then holds no registers of its own.
        if variant.modifies:
            products = _inner(key, query)
            products = jnp.where(visible, products, 0.0) if hides else products
            scores, factor = here.scores(scale * products, with_derivative=True)
            scores = LOG2_E * scores + minus_lse_ref[head, block][None, :]
        else:
            scores = slope * (minus_lse_ref[head, block][None, :] + _inner(key, query))
        if visible is not True:
            scores = jnp.where(visible, scores, -jnp.inf)
        weights = counted = jnp.exp2(scores)
        if variant.dropout:
            kept = here.kept()
            counted = jnp.where(kept, weights, 0.0)
            dweights = jnp.where(kept, variant.kept_factor * _inner(value, dout), 0.0)
            dscores = weights * (minus_delta_ref[head, block][None, :] + dweights)
        else:
            dscores = weights * (minus_delta_ref[head, block][None, :] + _inner(value, dout))
        dvalue = _add(dvalue, counted, dout)
        dscores = jnp.where(visible, dscores, 0.0) if hides else dscores
        if variant.modifies:
            dscores = dscores * factor
        if masked and variant.masks_by_data:  # queries that are padding may be anything, too
            query, _ = _finite(query)
        return _add(dkey, dscores, query), dvalue

    # One loop over blocks and heads, not a loop in a loop: products accumulate across it without leaving registers.
    def found():
        size = sizes.queries if elements.rows_count else _round_up(sizes.queries, block_q)
        return visits.static_range(variant, elements.first, key_start, size, block_k, block_q, of_keys=False)

    carry = _zeros(dkey_ref), _zeros(dvalue_ref)
    side = variant.block_size[0] // block_q if variant.block_size else 1
    dkey, dvalue = _loop(step, carry, refs, "query", side, found, group)
    _write(dkey_ref, dkey, scale)
    _write(dvalue_ref, dvalue, variant.kept_factor if variant.dropout else 1.0)


# Calls


def _round_up(size, block):
    return pl.cdiv(size, block) * block


def _padded(size: int, block: int, variant: Variant, side: int) -> int:
    """A sequence as whole blocks, also of those that lists count in."""
    return _round_up(size, max(block, variant.block_size[side] if variant.block_size else 0))


class _Onto(NamedTuple):
    """Results to write over, of so many elements of a batch."""

    results: tuple[jax.Array, ...]
    batch: jax.Array


def _call(
    kernel,
    operands: list,
    refs: Mapping[str, Any],
    specs: list,
    named: Callable,
    *,
    grid,
    onto: _Onto | None = None,
    **options,
):
    """`pallas_call` of a kernel whose last operand is a dictionary: those that it was given by name."""
    given, count = dict(refs), len(operands)
    if onto is not None:
        kernel = functools.partial(_without, kernel, slice(count, count + len(onto.results)))
        operands, specs = [*operands, *onto.results], [*specs, *jax.tree.leaves(options["out_specs"])]
        options |= dict(input_output_aliases={count + i: i for i in range(len(onto.results))})
        grid = (*grid[:-1], onto.batch)
    in_specs = [*specs, {name: named(name) for name in given}]
    return pl.pallas_call(kernel, grid=grid, in_specs=in_specs, **options)(*operands, given)


def _without(kernel, some: slice, *refs):
    kernel(*refs[: some.start], *refs[some.stop :])


def _specs(variant: Variant, refs: Mapping[str, Any], place: Callable[..., dict[str, tuple]]) -> Callable:
    """Block specs of operands by name. `place` gives for each axis its block and its index, of the program's ids."""
    axes = {operand.name: operand.axes for operand in variant.operands if operand.rank is None}
    axes |= {"key_range": "bi4", "query_range": "bj4"}

    def named(name: str) -> pl.BlockSpec:
        shape = refs[name].shape
        if not axes.get(name):
            return pl.BlockSpec(shape, lambda *ids: (0,) * len(shape))
        # One that holds for all in a batch has a batch axis of size 1.
        single = axes[name].startswith("b") and shape[0] == 1
        sides = tuple(size if size is not None else None for size in (place()[a][0] for a in axes[name]))

        def index(*ids):
            at = place(*ids)
            return tuple(0 if single and a == "b" else at[a][1] for a in axes[name])

        return pl.BlockSpec(sides, index)

    return named


def _by_queries(query, key, refs, sizes: Sizes, variant: Variant):
    """For kernels whose programs take a block of one head's queries each and walk over its keys: the grid, the block of
    an array (batch, queries, heads, ...), that of an array (batch, keys, key_heads, width), and those of operands."""
    (batch, queries, heads, _), (_, keys, key_heads, _) = query.shape, key.shape
    blocks, group = pl.cdiv(queries, sizes.block_q), heads // key_heads
    padded = _padded(keys, sizes.block_k, variant, 1)

    def some_queries(*rest):
        index = lambda i, h, b: (b, _query_block(i, blocks, variant), h, *(0 for _ in rest))  # noqa: E731
        return pl.BlockSpec((None, sizes.block_q, None, *rest), index)

    def all_keys(width):
        return pl.BlockSpec((None, padded, None, width), lambda i, h, b: (b, 0, lax.div(h, group), 0))

    side = variant.block_size[0] // sizes.block_q if variant.block_size else 1

    def place(i=0, h=0, b=0):
        i = _query_block(i, blocks, variant)
        listed = i if side == 1 else lax.div(i, side)
        lists = refs["key_blocks"].shape[-1] if "key_blocks" in refs else 0
        counted = {"4": (4, 0), "2": (2, 0), "j": (lists, 0)}
        return {
            "b": (None, b),
            "h": (None, h),
            "q": (sizes.block_q, i),
            "k": (padded, 0),
            "i": (None, listed),
        } | counted

    # Blocks of queries vary fastest: programs that run at the same time share the keys of a few heads in the cache.
    return (blocks, heads, batch), some_queries, all_keys, _specs(variant, refs, place)


# Which operands a kernel is given.
NOT_OF_SCORES = ("sinks",)
OF_KEYS, OF_QUERIES = ("key_blocks", "key_counts"), ("query_blocks", "query_counts")


def _refs(variant: Variant, arrays, *without: str) -> dict[str, jax.Array]:
    named = {name: x for name, x in variant.named(arrays).items() if name not in without}
    return {name: x if name == "origin" else jnp.atleast_1d(x) for name, x in named.items()}


def _with_range(variant: Variant, refs, sizes: Sizes, *, of_keys: bool) -> dict[str, jax.Array]:
    """The operands, and the ranges of blocks where operands tell them."""
    if not variant.has(*visits.TELLING):
        return refs
    name = "key_range" if of_keys else "query_range"
    axes = {operand.name: operand.axes for operand in variant.operands}
    x = {n: refs[n] if axes[n].startswith("b") else refs[n][None] for n in visits.TELLING if n in refs}
    x |= {"origin": refs["origin"]} if "origin" in refs else {}
    return refs | {name: visits.ranges(variant, x, sizes.queries, sizes.keys, sizes, of_keys=of_keys)}


def _sizes(tile: Tile, query, value) -> Sizes:
    return Sizes(query.shape[1], value.shape[1], tile.block_q, tile.block_k)


# The schedule for Hopper lets NaN in a key, value or query that is masked leak to those in its block. Its kernels set a
# number where there may be some, from 0 to the size of the batch, and all is computed once more, by as many programs.


def forward(query, key, value, *arrays, tile: Tile | hopper.ForwardTile, variant: Variant):
    if isinstance(tile, Tile):
        return _forward(query, key, value, arrays, tile, variant)
    out, lse, *found = on_hopper.forward(query, key, value, *arrays, tile=tile, variant=variant)
    if not found:
        return out, lse
    if variant.is_band:
        again = _once_more(query, value, arrays, variant, FORWARD, "forward")
    else:
        again = Tile(64 * tile.groups, tile.block_k, 8, 1)
    return _forward(query, key, value, arrays, again, variant, _Onto((out, lse), *found))


def _once_more(query, value, arrays, variant: Variant, tiles: dict, kernel: str) -> Tile:
    """A tile for any chip. (Where arrays tell which blocks to visit, these are those of the first time in place of it:
    XLA then finds them once.)"""
    return Problem(query, value, arrays, variant, None).of(tiles, kernel)._replace(num_stages=1)


def _forward(query, key, value, arrays, tile: Tile, variant: Variant, onto: _Onto | None = None):
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    sizes = _sizes(tile, query, value)
    refs = _with_range(variant, _refs(variant, arrays, *OF_QUERIES), sizes, of_keys=True)
    grid, some_queries, all_keys, named = _by_queries(query, key, refs, sizes, variant)
    out_dtype = jnp.bfloat16 if query.dtype.itemsize == 1 else query.dtype
    return _call(
        functools.partial(_forward_kernel, variant=variant, sizes=sizes),
        [query, key, value],
        refs,
        [some_queries(head_dim), all_keys(head_dim), all_keys(value_dim)],
        named,
        grid=grid,
        onto=onto,
        out_specs=[some_queries(value_dim), some_queries()],
        out_shape=[
            jax.ShapeDtypeStruct((*query.shape[:-1], value_dim), out_dtype),
            jax.ShapeDtypeStruct(query.shape[:-1], jnp.float32),
        ],
        compiler_params=tile.compiler_params,
        name="attention",
    )


def backward(query, key, value, *rest, tile: BackwardTiles | hopper.BackwardTile, variant: Variant):
    *arrays, out, lse, dout, dlse = rest
    delta = row_sums(out, dout, dlse)
    given = query, key, value, lse, delta, dout, arrays
    if isinstance(tile, BackwardTiles):
        return _dquery(*given, tile.dquery, variant), *_dkey_dvalue(*given, tile.dkey_dvalue, variant)
    results = dict(out=out, lse=lse, dout=dout, dlse=dlse)
    dquery, dkey, dvalue, *found = on_hopper.backward(query, key, value, *arrays, **results, tile=tile, variant=variant)
    if not found:
        return dquery, dkey, dvalue
    if variant.is_band:
        tables = (DQUERY, "dquery"), (SMALL_DKEY_DVALUE, "dkey_dvalue")
        again = BackwardTiles(*(_once_more(query, value, arrays, variant, *table) for table in tables))
    else:
        block_k = hopper.backward_block_k(query, value)
        again = BackwardTiles(Tile(128, block_k, 8, 1), Tile(tile.block_q, block_k, 8, 1))
    dquery = _dquery(*given, again.dquery, variant, _Onto((dquery,), *found))
    return dquery, *_dkey_dvalue(*given, again.dkey_dvalue, variant, _Onto((dkey, dvalue), *found))


def _dquery(query, key, value, lse, delta, dout, arrays, tile: Tile, variant: Variant, onto: _Onto | None = None):
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    sizes = _sizes(tile, query, value)
    refs = _with_range(variant, _refs(variant, arrays, *NOT_OF_SCORES, *OF_QUERIES), sizes, of_keys=True)
    grid, some_queries, all_keys, named = _by_queries(query, key, refs, sizes, variant)
    return _call(
        functools.partial(_dquery_kernel, variant=variant, sizes=sizes),
        [query, key, value, lse, delta, dout],
        refs,
        [
            *(some_queries(head_dim), all_keys(head_dim), all_keys(value_dim)),
            *(some_queries(), some_queries(), some_queries(value_dim)),
        ],
        named,
        grid=grid,
        onto=onto,
        out_specs=some_queries(head_dim),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=tile.compiler_params,
        name="attention_dquery",
    )


def _dkey_dvalue(query, key, value, lse, delta, dout, arrays, tile: Tile, variant: Variant, onto: _Onto | None = None):
    (batch, keys, key_heads, head_dim), value_dim = key.shape, value.shape[-1]
    queries, group = query.shape[1], query.shape[2] // key_heads
    sizes = _sizes(tile, query, value)
    refs = _with_range(variant, _refs(variant, arrays, *NOT_OF_SCORES, *OF_KEYS), sizes, of_keys=False)
    padded = _padded(queries, sizes.block_q, variant, 0)

    def some_keys(width):
        return pl.BlockSpec((None, sizes.block_k, None, width), lambda j, h, b: (b, j, h, 0))

    def all_queries(width):  # of all heads in the group: one program sums dkey and dvalue over them
        return pl.BlockSpec((None, padded, group, width), lambda j, h, b: (b, 0, h, 0))

    side = variant.block_size[1] // sizes.block_k if variant.block_size else 1

    def place(j=0, h=0, b=0):
        listed = j if side == 1 else lax.div(j, side)
        lists = refs["query_blocks"].shape[-1] if "query_blocks" in refs else 0
        counted = {"4": (4, 0), "2": (2, 0), "i": (lists, 0), "j": (None, listed)}
        return {"b": (None, b), "h": (group, h), "g": (None, h), "q": (padded, 0), "k": (sizes.block_k, j)} | counted

    statistics = pl.BlockSpec((None, group, padded), lambda j, h, b: (b, h, 0))
    minus_lse = -LOG2_E * _exponent(lse, variant) if variant.modifies else -_exponent(lse, variant) / variant.scale
    return _call(
        functools.partial(_dkey_dvalue_kernel, variant=variant, group=group, sizes=sizes),
        # A program reads these for many queries of few heads: with the queries innermost they are contiguous.
        [query, key, value, jnp.swapaxes(minus_lse, 1, 2), jnp.swapaxes(-delta, 1, 2), dout],
        refs,
        [
            *(all_queries(head_dim), some_keys(head_dim), some_keys(value_dim)),
            *(statistics, statistics, all_queries(value_dim)),
        ],
        _specs(variant, refs, place),
        grid=(pl.cdiv(keys, sizes.block_k), key_heads, batch),
        onto=onto,
        out_specs=[some_keys(head_dim), some_keys(value_dim)],
        out_shape=[jax.ShapeDtypeStruct(key.shape, key.dtype), jax.ShapeDtypeStruct(value.shape, value.dtype)],
        compiler_params=tile.compiler_params,
        name="attention_dkey_dvalue",
    )
