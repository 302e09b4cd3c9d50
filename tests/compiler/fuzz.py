"""Pallas kernels drawn at random, and what they compute compared with Pallas' interpreter.

    python -m tests.compiler.fuzz --examples 300                # the generated source in Triton's interpreter
    python -m tests.compiler.fuzz --examples 2000 --gpu         # the compiled kernels on a GPU

A kernel is drawn as the text of a Python program, so what fails can be read, copied and run.

How close the results must be follows from the program. Floats start as small integers, and while every number that an
expression can reach is an integer that its type holds, any order of operations gives the same bits: results must be
equal. Operations that round, or that libraries approximate, add to an error that is carried along (`Value.error`).
Where it would grow without bound, operands are clipped first.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import linecache
import math
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

import jtile
from jtile.compiler.interpret import interpret_pallas

# Of floats, the bits of a number's integer part that are exact: the mantissa's, with the leading one.
PRECISION = {"float32": 24, "float16": 11, "bfloat16": 8}
INTEGERS = ("int32", "int8", "uint8", "uint32", "int16", "uint16")
# Types that are only stored, not computed in, and the greatest integer up to which they hold all.
STORED = {"float8_e4m3fn": 16, "float8_e5m2": 8}
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 32)
MOST_ELEMENTS = 1024

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


@dataclasses.dataclass(frozen=True)
class Value:
    """What an expression of a kernel evaluates to.

    Attributes:
      text: its name.
      bound: no element is further from zero, except in `special` values.
      error: how far two right evaluations can be apart; 0 where they must be equal.
      special: infinities and NaN may be among the elements.
    """

    text: str
    shape: tuple[int, ...]
    dtype: str
    bound: float
    error: float = 0.0
    special: bool = False

    @property
    def is_float(self) -> bool:
        return self.dtype in PRECISION

    @property
    def is_integer(self) -> bool:
        return self.dtype in INTEGERS

    @property
    def exact(self) -> bool:
        return self.error == 0

    @property
    def rank(self) -> int:
        return len(self.shape)


class NoOperand(Exception):
    """Nothing computed so far serves an operation as its operand."""


def exact(v: Value) -> bool:
    return v.exact


def numeric(v: Value) -> bool:
    return v.dtype != "bool"


def greatest(dtype: str) -> float:
    """Of an integer type, the distance of its numbers from zero; of a float, up to where it holds every integer."""
    if dtype in PRECISION:
        return 2 ** PRECISION[dtype]
    return 1 if dtype == "bool" else -float(jnp.iinfo(dtype).min) or float(jnp.iinfo(dtype).max)


class Body:
    """Statements drawn one after the other, each on values of those before it."""

    def __init__(self, draw, values: Sequence[Value], names: Iterator[int], refs: Sequence["Ref"] = (), ids: int = 0):
        self.draw = draw
        self.values = list(values)
        self.lines: list[str] = []
        self.used: set[str] = set()
        self.names = names
        self.refs = refs
        self.ids = ids  # axes of the grid

    # Drawing

    def one_of(self, options: Sequence):
        return options[self.draw(st.integers(0, len(options) - 1))]

    def chance(self, one_in: int) -> bool:
        return self.draw(st.integers(0, one_in - 1)) == one_in - 1

    def pick(self, *tests: Callable[[Value], bool]) -> Value:
        """A value that passes the tests, rather one that has not been used, and a late one."""
        candidates = [v for v in reversed(self.values) if all(test(v) for test in tests)]
        if not candidates:
            raise NoOperand
        candidates.sort(key=lambda v: v.text in self.used)
        chosen = self.one_of(candidates[:6])
        self.used.add(chosen.text)
        return chosen

    def axis(self, v: Value) -> int:
        return self.draw(st.integers(0, v.rank - 1))

    # Writing

    def name(self, prefix: str = "v") -> str:
        return f"{prefix}{next(self.names)}"

    def let(self, text: str, shape, dtype: str, *operands: Value, bound: float, error: float = 0.0, ulps: float = 1):
        """Names an expression. Rounding adds to the error where the result is not an integer that the type holds."""
        most = greatest(dtype)
        if dtype not in PRECISION:
            bound = min(bound, most)
        elif error or bound > most:
            error += ulps * bound * 2.0 ** (1 - PRECISION[dtype])
        special = any(v.special for v in operands) and dtype in PRECISION
        value = Value(self.name(), tuple(shape), dtype, bound, error, special)
        self.lines.append(f"{value.text} = {text}")
        self.values.append(value)
        return value

    def same(self, text: str, shape, v: Value) -> Value:
        """Elements of `v`, moved."""
        if math.prod(shape) > MOST_ELEMENTS or len(shape) > 4:
            raise NoOperand
        return self.let(text, shape, v.dtype, v, bound=v.bound, error=v.error, ulps=0)

    def tame(self, v: Value, limit: float) -> Value:
        """`v`, within this distance of zero."""
        if v.bound <= limit:
            return v
        limit = int(limit)
        if v.is_float:
            text = f"jnp.clip({v.text}, {-limit}, {limit})"
        elif v.dtype.startswith("u"):
            text = f"jnp.minimum({v.text}, {limit})" if self.chance(2) else f"{v.text} % {limit}"
        else:
            text = f"jnp.clip({v.text}, {-limit}, {limit})" if self.chance(2) else f"{v.text} % {limit}"
        return self.let(text, v.shape, v.dtype, v, bound=limit, error=v.error, ulps=0)

    def cast(self, v: Value, dtype: str) -> Value:
        if v.dtype == dtype:
            return v
        if dtype == "bool":
            if not v.exact:
                raise NoOperand
            return self.let(f"{v.text}.astype(bool)", v.shape, dtype, bound=1)
        if dtype in STORED or dtype in PRECISION:
            most = STORED[dtype] if dtype in STORED else greatest(dtype)
            if dtype in STORED and v.special:
                raise NoOperand
            v = self.tame(v, most)
        elif v.is_float:  # to an integer, which is anything where the float is none, or out of range
            if not v.exact or v.special:
                raise NoOperand
            v = self.tame(v, min(greatest(dtype) - 1, 2**24))
            if dtype.startswith("u"):
                v = self.let(f"jnp.abs({v.text})", v.shape, v.dtype, v, bound=v.bound)
        if dtype in STORED:
            value = Value(self.name(), v.shape, dtype, v.bound, v.error + (v.error > 0) * v.bound / 4)
            self.lines.append(f"{value.text} = {v.text}.astype(jnp.{dtype})")
            return value  # and no operand of anything else
        fits = v.bound <= greatest(dtype) - 1 and not (dtype.startswith("u") and not v.dtype.startswith("u"))
        bound = v.bound if fits or dtype in PRECISION else greatest(dtype)
        return self.let(f"{v.text}.astype(jnp.{dtype})", v.shape, dtype, v, bound=bound, error=v.error)

    def block(self, head: str, inner: "Body", last: str = "") -> None:
        self.lines.append(head)
        self.lines += [f"    {line}" for line in [*inner.lines, *([last] if last else [])]]

    def nested(self, *more: Value) -> "Body":
        # Pallas' interpreter knows `pl.program_id` at the top of a kernel only.
        return Body(self.draw, [*self.values[-6:], *more], self.names, self.refs)

    def steps(self, most: int, operations: Sequence[Callable[["Body"], Any]]) -> None:
        for _ in range(self.draw(st.integers(1, most))):
            for _ in range(5):
                written, known = len(self.lines), len(self.values)
                try:
                    self.one_of(operations)(self)
                    break
                except NoOperand:
                    del self.lines[written:], self.values[known:]

    def leaves(self) -> list[Value]:
        """Values of which nothing has been made yet, latest first."""
        words = collections.Counter(re.findall(r"\w+", "\n".join(self.lines)))
        return [v for v in reversed(self.values) if words[v.text] == 1]

    def fitting(self, shape, dtype: str, bound: float = math.inf, *tests) -> Value:
        """A value of this shape and type."""
        v = self.cast(self.pick(lambda v: v.shape == tuple(shape), *tests), dtype)
        return v if bound == math.inf else self.tame(v, bound)


def broadcasts(v: Value, w: Value) -> bool:
    try:
        return math.prod(np.broadcast_shapes(v.shape, w.shape)) <= MOST_ELEMENTS
    except ValueError:
        return False


def alike(v: Value, w: Value, axis: int) -> bool:
    """Whether the shapes are the same along all other axes."""
    return v.rank == w.rank and all(m == n for a, (m, n) in enumerate(zip(v.shape, w.shape, strict=True)) if a != axis)


# Elementwise operations


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
    match body.one_of(("sort", "argsort", "top_k")):
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


# Products


def product(body: Body):
    """Of matrices whose sums are exact: small integers, which TF32 holds too."""
    x = body.pick(lambda v: v.rank == 2 and v.dtype in (*PRECISION, "int8", "uint8", "int32") and v.exact)
    y = body.pick(lambda v: v.rank == 2 and v.exact and bool(set(v.shape) & set(x.shape)))
    turns = [(i, j) for i in (0, 1) for j in (0, 1) if x.shape[1 - i] == y.shape[j]]
    if not turns:
        raise NoOperand
    i, j = body.one_of(turns)
    y = body.cast(y, x.dtype)
    terms = x.shape[1 - i]
    texts = f"{x.text}{'.T' * i}", f"{y.text}{'.T' * j}"
    shape = x.shape[i], y.shape[1 - j]
    if x.is_integer:
        text = f"jnp.dot({texts[0]}, {texts[1]}, preferred_element_type=jnp.int32)"
        body.let(text, shape, "int32", bound=x.bound * y.bound * terms)
        return
    out = x.dtype if body.chance(2) else "float32"
    limit = max(int(math.sqrt(min(greatest(out), 2**22) / terms)), 1)
    x, y = body.tame(x, limit), body.tame(y, limit)
    texts = f"{x.text}{'.T' * i}", f"{y.text}{'.T' * j}"
    text = f"jnp.dot({texts[0]}, {texts[1]}, preferred_element_type=jnp.{out})"
    body.let(text, shape, out, x, y, bound=x.bound * y.bound * terms)


def weighted_sum(body: Body):
    x = body.pick(lambda v: v.rank == 2 and v.is_float and v.exact)
    y = body.pick(lambda v: v.rank == 1 and v.shape[0] == x.shape[1] and v.exact)
    y = body.cast(y, x.dtype)
    limit = max(int(math.sqrt(greatest(x.dtype) / x.shape[1])), 1)
    x, y = body.tame(x, limit), body.tame(y, limit)
    body.let(f"{x.text} @ {y.text}", x.shape[:1], x.dtype, x, y, bound=x.bound * y.bound * x.shape[1])


def mixed_product(body: Body):
    """Of two types."""
    x = body.pick(lambda v: v.rank == 2 and v.is_float and v.exact)
    y = body.pick(lambda v: v.rank == 2 and v.shape[0] == x.shape[1] and v.exact and v.dtype != x.dtype)
    if not y.is_float:
        raise NoOperand
    limit = max(int(math.sqrt(min(greatest(x.dtype), greatest(y.dtype)) / x.shape[1])), 1)
    x, y = body.tame(x, limit), body.tame(y, limit)
    text = f"jnp.dot({x.text}, {y.text}, preferred_element_type=jnp.float32)"
    body.let(text, (x.shape[0], y.shape[1]), "float32", x, y, bound=x.bound * y.bound * x.shape[1])


def batched_product(body: Body):
    x = body.pick(lambda v: v.rank == 3 and v.is_float and v.exact)
    y = body.pick(lambda v: v.rank == 3 and v.shape[0] == x.shape[0] and v.shape[1] == x.shape[2] and v.exact)
    y = body.cast(y, x.dtype)
    limit = max(int(math.sqrt(greatest(x.dtype) / x.shape[2])), 1)
    x, y = body.tame(x, limit), body.tame(y, limit)
    shape = (*x.shape[:2], y.shape[2])
    if math.prod(shape) > MOST_ELEMENTS:
        raise NoOperand
    text = f'jnp.einsum("bij,bjk->bik", {x.text}, {y.text})'
    body.let(text, shape, x.dtype, x, y, bound=x.bound * y.bound * x.shape[2])


# Control flow


def carried(inner: Body, carry: Sequence[Value]) -> str:
    """What a turn of a loop hands on: values no larger than those that it got."""
    results = []
    for c in carry:
        try:
            fresh = lambda v, c=c: v.text != c.text and (c.special or not v.special)  # noqa: E731
            new = inner.fitting(c.shape, c.dtype, c.bound, exact, fresh)
        except NoOperand:
            new = c
        results.append(new.text if new.bound <= c.bound else c.text)
    return f"return {', '.join(results)}{',' * (len(results) == 1)}"


def loop(body: Body):
    first = body.pick(exact)
    outer = [first, body.pick(exact)] if body.chance(2) else [first]
    carry = [dataclasses.replace(v, text=body.name("c")) for v in outer]
    index = Value(body.name("i"), (), "int32", 8)
    inner = body.nested(index, *carry)
    inner.steps(3, ELEMENTWISE + MOVING + REDUCING + PRODUCTS + SLICED)
    function, last = body.name("turn"), carried(inner, carry)
    inner.lines.insert(0, f"({', '.join(c.text for c in carry)},) = carry")
    body.block(f"def {function}({index.text}, carry):", inner, last)
    low, high = body.one_of(((0, 3), (1, 4), (0, 1), (2, 2), ("pl.program_id(0)", 3), (0, "pl.program_id(0) + 1")))
    results = [dataclasses.replace(v, text=body.name()) for v in outer]
    starts = f"({', '.join(v.text for v in outer)},)"
    unroll = ", unroll=2" if isinstance(low, int) and isinstance(high, int) and body.chance(4) else ""
    if not body.ids and not (isinstance(low, int) and isinstance(high, int)):
        low, high = 0, 2
    body.lines.append(
        f"({', '.join(r.text for r in results)},) = lax.fori_loop({low}, {high}, {function}, {starts}{unroll})"
    )
    body.values += results


def scan_of_rows(body: Body):
    """`lax.scan` over the rows of a value, with a carry and a row of results for each."""
    rows = body.pick(lambda v: v.rank > 0, exact)
    start = body.pick(exact)
    carry = dataclasses.replace(start, text=body.name("c"))
    row = dataclasses.replace(rows, text=body.name("r"), shape=rows.shape[1:])
    inner = body.nested(carry, row)
    inner.steps(3, ELEMENTWISE + REDUCING)
    last = carried(inner, [carry])
    result = inner.pick()
    if math.prod(result.shape) * rows.shape[0] > MOST_ELEMENTS or result.rank > 2:
        raise NoOperand
    function, total = body.name("turn"), dataclasses.replace(start, text=body.name())
    stacked = dataclasses.replace(result, text=body.name(), shape=(rows.shape[0], *result.shape))
    body.block(f"def {function}({carry.text}, {row.text}):", inner, f"{last.rstrip(',')}, {result.text}")
    reverse = ", reverse=True" if body.chance(2) else ""
    body.lines.append(f"{total.text}, {stacked.text} = lax.scan({function}, {start.text}, {rows.text}{reverse})")
    body.values += [total, stacked]


def while_loop(body: Body):
    start = body.pick(exact, numeric, lambda v: not v.special)
    carry = dataclasses.replace(start, text=body.name("c"))
    inner = body.nested(carry)
    inner.steps(2, ELEMENTWISE)
    function, last = body.name("turn"), carried(inner, [carry])
    inner.lines.insert(0, f"n, {carry.text} = carry")
    body.block(f"def {function}(carry):", inner, last.replace("return ", "return n + 1, ").rstrip(","))
    result = dataclasses.replace(start, text=body.name())
    test = f"lambda c: (c[0] < 3) & (jnp.max(c[1]) {body.one_of('<>')} {body.one_of((0, 2, 5))})"
    body.lines.append(f"_, {result.text} = lax.while_loop({test}, {function}, (0, {start.text}))")
    body.values.append(result)


def branch(body: Body):
    like = body.pick(lambda v: not v.dtype.startswith("float8"))
    which = body.pick(lambda v: v.shape == () and v.exact and v.dtype in ("bool", "int32"))
    count = 2 if which.dtype == "bool" else 3
    functions, bound, error = [], 0.0, 0.0
    for _ in range(count):
        inner = body.nested(like)
        inner.steps(2, ELEMENTWISE + REDUCING + MOVING + SLICED)
        result = inner.fitting(like.shape, like.dtype, math.inf, lambda v: like.special or not v.special)
        functions.append(body.name("branch"))
        body.block(f"def {functions[-1]}():", inner, f"return {result.text}")
        bound, error = max(bound, result.bound), max(error, result.error)
    call = (
        f"lax.cond({which.text}, {', '.join(functions)})"
        if count == 2
        else f"lax.switch({which.text}, [{', '.join(functions)}])"
    )
    body.let(call, like.shape, like.dtype, like, bound=bound, error=error, ulps=0)


# Refs


@dataclasses.dataclass(frozen=True)
class Ref:
    """What the kernel sees of an operand or result, a block, or memory of its own; read, and perhaps written."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bound: float
    special: bool = False
    writable: bool = False


