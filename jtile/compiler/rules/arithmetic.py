"""Elementwise operations."""

import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jtile import borrowed
from jtile.compiler.primitives import TANH_CONSTRAINTS
from jtile.compiler.rules import rule
from jtile.compiler.value import Interval, Value, constant, float8, four_bits, inner, narrow_float, triton_type

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
    "one_minus_square": "(1 + {0}) * (1 - {0})",
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

# On truth values, of which False is the less.
BOOLEAN = {"max": "{} | {}", "min": "{} & {}", "clamp": "({1} | {0}) & {2}"}

# Functions with f(0) = 0, which keep padding at zero.
KEEP_ZERO = {
    *("neg", "abs", "square", "sqrt", "sin", "erf", "floor", "ceil", "tan", "asin", "atan", "sinh", "tanh", "asinh"),
    *("atanh", "cbrt", "log1p", "expm1", "erf_inv", "add", "add_any", "sub", "mul", "max", "min"),
}


def elementwise(e, eqn, *operands: Value) -> Value:
    out = eqn.outvars[0].aval
    for option in ("accuracy", "out_dtype"):
        if eqn.params.get(option) not in (None, jax.lax.AccuracyMode.DEFAULT):
            what = f"`{eqn.primitive.name}` with {option}={eqn.params[option]} has no form in Triton"
            raise e.unsupported(what, "Leave the argument out; convert the operands to the type wanted.")
    return apply(e, eqn.primitive.name, out.shape, np.dtype(out.dtype), *operands)


def apply(e, name: str, shape: tuple[int, ...], dtype: np.dtype, *operands: Value) -> Value:
    kind, wide = operands[0].dtype, False
    if name in PLAIN:
        template, wide = PLAIN[name], float8(kind)
    elif jnp.issubdtype(kind, jnp.floating):
        template, wide = FLOAT[name], narrow_float(kind)
    elif name in BOOLEAN and kind == np.bool_:
        template = BOOLEAN[name]
    elif name in INTEGER:
        template = INTEGER[name]
    else:
        raise e.unsupported(f"`{name}` of {kind} has no form in Triton", "Convert to float32 first.")
    bounds = interval(name, operands, dtype)
    if bounds is not None and bounds[0] == bounds[1]:
        return constant(bounds[0], shape, dtype)
    if (known := _known(name, operands)) is not None:
        return known if isinstance(known, Value) and known.shape == shape else constant(known, shape, dtype)
    texts = e.operands(*operands, shape=shape)
    if kind == np.float64 and "libdevice" in template:  # which takes literals for float32
        texts = [e.tensor(e.spread(v, shape)) if v.constant is not None else v.text for v in operands]
    if wide:
        bare = [v.text if v.constant is not None else None for v in operands]  # literals have no type to convert
        texts = [t if t == b else f"tl.cast({t}, tl.float32)" for t, b in zip(texts, bare, strict=True)]
    text = template.format(*texts)
    if wide and dtype == kind:
        text = narrowed(e, text, shape, dtype)
    zero = name in KEEP_ZERO and (
        all(v.zero_outside(shape) for v in operands)
        or (name == "mul" and any(v.zero_outside(shape) for v in operands) and any(map(_finite_constant, operands)))
    )
    product = name in ("mul", "square") or (name == "neg" and operands[0].product)
    facts = dict(bounds=bounds, zero_padded=zero, product=product, multiple=multiple(name, operands))
    return e.let(text, shape, dtype, name, **facts)


rule(*{*PLAIN, *FLOAT, *INTEGER})(elementwise)


