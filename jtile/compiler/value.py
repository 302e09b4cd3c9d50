"""What a rule takes and gives: a JAX value with its name in the Triton source."""

import dataclasses
import math

import numpy as np
from jax import numpy as jnp
from jax.experimental import pallas as pl

from jtile.compiler.kernel import Ref

TRITON_TYPES = {
    "bool": "tl.int1",
    "int4": "tl.int8",  # a byte each: see `stored`
    "int8": "tl.int8",
    "int16": "tl.int16",
    "int32": "tl.int32",
    "int64": "tl.int64",
    "uint4": "tl.uint8",
    "uint8": "tl.uint8",
    "uint16": "tl.uint16",
    "uint32": "tl.uint32",
    "uint64": "tl.uint64",
    "float8_e4m3fn": "tl.float8e4nv",
    "float8_e5m2": "tl.float8e5",
    "float16": "tl.float16",
    "bfloat16": "tl.bfloat16",
    "float32": "tl.float32",
    "float64": "tl.float64",
}

type Interval = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Value:
    """A scalar or tile.

    Triton's tiles have power-of-two sides, so the tile behind a value of shape (3, 96) is 4 x 128. Lanes outside the
    shape hold anything unless `zero_padded`; rules mask them where they could reach lanes inside.

    Attributes:
      text: its name; or, when `constant` is given, the literal, which Triton broadcasts where it is used.
      constant: the one number that every lane holds.
      bounds: least and greatest of an integer value, where known: what proves that an access stays inside an array.
      multiple: what an integer value is known to be a multiple of: what proves that an offset is aligned. 0 of 0.
      zero_padded: the lanes outside the shape are known to hold 0.
      product: a product of floats, which the compiler may fuse with an addition and then round only once.
    """

    text: str
    shape: tuple[int, ...]
    dtype: np.dtype
    constant: bool | int | float | None = None
    bounds: Interval | None = None
    zero_padded: bool = False
    product: bool = False
    multiple: int = 1

    @property
    def tile(self) -> tuple[int, ...]:
        return tile(self.shape)

    def zero_outside(self, shape: tuple[int, ...]) -> bool:
        """Whether the value, broadcast to `shape`, holds 0 in the lanes outside of it."""
        if self.constant is not None:
            return self.constant == 0
        kept = len(self.shape) == len(shape) and all(
            n == m or m == p for n, m, p in zip(self.shape, shape, tile(shape), strict=True)
        )
        return kept and self.zero_padded

    @property
    def padded_axes(self) -> tuple[int, ...]:
        return tuple(axis for axis, (n, p) in enumerate(zip(self.shape, self.tile, strict=True)) if n != p)


