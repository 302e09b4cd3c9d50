"""Operations that reduce values, or move their elements."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st

from tests.compiler.fuzz.body import PRECISION, SIZES, Body, NoOperand, Value, alike, exact, greatest, numeric

# Reductions and scans


def reduce(body: Body):
    x = body.pick(lambda v: v.rank > 0)
    axes = body.one_of([None, *((a,) for a in range(x.rank)), *itertools.combinations(range(x.rank), 2)])
    kept, reduced = [], axes or range(x.rank)
    keepdims = body.chance(2)
    for a, n in enumerate(x.shape):
        if a not in reduced or keepdims:
            kept.append(1 if a in reduced else n)
    terms = math.prod(x.shape[a] for a in reduced)
    axis = "None" if axes is None else str(axes[0] if len(axes) == 1 else axes)
    arguments = f"axis={axis}, keepdims={keepdims}"
    if x.dtype == "bool":
        body.let(f"jnp.{body.one_of(('any', 'all'))}({x.text}, {arguments})", kept, "bool", bound=1)
        return
    function = body.one_of(("sum", "max", "min", "prod", "mean"))
    if x.is_integer and body.chance(4):
        function = body.one_of(("and", "or", "xor"))
        text = f"jnp.bitwise_{function}.reduce({x.text}, axis={axis}, keepdims={keepdims})"
        body.let(text, kept, x.dtype, bound=greatest(x.dtype))
    elif function in ("max", "min"):
        body.same(f"jnp.{function}({x.text}, {arguments})", kept, x)
    elif x.is_integer:
        if function == "mean" or x.dtype not in ("int32", "uint32"):  # jnp sums narrow integers in int32
            raise NoOperand
        body.let(f"jnp.{function}({x.text}, {arguments})", kept, x.dtype, bound=greatest(x.dtype))
    elif function == "prod":
        if not x.exact:
            raise NoOperand
        x = body.let(f"jnp.sign({x.text})", x.shape, x.dtype, x, bound=1)
        body.let(f"jnp.prod({x.text}, {arguments})", kept, x.dtype, x, bound=1)
    else:
        x = body.tame(x, max(greatest(x.dtype) // terms, 1))
        error, bound = x.error * terms, x.bound * terms
        if x.error:
            error += terms * bound * 2.0 ** -PRECISION[x.dtype]
        if function == "mean":
            error, bound = error / terms + x.bound * 2.0 ** (1 - PRECISION[x.dtype]), x.bound
        body.let(f"jnp.{function}({x.text}, {arguments})", kept, x.dtype, x, bound=bound, error=error)


def argument(body: Body):
    x = body.pick(lambda v: v.rank > 0, exact, numeric)
    axis = body.axis(x)
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    body.let(f"jnp.{body.one_of(('argmax', 'argmin'))}({x.text}, axis={axis})", shape, "int32", bound=x.shape[axis] - 1)


def scan(body: Body):
    x = body.pick(lambda v: v.rank > 0, numeric)
    axis = body.axis(x)
    n = x.shape[axis]
    arguments = f"axis={axis}, reverse={body.chance(2)}"
    function = body.one_of(("cumsum", "cummax", "cummin", "cumprod"))
    if function in ("cummax", "cummin"):
        body.same(f"lax.{function}({x.text}, {arguments})", x.shape, x)
    elif x.is_integer:
        body.let(f"lax.{function}({x.text}, {arguments})", x.shape, x.dtype, bound=greatest(x.dtype))
    elif function == "cumprod":
        if not x.exact:
            raise NoOperand
        x = body.let(f"jnp.sign({x.text})", x.shape, x.dtype, x, bound=1)
        body.let(f"lax.cumprod({x.text}, {arguments})", x.shape, x.dtype, x, bound=1)
    else:
        x = body.tame(x, max(greatest(x.dtype) // n, 1))
        error = x.error * n + (n * n * x.bound * 2.0 ** -PRECISION[x.dtype] if x.error else 0)
        body.let(f"lax.cumsum({x.text}, {arguments})", x.shape, x.dtype, x, bound=x.bound * n, error=error)


def associative_scan(body: Body):
    x = body.pick(lambda v: v.rank > 0, numeric)
    function = body.one_of(("jnp.maximum", "jnp.minimum", "lambda a, b: b"))
    body.same(f"lax.associative_scan({function}, {x.text}, axis={body.axis(x)}, reverse={body.chance(2)})", x.shape, x)


def normalise(body: Body):
    """The error of softmax(x) is at most twice that of x, and that of the logarithm of the sum no larger."""
    x = body.pick(lambda v: v.rank > 0 and v.is_float and not v.special)
    x = body.tame(x, 8)
    axis = body.axis(x)
    if body.chance(2):
        error = 2 * x.error + 16 * 2.0 ** (1 - PRECISION[x.dtype])
        body.let(f"jax.nn.softmax({x.text}, axis={axis})", x.shape, x.dtype, bound=1, error=error)
    else:
        bound = x.bound + math.log(x.shape[axis])
        error = x.error + 16 * bound * 2.0 ** (1 - PRECISION[x.dtype])
        shape = (*x.shape[:axis], *x.shape[axis + 1 :])
        body.let(f"jax.nn.logsumexp({x.text}, axis={axis})", shape, x.dtype, bound=bound, error=error)


REDUCING: list[Callable[[Body], Any]] = [reduce, reduce, argument, scan, scan, associative_scan, normalise]


# Moving elements


def transpose(body: Body):
    x = body.pick(lambda v: v.rank > 1)
    order = body.draw(st.permutations(range(x.rank)))
    body.same(f"jnp.transpose({x.text}, {tuple(order)})", [x.shape[a] for a in order], x)


def reshape(body: Body):
    x = body.pick(lambda v: v.rank > 0)
    left, shape = math.prod(x.shape), []
    while left > 1 and len(shape) < 2:
        shape.append(body.one_of([n for n in range(2, left + 1) if left % n == 0]))
        left //= shape[-1]
    shape.insert(body.draw(st.integers(0, len(shape))), left)
    body.same(f"jnp.reshape({x.text}, {tuple(shape)})", shape, x)


def expand(body: Body):
    x = body.pick(lambda v: v.rank < 3)
    axis = body.draw(st.integers(0, x.rank))
    body.same(f"jnp.expand_dims({x.text}, {axis})", (*x.shape[:axis], 1, *x.shape[axis:]), x)


def broadcast(body: Body):
    x = body.pick(lambda v: v.rank < 3)
    shape = (body.one_of(SIZES), *(body.one_of(SIZES) if n == 1 else n for n in x.shape))
    body.same(f"jnp.broadcast_to({x.text}, {shape})", shape, x)


def cut(body: Body):
    x = body.pick(lambda v: v.rank > 0 and max(v.shape) > 1)
    axis = body.one_of([a for a, n in enumerate(x.shape) if n > 1])
    n = x.shape[axis]
    start = body.draw(st.integers(0, n - 1))
    stop = body.draw(st.integers(start + 1, n))
    step = body.one_of((1, 1, 2))
    index = ", ".join([":"] * axis + [f"{start}:{stop}" + (f":{step}" if step > 1 else "")])
    body.same(f"{x.text}[{index}]", (*x.shape[:axis], len(range(start, stop, step)), *x.shape[axis + 1 :]), x)


def rearrange(body: Body):
    x = body.pick(lambda v: v.rank > 0)
    axis = body.axis(x)
    n = x.shape[axis]
    shifted = body.draw(st.integers(-n, n))
    match body.one_of(("flip", "roll", "pad", "tile")):
        case "flip":
            body.same(f"jnp.flip({x.text}, {axis})", x.shape, x)
        case "roll":
            body.same(f"jnp.roll({x.text}, {shifted}, {axis})", x.shape, x)
        case "pad":
            low, high = body.one_of(((0, 1), (2, 0), (1, 2)))
            widths = tuple((low, high) if a == axis else (0, 0) for a in range(x.rank))
            filler = 1 if x.dtype != "bool" else True
            shape = (*x.shape[:axis], n + low + high, *x.shape[axis + 1 :])
            body.same(
                f"jnp.pad({x.text}, {widths}, constant_values={filler})",
                shape,
                dataclasses.replace(x, bound=max(x.bound, 1)),
            )
        case "tile":
            repeats = tuple(2 if a == axis else 1 for a in range(x.rank))
            body.same(f"jnp.tile({x.text}, {repeats})", (*x.shape[:axis], 2 * n, *x.shape[axis + 1 :]), x)


def join(body: Body):
    x = body.pick(lambda v: v.rank > 0)
    axis = body.axis(x)
    y = body.cast(body.pick(lambda v: alike(v, x, axis)), x.dtype)
    both = Value("", (), x.dtype, max(x.bound, y.bound), max(x.error, y.error), x.special or y.special)
    if x.shape == y.shape and body.chance(3):
        body.same(f"jnp.stack([{x.text}, {y.text}], {axis})", (*x.shape[:axis], 2, *x.shape[axis:]), both)
    else:
        shape = (*x.shape[:axis], x.shape[axis] + y.shape[axis], *x.shape[axis + 1 :])
        body.same(f"jnp.concatenate([{x.text}, {y.text}], {axis})", shape, both)


def counting(body: Body):
    shape = body.pick(lambda v: v.rank > 0).shape
    axis = body.draw(st.integers(0, len(shape) - 1))
    dtype = body.one_of(("int32", "float32"))
    body.let(f"lax.broadcasted_iota(jnp.{dtype}, {shape}, {axis})", shape, dtype, bound=shape[axis] - 1)


def position(body: Body):
    if not body.ids:
        raise NoOperand
    body.let(f"pl.program_id({body.draw(st.integers(0, body.ids - 1))})", (), "int32", bound=8)


def dynamic_slice(body: Body):
    x = body.pick(lambda v: v.rank > 0)
    start = body.pick(lambda v: v.dtype == "int32" and v.shape == ())
    axis = body.axis(x)
    size = body.draw(st.integers(1, x.shape[axis]))
    body.same(
        f"lax.dynamic_slice_in_dim({x.text}, {start.text}, {size}, {axis})",
        (*x.shape[:axis], size, *x.shape[axis + 1 :]), x,
    )  # fmt: skip


def scatter(body: Body):
    """Sums in any order; integers, so that the order is no matter."""
    x = body.pick(lambda v: v.rank > 0 and v.dtype in ("int32", "float32"), exact, lambda v: not v.special)
    picks = body.pick(lambda v: v.dtype == "int32" and v.rank == 1)
    rows = body.fitting((*picks.shape, *x.shape[1:]), x.dtype, 8, exact, lambda v: not v.special)
    x = body.tame(x, 2**20)
    text = f"{x.text}.at[{picks.text} % {x.shape[0]}].add({rows.text})"
    body.let(text, x.shape, x.dtype, bound=x.bound + picks.shape[0] * rows.bound)


def update(body: Body):
    x = body.pick(lambda v: v.rank > 0)
    axis = body.axis(x)
    y = body.cast(body.pick(lambda v: alike(v, x, axis) and v.shape[axis] < x.shape[axis]), x.dtype)
    start = body.pick(lambda v: v.dtype == "int32" and v.shape == ())
    both = Value("", (), x.dtype, max(x.bound, y.bound), max(x.error, y.error), x.special or y.special)
    body.same(f"lax.dynamic_update_slice_in_dim({x.text}, {y.text}, {start.text}, {axis})", x.shape, both)


def gather(body: Body):
    x = body.pick(lambda v: v.rank > 0)
    axis = body.axis(x)
    n = x.shape[axis]
    picks = body.pick(lambda v: v.dtype == "int32" and v.rank in (1, x.rank))
    if picks.rank == 1 and body.chance(2):
        shape = (*x.shape[:axis], *picks.shape, *x.shape[axis + 1 :])
        body.same(f"jnp.take({x.text}, {picks.text} % {n}, axis={axis})", shape, x)
    if (
        all(m == k for a, (m, k) in enumerate(zip(x.shape, picks.shape, strict=False)) if a != axis)
        and picks.rank == x.rank
    ):
        body.same(f"jnp.take_along_axis({x.text}, {picks.text} % {n}, axis={axis})", picks.shape, x)


def sort(body: Body):
    x = body.pick(lambda v: v.rank > 0, exact, numeric)
    axis = body.axis(x)
    # `top_k` orders NaN by its sign, and of what NaN a machine computes the sign is its own affair.
    match body.one_of(("sort", "argsort") if x.special else ("sort", "argsort", "top_k")):
        case "sort":
            body.same(f"jnp.sort({x.text}, axis={axis}, descending={body.chance(2)})", x.shape, x)
        case "argsort":
            body.let(f"jnp.argsort({x.text}, axis={axis})", x.shape, "int32", bound=x.shape[axis])
        case "top_k":
            count = body.draw(st.integers(1, x.shape[-1]))
            part = body.draw(st.integers(0, 1))
            like = x if part == 0 else Value("", (), "int32", x.shape[-1])
            body.same(f"lax.top_k({x.text}, {count})[{part}]", (*x.shape[:-1], count), like)


def halves(body: Body):
    x = body.pick(lambda v: v.rank > 0 and any(n % 2 == 0 for n in v.shape))
    axis = body.one_of([a for a, n in enumerate(x.shape) if n % 2 == 0])
    shape = (*x.shape[:axis], x.shape[axis] // 2, *x.shape[axis + 1 :])
    body.same(f"jnp.split({x.text}, 2, {axis})[{body.one_of((0, 1))}]", shape, x)


def repeat(body: Body):
    x = body.pick(lambda v: v.rank > 0)
    axis = body.axis(x)
    body.same(f"jnp.repeat({x.text}, 2, {axis})", (*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :]), x)


MOVING: list[Callable[[Body], Any]] = [
    *(transpose, reshape, expand, broadcast, cut, rearrange, join, counting, position, dynamic_slice, update, gather),
    *(sort, halves, repeat, scatter),
]