def _known(name: str, operands: tuple[Value, ...]) -> Value | bool | None:
    """A comparison that its operands' bounds decide; what is left of a logical operation with a constant."""
    known = [v.bounds for v in operands if v.bounds is not None]
    if name in COMPARISONS and len(known) == 2:
        always, never = COMPARISONS[name](*known[0], *known[1])
        return True if always else False if never else None
    if name in ("and", "or") and operands[0].dtype == np.bool_:
        for side, other in (operands, operands[::-1]):
            if side.constant is not None:
                return bool(side.constant) if side.constant == (name == "or") else other
    if name == "not" and operands[0].dtype == np.bool_ and operands[0].constant is not None:
        return not operands[0].constant
    return None


# Of a number from a to b and one from c to d: whether the comparison always holds, and whether it never does.
COMPARISONS: dict[str, Callable[[int, int, int, int], tuple[bool, bool]]] = {
    "lt": lambda a, b, c, d: (b < c, a >= d),
    "le": lambda a, b, c, d: (b <= c, a > d),
    "gt": lambda a, b, c, d: (a > d, b <= c),
    "ge": lambda a, b, c, d: (a >= d, b < c),
    "eq": lambda a, b, c, d: (a == b == c == d, b < c or d < a),
    "ne": lambda a, b, c, d: (b < c or d < a, a == b == c == d),
}


def _finite_constant(value: Value) -> bool:
    return value.constant is not None and bool(np.isfinite(value.constant))


def digamma(x):
    """The derivative of the logarithm of the gamma function (Abramowitz & Stegun 6.3.5, 6.3.7 and 6.3.18)."""
    mirrored = x < 0.5
    y = jnp.where(mirrored, 1 - x, x)
    result = jnp.zeros_like(y)
    for _ in range(10):  # digamma(y) = digamma(y + 1) - 1 / y
        result -= jnp.where(y < 10, 1 / y, 0)
        y = jnp.where(y < 10, y + 1, y)
    square = 1 / (y * y)
    series = jnp.zeros_like(y)
    for coefficient in (1 / 12, -691 / 32760, 1 / 132, -1 / 240, 1 / 252, -1 / 120, 1 / 12):
        series = square * (coefficient + series)
    result += jnp.log(y) - 0.5 / y - series
    whole = jnp.round(x)
    reflected = result - jnp.pi / jnp.tan(jnp.pi * (x - whole))
    pole = jnp.where(x == 0, -jnp.inf, jnp.nan)
    return jnp.where(mirrored, jnp.where(x == whole, pole, reflected), result)


def zeta(x, q):
    """The sum of (q + k)^-x over k from 0, by Euler and Maclaurin's formula from the tenth term on (DLMF 25.11.5)."""
    total = jnp.zeros_like(q)
    for k in range(10):
        total += (q + k) ** -x
    a = q + 10
    total += a ** (1 - x) / (x - 1) + 0.5 * a**-x
    power, factorial = x * a ** (-x - 1), 2.0
    for j, bernoulli in enumerate((1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510), start=1):
        total += bernoulli / factorial * power
        power *= (x + (2 * j - 1)) * (x + 2 * j) / (a * a)
        factorial *= (2 * j + 1) * (2 * j + 2)
    even = jnp.floor(x / 2) * 2 == x
    pole = jnp.where(even, jnp.inf, jnp.nan)
    total = jnp.where(q > 0, total, jnp.where(jnp.floor(q) == q, pole, jnp.where(jnp.floor(x) == x, total, jnp.nan)))
    return jnp.where(x == 1, jnp.inf, jnp.where(x < 1, jnp.nan, total))


def polygamma(n, x):
    """The derivative of order n of `digamma` (DLMF 25.11.12)."""
    odd = jnp.floor(n / 2) * 2 != n
    derivative = jnp.where(odd, 1, -1) * jnp.exp(jax.lax.lgamma(n + 1)) * zeta(n + 1, x)
    derivative = jnp.where((n < 0) | (jnp.floor(n) != n), jnp.nan, derivative)
    return jnp.where(n == 0, digamma(x), derivative)


