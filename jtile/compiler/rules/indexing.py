"""Parts of values: slices from a place known at run time, gathers, scatters."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun
from jax.lax import GatherScatterMode

from jtile.compiler.rules import rule
from jtile.compiler.rules.arithmetic import cast
from jtile.compiler.rules.shape import picked, reshaped, transposed
from jtile.compiler.value import Value, constant


def within(e, index: Value, limit: int) -> Value:
    """`index`, of at least 32 bits, as 32-bit integers moved into 0 to `limit`, as JAX moves slices that run out."""
    if index.constant is not None:
        return constant(min(max(int(index.constant), 0), limit), index.shape, np.int32)
    text = index.text
    if index.bounds is None or index.bounds[0] < 0 or index.bounds[1] > limit:
        text = f"tl.minimum(tl.maximum({text}, 0), {limit})"
    if index.dtype != np.int32:
        text = f"tl.cast({text}, tl.int32)"
    if text == index.text:
        return index
    low, high = index.bounds or (0, limit)
    bounds = min(max(low, 0), limit), min(max(high, 0), limit)
    return e.let(text, index.shape, np.int32, "start", bounds=bounds)


def _wide(e, index: Value) -> Value:
    """`index` in a type that holds the size of any tile."""
    return cast(e, index, np.dtype(np.int32)) if index.dtype.itemsize < 4 else index


@rule("dynamic_slice")
def dynamic_slice(e, eqn, x: Value, *starts: Value):
    shape = tuple(eqn.params["slice_sizes"])
    coordinates: list[int | str] = list(range(len(shape)))
    for axis, (start, size, n) in enumerate(zip(starts, shape, x.shape, strict=True)):
        if size != n:
            coordinates[axis] = f"{within(e, _wide(e, start), n - size).text} + {e.lanes(size, axis, len(shape))}"
    return picked(e, x, shape, coordinates)


@rule("dynamic_update_slice")
def dynamic_update_slice(e, eqn, x: Value, update: Value, *starts: Value):
    clamped = [within(e, _wide(e, s), n - m) for s, n, m in zip(starts, x.shape, update.shape, strict=True)]
    return _replaced(e, x, update, clamped, lambda old, new: new)


def _replaced(e, x: Value, window: Value, starts: Sequence[Value], combine, only: str = "") -> Value:
    """`x`, with `combine` of it and the window in the window's place, if the test `only` holds."""
    rank = len(x.shape)
    coordinates: list[int | str] = list(range(rank))
    tests = [only] if only else []
    for axis, (start, size, n) in enumerate(zip(starts, window.shape, x.shape, strict=True)):
        lanes = e.lanes(n, axis, rank)
        if size == 1 and n > 1:
            tests.append(f"{lanes} == {start.text}")
        elif size != n:
            coordinates[axis] = f"{lanes} - {start.text}"
            tests.append(f"{lanes} >= {start.text}")
            tests.append(f"{lanes} < {start.text} + {size}")
    new = combine(x, picked(e, window, x.shape, coordinates))
    if not tests:
        return new
    old_text, new_text = e.operands(x, new, shape=x.shape)
    test = tests[0] if len(tests) == 1 else " & ".join(f"({t})" for t in tests)
    return e.let(f"tl.where({test}, {new_text}, {old_text})", x.shape, x.dtype, "update")


@rule("gather")
def gather(e, eqn, x: Value, indices: Value):
    indices = _wide(e, indices)
    numbers, sizes, mode = (eqn.params[key] for key in ("dimension_numbers", "slice_sizes", "mode"))
    shape = tuple(eqn.outvars[0].aval.shape)
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    window = [axis for axis in range(len(x.shape)) if axis not in dropped]
    batch = [axis for axis in range(len(shape)) if axis not in numbers.offset_dims]
    tests: list[str] = []
    coordinates: list[int | str] = ["0"] * len(x.shape)
    for axis, place in zip(window, numbers.offset_dims, strict=True):
        coordinates[axis] = place
    for axis, place in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        coordinates[axis] = batch[place]
    for k, axis in enumerate(numbers.start_index_map):
        limit = x.shape[axis] - sizes[axis]
        index = _component(e, indices, k)
        start = _spread(within(e, index, limit), batch, len(shape))
        if sizes[axis] == 1:
            coordinates[axis] = start
        elif limit:
            place = numbers.offset_dims[window.index(axis)]
            coordinates[axis] = f"{start} + {e.lanes(sizes[axis], place, len(shape))}"
        known = index.bounds is not None and 0 <= index.bounds[0] and index.bounds[1] <= limit
        if mode == GatherScatterMode.FILL_OR_DROP and not known:
            given = _spread(index, batch, len(shape))
            tests.append(f"({given} >= 0) & ({given} <= {limit})")
    value = picked(e, x, shape, coordinates)
    if not tests:
        return value
    filler = constant(_filler(eqn.params["fill_value"], x.dtype), shape, x.dtype)
    new, other = e.operands(value, filler, shape=shape)
    return e.let(f"tl.where({' & '.join(tests)}, {new}, {other})", shape, x.dtype, "take")


