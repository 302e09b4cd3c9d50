"""Operations on the elements of one to three values."""

import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np

from tests.compiler.fuzz.body import (
    INTEGERS,
    MOST_ELEMENTS,
    PRECISION,
    Body,
    NoOperand,
    Value,
    broadcasts,
    exact,
    greatest,
    numeric,
)

# Functions as (their text, domain, greatest value and greatest slope there, units in the last place of that greatest
# value between two good implementations). A slope of infinity: only for operands without error.
SMOOTH = {
    "exp": ("jnp.exp({})", 2, 7.4, 7.4, 8),
    "exp2": ("jnp.exp2({})", 4, 16, 11.1, 8),
    "expm1": ("jnp.expm1({})", 2, 6.4, 7.4, 8),
    "log": ("jnp.log(jnp.abs({}) + 1)", 64, 4.2, 1, 8),
    "log1p": ("jnp.log1p(jnp.abs({}))", 64, 4.2, 1, 8),
    "sqrt": ("jnp.sqrt(jnp.abs({}) + 1)", 64, 8.1, 0.5, 8),
    "rsqrt": ("lax.rsqrt(jnp.abs({}) + 1)", 64, 1, 0.5, 8),
    "cbrt": ("jnp.cbrt({})", 64, 4, math.inf, 16),
    "sin": ("jnp.sin({})", 64, 1, 1, 8),
    "cos": ("jnp.cos({})", 64, 1, 1, 8),
    "tan": ("jnp.tan({})", 1, 1.6, 3.5, 16),
    "asin": ("jnp.arcsin({})", 1, 1.6, math.inf, 16),
    "acos": ("jnp.arccos({})", 1, 3.2, math.inf, 16),
    "atan": ("jnp.arctan({})", 64, 1.6, 1, 8),
    "sinh": ("jnp.sinh({})", 2, 3.7, 3.8, 16),
    "cosh": ("jnp.cosh({})", 2, 3.8, 3.7, 16),
    "tanh": ("jnp.tanh({})", 64, 1, 1, 16),
    "asinh": ("jnp.arcsinh({})", 64, 4.9, 1, 32),
    "acosh": ("jnp.arccosh(jnp.abs({}) + 2)", 64, 4.9, 0.6, 32),
    "atanh": ("jnp.arctanh({} / 2)", 1, 0.6, 0.7, 16),
    "erf": ("jax.scipy.special.erf({})", 64, 1, 1.2, 16),
    "erfc": ("jax.scipy.special.erfc({})", 64, 2, 1.2, 16),
    "erf_inv": ("jax.scipy.special.erfinv({} / 2)", 1, 0.5, 0.6, 32),
    "lgamma": ("lax.lgamma(jnp.abs({}) + 1)", 8, 10.7, 2.2, 64),
    "logistic": ("jax.nn.sigmoid({})", 64, 1, 0.25, 16),
    "gelu": ("jax.nn.gelu({}, approximate=False)", 8, 8, 1.2, 16),
    "gelu_tanh": ("jax.nn.gelu({})", 8, 8, 1.2, 32),
    "silu": ("jax.nn.silu({})", 8, 8, 1.1, 16),
    "softplus": ("jax.nn.softplus({})", 8, 8.1, 1, 16),
}


def operands(body: Body, *tests) -> tuple[Value, Value, tuple[int, ...]]:
    """Two values of one type, and the shape that they broadcast to."""
    x = body.pick(*tests)
    y = body.pick(*tests, lambda v: broadcasts(v, x))
    y = body.cast(y, x.dtype)
    if body.chance(2):
        x, y = y, x
    return x, y, np.broadcast_shapes(x.shape, y.shape)


def add(body: Body):
    x, y, shape = operands(body, numeric)
    sign = body.one_of("+-")
    if x.is_float:
        x, y = (body.tame(v, greatest(x.dtype) / 2) for v in (x, y))
    bound = greatest(x.dtype) if x.dtype.startswith("u") else x.bound + y.bound
    body.let(f"{x.text} {sign} {y.text}", shape, x.dtype, x, y, bound=bound, error=x.error + y.error)


def multiply(body: Body):
    x, y, shape = operands(body, numeric)
    if x.is_float and x.bound * y.bound > greatest(x.dtype):
        x, y = (body.tame(v, greatest(x.dtype) ** 0.5) for v in (x, y))
    error = x.error * y.bound + y.error * x.bound + x.error * y.error
    body.let(f"{x.text} * {y.text}", shape, x.dtype, x, y, bound=x.bound * y.bound, error=error)