# In terms of simpler operations, most of them as JAX itself writes them for XLA.
SPECIAL: dict[str, Callable] = {
    "igamma": borrowed.igamma,
    "igammac": borrowed.igammac,
    "igamma_grad_a": borrowed.igamma_grad_a,
    "regularized_incomplete_beta": borrowed.regularized_incomplete_beta,
    "digamma": digamma,
    "polygamma": polygamma,
    "zeta": zeta,
    "bessel_i0e": borrowed.bessel_i0e,
}


@rule(*SPECIAL)
def special(e, eqn, *operands: Value):
    out = eqn.outvars[0].aval
    wide = np.dtype(np.float32) if narrow_float(out.dtype) else np.dtype(out.dtype)
    given = [cast(e, e.spread(v, out.shape), wide) for v in operands]
    [result] = e.compute(SPECIAL[eqn.primitive.name], *given)
    return cast(e, result, np.dtype(out.dtype))


@rule("polynomial")
def polynomial(e, eqn, *operands: Value):
    """Horner's rule; the coefficient of the highest power comes last."""

    def horner(x, *coefficients):
        total = jnp.broadcast_to(coefficients[-1], jnp.broadcast_shapes(*(a.shape for a in (x, *coefficients))))
        for coefficient in coefficients[-2::-1]:
            total = total * x + coefficient
        return total

    return e.compute(horner, *operands)[0]


@rule("reciprocal")
def reciprocal(e, eqn, x: Value):
    """Correctly rounded, whether or not an approximation would do."""
    return e.compute(lambda x: 1 / x, x)[0]


@rule("bessel_i1e")
def bessel_i1e(e, eqn, x: Value):
    """exp(-|x|) times the modified Bessel function, which is too large for a float far from 0."""
    wide = cast(e, x, np.dtype(np.float32)) if narrow_float(x.dtype) else x
    [near] = e.compute(lambda x: jnp.clip(x, -60, 60), wide)
    near = e.let(f"libdevice.cyl_bessel_i1({e.tensor(near)})", near.shape, near.dtype, "bessel_i1")
    [result] = e.compute(_scaled_bessel_i1, wide, near)
    return cast(e, result, x.dtype)


def _scaled_bessel_i1(x, near):
    """From I1 near 0, and elsewhere from Hankel's expansion (DLMF 10.40.1)."""
    size = jnp.abs(x)
    large = jnp.maximum(size, 60)
    term = total = jnp.ones_like(x)
    for k in range(1, 11):
        term *= ((2 * k - 1) ** 2 - 4) / (8 * k * large)
        total += term
    far = jnp.sign(x) * total / jnp.sqrt(2 * jnp.pi * large)
    return jnp.where(size < 60, near * jnp.exp(-size), far)


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
    if float8(x.dtype):
        raise e.unsupported(f"`nextafter` of {x.dtype} has no form in Triton", "Step through the bits of an integer.")
    shape = eqn.outvars[0].aval.shape
    if narrow_float(x.dtype):
        [result] = e.compute(_next_half, *(e.spread(v, shape) for v in (x, y)))
        return result
    x_text, y_text = (e.tensor(e.spread(v, shape)) for v in (x, y))
    return e.let(f"libdevice.nextafter({x_text}, {y_text})", shape, x.dtype, "nextafter")