def read(body: Body, ref: Ref, index: str, shape) -> Value:
    value = Value(body.name(), tuple(shape), ref.dtype, ref.bound, 0.0, ref.special)
    body.lines.append(f"{value.text} = {ref.name}[{index}]")
    if ref.dtype in STORED:
        return body.let(f"{value.text}.astype(jnp.float32)", shape, "float32", bound=ref.bound)
    body.values.append(value)
    return value


def sliced(body: Body):
    if not body.refs:
        raise NoOperand
    ref = body.one_of(body.refs)
    if not ref.shape:
        raise NoOperand
    axis = body.draw(st.integers(0, len(ref.shape) - 1))
    n, leading = ref.shape[axis], ":, " * axis
    start = body.draw(st.integers(0, n - 1))
    rest = ref.shape[:axis], ref.shape[axis + 1 :]
    counters = [v for v in body.values if v.text.startswith("i") and v.shape == ()]
    match body.one_of(("at", "slice", "stride", "turn", "pick")):
        case "at":
            read(body, ref, f"{leading}{start}", (*rest[0], *rest[1]))
        case "slice":
            size = body.draw(st.integers(1, n - start))
            read(body, ref, f"{leading}pl.ds({start}, {size})", (*rest[0], size, *rest[1]))
        case "stride":
            size = (n - start + 1) // 2
            read(body, ref, f"{leading}pl.ds({start}, {size}, stride=2)", (*rest[0], size, *rest[1]))
        case "turn" if counters:
            read(body, ref, f"{leading}{counters[-1].text} % {n}", (*rest[0], *rest[1]))
        case "pick":
            picks = body.pick(lambda v: v.rank == 1 and v.dtype == "int32")
            read(body, ref, f"{leading}{picks.text} % {n}", (*rest[0], *picks.shape, *rest[1]))