def with_constant(body: Body):
    x = body.pick(numeric)
    n, sign = body.one_of((1, 2, 3)), body.one_of("+-*")
    if x.is_float:
        x = body.tame(x, greatest(x.dtype) / 4)
    texts = (x.text, str(n)) if body.chance(2) else (str(n), x.text)
    bound = x.bound * n if sign == "*" else x.bound + n
    if x.dtype.startswith("u"):
        bound = greatest(x.dtype)
    body.let(
        f"{texts[0]} {sign} {texts[1]}", x.shape, x.dtype, x, bound=bound, error=x.error * (n if sign == "*" else 1)
    )


def extreme(body: Body):
    x, y, shape = operands(body, numeric)
    function = body.one_of(("maximum", "minimum"))
    error = max(x.error, y.error)
    body.let(
        f"jnp.{function}({x.text}, {y.text})", shape, x.dtype, x, y, bound=max(x.bound, y.bound), error=error, ulps=0
    )


def divide(body: Body):
    x, y, shape = operands(body, lambda v: v.is_float, lambda v: not v.special)
    x = body.tame(x, greatest(x.dtype) / 2)
    y = body.tame(y, greatest(x.dtype) / 2)
    error = x.error + x.bound * y.error + x.bound * 2.0 ** (1 - PRECISION[x.dtype])
    body.let(f"{x.text} / (jnp.abs({y.text}) + 1)", shape, x.dtype, x, y, bound=x.bound, error=error, ulps=2)


def integer_divide(body: Body):
    x, y, shape = operands(body, lambda v: v.is_integer)
    divisor = f"(abs({y.text}) | 1)" if not y.dtype.startswith("u") else f"({y.text} | 1)"
    template = body.one_of(("{} // {}", "{} % {}", "lax.div({}, {})", "lax.rem({}, {})"))
    if "lax" in template and x.shape != y.shape:
        raise NoOperand
    body.let(template.format(x.text, divisor), shape, x.dtype, bound=max(x.bound, y.bound + 1))


def bits(body: Body):
    x, y, shape = operands(body, lambda v: not v.is_float)
    sign = body.one_of("&|^")
    body.let(f"{x.text} {sign} {y.text}", shape, x.dtype, bound=greatest(x.dtype))


def shift(body: Body):
    x, y, shape = operands(body, lambda v: v.is_integer)
    function = body.one_of(("left_shift", "right_shift", "lax.shift_right_logical"))
    by = str(body.draw(st.integers(0, 7))) if body.chance(2) else y.text
    if by == y.text and x.shape != y.shape or "lax" in function and by != y.text:
        raise NoOperand
    function = function if "lax" in function else f"jnp.{function}"
    body.let(f"{function}({x.text}, {by})", x.shape if by != y.text else shape, x.dtype, bound=greatest(x.dtype))


def integer_unary(body: Body):
    x = body.pick(lambda v: v.is_integer)
    template = body.one_of(
        ("-{}", "abs({})", "jnp.sign({})", "~{}", "{}**2", "{}**3", "lax.population_count({})", "lax.clz({})")
    )
    body.let(template.format(x.text), x.shape, x.dtype, bound=greatest(x.dtype))


def float_unary(body: Body):
    x = body.pick(lambda v: v.is_float)
    template, grows = body.one_of(
        (("-{}", 1), ("jnp.abs({})", 1), ("jax.nn.relu({})", 1), ("{}**2", 2), ("{}**3", 3), ("jnp.square({})", 2))
    )
    x = body.tame(x, greatest(x.dtype) ** (1 / grows))
    error = grows * (x.bound + x.error) ** (grows - 1) * x.error
    body.let(template.format(x.text), x.shape, x.dtype, x, bound=x.bound**grows, error=error)


def rounding(body: Body):
    x = body.pick(lambda v: v.is_float, exact)
    x = body.tame(x, greatest(x.dtype) / 2)
    function = body.one_of(("jnp.floor({})", "jnp.ceil({})", "jnp.round({})", "lax.round({})", "jnp.sign({})"))
    body.let(function.format(f"{x.text} * 0.5"), x.shape, x.dtype, x, bound=x.bound)


def smooth(body: Body):
    template, domain, bound, slope, ulps = SMOOTH[body.one_of(sorted(SMOOTH))]
    x = body.pick(lambda v: v.is_float, lambda v: v.exact or slope < math.inf)
    x = body.tame(x, domain)
    most = bound * 2.0 ** (1 - PRECISION[x.dtype])
    # Intermediate results such as |x| + 1 are rounded as well, at up to the domain's size.
    error = ulps * most + (slope * (x.error + (x.error > 0) * domain * 2.0 ** -PRECISION[x.dtype]) if x.error else 0)
    body.let(template.format(x.text), x.shape, x.dtype, x, bound=bound, error=error)