def _next_half(x, y):
    """The 16-bit float after `x` towards `y`: away from 0 its bits count up, towards 0 down."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int16)
    away = (x < y) == (x > 0)
    least = jnp.where(y > 0, jnp.int16(1), jnp.int16(-(2**15) + 1))
    stepped = jnp.where(x == 0, least, jnp.where(away, bits + jnp.int16(1), bits - jnp.int16(1)))
    stepped = jax.lax.bitcast_convert_type(stepped, x.dtype)
    return jnp.where(x == y, y, jnp.where((x != x) | (y != y), x + y, stepped))


@rule("population_count", "clz")
def count_bits(e, eqn, x: Value):
    """libdevice counts in 32 or 64 bits; the bits before a narrower number are zeros."""
    bits = 8 * x.dtype.itemsize
    text = e.tensor(x)
    if x.dtype.kind == "i" and bits < 32:
        text = f"tl.cast({text}, tl.uint{bits}, bitcast=True)"
    wide = "tl.int64" if bits == 64 else "tl.int32"
    text = f"tl.cast({text}, {wide})" if bits < 32 else f"tl.cast({text}, {wide}, bitcast=True)"
    if eqn.primitive.name == "population_count":
        text = f"libdevice.popc({text})"
    else:
        text = f"libdevice.clz({text})" + (f" - {32 - bits}" if bits < 32 else "")
    if x.dtype != np.int32:
        text = f"tl.cast({text}, {triton_type(x.dtype)})"
    return e.let(text, x.shape, x.dtype, eqn.primitive.name)


@rule("mulhi")
def mulhi(e, eqn, x: Value, y: Value):
    """The upper half of the product."""
    shape, bits = eqn.outvars[0].aval.shape, 8 * x.dtype.itemsize
    a, b = (e.tensor(e.spread(v, shape)) for v in (x, y))
    if x.dtype in (np.uint32, np.uint64):
        text = f"tl.umulhi({a}, {b})"
    elif bits == 64:
        unsigned = (f"tl.cast({t}, tl.uint64, bitcast=True)" for t in (a, b))
        text = f"tl.cast(tl.umulhi({', '.join(unsigned)}), tl.int64, bitcast=True)"
        text += f" - tl.where({a} < 0, {b}, 0) - tl.where({b} < 0, {a}, 0)"
    else:
        text = f"tl.cast(tl.cast({a}, tl.int64) * tl.cast({b}, tl.int64) >> {bits}, {triton_type(x.dtype)})"
    return e.let(text, shape, x.dtype, "mulhi")


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
    zero = x.zero_padded and exponent > 0
    return Value(result, x.shape, x.dtype, bounds=bounds, zero_padded=zero, product=exponent > 1)


@rule("shift_left", "shift_right_arithmetic", "shift_right_logical")
def shift(e, eqn, x: Value, amount: Value):
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    bits = x.dtype.itemsize * 8
    if amount.constant is not None and not 0 <= amount.constant < bits:
        if name != "shift_right_arithmetic":
            return constant(0, out.shape, out.dtype)
        amount = constant(bits - 1, amount.shape, amount.dtype)
    x_text, by = e.operands(x, amount, shape=out.shape)
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
    if which.constant is not None:
        return cases[int(which.constant)]
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
    return cast(e, x, np.dtype(eqn.params["new_dtype"]))


def cast(e, x: Value, dtype: np.dtype) -> Value:
    """`x` as another type: floats lose their fraction and stay inside an integer type's range, as in JAX."""
    if dtype == x.dtype:
        return x
    if x.constant is not None:
        return constant(np.asarray(x.constant, x.dtype).astype(dtype), x.shape, dtype)
    bounds = inner(x.bounds, dtype) if jnp.issubdtype(dtype, np.integer) else None
    text = x.text
    if float8(x.dtype) or float8(dtype):
        text = f"tl.cast({text}, tl.float32)"
    if dtype == np.bool_:
        text = f"{text} != 0"
    elif four_bits(dtype) and not jnp.issubdtype(x.dtype, jnp.floating):
        text = f"tl.cast({text}, {triton_type(dtype)})"
        text = f"{text} & 15" if dtype == jnp.uint4 else f"({text} << 4) >> 4"
    elif float8(dtype):
        text = narrowed(e, text, x.shape, dtype)
    elif jnp.issubdtype(x.dtype, jnp.floating) and jnp.issubdtype(dtype, jnp.integer) and dtype.itemsize < 4:
        ends = jnp.iinfo(dtype)
        text = f"tl.minimum(tl.maximum(tl.cast({text}, tl.int32), {ends.min}), {ends.max})"
        text = f"tl.cast({text}, {triton_type(dtype)})"
    else:
        text = f"tl.cast({text}, {triton_type(dtype)})"
    whole = x.multiple if jnp.issubdtype(dtype, np.integer) else 1
    return e.let(text, x.shape, dtype, dtype.name, bounds=bounds, zero_padded=x.zero_padded, multiple=whole)