def masked(body: Body):
    ref = body.one_of(body.refs or [None])
    if ref is None or ref.dtype in STORED or not ref.shape:
        raise NoOperand
    mask = body.pick(lambda v: v.dtype == "bool" and v.shape == ref.shape)
    other = {"bool": "True"}.get(ref.dtype, str(body.one_of((0, 1, 7))))
    bound = 1 if ref.dtype == "bool" else max(ref.bound, 7)
    value = Value(body.name(), ref.shape, ref.dtype, bound, 0.0, ref.special)
    body.lines.append(f"{value.text} = jtile.load({ref.name}, mask={mask.text}, other=jnp.{ref.dtype}({other}))")
    body.values.append(value)


def write(body: Body):
    """What is read afterwards, by other threads too, is what was written."""
    refs = [ref for ref in body.refs if ref.writable]
    if not refs:
        raise NoOperand
    ref = body.one_of(refs)
    suits = lambda v: v.exact and (ref.special or not v.special)  # noqa: E731
    if not ref.shape or body.chance(2):
        value = body.fitting(ref.shape, ref.dtype, ref.bound, suits)
        body.lines.append(f"{ref.name}[...] = {value.text}")
        return
    axis = body.draw(st.integers(0, len(ref.shape) - 1))
    whole = Value("", ref.shape, ref.dtype, 0)
    part = body.pick(suits, lambda v: alike(v, whole, axis) and v.shape[axis] <= ref.shape[axis])
    part = body.tame(body.cast(part, ref.dtype), ref.bound)
    start = body.draw(st.integers(0, ref.shape[axis] - part.shape[axis]))
    body.lines.append(f"{ref.name}[{':, ' * axis}pl.ds({start}, {part.shape[axis]})] = {part.text}")