def _component(e, indices: Value, k: int) -> Value:
    """Number `k` of the indices that lie along the last axis."""
    *batch, count = indices.shape
    coordinates = [*range(len(batch)), str(k)]
    part = indices if count == 1 else picked(e, indices, (*batch, 1), coordinates)
    part = reshaped(e, part, tuple(batch))
    if part.constant is not None:
        return part
    return part if part.text.isidentifier() else e.let(part.text, part.shape, part.dtype, "index", bounds=part.bounds)


def _spread(value: Value, axes: Sequence[int], rank: int) -> str:
    """A value as source that broadcasts against a tile of this rank, whose `axes` it has."""
    if value.constant is not None or not value.shape or len(value.shape) == rank:
        return value.text
    return f"{value.text}[{', '.join(':' if a in axes else 'None' for a in range(rank))}]"


def _filler(given, dtype):
    """What JAX reads outside of an array where it is told nothing."""
    if given is not None:
        return given
    if jnp.issubdtype(dtype, jnp.inexact):
        return np.nan
    if dtype == np.bool_:
        return True
    return jnp.iinfo(dtype).min if jnp.issubdtype(dtype, jnp.signedinteger) else jnp.iinfo(dtype).max


@rule("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max")
def scatter(e, eqn, x: Value, indices: Value, updates: Value):
    """One window of updates after the other, each a masked select over all of `x`."""
    numbers, mode = eqn.params["dimension_numbers"], eqn.params["mode"]
    dropped = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    window = [axis for axis in range(len(x.shape)) if axis not in dropped]
    batch = [axis for axis in range(len(updates.shape)) if axis not in numbers.update_window_dims]
    sizes = [1] * len(x.shape)
    for axis, place in zip(window, numbers.update_window_dims, strict=True):
        sizes[axis] = updates.shape[place]
    places = tuple(updates.shape[axis] for axis in batch)
    count = math.prod(places)
    updates = transposed(e, updates, (*batch, *numbers.update_window_dims))
    updates = reshaped(e, updates, (count, *sizes))
    indices = reshaped(e, _wide(e, indices), (count, indices.shape[-1]))
    combine = _combination(e, eqn, x)

    def one(x: Value, turn: Value) -> Value:
        starts, tests = [constant(0, (), np.int32)] * len(x.shape), []
        for axis, place in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True):
            text = f"{turn.text} // {math.prod(places[place + 1 :])} % {places[place]}"
            starts[axis] = e.let(text, (), np.int32, "start")
        for k, axis in enumerate(numbers.scatter_dims_to_operand_dims):
            limit = x.shape[axis] - sizes[axis]
            index = picked(e, indices, (), [turn.text, str(k)])
            starts[axis] = within(e, index, limit)
            if mode != GatherScatterMode.CLIP and starts[axis] is not index:
                tests.append(f"({index.text} >= 0) & ({index.text} <= {limit})")
        coordinates: list[int | str] = [turn.text, *(axis + 1 for axis in range(len(sizes)))]
        current = reshaped(e, picked(e, updates, (1, *sizes), coordinates), tuple(sizes))
        return _replaced(e, x, current, starts, combine, " & ".join(tests))

    if count == 1:
        return one(x, constant(0, (), np.int32))
    x = e.let(e.tensor(x), x.shape, x.dtype, "carry")
    turn = Value(e.name("i"), (), np.dtype(np.int32), bounds=(0, count - 1))
    e.loops += 1
    with e.block(f"for {turn.text} in tl.range(0, {count}):"):
        e.line(f"{x.text} = {e.tensor(one(x, turn))}")
    return x


def _combination(e, eqn, x: Value):
    """The function of two numbers that a scatter applies, on tiles."""
    jaxpr = eqn.params["update_jaxpr"]
    if jaxpr is None:
        return lambda old, new: new
    function = jaxpr_as_fun(jaxpr)
    for _ in x.shape:
        function = jax.vmap(function)

    def combine(old: Value, new: Value) -> Value:
        [result] = e.compute(function, old, new)
        return result

    return combine