def narrowed(e, text: str, shape: tuple[int, ...], dtype: np.dtype) -> str:
    """float32 rounded to a narrower float. The hardware keeps what is too large for 8 bits finite; JAX does not."""
    if not float8(dtype):
        return f"tl.cast({text}, {triton_type(dtype)})"
    wide = e.let(text, shape, np.float32, "wide").text
    bits = f"tl.cast(tl.cast({wide}, {triton_type(dtype)}), tl.uint8, bitcast=True)"
    if dtype == jnp.float8_e4m3fn:  # has no infinity; 464 is half-way from 448, the greatest, to what would be 480
        bits = f"tl.where(tl.abs({wide}) <= 464.0, {bits}, 127)"
    else:  # 61440 is half-way from 57344 to 65536, which is even
        large = f"tl.where({wide} != {wide}, 127, tl.where({wide} > 0, 124, 252))"
        bits = f"tl.where(tl.abs({wide}) < 61440.0, {bits}, {large})"
    return f"tl.cast(tl.cast({bits}, tl.uint8), {triton_type(dtype)}, bitcast=True)"


@rule("bitcast_convert_type")
def bitcast_convert_type(e, eqn, x: Value):
    """Between types of different width, the parts of the wider number lie along a last axis, the lowest first."""
    dtype, shape = np.dtype(eqn.params["new_dtype"]), eqn.outvars[0].aval.shape
    old, new = x.dtype.itemsize, dtype.itemsize
    text = e.tensor(x)
    if old == new:
        text = f"tl.cast({text}, {triton_type(dtype)}, bitcast=True)"
        return e.let(text, shape, dtype, dtype.name, zero_padded=x.zero_padded)
    word, part = max(old, new) * 8, min(old, new) * 8
    rank = max(len(shape), len(x.shape))
    by = f"tl.cast({e.lanes(word // part, rank - 1, rank)} * {part}, tl.uint{word})"
    text = f"tl.cast({text}, tl.uint{8 * old}, bitcast=True)"
    if old > new:
        if x.shape:
            text = e.let(text, x.shape, x.dtype, "word").text + f"[{', '.join(':' for _ in x.shape)}, None]"
        text = f"tl.cast({text} >> {by}, tl.uint{part})"
    else:
        text = f"tl.sum(tl.cast({text}, tl.uint{word}) << {by}, axis={rank - 1}, dtype=tl.uint{word})"
    return e.let(f"tl.cast({text}, {triton_type(dtype)}, bitcast=True)", shape, dtype, dtype.name)


@rule("reduce_precision")
def reduce_precision(e, eqn, x: Value):
    exponent, mantissa = eqn.params["exponent_bits"], eqn.params["mantissa_bits"]
    given = jnp.finfo(x.dtype)
    if exponent >= given.nexp and mantissa >= given.nmant:
        return x
    wide = np.dtype(np.float64) if x.dtype == np.float64 else np.dtype(np.float32)
    [rounded] = e.compute(lambda x: _reduced(x, exponent, mantissa), cast(e, x, wide))
    return cast(e, rounded, x.dtype)


