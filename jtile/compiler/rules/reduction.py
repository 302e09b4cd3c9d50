"""Reductions and scans. Padding is filled with the operation's neutral element first."""

import jax.numpy as jnp
import numpy as np

from jtile.compiler.rules import rule
from jtile.compiler.value import Value, narrow_float, triton_type

# Triton's own `tl.max` skips NaN; JAX's maximum of anything and NaN is NaN.
COMBINE = {
    "maximum": "tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)",
    "minimum": "tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)",
    "product": "a * b",
    "conjunction": "a & b",
    "disjunction": "a | b",
    "parity": "a ^ b",
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
    if "max" in name:
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
    x = e.filled(x, axes, _neutral(name, x.dtype))
    dtype, bounds = x.dtype, x.bounds if name in ("reduce_max", "reduce_min") else None
    wide = narrow_float(dtype)
    text = f"tl.cast({x.text}, tl.float32)" if wide else x.text
    for axis in sorted(axes, reverse=True):
        if name == "reduce_sum":
            text = f"tl.sum({text}, axis={axis}, dtype={triton_type(np.float32 if wide else dtype)})"
        else:
            text = f"tl.reduce({text}, axis={axis}, combine_fn={_combine(e, FOLDS[name])})"
    if wide:
        text = f"tl.cast({text}, {triton_type(dtype)})"
    return e.let(text, eqn.outvars[0].aval.shape, dtype, name.removeprefix("reduce_"), bounds=bounds)


@rule("argmax", "argmin")
def argument(e, eqn, x: Value):
    name, axes = eqn.primitive.name, eqn.params["axes"]
    if len(axes) != 1:
        raise e.unsupported(f"`{name}` over axes {axes} has no form in Triton", "Reduce one axis.")
    (axis,) = axes
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


@rule("cumsum", "cumprod", "cummax", "cummin")
def cumulative(e, eqn, x: Value):
    name, axis, reverse = eqn.primitive.name, eqn.params["axis"], eqn.params["reverse"]
    # Padding comes after the values, so it matters only to scans that start from the end.
    x = e.filled(x, (axis,) if reverse else (), _neutral(name, x.dtype))
    wide = narrow_float(x.dtype)
    dtype = np.dtype(np.float32) if wide else x.dtype
    text = f"tl.cast({x.text}, tl.float32)" if wide else x.text
    backwards = ", reverse=True" if reverse else ""
    if name == "cumsum":
        text = f"tl.cumsum({text}, axis={axis}{backwards}, dtype={triton_type(dtype)})"
    else:
        combine = _combine(e, {"cumprod": "product", "cummax": "maximum", "cummin": "minimum"}[name])
        text = f"tl.associative_scan({text}, axis={axis}, combine_fn={combine}{backwards})"
    text = f"tl.cast({text}, {triton_type(x.dtype)})" if wide else text
    return e.let(text, x.shape, x.dtype, name)
