"""Elementwise operations."""

import itertools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from jtile.compiler.rules import rule
from jtile.compiler.value import Interval, Value, constant, inner, narrow_float, triton_type

# Done in the operands' own type.
PLAIN = {
    "add": "{} + {}",
    "add_any": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "neg": "-{}",
    "abs": "tl.abs({})",
    "square": "{0} * {0}",
    "eq": "{} == {}",
    "ne": "{} != {}",
    "lt": "{} < {}",
    "le": "{} <= {}",
    "gt": "{} > {}",
    "ge": "{} >= {}",
    "and": "{} & {}",
    "or": "{} | {}",
    "xor": "{} ^ {}",
    "not": "~{}",
    "is_finite": 'tl.abs({}) < float("inf")',
    "population_count": "libdevice.popc({})",
    "clz": "libdevice.clz({})",
}

# Done in float32 for narrower floats, which Triton or the chip lack the operation for, and rounded once.
FLOAT = {
    "div": "{} / {}",
    "max": "tl.maximum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
    "min": "tl.minimum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
    "clamp": "tl.minimum(tl.maximum({1}, {0}, propagate_nan=tl.PropagateNan.ALL), {2},"
    " propagate_nan=tl.PropagateNan.ALL)",
    "exp": "tl.exp({})",
    "exp2": "tl.exp2({})",
    "log": "tl.log({})",
    "log2": "tl.log2({})",
    "sqrt": "tl.sqrt({})",
    "rsqrt": "tl.rsqrt({})",
    "sin": "tl.sin({})",
    "cos": "tl.cos({})",
    "erf": "tl.erf({})",
    "logistic": "tl.sigmoid({})",
    "floor": "tl.floor({})",
    "ceil": "tl.ceil({})",
    "rem": "libdevice.fmod({}, {})",
    "pow": "libdevice.pow({}, {})",
    "log1p": "libdevice.log1p({})",
    "expm1": "libdevice.expm1({})",
    "tan": "libdevice.tan({})",
    "asin": "libdevice.asin({})",
    "acos": "libdevice.acos({})",
    "atan": "libdevice.atan({})",
    "atan2": "libdevice.atan2({}, {})",
    "sinh": "libdevice.sinh({})",
    "cosh": "libdevice.cosh({})",
    "tanh": "libdevice.tanh({})",
    "asinh": "libdevice.asinh({})",
    "acosh": "libdevice.acosh({})",
    "atanh": "libdevice.atanh({})",
    "cbrt": "libdevice.cbrt({})",
    "erfc": "libdevice.erfc({})",
    "erf_inv": "libdevice.erfinv({})",
    "lgamma": "libdevice.lgamma({})",
}

# On integers: division truncates and the remainder has the dividend's sign, in C, JAX and Triton alike.
INTEGER = {
    "div": "{} // {}",
    "rem": "{} % {}",
    "max": "tl.maximum({}, {})",
    "min": "tl.minimum({}, {})",
    "clamp": "tl.minimum(tl.maximum({1}, {0}), {2})",
}

# Functions with f(0) = 0, which keep padding at zero.
KEEP_ZERO = {
    *("neg", "abs", "square", "sqrt", "sin", "erf", "floor", "ceil", "tan", "asin", "atan", "sinh", "tanh", "asinh"),
    *("atanh", "cbrt", "log1p", "expm1", "erf_inv", "add", "add_any", "sub", "mul", "max", "min"),
}


def elementwise(e, eqn, *operands: Value) -> Value:
    out = eqn.outvars[0].aval
    for option in ("accuracy", "out_dtype"):
        if eqn.params.get(option) is not None:
            what = f"`{eqn.primitive.name}` with {option}={eqn.params[option]} has no form in Triton"
            raise e.unsupported(what, "Leave the argument out; convert the operands to the type wanted.")
    return apply(e, eqn.primitive.name, out.shape, np.dtype(out.dtype), *operands)