def _reduced(x, exponent: int, mantissa: int):
    """Rounded to so many bits of mantissa, to even; infinite or zero where the exponent then lies out of range."""
    given = jnp.finfo(x.dtype)
    integer = jnp.dtype(f"int{given.bits}").type
    drop = max(given.nmant - mantissa, 0)
    bits = jax.lax.bitcast_convert_type(x, integer)
    if drop:
        odd = (bits >> integer(drop)) & integer(1)
        bits = (bits + integer(2 ** (drop - 1) - 1) + odd) & integer(-(2**drop))
    rounded = jax.lax.bitcast_convert_type(bits, x.dtype)
    if exponent < given.nexp:
        bias = 2 ** (exponent - 1) - 1
        size = jnp.abs(rounded)
        rounded = jnp.where(size >= 2.0 ** (bias + 1), jnp.copysign(jnp.inf, x), rounded)
        rounded = jnp.where(size < 2.0 ** (1 - bias), jnp.copysign(0, x), rounded)
    return jnp.where(x != x, x, rounded)


@rule("copy", "stop_gradient", "name", "reshard")
def identity(e, eqn, x: Value):
    return x


@rule("optimization_barrier")
def identities(e, eqn, *values: Value):
    return list(values)


@rule("multiple_of", "max_contiguous")
def hint(e, eqn, x: Value):
    """What the author knows of a value, and Triton uses."""
    name, values = eqn.primitive.name, eqn.params["values"]
    if name == "max_contiguous" and not x.shape:
        return x  # which says nothing of one number
    known = math.lcm(x.multiple, *values) if name == "multiple_of" and not x.shape else x.multiple
    text = f"tl.{name}({e.tensor(x)}, {list(values)})"
    return e.let(text, x.shape, x.dtype, "hint", bounds=x.bounds, multiple=known)


@rule("elementwise_inline_asm_p", "elementwise_inline_asm")  # in JAX 0.11, in 0.12
def elementwise_inline_asm(e, eqn, *operands: Value):
    params, outs = eqn.params, eqn.params["result_shape_dtypes"]
    return _assembly(e, params["asm"], params["constraints"], params["pack"], operands, outs)


@rule("approx_tanh")
def approx_tanh(e, eqn, x: Value):
    kind, register = TANH_CONSTRAINTS[x.dtype.name]
    return _assembly(e, f"tanh.approx.{kind} $0, $1;", f"={register},{register}", 1, [x], [x])[0]


@rule("approx_exp2")
def approx_exp2(e, eqn, x: Value):
    return _assembly(e, "ex2.approx.ftz.f32 $0, $1;", "=f,f", 1, [x], [x])[0]


def _assembly(e, asm: str, constraints: str, pack: int, operands: Sequence[Value], outs: Sequence) -> list[Value]:
    names = [e.name("asm") for _ in outs]
    types = ", ".join(triton_type(out.dtype) for out in outs)
    e.line(
        f"{', '.join(names)} = tl.inline_asm_elementwise(asm={asm!r}, constraints={constraints!r}, "
        f"args=[{', '.join(map(e.tensor, operands))}], dtype={types if len(outs) == 1 else f'({types})'}, "
        f"is_pure=True, pack={pack})"
    )
    return [Value(name, tuple(out.shape), np.dtype(out.dtype)) for name, out in zip(names, outs, strict=True)]


def multiple(name: str, operands: tuple[Value, ...]) -> int:
    """What the result of an integer operation is a multiple of. (Of a power of two also where it wraps around.)"""
    known = [v.multiple for v in operands]
    if name == "mul":
        return math.prod(known)
    return math.gcd(*known) if name in ("add", "sub", "neg", "max", "min") else 1


def interval(name: str, operands: tuple[Value, ...], dtype) -> Interval | None:
    """The least and greatest value of an integer operation, where they follow from its operands'."""
    if name not in INTERVALS or not all(jnp.issubdtype(d, np.integer) for d in (dtype, *(v.dtype for v in operands))):
        return None
    # Any number may be behind an unknown one: `min` and its like make something of that.
    whole = [(int(jnp.iinfo(v.dtype).min), int(jnp.iinfo(v.dtype).max)) for v in operands]
    if all(v.bounds is None for v in operands):
        return None
    return inner(INTERVALS[name](*(v.bounds or w for v, w in zip(operands, whole, strict=True))), dtype)


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
