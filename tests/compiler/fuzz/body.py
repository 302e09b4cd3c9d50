"""Statements of a kernel, drawn one after the other, and what is known of their values."""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np

# Of floats, the bits of a number's integer part that are exact: the mantissa's, with the leading one.
PRECISION = {"float32": 24, "float16": 11, "bfloat16": 8}
INTEGERS = ("int32", "int8", "uint8", "uint32", "int16", "uint16")
# Types that are only stored, not computed in, and the greatest integer up to which they hold all.
STORED = {"float8_e4m3fn": 16, "float8_e5m2": 8}
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 32)
MOST_ELEMENTS = 1024
DTYPES = (*PRECISION, *INTEGERS, "bool", *STORED)


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


@dataclasses.dataclass(frozen=True)
class Ref:
    """What the kernel sees of an operand or result, a block, or memory of its own; read, and perhaps written."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bound: float
    special: bool = False
    writable: bool = False


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