def conditionally(body: Body):
    """Writes under `pl.when`."""
    test = body.pick(lambda v: v.shape == () and v.exact and v.dtype in ("bool", "int32"))
    inner = body.nested()
    write(inner)
    body.lines.append(f"@pl.when({test.text}{' > 0' if test.dtype == 'int32' else ''})")
    body.block(f"def {body.name('write')}():", inner)


ELEMENTWISE: list[Callable[[Body], Any]] = [
    *(add, multiply, with_constant, extreme, divide, integer_divide, bits, shift, integer_unary, float_unary),
    *(rounding, smooth, smooth, compare, logic, select, convert, float_remainder, angle, through_bits),
    *(reduce_precision, classify, select_among_three),
]
REDUCING: list[Callable[[Body], Any]] = [reduce, reduce, argument, scan, scan, associative_scan, normalise]
MOVING: list[Callable[[Body], Any]] = [
    *(transpose, reshape, expand, broadcast, cut, rearrange, join, counting, position, dynamic_slice, update, gather),
    *(sort, halves, repeat, scatter),
]
PRODUCTS: list[Callable[[Body], Any]] = [product, product, product, weighted_sum, batched_product, mixed_product]
SLICED: list[Callable[[Body], Any]] = [sliced, sliced, masked, write, conditionally]
CONTROL: list[Callable[[Body], Any]] = [loop, loop, while_loop, branch, scan_of_rows]
FAMILIES = [ELEMENTWISE, ELEMENTWISE, REDUCING, MOVING, PRODUCTS, SLICED, CONTROL]