def tile(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The smallest sides Triton has for `shape`."""
    return tuple(pl.next_power_of_2(int(n)) for n in shape)


def constant(number, shape: tuple[int, ...], dtype) -> Value:
    """A value that holds `number` in every lane."""
    dtype = np.dtype(dtype)
    number = np.asarray(number, dtype).item()
    if not jnp.issubdtype(dtype, np.integer):
        return Value(literal(number, dtype), shape, dtype, number, zero_padded=number == 0)
    bounds, multiple = (number, number), abs(number)
    return Value(literal(number, dtype), shape, dtype, number, bounds, number == 0, multiple=multiple)


def literal(number: bool | int | float, dtype: np.dtype) -> str:
    """The shortest text that reads back as `number` in `dtype`."""
    if not isinstance(number, float):
        return repr(number)
    if not math.isfinite(number):
        return f'float("{number}")'
    return repr(number if dtype == np.float64 else float(str(np.float32(number))))


def behind_a_move(text: str, dtype) -> str:
    """The same number, of 32 or 64 bits, of which the compiler does not know where it comes from."""
    bits = 8 * np.dtype(dtype).itemsize
    register = {("f", 32): "f", ("f", 64): "d", ("i", 32): "r", ("i", 64): "l"}[np.dtype(dtype).kind, bits]
    return (
        f'tl.inline_asm_elementwise("mov.b{bits} $0, $1;", "={register},{register}", [{text}], '
        f"dtype={triton_type(dtype)}, is_pure=True, pack=1)"
    )


def triton_type(dtype) -> str:
    """The name of `dtype` in Triton."""
    return TRITON_TYPES[np.dtype(dtype).name]


def narrow_float(dtype) -> bool:
    """Whether Triton does only the simplest arithmetic in `dtype`, so that the rest is done in float32."""
    return jnp.issubdtype(dtype, jnp.floating) and np.dtype(dtype).itemsize < 4


def float8(dtype) -> bool:
    """Whether Triton does no arithmetic in `dtype` at all."""
    return jnp.issubdtype(dtype, jnp.floating) and np.dtype(dtype).itemsize == 1


def four_bits(dtype) -> bool:
    """Whether numbers of this type have four bits; Triton has a byte for each."""
    return np.dtype(dtype).name in ("int4", "uint4")


def stored(dtype) -> np.dtype:
    """The type that numbers of `dtype` have in a kernel's arrays. XLA packs two of four bits into a byte: neighbours
    could not be written by different threads."""
    dtype = np.dtype(dtype)
    return np.dtype(dtype.name.replace("4", "8")) if four_bits(dtype) else dtype


def inner(bounds: Interval | None, dtype) -> Interval | None:
    """`bounds` if every number in them fits `dtype`, so that arithmetic did not wrap around."""
    if bounds is None:
        return None
    info = jnp.iinfo(dtype)
    return bounds if info.min <= bounds[0] and bounds[1] <= info.max else None


@dataclasses.dataclass(frozen=True)
class Affine:
    """An integer scalar as a sum: constant + value * factor + ..."""

    terms: tuple[tuple[Value, int], ...] = ()
    constant: int = 0

    @staticmethod
    def of(value: "Value | Affine | int") -> "Affine":
        if isinstance(value, Affine):
            return value
        if isinstance(value, Value):
            return Affine(((value, 1),)) if value.constant is None else Affine(constant=int(value.constant))
        return Affine(constant=int(value))

    def __add__(self, other: "Value | Affine | int") -> "Affine":
        other = Affine.of(other)
        return Affine(self.terms + other.terms, self.constant + other.constant)

    def __mul__(self, factor: int) -> "Affine":
        return Affine(tuple((v, k * factor) for v, k in self.terms), self.constant * factor)

    def __sub__(self, other: "Affine") -> "Affine":
        """What is left without terms that are in this sum."""
        terms = list(self.terms)
        for term in other.terms:
            terms.remove(term)
        return Affine(tuple(terms), self.constant - other.constant)

    @property
    def bounds(self) -> Interval | None:
        low = high = self.constant
        for value, factor in self.terms:
            if value.bounds is None:
                return None
            ends = sorted(end * factor for end in value.bounds)
            low, high = low + ends[0], high + ends[1]
        return low, high

    @property
    def multiple(self) -> int:
        return math.gcd(self.constant, *(value.multiple * factor for value, factor in self.terms))

    def summands(self, wide: bool = False) -> list[str]:
        """The terms as source, in 64-bit arithmetic if `wide`, else in 32-bit."""
        dtype = np.dtype(np.int64 if wide else np.int32)
        texts = []
        for value, factor in self.terms:
            text = value.text if value.dtype == dtype else f"tl.cast({value.text}, {triton_type(dtype)})"
            texts.append(text if factor == 1 else f"{text} * {factor}")
        if self.constant:
            texts.append(str(self.constant))
        return texts


def is_wide(ref: Ref) -> bool:
    """Whether offsets into an array need 64 bits."""
    return math.prod(ref.shape) > 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Block:
    """What a program sees of an array: the elements from `starts`, one integer per dimension of the array."""

    ref: Ref
    starts: tuple[Affine, ...]
