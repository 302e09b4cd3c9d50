"""Sorting: Triton sorts one tile of integers along its last axis, each of which here holds a key and where it was."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jtile.compiler.rules import rule
from jtile.compiler.rules.arithmetic import apply, cast
from jtile.compiler.rules.shape import picked, sliced, transposed
from jtile.compiler.value import Value, tile

FEW = 32  # so many elements are found faster one by one than by sorting all


@rule("sort")
def sort(e, eqn, *operands: Value):
    axis = eqn.params["dimension"]
    if operands[0].shape[axis] == 1:
        return list(operands)
    if len(operands) == 1 and jnp.issubdtype(operands[0].dtype, jnp.integer):  # equals cannot be told apart
        last, back = _last(axis, len(operands[0].shape))
        x = transposed(e, e.filled(operands[0], (axis,), int(jnp.iinfo(operands[0].dtype).max)), last)
        return [transposed(e, e.let(f"tl.sort({x.text})", x.shape, x.dtype, "sorted"), back)]
    order = _order(e, operands[: eqn.params["num_keys"]], axis)
    return [_reordered(e, x, order, axis) for x in operands]


@rule("le_to", "lt_to")
def compare(e, eqn, *operands: Value) -> Value:
    """In the total order of floats, NaN among them: what `jnp.searchsorted` asks for."""

    def key(x: Value) -> Value:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return e.let(_in_total_order(e, x)[1], x.shape, np.dtype(f"int{8 * x.dtype.itemsize}"), "key")

    name, out = eqn.primitive.name.removesuffix("_to"), eqn.outvars[0].aval
    return apply(e, name, out.shape, np.dtype(out.dtype), *map(key, operands))


@rule("top_k")
def top_k(e, eqn, x: Value):
    """In the total order of floats: NaN, infinity, ... 0, -0, ... minus infinity, NaN with a sign."""
    return _greatest(e, x, eqn.params["k"], eqn.params["axis"], eqn.outvars[1].aval.dtype, total=True)


@rule("approx_top_k")
def approx_top_k(e, eqn, x: Value):
    """Exact, which every `recall_target` allows."""
    params = eqn.params
    k, axis = params["k"], params["reduction_dimension"] % len(x.shape)
    return _greatest(e, x, k, axis, eqn.outvars[1].aval.dtype, least=not params["is_max_k"])


def _greatest(e, x: Value, k: int, axis: int, index_dtype, total=False, least=False) -> list[Value]:
    keys = _parts(e, x, total)
    if not least:
        keys = [e.let(f"~{e.tensor(key)}", key.shape, np.int32, "key") for key in keys]
    order = _places(e, keys, axis, k if len(keys) == 1 and k <= FEW else None)
    order = sliced(e, order, axis, 0, k)
    return [_reordered(e, x, order, axis), cast(e, order, np.dtype(index_dtype))]


def _reordered(e, x: Value, order: Value, axis: int) -> Value:
    coordinates = [order.text if a == axis else a for a in range(len(x.shape))]
    return picked(e, x, order.shape, coordinates)


def _order(e, keys: Sequence[Value], axis: int) -> Value:
    """Where the elements of each row come from: sorted by the first key, among equals by the next, then by place."""
    return _places(e, [part for x in reversed(keys) for part in _parts(e, x)], axis)


def _places(e, keys: Sequence[Value], axis: int, k: int | None = None) -> Value:
    """The places of the elements in order of 32-bit keys, the last the most significant; only of the first k if given.

    They are sorted by one key after the other, and each sort keeps the order of equals: what is sorted are 64-bit
    integers, the upper half a key and the lower half the place.
    """
    rank, n = len(keys[0].shape), keys[0].shape[axis]
    last, back = _last(axis, rank)
    order: Value | None = None
    for key in keys:
        key = transposed(e, e.filled(key, (axis,), 2**31 - 1), last)
        if order is not None:
            key = picked(e, key, key.shape, [*range(rank - 1), order.text])
        packed = f"(tl.cast({key.text}, tl.int64) << 32) | {e.lanes(n, rank - 1, rank)}"
        if k is None:
            found = e.let(f"tl.sort({packed})", key.shape, np.int64, "sorted")
        else:
            found = _first(e, e.let(packed, key.shape, np.int64, "rest"), k)
        text = f"tl.cast({found.text}, tl.int32)"
        places = e.let(text, found.shape, np.int32, "order", bounds=(0, n - 1))
        order = places if order is None else picked(e, order, order.shape, [*range(rank - 1), places.text])
    assert order is not None  # there is at least one key
    return transposed(e, order, back)


def _first(e, rest: Value, k: int) -> Value:
    """The k least of each row, all different, found one after the other."""
    axis, shape = len(rest.shape) - 1, (*rest.shape[:-1], k)
    found = e.let(f"tl.full({list(tile(shape))}, 0, tl.int64)", shape, np.int64, "sorted")
    i, least = e.name("i"), e.name("least")
    e.loops += 1
    with e.block(f"for {i} in tl.range(0, {k}):"):
        e.line(f"{least} = tl.min({rest.text}, axis={axis}, keep_dims=True)")
        e.line(f"{found.text} = tl.where({e.lanes(k, axis, axis + 1)} == {i}, {least}, {found.text})")
        e.line(f"{rest.text} = tl.where({rest.text} == {least}, {2**63 - 1}, {rest.text})")
    return found


def _last(axis: int, rank: int) -> tuple[list[int], list[int]]:
    """The order of axes in which one comes last, as Triton sorts, and the order that undoes it."""
    order = [*(a for a in range(rank) if a != axis), axis]
    return order, [order.index(a) for a in range(rank)]


def _parts(e, x: Value, total: bool = False) -> list[Value]:
    """32-bit integers in the order of `x`, the least significant first.

    Unless the order of floats is to be total, -0 equals 0 and every NaN comes last, as in `jax.lax.sort`.
    """
    bits = 8 * x.dtype.itemsize
    integer, most = f"tl.int{bits}", 2 ** (bits - 1) - 1
    text = e.tensor(x)
    if jnp.issubdtype(x.dtype, jnp.floating):
        raw, text = _in_total_order(e, x)
        if not total:
            size = e.let(f"{raw} & {most}", x.shape, np.int64, "size").text
            text = f"tl.where({size} > {_greatest_bits(x.dtype)}, {most}, tl.where({size} == 0, 0, {text}))"
    elif x.dtype in (np.uint32, np.uint64):
        text = f"tl.cast({text}, {integer}, bitcast=True) ^ {-most - 1}"
    if bits < 32:
        text = f"tl.cast({text}, tl.int32)"
    key = x if text == x.text else e.let(text, x.shape, np.int32, "key")
    if bits <= 32:
        return [key]
    low = e.let(f"tl.cast({key.text}, tl.int32) ^ {-(2**31)}", x.shape, np.int32, "key")
    return [low, e.let(f"tl.cast({key.text} >> 32, tl.int32)", x.shape, np.int32, "key")]


def _in_total_order(e, x: Value) -> tuple[str, str]:
    """The bits of floats as integers, and as integers in the order of the floats.

    Bits are in order as they are, apart from the sign: negative numbers count backwards.
    """
    bits = 8 * x.dtype.itemsize
    raw = e.let(f"tl.cast({e.tensor(x)}, tl.int{bits}, bitcast=True)", x.shape, np.dtype(f"int{bits}"), "bits").text
    return raw, f"{raw} ^ (({raw} >> {bits - 1}) & {2 ** (bits - 1) - 1})"


def _greatest_bits(dtype) -> int:
    """The bits of the greatest float: infinity, where the type has it."""
    ends = np.array([np.inf, jnp.finfo(dtype).max]).astype(dtype)
    greatest = ends[0] if np.isinf(ends[0]) else ends[1]
    return int(greatest.view(f"int{8 * dtype.itemsize}"))