def anything(body: Body):
    body.one_of(body.one_of(FAMILIES))(body)


# Whole programs


@dataclasses.dataclass(frozen=True, repr=False)
class Program:
    """A Pallas call as Python text.

    Attributes:
      text: defines `call`, a function of the operands.
      operands: what to fill each operand with: shape, dtype, bound, special.
      results: of each result what is known.
      seed: of the operands' numbers.
    """

    text: str
    operands: tuple[tuple[tuple[int, ...], str, float, bool], ...]
    results: tuple[Value, ...]
    seed: int

    def __repr__(self) -> str:
        return f"{self.text}# operands: {self.operands}, filled with seed {self.seed}\n"

    def _repr_pretty_(self, printer, cycle: bool) -> None:  # what hypothesis prints
        printer.text(repr(self))

    @property
    def call(self) -> Callable:
        file = f"<fuzz {zlib.crc32(self.text.encode()):x}>"
        linecache.cache[file] = (len(self.text), None, self.text.splitlines(keepends=True), file)
        module: dict[str, Any] = {}
        exec(compile(self.text, file, "exec"), module)
        return module["call"]

    def arrays(self) -> list[np.ndarray]:
        generator = np.random.default_rng(self.seed)
        return [_filled(generator, *operand) for operand in self.operands]


def _filled(generator, shape, dtype: str, bound: float, special: bool) -> np.ndarray:
    if dtype == "bool":
        return generator.integers(0, 2, shape).astype(bool)
    low = 0 if dtype.startswith("u") else -int(bound)
    if dtype in INTEGERS and bound == greatest(dtype):
        info = np.iinfo(dtype)
        return generator.integers(info.min, info.max, shape, dtype, endpoint=True)
    array = generator.integers(low, int(bound), shape, endpoint=True).astype(np.float32)
    if special:
        odd = generator.choice(np.array([np.inf, -np.inf, np.nan, -0.0], np.float32), shape)
        array = np.where(generator.integers(0, 4, shape) == 0, odd, array)
    return array.astype(jnp.dtype(dtype))


