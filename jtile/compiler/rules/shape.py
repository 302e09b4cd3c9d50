"""Operations that move values without changing them."""

import math
from collections.abc import Sequence

import numpy as np

from jtile.compiler.rules import rule
from jtile.compiler.value import Value, constant, tile, triton_type


@rule("broadcast_in_dim", "broadcast_to")
def broadcast_in_dim(e, eqn, x: Value, *_):
    shape = tuple(eqn.params["shape"])
    axes = eqn.params.get("broadcast_dimensions", range(len(shape) - len(x.shape), len(shape)))
    if x.constant is not None:
        return constant(x.constant, shape, x.dtype)
    if x.shape == shape:
        return x
    text, here = x.text, [1] * len(shape)
    for axis, n in zip(axes, x.shape, strict=True):
        here[axis] = n
    if x.shape and len(x.shape) < len(shape):
        text += f"[{', '.join(':' if a in axes else 'None' for a in range(len(shape)))}]"
    if tuple(here) != shape or not x.shape:
        text = f"tl.broadcast_to({text}, {list(tile(shape))})"
    repeated = any(n != m and n != p for n, m, p in zip(shape, here, tile(shape), strict=True))
    zero = x.zero_padded and not repeated
    return e.let(text, shape, x.dtype, "spread", bounds=x.bounds, zero_padded=zero, product=x.product)


@rule("reshape", "squeeze")
def reshape(e, eqn, x: Value):
    return reshaped(e, x, tuple(eqn.outvars[0].aval.shape))


def reshaped(e, x: Value, shape: tuple[int, ...]) -> Value:
    """`x` in another shape.

    The padded tile follows it where dimensions are merged, or split, and only the first of each group is padded: then
    the padding stays at the end. (3, 64) -> (192,) is 4 x 64 -> 256; (64, 3) -> (192,) would leave holes.
    """
    if x.constant is not None:
        return constant(x.constant, shape, x.dtype)
    if x.shape == shape:
        return x
    if not shape:
        return e.let(f"tl.sum({x.text}, dtype={triton_type(x.dtype)})", shape, x.dtype, "scalar", bounds=x.bounds)
    if not x.shape:
        return e.let(f"tl.broadcast_to({x.text}, {list(shape)})", shape, x.dtype, "spread", bounds=x.bounds)
    if not _follows(x.shape, shape):
        return _renumbered(e, x, shape)
    text = f"tl.reshape({x.text}, {list(tile(shape))})"
    return e.let(text, shape, x.dtype, "reshape", bounds=x.bounds, zero_padded=x.zero_padded, product=x.product)