def float_remainder(body: Body):
    """Of integers, which is exact."""
    x, y, shape = operands(body, lambda v: v.is_float, exact, lambda v: not v.special)
    x, y = (body.tame(v, greatest(x.dtype) / 2) for v in (x, y))
    if x.shape != y.shape:
        raise NoOperand
    function = body.one_of(("jnp.mod", "lax.rem"))
    body.let(f"{function}({x.text}, jnp.abs({y.text}) + 1)", shape, x.dtype, bound=y.bound + 1)


def angle(body: Body):
    x, y, shape = operands(body, lambda v: v.is_float, exact, lambda v: not v.special)
    x, y = (body.tame(v, 64) for v in (x, y))
    error = 16 * 2.0 ** (1 - PRECISION[x.dtype])
    body.let(f"jnp.arctan2({x.text}, jnp.abs({y.text}) + 1)", shape, x.dtype, bound=1.6, error=error)


def through_bits(body: Body):
    """The sign flipped in the float's bits."""
    x = body.pick(lambda v: v.is_float)
    size = 32 if x.dtype == "float32" else 16
    bits = f"lax.bitcast_convert_type({x.text}, jnp.uint{size}) ^ jnp.uint{size}({2 ** (size - 1)})"
    text = f"lax.bitcast_convert_type({bits}, jnp.{x.dtype})"
    body.let(text, x.shape, x.dtype, x, bound=x.bound, error=x.error, ulps=0)


def reduce_precision(body: Body):
    x = body.pick(lambda v: v.dtype == "float32", exact)
    exponent, mantissa = body.one_of(((8, 7), (5, 10), (4, 6)))
    x = body.tame(x, 2 ** (mantissa + 1))
    body.let(f"lax.reduce_precision({x.text}, {exponent}, {mantissa})", x.shape, x.dtype, x, bound=x.bound)


def classify(body: Body):
    x = body.pick(lambda v: v.is_float, exact)
    body.let(f"{body.one_of(('jnp.isnan', 'jnp.isfinite', 'jnp.isinf'))}({x.text})", x.shape, "bool", bound=1)


def select_among_three(body: Body):
    which = body.pick(lambda v: v.dtype == "int32")
    first = body.pick(lambda v: v.shape == which.shape)
    cases = [first, *(body.fitting(first.shape, first.dtype) for _ in range(2))]
    bound, error = max(v.bound for v in cases), max(v.error for v in cases)
    text = f"lax.select_n({which.text} % 3, {', '.join(v.text for v in cases)})"
    body.let(text, which.shape, first.dtype, *cases, bound=bound, error=error, ulps=0)


def compare(body: Body):
    x, y, shape = operands(body, exact)
    sign = body.one_of(("<", "<=", ">", ">=", "==", "!=") if x.dtype != "bool" else ("==", "!="))
    body.let(f"{x.text} {sign} {y.text}", shape, "bool", bound=1)


def logic(body: Body):
    x, y, shape = operands(body, lambda v: v.dtype == "bool")
    template = body.one_of(("{} & {}", "{} | ~{}", "{} ^ {}", "jnp.logical_or({}, {})"))
    body.let(template.format(x.text, y.text), shape, "bool", bound=1)


def select(body: Body):
    which = body.pick(lambda v: v.dtype == "bool")
    x, y, shape = operands(body, lambda v: broadcasts(v, which))
    shape = np.broadcast_shapes(shape, which.shape)
    if math.prod(shape) > MOST_ELEMENTS:
        raise NoOperand
    body.let(
        f"jnp.where({which.text}, {x.text}, {y.text})",
        shape, x.dtype, x, y, bound=max(x.bound, y.bound), error=max(x.error, y.error), ulps=0,
    )  # fmt: skip


def convert(body: Body):
    x = body.pick()
    body.cast(x, body.one_of((*PRECISION, *INTEGERS, "bool")))


ELEMENTWISE: list[Callable[[Body], Any]] = [
    *(add, multiply, with_constant, extreme, divide, integer_divide, bits, shift, integer_unary, float_unary),
    *(rounding, smooth, smooth, compare, logic, select, convert, float_remainder, angle, through_bits),
    *(reduce_precision, classify, select_among_three),
]