@dataclasses.dataclass
class _Spec:
    """A `BlockSpec` and its array's shape, dimension by dimension."""

    block: list[str]
    index: list[str]
    shape: list[int]

    def text(self, axes: Sequence[str]) -> str:
        return f"pl.BlockSpec(({_listed(self.block)}), lambda {', '.join(axes)}: ({_listed(self.index)}))"


def _listed(items: Sequence) -> str:
    return ", ".join(map(str, items)) + "," * (len(items) == 1)


def _input_spec(draw, block: Sequence[int], grid: Sequence[int], axes: Sequence[str]) -> _Spec:
    spec = _Spec([], [], [])
    choose = lambda options: options[draw(st.integers(0, len(options) - 1))]  # noqa: E731
    if grid and draw(st.integers(0, 3)) == 3:  # one matrix of several
        a = draw(st.integers(0, len(grid) - 1))
        spec.block.append("None")
        spec.index.append(axes[a])
        spec.shape.append(max(grid[a] - draw(st.integers(0, 1)), 1))
    for size in block:
        ragged = draw(st.integers(0, min(size - 1, 3)))
        how = choose(("whole", "blocks", "blocks", "blocks", "shifted", "shared", "windows")) if grid else "whole"
        a = draw(st.integers(0, max(len(grid) - 1, 0)))
        if how == "whole":
            whole = (str(size), "0", size - ragged)
        elif how == "blocks":
            index = choose((axes[a], f"{grid[a] - 1} - {axes[a]}"))
            whole = (str(size), index, grid[a] * size - ragged)
        elif how == "shifted":  # some blocks lie before the array, or after it
            whole = (str(size), f"{axes[a]} {choose(('- 1', '+ 1'))}", grid[a] * size - ragged)
        elif how == "shared":
            whole = (str(size), f"{axes[a]} // 2", (grid[a] + 1) // 2 * size - ragged)
        else:
            step = choose((1, 2, 3))
            whole = (f"pl.Element({size})", f"{axes[a]} * {step} - {choose((0, 1))}", grid[a] * step + size - ragged)
        spec.block.append(whole[0])
        spec.index.append(whole[1])
        spec.shape.append(whole[2])
    return spec


def _output_spec(draw, block: Sequence[int], grid: Sequence[int], axes: Sequence[str], ragged: int = 3) -> _Spec:
    """Every program has a block of its own, of which the last may lack up to so many elements."""
    spec = _Spec([], [], [])
    free = list(range(len(grid)))
    for size in block:
        if free and draw(st.integers(0, 2)):
            a = free.pop(draw(st.integers(0, len(free) - 1)))
            index = axes[a] if draw(st.integers(0, 2)) else f"{grid[a] - 1} - {axes[a]}"
            spec.block.append(str(size))
            spec.index.append(index)
            spec.shape.append(grid[a] * size - draw(st.integers(0, min(size - 1, ragged))))
        else:
            spec.block.append(str(size))
            spec.index.append("0")
            spec.shape.append(size)
    for a in free:
        spec.block.insert(0, "None")
        spec.index.insert(0, axes[a])
        spec.shape.insert(0, grid[a])
    return spec


def _store(body: Body, name: str, v: Value) -> Value:
    """Writes a value to an output, sometimes in pieces or over what was there; returns what is known of the output."""
    how = body.one_of(("plain", "plain", "plain", "halves", "when", "masked", "add"))
    result = v
    if how == "halves" and v.rank and v.shape[0] % 2 == 0:
        half = v.shape[0] // 2
        body.lines.append(f"{name}[pl.ds(0, {half})] = {v.text}[:{half}]")
        body.lines.append(f"{name}[pl.ds({half}, {half})] = {v.text}[{half}:]")
        return result
    body.lines.append(f"{name}[...] = {v.text}")
    with contextlib.suppress(NoOperand):
        if how == "when":
            other = body.fitting(v.shape, v.dtype) if v.dtype not in STORED else v
            test = body.pick(lambda v: v.shape == () and v.exact and v.dtype in ("bool", "int32"))
            body.lines.append(f"@pl.when({test.text}{' > 0' if test.dtype == 'int32' else ''})")
            body.lines += ["def _():", f"    {name}[...] = {other.text}"]
        elif how == "masked" and v.rank:
            mask = body.pick(lambda m: m.dtype == "bool" and m.shape == v.shape)
            other = body.fitting(v.shape, v.dtype) if v.dtype not in STORED else v
            body.lines.append(f"jtile.store({name}.at[...], {other.text}, mask={mask.text})")
        elif how == "add" and v.dtype in ("int32", "float32") and v.exact:
            body.lines.append(f"{name}[...] += 1")
            return dataclasses.replace(v, bound=v.bound + 1)
        else:
            return result
        result = dataclasses.replace(
            v, bound=max(v.bound, other.bound), error=max(v.error, other.error), special=v.special or other.special
        )
    return result


@st.composite
def programs(draw) -> Program:
    grid = draw(st.sampled_from(((2,), (), (1,), (3,), (2, 3), (3, 2), (4, 1), (2, 2, 2), (3, 1, 2), (2, 1, 3, 2))))
    axes = ["i", "j", "k", "l"][: len(grid)]
    names = itertools.count(1)
    body = Body(draw, [], names, ids=len(grid))
    common = [body.one_of(SIZES) for _ in range(draw(st.integers(1, 3)))]
    while math.prod(common) > MOST_ELEMENTS // 2:
        common[common.index(max(common))] //= 2
    specs, operands, refs = [], [], []

    def operand(block, dtype, spec, number):
        special = dtype in PRECISION and body.chance(4)
        if dtype in INTEGERS:
            bound = greatest(dtype) if body.chance(2) else 5.0
        else:
            bound = 1.0 if dtype == "bool" else float(body.one_of((1, 4, 8)))
        specs.append(spec)
        operands.append((tuple(spec.shape), dtype, bound, special))
        refs.append(Ref(f"{'abcdef'[number]}_ref", tuple(block), dtype, bound, special))

    for number in range(draw(st.integers(1, 3))):
        block = [1 if body.chance(8) else n for n in common][body.one_of((0, 0, 0, 0, 1)) * (len(common) > 1) :]
        if body.chance(4):
            block = [body.one_of(SIZES) if body.chance(2) else n for n in block]
        if math.prod(block) > MOST_ELEMENTS:
            block = common
        operand(block, body.one_of(DTYPES), _input_spec(draw, block, grid, axes), number)
    aliases = {}
    aliased = body.chance(6)
    if aliased:
        spec = _output_spec(draw, common, grid, axes)
        aliases[len(specs)] = 0
        operand(common, body.one_of([d for d in DTYPES if d not in STORED]), spec, len(specs))
    body.refs = [ref for i, ref in enumerate(refs) if i not in aliases]
    for ref in refs:
        read(body, ref, "...", ref.shape)
    written, own = [], []
    for _ in range(draw(st.integers(0, 2))):  # memory to write and read: results that no edge cuts, or scratch
        with contextlib.suppress(NoOperand):
            v = body.pick(exact)
            if body.chance(2):
                ref = Ref(f"own{len(own)}_ref", v.shape, v.dtype, v.bound, v.special, writable=True)
                own.append(ref)
            else:
                ref = Ref(f"written{len(written)}_ref", v.shape, v.dtype, v.bound, v.special, writable=True)
                written.append(ref)
            body.lines.append(f"{ref.name}[...] = {v.text}")
            body.refs.append(ref)
    body.steps(16, [anything])
    outputs, results = [], []
    leaves = body.leaves() or body.values[-1:]
    for number in range(min(draw(st.integers(1, 4)), len(leaves))):
        name = f"{'xyzw'[number]}_ref"
        if number == 0 and aliased:
            source, spec = refs[-1], specs[-1]
            matching = [v for v in reversed(body.values) if v.shape == source.shape]
            value = body.cast(matching[0], source.dtype) if _castable(matching[0], source.dtype) else None
            value = value or next(v for v in body.values if v.shape == source.shape and v.dtype == source.dtype)
        else:
            value = leaves[number]
            wanted = body.one_of((value.dtype, value.dtype, *DTYPES))
            if _castable(value, wanted):
                value = body.cast(value, wanted)
            spec = _output_spec(draw, value.shape, grid, axes)
        outputs.append(spec)
        results.append(dataclasses.replace(_store(body, name, value), shape=tuple(spec.shape)))
    for ref in written:
        outputs.append(_output_spec(draw, ref.shape, grid, axes, ragged=0))
        results.append(Value("", tuple(outputs[-1].shape), ref.dtype, ref.bound, special=ref.special))
    parameters = [r.name for r in refs] + [f"{n}_ref" for n in "xyzw"[: len(results) - len(written)]]
    parameters += [r.name for r in written + own]
    mapped = 0 if aliased or not body.chance(5) else body.one_of((2, 3))
    in_axes = [0 if body.chance(2) else None for _ in operands]
    in_axes[0] = 0
    params = {
        "num_warps": body.one_of((4, 1, 2, 8)),
        "num_stages": body.one_of((2, 1, 3)),
        "tma": body.one_of((None, None, True)),
    }
    lines = [
        "import jax",
        "import jax.numpy as jnp",
        "from jax import lax",
        "from jax.experimental import pallas as pl",
        "from jax.experimental.pallas import tpu as pltpu",
        "",
        "import jtile",
        "",
        "",
        f"def kernel({', '.join(parameters)}):",
        *(f"    {line}" for line in body.lines),
        "",
        "",
        "call = pl.pallas_call(",
        "    kernel,",
        f"    grid=({_listed(grid)}),",
        f"    in_specs=[{', '.join(s.text(axes) for s in specs)}],",
        f"    out_specs=[{', '.join(s.text(axes) for s in outputs)}],",
        "    out_shape=["
        + ", ".join(
            f"jax.ShapeDtypeStruct(({_listed(s.shape)}), jnp.{v.dtype})" for s, v in zip(outputs, results, strict=True)
        )
        + "],",
        f"    scratch_shapes=[{', '.join(f'pltpu.VMEM(({_listed(r.shape)}), jnp.{r.dtype})' for r in own)}],",
        f"    input_output_aliases={aliases},",
        f"    compiler_params=jtile.CompilerParams({', '.join(f'{k}={v}' for k, v in params.items())}),",
        ")",
    ]
    if mapped:
        lines.append(f"call = jax.vmap(call, in_axes={tuple(in_axes)})")
        operands = [
            ((mapped, *s), *rest) if a == 0 else (s, *rest) for a, (s, *rest) in zip(in_axes, operands, strict=True)
        ]
        results = [dataclasses.replace(v, shape=(mapped, *v.shape)) for v in results]
    return Program("\n".join(lines) + "\n", tuple(map(tuple, operands)), tuple(results), draw(st.integers(0, 99)))


def _castable(v: Value, dtype: str) -> bool:
    if v.dtype == dtype:
        return True
    if dtype in PRECISION:
        return True
    return not v.special and (v.exact or dtype in STORED)


# Comparing

DTYPES = (*PRECISION, *INTEGERS, "bool", *STORED)


def on_cpu(call: Callable) -> Callable:
    """The generated source, in Triton's interpreter."""
    return jtile.debug(call)


def on_gpu(call: Callable) -> Callable:
    return jax.jit(call)


def check(program: Program, run: Callable[[Callable], Callable]) -> None:
    """Compares what `run` makes of a program with what Pallas' interpreter does."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        # The kernels are small: compiling is what takes time. And every type rounds as it says.
        options = {"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False}
        expected = jax.jit(interpret_pallas(program.call), compiler_options=options)(*program.arrays())
    found = run(program.call)(*program.arrays())
    for f, e, known in zip(found, expected, program.results, strict=True):
        assert (f.shape, f.dtype) == (e.shape, e.dtype), (f, e)
        wide = np.float64 if known.dtype in (*PRECISION, *STORED) else np.int64
        f, e = np.asarray(f).astype(wide), np.asarray(e).astype(wide)
        if wide is np.float64 and not known.special:
            largest = np.max(np.abs(e), initial=0.0)
            assert largest <= known.bound + known.error, f"the fuzzer's bound is wrong: {largest} > {known.bound}"
        np.testing.assert_allclose(f, e, rtol=0, atol=known.error)


def examples(
    run: Callable[[Callable], Callable], count: int, seed: int, shrink: bool = True, report: bool = False
) -> None:
    """Draws and checks `count` programs. Raises at a mismatch, with the smallest program found that still shows it."""
    done, start, phase = itertools.count(1), time.monotonic(), hypothesis.Phase

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
        phases=[phase.generate, phase.shrink] if shrink else [phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(programs())
    def agrees(program):
        try:
            check(program, run)
        except Exception:
            if report and (number := next(done)) <= count:
                print(f"seed {seed}: kernel {number} does not agree:\n{program}", flush=True)
                for _ in range(count):  # what follows are attempts to make it smaller
                    next(done)
            raise
        if (number := next(done)) % 50 == 0 and report and number <= count:
            print(f"seed {seed}: {number} kernels agree, {time.monotonic() - start:.0f} s", flush=True)

    agrees()


def _work(gpu: bool, count: int, seed: int, shrink: bool) -> str:
    """Runs in a process of its own; returns what went wrong, or nothing."""
    try:
        examples(on_gpu if gpu else on_cpu, count, seed, shrink, report=True)
    except Exception as error:
        return "".join(traceback.format_exception(error))
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=300, help="kernels to draw, in all")
    parser.add_argument("--seed", type=int, default=0, help="of the first process; the others count up from it")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--gpu", action="store_true", help="compile and run on the GPU")
    parser.add_argument("--no-shrink", action="store_true", help="report mismatches as drawn")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cuda,cpu" if options.gpu else "cpu"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    count = math.ceil(options.examples / options.processes)
    with (
        tempfile.TemporaryDirectory() as os.environ["JTILE_CACHE_DIR"],
        concurrent.futures.ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool,
    ):
        work = functools.partial(_work, options.gpu, count, shrink=not options.no_shrink)
        seeds = range(options.seed, options.seed + options.processes)
        failures = {seed: text for seed, text in zip(seeds, pool.map(work, seeds), strict=True) if text}
    for seed, text in failures.items():
        print(f"\n--seed {seed} --examples {count}:\n{text}")
    wrong = f"mismatches with seeds {list(failures)}" if failures else "no mismatch"
    print(f"{count * options.processes} kernels, {wrong}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