def apply(e, name: str, shape: tuple[int, ...], dtype: np.dtype, *operands: Value) -> Value:
    kind, wide = operands[0].dtype, False
    if name in PLAIN:
        template = PLAIN[name]
    elif jnp.issubdtype(kind, jnp.floating):
        template, wide = FLOAT[name], narrow_float(kind)
    elif name in INTEGER:
        template = INTEGER[name]
    else:
        raise e.unsupported(f"`{name}` of {kind} has no form in Triton", "Convert to float32 first.")
    bounds = interval(name, operands, dtype)
    if bounds is not None and bounds[0] == bounds[1]:
        return constant(bounds[0], shape, dtype)
    texts = e.operands(*operands, shape=shape)
    if wide:
        bare = [v.text if v.constant is not None else None for v in operands]  # literals have no type to convert
        texts = [t if t == b else f"tl.cast({t}, tl.float32)" for t, b in zip(texts, bare, strict=True)]
    text = template.format(*texts)
    if wide and dtype == kind:
        text = f"tl.cast({text}, {triton_type(dtype)})"
    zero = name in KEEP_ZERO and (
        all(v.zero_outside(shape) for v in operands)
        or (name == "mul" and any(v.zero_outside(shape) for v in operands) and any(map(_finite_constant, operands)))
    )
    return e.let(text, shape, dtype, name, bounds=bounds, zero_padded=zero)


rule(*{*PLAIN, *FLOAT, *INTEGER})(elementwise)


def _finite_constant(value: Value) -> bool:
    return value.constant is not None and bool(np.isfinite(value.constant))


@rule("sign")
def sign(e, eqn, x: Value):
    text = e.tensor(x)
    negative = text if jnp.issubdtype(x.dtype, jnp.unsignedinteger) else f"tl.where({text} < 0, -1, {text})"
    return e.let(f"tl.where({text} > 0, 1, {negative})", x.shape, x.dtype, "sign", zero_padded=x.zero_padded)


@rule("round")
def round_(e, eqn, x: Value):
    function = "round" if int(eqn.params["rounding_method"]) == 0 else "rint"  # half away from zero, or to even
    text = e.tensor(x)
    if narrow_float(x.dtype):
        text = f"tl.cast(libdevice.{function}(tl.cast({text}, tl.float32)), {triton_type(x.dtype)})"
    else:
        text = f"libdevice.{function}({text})"
    return e.let(text, x.shape, x.dtype, "round", zero_padded=x.zero_padded)


@rule("nextafter")
def nextafter(e, eqn, x: Value, y: Value):
    if narrow_float(x.dtype):
        raise e.unsupported(f"`nextafter` of {x.dtype} has no form in Triton", "Step through the bits of an integer.")
    shape = eqn.outvars[0].aval.shape
    x_text, y_text = e.operands(x, y, shape=shape)
    return e.let(f"libdevice.nextafter({x_text}, {y_text})", shape, x.dtype, "nextafter")


@rule("integer_pow")
def integer_pow(e, eqn, x: Value):
    """x**y by repeated squaring."""
    exponent, text, result = eqn.params["y"], e.tensor(x), None
    remaining = abs(exponent)
    while remaining:
        if remaining & 1:
            result = text if result is None else e.let(f"{result} * {text}", x.shape, x.dtype, "pow").text
        remaining >>= 1
        if remaining:
            text = e.let(f"{text} * {text}", x.shape, x.dtype, "pow").text
    if exponent < 0:
        result = f"1.0 / tl.cast({result}, tl.float32)" if narrow_float(x.dtype) else f"1.0 / {result}"
        result = e.let(f"tl.cast({result}, {triton_type(x.dtype)})", x.shape, x.dtype, "pow").text
    if result is None:
        return constant(1, x.shape, x.dtype)
    bounds = None
    if x.bounds is not None and x.bounds[0] >= 0:
        bounds = inner((x.bounds[0] ** exponent, x.bounds[1] ** exponent), x.dtype)
    return Value(result, x.shape, x.dtype, bounds=bounds, zero_padded=x.zero_padded and exponent > 0)


