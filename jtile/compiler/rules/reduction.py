"""Reductions and scans. Padding is filled with the operation's neutral element first."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jtile.compiler.rules import rule
from jtile.compiler.rules.arithmetic import cast
from jtile.compiler.value import Value, behind_a_move, narrow_float, triton_type

# Triton's own `tl.max` skips NaN; JAX's maximum of anything and NaN is NaN.
COMBINE = {
    "maximum": "tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)",
    "minimum": "tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)",
    "product": "a * b",
    "conjunction": "a & b",
    "disjunction": "a | b",
    "parity": "a ^ b",
    "log_of_sum": "tl.where(a == b, a + 0.6931471805599453, "  # which log1p would not take, were both infinite
    "tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL) + libdevice.log1p(tl.exp(-tl.abs(a - b))))",
}

FUNCTION = """\
@triton.jit
def _{name}(a, b):
    return {body}
"""

# NaN counts as the extreme, and of equals the first.
ARGUMENT = """\
@triton.jit
def _{name}(a, i, b, j):
    first = (a {comparison} b) | ((a != a) & (b == b)) | (((a == b) | ((a != a) & (b != b))) & (i < j))
    return tl.where(first, a, b), tl.where(first, i, j)
"""


def _combine(e, name: str) -> str:
    return e.helper(f"_{name}", FUNCTION.format(name=name, body=COMBINE[name]))


def _extreme(dtype, largest: bool):
    if dtype == np.bool_:
        return largest
    if jnp.issubdtype(dtype, jnp.floating):
        return float("inf" if largest else "-inf")
    info = jnp.iinfo(dtype)
    return int(info.max if largest else info.min)


def _neutral(name: str, dtype):
    if "max" in name or name == "cumlogsumexp":
        return _extreme(dtype, False)
    if "min" in name:
        return _extreme(dtype, True)
    if name in ("reduce_prod", "cumprod"):
        return 1
    if name == "reduce_and":
        return np.invert(np.zeros((), dtype)).item()
    return 0


FOLDS = {
    "reduce_max": "maximum",
    "reduce_min": "minimum",
    "reduce_prod": "product",
    "reduce_and": "conjunction",
    "reduce_or": "disjunction",
    "reduce_xor": "parity",
}


@rule("reduce_sum", *FOLDS)
def reduce(e, eqn, x: Value):
    name, axes = eqn.primitive.name, eqn.params["axes"]
    if not axes:
        return x
    bounds = x.bounds if name in ("reduce_max", "reduce_min") else None
    dtype, x = x.dtype, _widened(e, x)
    x = e.filled(x, axes, _neutral(name, x.dtype))
    text = summands(x) if name == "reduce_sum" else x.text
    for axis in sorted(axes, reverse=True):
        if name == "reduce_sum":
            text = f"tl.sum({text}, axis={axis}, dtype={triton_type(x.dtype)})"
        else:
            text = f"tl.reduce({text}, axis={axis}, combine_fn={_combine(e, FOLDS[name])})"
    return cast(e, e.let(text, eqn.outvars[0].aval.shape, x.dtype, name.removeprefix("reduce_"), bounds=bounds), dtype)


def summands(x: Value) -> str:
    """The terms of a sum, each rounded.

    Threads add up what they hold in pairs, each its own number to the other's. Were that fused with the product a * b
    that the number is, the two of a pair would round differently, and what they write to the same place would be the
    one's or the other's.
    """
    return behind_a_move(x.text, x.dtype) if x.product and x.dtype.kind == "f" else x.text


def _widened(e, x: Value) -> Value:
    """`x` in a type that sums don't lose much in."""
    return cast(e, x, np.dtype(np.float32)) if narrow_float(x.dtype) else x


@rule("reduce")
def reduce_by_a_function(e, eqn, *operands: Value):
    """Reduces several values at once with the user's own function, of which the initial values are neutral elements."""
    n = len(operands) // 2
    neutral = [v.constant for v in operands[n:]]
    if None in neutral:
        raise e.unsupported(
            "`reduce` has an initial value known only at run time",
            "Start from the function's neutral element, a number.",
        )
    return _reduced(e, operands[:n], neutral, eqn.params["dimensions"], eqn.params["jaxpr"])


@rule("joint_sums")
def joint_sums(e, eqn, *terms: Value):
    numbers = [jax.ShapeDtypeStruct((), term.dtype) for term in terms]
    add = jax.make_jaxpr(lambda a, b: [x + y for x, y in zip(a, b, strict=True)])(numbers, numbers)
    return _reduced(e, terms, [0.0] * len(terms), (eqn.params["axis"],), add)


def _reduced(e, values: Sequence[Value], neutral: Sequence, axes: Sequence[int], function) -> list[Value]:
    """Several values at once, by a function of twice as many numbers."""
    n, shape = len(values), values[0].shape
    values = [e.filled(x, axes, filler) for x, filler in zip(values, neutral, strict=True)]
    combine = e.function(function, "combine")
    for axis in sorted(axes, reverse=True):
        shape = (*shape[:axis], *shape[axis + 1 :])
        texts = [summands(v) for v in values]
        values = [Value(e.name("reduced"), shape, v.dtype) for v in values]
        given = f"({', '.join(texts)})" if n > 1 else texts[0]
        e.line(f"{', '.join(v.text for v in values)} = tl.reduce({given}, axis={axis}, combine_fn={combine})")
    return values


@rule("argmax", "argmin")
def argument(e, eqn, x: Value):
    name, axes = eqn.primitive.name, eqn.params["axes"]
    (axis,) = axes
    x = _widened(e, x)
    x = e.filled(x, axes, _neutral(name, x.dtype))
    comparison = ">" if name == "argmax" else "<"
    helper = e.helper(f"_{name}", ARGUMENT.format(name=name, comparison=comparison))
    index = f"tl.broadcast_to({e.lanes(x.shape[axis], axis, len(x.shape))}, {list(x.tile)})"
    best, where = e.name("best"), e.name(name)
    e.line(f"{best}, {where} = tl.reduce(({x.text}, {index}), axis={axis}, combine_fn={helper})")
    dtype, shape = np.dtype(eqn.params["index_dtype"]), eqn.outvars[0].aval.shape
    bounds = (0, x.shape[axis] - 1)
    if dtype == np.int32:
        return Value(where, shape, dtype, bounds=bounds)
    return e.let(f"tl.cast({where}, {triton_type(dtype)})", shape, dtype, name, bounds=bounds)


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def cumulative(e, eqn, x: Value):
    name, axis, reverse = eqn.primitive.name, eqn.params["axis"], eqn.params["reverse"]
    dtype, x = x.dtype, _widened(e, x)
    # Padding comes after the values, so it matters only to scans that start from the end.
    x = e.filled(x, (axis,) if reverse else (), _neutral(name, x.dtype))
    backwards = ", reverse=True" if reverse else ""
    if name == "cumsum":
        text = f"tl.cumsum({x.text}, axis={axis}{backwards}, dtype={triton_type(x.dtype)})"
    else:
        text = f"tl.associative_scan({x.text}, axis={axis}, combine_fn={_combine(e, SCANS[name])}{backwards})"
    return cast(e, e.let(text, x.shape, x.dtype, name), dtype)


SCANS = {"cumprod": "product", "cummax": "maximum", "cummin": "minimum", "cumlogsumexp": "log_of_sum"}
