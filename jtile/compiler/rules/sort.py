"""Sorting: Triton sorts one tile of integers along its last axis, each of which here holds a key and where it was."""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jtile.compiler.rules import rule
from jtile.compiler.rules.arithmetic import cast
from jtile.compiler.rules.shape import picked, sliced, transposed
from jtile.compiler.value import Value


@rule("sort")
def sort(e, eqn, *operands: Value):
    axis = eqn.params["dimension"]
    if operands[0].shape[axis] == 1:
        return list(operands)
    order = _order(e, operands[: eqn.params["num_keys"]], axis)
    return [_reordered(e, x, order, axis) for x in operands]


@rule("top_k")
def top_k(e, eqn, x: Value):
    """In the total order of floats: NaN, infinity, ... 0, -0, ... minus infinity, NaN with a sign."""
    return _greatest(e, x, eqn.params["k"], eqn.params["axis"], eqn.outvars[1].aval.dtype, total=True)


@rule("approx_top_k")
def approx_top_k(e, eqn, x: Value):
    """Exact, which every `recall_target` allows."""
    params = eqn.params
    k, axis = params["k"], params["reduction_dimension"] % len(x.shape)
    return _greatest(e, x, k, axis, eqn.outvars[1].aval.dtype, descending=params["is_max_k"])


def _greatest(e, x: Value, k: int, axis: int, index_dtype, total=False, descending=True) -> list[Value]:
    order = sliced(e, _order(e, [x], axis, total, descending), axis, 0, k)
    values = _reordered(e, x, order, axis)
    return [values, cast(e, order, np.dtype(index_dtype))]


def _reordered(e, x: Value, order: Value, axis: int) -> Value:
    coordinates = [order.text if a == axis else a for a in range(len(x.shape))]
    return picked(e, x, order.shape, coordinates)


def _order(e, keys: Sequence[Value], axis: int, total: bool = False, descending: bool = False) -> Value:
    """Where the elements of each row come from: sorted by the first key, among equals by the next, then by place.

    Keys are sorted by one after the other, the last first; each sort keeps the order of equals.
    """
    rank, last, n = len(keys[0].shape), len(keys[0].shape) - 1, keys[0].shape[axis]
    swap = [*(a for a in range(rank) if a != axis), axis]
    order: Value | None = None
    for key in itertools.chain.from_iterable(_parts(e, x, total) for x in reversed(keys)):
        if descending:
            key = e.let(f"~{e.tensor(key)}", key.shape, np.int32, "key")
        key = transposed(e, e.filled(key, (axis,), 2**31 - 1), swap)
        if order is not None:
            key = picked(e, key, key.shape, [*range(last), order.text])
        place = e.lanes(n, last, rank)
        packed = e.let(f"tl.sort((tl.cast({key.text}, tl.int64) << 32) | {place})", key.shape, np.int64, "sorted")
        places = e.let(f"tl.cast({packed.text}, tl.int32)", key.shape, np.int32, "order", bounds=(0, n - 1))
        order = places if order is None else picked(e, order, order.shape, [*range(last), places.text])
    assert order is not None  # there is at least one key
    back = [swap.index(a) for a in range(rank)]
    return transposed(e, order, back)


def _parts(e, x: Value, total: bool) -> list[Value]:
    """32-bit integers in the order of `x`, the least significant first.

    A float's bits are in order as they are, apart from the sign: negative numbers count backwards. Unless the order is
    to be total, -0 equals 0 and every NaN comes last, as in `jax.lax.sort`.
    """
    bits = 8 * x.dtype.itemsize
    integer, most = f"tl.int{bits}", 2 ** (bits - 1) - 1
    text = e.tensor(x)
    if jnp.issubdtype(x.dtype, jnp.floating):
        raw = e.let(f"tl.cast({text}, {integer}, bitcast=True)", x.shape, np.int64, "bits").text
        text = f"{raw} ^ (({raw} >> {bits - 1}) & {most})"
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


def _greatest_bits(dtype) -> int:
    """The bits of the greatest float: infinity, where the type has it."""
    ends = np.array([np.inf, jnp.finfo(dtype).max]).astype(dtype)
    greatest = ends[0] if np.isinf(ends[0]) else ends[1]
    return int(greatest.view(f"int{8 * dtype.itemsize}"))