@rule("shift_left", "shift_right_arithmetic", "shift_right_logical")
def shift(e, eqn, x: Value, amount: Value):
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    x_text, by = e.operands(x, amount, shape=out.shape)
    bits = x.dtype.itemsize * 8
    as_type = triton_type(x.dtype.name if name == "shift_left" else _signedness(x.dtype, "logical" not in name))
    recast = as_type != triton_type(x.dtype)
    if recast:
        x_text = f"tl.cast({e.tensor(x)}, {as_type}, bitcast=True)"
    if amount.constant is None:  # the chip's shifts are undefined from the width on; JAX's push every bit out
        within = f"tl.minimum(tl.cast({by}, tl.uint32), {bits - 1})"
        text = f"{x_text} {'<<' if name == 'shift_left' else '>>'} tl.cast({within}, {as_type})"
        if name != "shift_right_arithmetic":
            text = f"tl.where(tl.cast({by}, tl.uint32) < {bits}, {text}, 0)"
    else:
        text = f"{x_text} {'<<' if name == 'shift_left' else '>>'} {by}"
    if recast:
        text = f"tl.cast({text}, {triton_type(x.dtype)}, bitcast=True)"
    return e.let(text, out.shape, out.dtype, "shift", bounds=interval(name, (x, amount), out.dtype))


def _signedness(dtype: np.dtype, signed: bool) -> str:
    return f"{'' if signed else 'u'}int{dtype.itemsize * 8}"


@rule("select_n")
def select_n(e, eqn, which: Value, *cases: Value):
    out = eqn.outvars[0].aval
    texts = e.operands(*cases, shape=out.shape)
    text = texts[-1]
    if which.dtype == np.bool_:
        text = f"tl.where({e.tensor(which)}, {texts[1]}, {texts[0]})"
    else:
        index = e.tensor(which)
        for i in reversed(range(len(cases) - 1)):
            text = f"tl.where({index} == {i}, {texts[i]}, {text})"
    ends = [c.bounds for c in cases if c.bounds is not None]
    bounds = (min(low for low, _ in ends), max(high for _, high in ends)) if len(ends) == len(cases) else None
    return e.let(
        text, out.shape, out.dtype, "where", bounds=bounds, zero_padded=all(c.zero_outside(out.shape) for c in cases)
    )


@rule("convert_element_type")
def convert_element_type(e, eqn, x: Value):
    dtype = np.dtype(eqn.params["new_dtype"])
    if dtype == x.dtype:
        return x
    if x.constant is not None:
        return constant(np.asarray(x.constant, x.dtype).astype(dtype), x.shape, dtype)
    bounds = inner(x.bounds, dtype) if jnp.issubdtype(dtype, np.integer) else None
    text = f"{x.text} != 0" if dtype == np.bool_ else f"tl.cast({x.text}, {triton_type(dtype)})"
    return e.let(text, x.shape, dtype, dtype.name, bounds=bounds, zero_padded=x.zero_padded)


@rule("bitcast_convert_type")
def bitcast_convert_type(e, eqn, x: Value):
    dtype = np.dtype(eqn.params["new_dtype"])
    if dtype.itemsize != x.dtype.itemsize:
        raise e.unsupported(
            f"`bitcast_convert_type` from {x.dtype} to {dtype} changes the width", "Cast through an integer as wide."
        )
    text = f"tl.cast({e.tensor(x)}, {triton_type(dtype)}, bitcast=True)"
    return e.let(text, x.shape, dtype, dtype.name, zero_padded=x.zero_padded)