def _follows(old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """Whether reshaping the tiles reshapes what is inside them."""
    shapes = [n for n in old if n > 1], [n for n in new if n > 1]
    while all(shapes):
        # A group of dimensions with equal products, from the last to the first.
        group = [shapes[0].pop()], [shapes[1].pop()]
        while (products := [math.prod(g) for g in group])[0] != products[1]:
            smaller = products.index(min(products))
            group[smaller].append(shapes[smaller].pop())
        if any(n not in tile((n,)) for g in group for n in g[:-1]):
            return False
    return True


LISTED = 64  # elements of an array constant, at most, that the source lists one by one


def array_constant(e, array: np.ndarray) -> Value:
    """An array that a function called in the kernel has captured: evenly spaced, or else listed.

    Raises:
      UnsupportedKernel: it is neither, and too large to be listed.
    """
    shape, rank = array.shape, array.ndim
    first = array.reshape(-1)[0]
    if array.tobytes() == first.tobytes() * array.size:
        return constant(first, shape, array.dtype)
    lanes = [e.lanes(n, axis, rank) for axis, n in enumerate(shape)]
    # Along each axis its first step, which is all of them if the array is evenly spaced.
    steps = [array[tuple(np.eye(rank, dtype=int)[axis])] - first if n > 1 else 0 for axis, n in enumerate(shape)]
    spaced = sum((i * step for i, step in zip(np.indices(shape), steps, strict=True)), first)
    number = " + ".join(f"{lane} * {step}" for lane, step in zip(lanes, steps, strict=True) if step)
    if array.dtype == np.int32 and np.array_equal(spaced, array):
        text = f"tl.broadcast_to({number} + {first}, {list(tile(shape))})"
        return e.let(text, shape, array.dtype, "table", bounds=(int(array.min()), int(array.max())))
    if array.size > LISTED:
        raise e.unsupported(
            f"it uses an array of shape {shape} that is not an operand",
            "Pass the array as an operand of `pallas_call`.",
        )
    number = " + ".join(
        f"{lane} * {math.prod(shape[axis + 1 :])}"
        for axis, (lane, n) in enumerate(zip(lanes, shape, strict=True))
        if n > 1
    )
    number = e.let(number, shape, np.int32, "number").text
    result = e.let(e.tensor(constant(first, shape, array.dtype)), shape, array.dtype, "table")
    for i, element in enumerate(array.reshape(-1)[1:], start=1):
        text = constant(element, (), array.dtype).text
        result = e.let(f"tl.where({number} == {i}, {text}, {result.text})", shape, array.dtype, "table")
    return result


def _renumbered(e, x: Value, shape: tuple[int, ...]) -> Value:
    """`x` in another shape, each element looked up by its number in row-major order."""
    number = " + ".join(
        f"{e.lanes(n, axis, len(shape))} * {math.prod(shape[axis + 1 :])}" for axis, n in enumerate(shape) if n > 1
    )
    coordinates = [f"({number}) // {math.prod(x.shape[axis + 1 :])} % {n}" for axis, n in enumerate(x.shape)]
    return picked(e, x, shape, coordinates)


@rule("transpose")
def transpose(e, eqn, x: Value):
    return transposed(e, x, eqn.params["permutation"])


def transposed(e, x: Value, order: Sequence[int]) -> Value:
    shape = tuple(x.shape[a] for a in order)
    if tuple(order) == tuple(range(len(order))):
        return x
    if x.constant is not None:
        return constant(x.constant, shape, x.dtype)
    text = f"tl.trans({x.text})" if tuple(order) == (1, 0) else f"tl.permute({x.text}, {list(order)})"
    return e.let(text, shape, x.dtype, "trans", bounds=x.bounds, zero_padded=x.zero_padded, product=x.product)


@rule("empty")
def empty(e, eqn):
    """Zeros: whatever is there would differ from run to run."""
    out = eqn.outvars[0].aval
    return constant(0, out.shape, out.dtype)


@rule("iota")
def iota(e, eqn, *_):
    shape, axis = tuple(eqn.params["shape"]), eqn.params["dimension"]
    dtype = np.dtype(eqn.params["dtype"])
    text = e.lanes(shape[axis], axis, len(shape))
    if len(shape) > 1:
        text = f"tl.broadcast_to({text}, {list(tile(shape))})"
    if dtype != np.int32:
        text = f"tl.cast({text}, {triton_type(dtype)})"
    bounds = (0, shape[axis] - 1) if np.issubdtype(dtype, np.integer) else None
    if text.isidentifier():
        return Value(text, shape, dtype, bounds=bounds)
    return e.let(text, shape, dtype, "iota", bounds=bounds)


@rule("slice")
def slice_(e, eqn, x: Value):
    starts, strides = eqn.params["start_indices"], eqn.params["strides"] or (1,) * len(x.shape)
    shape = eqn.outvars[0].aval.shape
    for axis, (start, size, stride) in enumerate(zip(starts, shape, strides, strict=True)):
        x = sliced(e, x, axis, start, size, stride)
    return x


@rule("split")
def split(e, eqn, x: Value):
    return _split(e, x, eqn.params["axis"], [int(n) for n in eqn.params["sizes"]])


@rule("unstack")
def unstack(e, eqn, x: Value):
    axis = eqn.params["axis"]
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    return [reshaped(e, part, shape) for part in _split(e, x, axis, [1] * x.shape[axis])]


def _split(e, x: Value, axis: int, sizes: list[int]) -> list[Value]:
    values, start = [], 0
    for size in sizes:
        values.append(sliced(e, x, axis, start, size))
        start += size
    return values


def sliced(e, x: Value, axis: int, start: int, size: int, stride: int = 1) -> Value:
    if size == x.shape[axis]:
        return x
    steps = _halvings(x.shape[axis], start, size, stride)
    if steps is not None:
        return _halve(e, x, axis, steps)
    return take(e, x, axis, size, f"{f'{start} + ' if start else ''}{{}}{f' * {stride}' if stride > 1 else ''}")


@rule("rev")
def rev(e, eqn, x: Value):
    reversed_axes, rank = eqn.params["dimensions"], len(x.shape)
    return picked(
        e,
        x,
        x.shape,
        [f"{n - 1} - {e.lanes(n, a, rank)}" if a in reversed_axes else a for a, n in enumerate(x.shape)],
    )


@rule("concatenate")
def concatenate(e, eqn, *parts: Value):
    return _concatenated(e, parts, eqn.params["dimension"])


@rule("stack")
def stack(e, eqn, *parts: Value):
    axis = eqn.params["axis"]
    shape = (*parts[0].shape[:axis], 1, *parts[0].shape[axis:])
    return _concatenated(e, [reshaped(e, part, shape) for part in parts], axis)


@rule("tile")
def tile_(e, eqn, x: Value):
    shape = eqn.outvars[0].aval.shape
    coordinates: list[int | str] = list(range(len(shape)))
    for axis, (n, repeats) in enumerate(zip(x.shape, eqn.params["reps"], strict=True)):
        if repeats > 1:
            coordinates[axis] = f"{e.lanes(shape[axis], axis, len(shape))} % {n}"
    return picked(e, x, shape, coordinates)


@rule("pad")
def pad(e, eqn, x: Value, filler: Value):
    """Elements `interior + 1` apart, from `low` on; fewer than no padding cuts elements off."""
    shape = eqn.outvars[0].aval.shape
    coordinates: list[int | str] = list(range(len(shape)))
    tests = []
    for axis, (low, high, interior) in enumerate(eqn.params["padding_config"]):
        n, step = x.shape[axis], interior + 1
        place = f"{e.lanes(shape[axis], axis, len(shape))} - {low}" if low else e.lanes(shape[axis], axis, len(shape))
        if low > 0:
            tests.append(f"{place} >= 0")
        if high > 0:
            tests.append(f"{place} <= {(n - 1) * step}")
        if interior:
            tests.append(f"({place}) % {step} == 0")
        if low or high or interior:
            coordinates[axis] = f"({place}) // {step}" if interior else place
    value = picked(e, x, shape, coordinates)
    if not tests:
        return value
    value_text, filler_text = e.operands(value, filler, shape=shape)
    test = " & ".join(f"({t})" for t in tests)
    return e.let(f"tl.where({test}, {value_text}, {filler_text})", shape, x.dtype, "pad")


def _halvings(n: int, start: int, size: int, stride: int) -> list[tuple[bool, int]] | None:
    """Steps that halve an axis down to a slice: (True, evens 0 or odds 1) or (False, first 0 or second 1)."""
    if n != tile((n,))[0] or size != tile((size,))[0]:
        return None
    steps = []
    while stride > 1 and n > size:
        if stride % 2 or start >= n:
            return None
        steps.append((True, start % 2))
        n, start, stride = n // 2, start // 2, stride // 2
    if stride > 1 or start % size or start + size > n:
        return None
    while n > size:
        n //= 2
        steps.append((False, start // n))
        start %= n
    return steps


def _halve(e, x: Value, axis: int, steps: list[tuple[bool, int]]) -> Value:
    """Halves of `x` along an axis, by `tl.split`, which takes a last axis of two apart."""
    for interleaved, half in steps:
        if x.constant is not None:
            x = constant(x.constant, (*x.shape[:axis], x.shape[axis] // 2, *x.shape[axis + 1 :]), x.dtype)
            continue
        n = x.shape[axis] // 2
        sides = list(x.tile)
        rank = len(sides)
        sides[axis : axis + 1] = [n, 2] if interleaved else [2, n]
        two = axis + 1 if interleaved else axis
        order = [a for a in range(rank + 1) if a != two] + [two]
        pairs = f"tl.reshape({x.text}, {sides})"
        pairs = pairs if order == sorted(order) else f"tl.permute({pairs}, {order})"
        names = e.name("half"), e.name("half")
        e.line(f"{names[0]}, {names[1]} = tl.split({pairs})")
        shape = (*x.shape[:axis], n, *x.shape[axis + 1 :])
        x = Value(names[half], shape, x.dtype, bounds=x.bounds, zero_padded=x.zero_padded)
    return x


def picked(e, x: Value, shape: tuple[int, ...], coordinates: Sequence[int | str]) -> Value:
    """A value of this shape whose lanes take each the element of `x` at `coordinates`; anything where that is outside.

    A coordinate, one for each axis of `x`, is an axis of the result along which it counts up from 0; or integers, as
    source that broadcasts against the result.
    """
    if x.constant is not None:
        return constant(x.constant, shape, x.dtype)
    sides = tile(shape)
    moved = _moved(x, shape, coordinates) if len(shape) == len(x.shape) else []
    # Triton 3.6 and 3.7 fail where a gather changes an axis's size.
    if len(shape) != len(x.shape) or len(moved) > 1 or any(x.tile[axis] != sides[axis] for axis in moved):
        return _picked_by_number(e, x, shape, coordinates)
    text = x.text if x.tile == sides else f"tl.broadcast_to({x.text}, {list(sides)})"
    for axis in moved:
        index = _source(e, coordinates[axis], shape)
        index = f"tl.minimum(tl.maximum({index}, 0), {x.tile[axis] - 1})"
        text = f"tl.gather({text}, tl.broadcast_to({index}, {list(sides)}), {axis})"
    return x if text == x.text and shape == x.shape else e.let(text, shape, x.dtype, "take", bounds=x.bounds)


def _moved(x: Value, shape: tuple[int, ...], coordinates: Sequence[int | str]) -> list[int]:
    """The axes of `x` that the result does not simply have too. One of a single element is broadcast."""
    return [a for a, c in enumerate(coordinates) if x.shape[a] > 1 and (c != a or x.shape[a] != shape[a])]


def _picked_by_number(e, x: Value, shape: tuple[int, ...], coordinates: Sequence[int | str]) -> Value:
    """The same by the number of each element in the row-major order of `x`'s tile."""
    if max(x.shape, default=1) == 1:
        return e.spread(reshaped(e, x, ()), shape)
    terms, stride = [], 1
    for side, coordinate in reversed(list(zip(x.tile, coordinates, strict=True))):
        if side > 1:
            source = _source(e, coordinate, shape)
            terms.append(source if stride == 1 else f"({source}) * {stride}")
        stride *= side
    numbers = f"tl.minimum(tl.maximum({' + '.join(terms[::-1]) or '0'}, 0), {stride - 1})"
    count = math.prod(tile(shape))
    numbers = f"tl.broadcast_to({numbers}, {list(tile(shape)) or [1]})"
    numbers = numbers if len(shape) <= 1 else f"tl.reshape({numbers}, [{count}])"
    elements = x.text if len(x.shape) == 1 else f"tl.reshape({x.text}, [{stride}])"
    text = f"tl.gather({elements}, {numbers}, 0)"
    if not shape:
        text = f"tl.sum({text}, dtype={triton_type(x.dtype)})"
    elif len(shape) > 1:
        text = f"tl.reshape({text}, {list(tile(shape))})"
    return e.let(text, shape, x.dtype, "take", bounds=x.bounds)


def _source(e, coordinate: int | str, shape: tuple[int, ...]) -> str:
    return coordinate if isinstance(coordinate, str) else e.lanes(shape[coordinate], coordinate, len(shape))


def take(e, x: Value, axis: int, size: int, index: str) -> Value:
    """The elements of `x` along an axis at `index`, a template of lanes 0, 1, ...; anything where it is outside."""
    shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
    coordinates: list[int | str] = list(range(len(shape)))
    coordinates[axis] = index.format(e.lanes(size, axis, len(shape)))
    return picked(e, x, shape, coordinates)


def _concatenated(e, parts, axis: int) -> Value:
    """Joins neighbours, then neighbours of those: equal halves are the cheap case."""
    parts = list(parts)
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=False)
        parts = [joined(e, a, b, axis) for a, b in pairs] + parts[len(parts) // 2 * 2 :]
    return parts[0]


def joined(e, a: Value, b: Value, axis: int) -> Value:
    """Two values, one after the other along an axis."""
    n, m = a.shape[axis], b.shape[axis]
    shape = (*a.shape[:axis], n + m, *a.shape[axis + 1 :])
    if n == m == tile((n,))[0]:
        rank = len(shape)
        order = [*range(axis), rank, *range(axis, rank)]
        text = f"tl.join({e.tensor(a)}, {e.tensor(b)})"
        text = f"tl.reshape(tl.permute({text}, {order}), {list(tile(shape))})"
        return e.let(text, shape, a.dtype, "concat", zero_padded=a.zero_padded and b.zero_padded)
    first, second = take(e, a, axis, n + m, "{}"), take(e, b, axis, n + m, f"{{}} - {n}")
    lanes = e.lanes(n + m, axis, len(shape))
    texts = e.operands(first, second, shape=shape)
    return e.let(f"tl.where({lanes} < {n}, {texts[0]}, {texts[1]})", shape, a.dtype, "concat")