@rule("reduce_precision")
def reduce_precision(e, eqn, x: Value):
    bits = eqn.params["exponent_bits"], eqn.params["mantissa_bits"]
    formats = {(8, 7): "bfloat16", (5, 10): "float16", (8, 23): "float32", (11, 52): "float64"}
    if bits not in formats:
        raise e.unsupported(f"`reduce_precision` to {bits} bits has no form in Triton", f"Round to one of {formats}.")
    text = f"tl.cast(tl.cast({e.tensor(x)}, {triton_type(formats[bits])}), {triton_type(x.dtype)})"
    return e.let(text, x.shape, x.dtype, "rounded", zero_padded=x.zero_padded)


@rule("copy", "copy_p", "stop_gradient", "name", "pvary", "pcast", "reshard")
def identity(e, eqn, x: Value):
    return x


@rule("optimization_barrier")
def identities(e, eqn, *values: Value):
    return list(values)


@rule("multiple_of", "max_contiguous")
def hint(e, eqn, x: Value):
    """What the author knows of a value, and Triton uses."""
    name, values = eqn.primitive.name, eqn.params["values"]
    return e.let(f"tl.{name}({e.tensor(x)}, {list(values)})", x.shape, x.dtype, "hint", bounds=x.bounds)


@rule("elementwise_inline_asm_p", "elementwise_inline_asm")  # in JAX 0.11, in 0.12
def elementwise_inline_asm(e, eqn, *operands: Value):
    outs = eqn.params["result_shape_dtypes"]
    if len(outs) != 1:
        raise e.unsupported(f"inline assembly with {len(outs)} results has no rule", "Write one block per result.")
    arguments = ", ".join(e.tensor(v) for v in operands)
    text = (
        f"tl.inline_asm_elementwise(asm={eqn.params['asm']!r}, constraints={eqn.params['constraints']!r}, "
        f"args=[{arguments}], dtype={triton_type(outs[0].dtype)}, is_pure=True, pack={eqn.params['pack']})"
    )
    return [e.let(text, outs[0].shape, outs[0].dtype, "asm")]


def interval(name: str, operands: tuple[Value, ...], dtype) -> Interval | None:
    """The least and greatest value of an integer operation, where they follow from its operands'."""
    if name not in INTERVALS or not jnp.issubdtype(dtype, np.integer) or any(v.bounds is None for v in operands):
        return None
    return inner(INTERVALS[name](*(v.bounds for v in operands)), dtype)


def _corners(function, *operands: Interval) -> Interval:
    """The bounds of a function that is monotonic in each operand: it takes its extremes at their ends."""
    values = [function(*ends) for ends in itertools.product(*operands)]
    return min(values), max(values)


def _div(a: Interval, b: Interval) -> Interval | None:
    truncated = lambda x, y: abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)  # noqa: E731
    return _corners(truncated, a, b) if b[0] > 0 else None


def _rem(a: Interval, b: Interval) -> Interval | None:
    if b[0] <= 0:
        return None
    most = b[1] - 1
    return max(a[0], -most) if a[0] < 0 else 0, min(a[1], most) if a[1] > 0 else 0


INTERVALS: dict[str, Callable[..., Interval | None]] = {
    "add": lambda a, b: (a[0] + b[0], a[1] + b[1]),
    "sub": lambda a, b: (a[0] - b[1], a[1] - b[0]),
    "mul": lambda a, b: _corners(lambda x, y: x * y, a, b),
    "neg": lambda a: (-a[1], -a[0]),
    "max": lambda a, b: (max(a[0], b[0]), max(a[1], b[1])),
    "min": lambda a, b: (min(a[0], b[0]), min(a[1], b[1])),
    "clamp": lambda low, a, high: _corners(lambda x, y, z: min(max(y, x), z), low, a, high),
    "div": _div,
    "rem": _rem,
    "and": lambda a, b: (0, min(x[1] for x in (a, b) if x[0] >= 0)) if a[0] >= 0 or b[0] >= 0 else None,
    "shift_left": lambda a, b: _corners(lambda x, y: x << y, a, b) if 0 <= b[0] and b[1] < 64 else None,
    "shift_right_arithmetic": lambda a, b: _corners(lambda x, y: x >> y, a, b) if 0 <= b[0] else None,
}
