"""Triton on the CPU: each program of a `@triton.jit` function as plain Python, its tiles NumPy arrays.

It is Triton's own interpreter, repaired:

- A function compiled for the GPU runs as it is. Triton alone decides by an environment variable when it is imported.
- bfloat16 and float8 are numbers. Triton keeps their bits in integers and computes with those.
- Every array has addresses of its own, so that an access outside of it raises, where Triton would read what is there.
- Reductions by functions of one's own combine halves, in as many steps as the logarithm of the size.
- The functions of `libdevice` are NumPy's and SciPy's.

Importing this module imports Triton.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.special
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.semantic import TritonSemantic
from triton.runtime import JITFunction, interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle
from triton.runtime.jit import ConstexprFunction


class OutOfBounds(IndexError):
    """A program read or wrote outside of the arrays that it was given."""


class Descriptor(NamedTuple):
    """An array as an argument by tensor descriptor."""

    base: np.ndarray
    shape: Sequence[int]
    strides: Sequence[int]
    block_shape: Sequence[int]
    padding: str
    round_f32_to_tf32: bool


def run(function: JITFunction, arguments: Sequence[Any], grid: tuple[int, int, int]) -> None:
    """Runs a Triton function for each program of a grid, one after the other, x running fastest.

    Args:
      function: decorated with `@triton.jit`.
      arguments: one for each parameter: for a pointer a contiguous NumPy array, which the programs change in place;
        for a `constexpr` its value; a number; or a `Descriptor`.
      grid: programs along x, y and z.

    Raises:
      OutOfBounds: a program reads or writes outside of the arrays.
      RuntimeError: the environment makes Triton interpret, its own way, all that it compiles.
    """
    if not isinstance(function, JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set, with which Triton compiles nothing: unset it. jtile needs it not.")
    bases = (a.base if isinstance(a, Descriptor) else a for a in arguments)
    arrays = {p.name: a for p, a in zip(function.params, bases, strict=True) if isinstance(a, np.ndarray)}
    with _lock, _interpreting(function), np.errstate(all="ignore"):
        _builder.memory = Memory(function.fn.__name__, arrays)
        given = [
            value if parameter.is_constexpr else _argument(parameter.name, value)
            for parameter, value in zip(function.params, arguments, strict=True)
        ]
        _builder.set_grid_dim(*grid)
        body = _as_python(function)
        for z, y, x in np.ndindex(grid[::-1]):
            _builder.set_grid_idx(x, y, z)
            body(*given)


def _argument(name: str, value: Any):
    if isinstance(value, np.ndarray):
        kind = tl.pointer_type(_TRITON_TYPES[value.dtype.name])
        return tl.tensor(TensorHandle(np.array([_builder.memory.address(name)], np.uint64), kind), kind)
    if isinstance(value, Descriptor):
        descriptor = _semantic.make_tensor_descriptor(
            _argument(name, value.base),
            [_argument(name, n) for n in value.shape],
            [*(_argument(name, n) for n in value.strides[:-1]), tl.constexpr(1)],
            [tl.constexpr(n) for n in value.block_shape],
            padding_option=value.padding,
        )
        descriptor.handle.round_f32_to_tf32 = value.round_f32_to_tf32
        return descriptor
    return interpreter._implicit_cvt(value)


# Triton keeps what it runs, and where, in one place for the whole process.
_lock = threading.RLock()


@contextlib.contextmanager
def _interpreting(function: JITFunction) -> Iterator[None]:
    """A context in which `tl`, and functions made of it, work on NumPy arrays."""
    scope = interpreter._LangPatchScope()
    with contextlib.ExitStack() as stack:
        stack.callback(scope.restore)
        scope.set_attr(interpreter, "interpreter_builder", _builder)
        scope.set_attr(interpreter, "interpreter_semantic", _semantic)
        scope.set_attr(interpreter, "_get_np_dtype", _numpy_type)
        scope.set_attr(interpreter.ReduceOps, "generic_reduce", _reduce)
        scope.set_attr(interpreter.ScanOps, "generic_scan", _scan)
        scope.set_attr(JITFunction, "__call__", lambda self, *args, **kwargs: _as_python(self)(*args, **kwargs))
        scope.set_attr(ConstexprFunction, "__call__", _of_plain_values)
        for name in dir(libdevice):
            if not name.startswith("_") and callable(getattr(libdevice, name)):
                scope.set_attr(libdevice, name, _stand_in(name))
        # Patches `tl` as the functions see it: the kernel as a module, Triton's own library as its parts.
        for fn in (function.fn, tl.standard.sum.fn):
            patches = interpreter._patch_lang(fn)
            stack.callback(patches.restore)
        patches.set_attr(tl.tensor, "__index__", lambda self: self.handle.data.item())  # Triton 3.6 has it wrong
        patches.set_attr(tl, "range", _counted)
        patches.set_attr(tl, "inline_asm_elementwise", _assembly)
        patches.set_attr(tl.tensor, "__repr__", _printed)
        patches.set_attr(tl.tensor, "__str__", _printed)
        yield


def _counted(*ends, **_) -> Iterator[tl.tensor]:
    """As in compiled loops the counter is a tensor, where Triton's interpreter gives a number."""
    return map(_semantic.to_tensor, range(*ends))


def _assembly(asm: str, constraints: str, args: list[tl.tensor], **_) -> tl.tensor:
    """What the compiler writes of its own accord: moves, and the instructions that jtile has functions for."""
    instruction = asm.partition(".")[0]
    if instruction == "mov":
        return args[0]
    if instruction not in _INSTRUCTIONS:
        raise NotImplementedError(f"Inline assembly runs on GPUs alone: {asm!r}.")
    return _stand_in(_INSTRUCTIONS[instruction])(args[0])


_INSTRUCTIONS = {"ex2": "exp2", "tanh": "tanh"}


def _printed(tensor: tl.tensor) -> str:
    data = tensor.handle.data
    return str(data if tensor.type.is_block() else data.item())  # a scalar is an array of one number


def _of_plain_values(self, *args, _semantic=None, **kwargs):
    """A function of compile-time values, which are plain values here."""
    unwrapped = {name: tl.core._unwrap_if_constexpr(value) for name, value in kwargs.items()}
    return self.fn(*map(tl.core._unwrap_if_constexpr, args), **unwrapped)


def _as_python(function):
    return InterpretedFunction(function.fn).rewrite()


# Types

_NARROW = {"bf16": jnp.bfloat16, "fp8e4nv": jnp.float8_e4m3fn, "fp8e5": jnp.float8_e5m2}
_triton_numpy_type = interpreter._get_np_dtype


def _numpy_type(kind) -> np.dtype:
    narrow = _NARROW.get(kind.scalar.name)
    return np.dtype(narrow) if narrow else _triton_numpy_type(kind)


_TRITON_TYPES = {
    _numpy_type(kind).name: kind
    for kind in (
        *(tl.int1, tl.int8, tl.int16, tl.int32, tl.int64, tl.uint8, tl.uint16, tl.uint32, tl.uint64),
        *(tl.float16, tl.bfloat16, tl.float32, tl.float64, tl.float8e4nv, tl.float8e5),
    )
}


def _converted(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`x` in another type, rounded as the hardware does: to the nearest number that the type has, however far."""
    if jnp.issubdtype(x.dtype, np.floating):
        if dtype.itemsize == 1 and jnp.issubdtype(dtype, np.floating):
            limit = float(jnp.finfo(dtype).max)
            return np.clip(x.astype(np.float64), -limit, limit).astype(dtype)
        if np.issubdtype(dtype, np.integer):
            # In registers of at least 32 bits, of which a narrower type takes the lowest.
            info = np.iinfo(np.promote_types(dtype, np.uint32 if dtype.kind == "u" else np.int32))
            wide = np.nan_to_num(x.astype(np.float64), posinf=np.inf, neginf=-np.inf)
            inside = (wide > info.min) & (wide < info.max)
            clamped = np.where(wide > 0, info.max, info.min).astype(info.dtype)
            return np.where(inside, np.where(inside, wide, 0).astype(info.dtype), clamped).astype(dtype)
    return x.astype(dtype)


# Memory


class Memory:
    """The arrays of a launch, each at addresses of its own, far from the others'."""

    SPACING = 1 << 44  # bytes from the start of an array to the start of the next; more than any array has

    def __init__(self, kernel: str, arrays: dict[str, np.ndarray]):
        self.kernel = kernel
        self.names = list(arrays)
        self.arrays = [a.reshape(-1).view(np.uint8) for a in arrays.values()]

    def address(self, name: str) -> int:
        return (self.names.index(name) + 1) * self.SPACING

    def load(self, pointers: np.ndarray, mask: np.ndarray | np.bool, other: np.ndarray, dtype: np.dtype) -> np.ndarray:
        values = np.array(np.broadcast_to(other, pointers.shape), dtype)
        for elements, indices, lanes in self._parts(pointers, mask, dtype, "reads"):
            values[lanes] = elements[indices]
        return values

    def store(self, pointers: np.ndarray, values: np.ndarray, mask: np.ndarray | np.bool, dtype: np.dtype) -> None:
        values = np.broadcast_to(values, pointers.shape).astype(dtype)
        for elements, indices, lanes in self._parts(pointers, mask, dtype, "writes"):
            elements[indices] = values[lanes]

    def _parts(self, pointers: np.ndarray, mask: np.ndarray | np.bool, dtype: np.dtype, verb: str):
        """For each array that is accessed: its elements, their indices, and in which lanes."""
        half = self.SPACING // 2
        numbers = (pointers.astype(np.int64) + half) // self.SPACING - 1
        mask = np.broadcast_to(mask, pointers.shape)
        for number in np.unique(numbers[mask]):
            lanes = mask & (numbers == number)
            offsets = pointers[lanes].astype(np.int64) - (number + 1) * self.SPACING
            where = f"Program {_builder.grid_idx} of kernel {self.kernel} {verb}"
            if not 0 <= number < len(self.arrays):
                raise OutOfBounds(f"{where} at a pointer that was not made from any of its arguments.")
            size = len(self.arrays[number]) // dtype.itemsize
            indices, beyond = np.divmod(offsets, dtype.itemsize)
            outside = (indices < 0) | (indices >= size) | (beyond != 0)
            if outside.any():
                raise OutOfBounds(
                    f"{where} element {indices[outside][0]} of {self.names[number]}, which has {size}. Mask the access."
                )
            yield self.arrays[number].view(dtype), indices, lanes


class Builder(interpreter.InterpreterBuilder):
    """What carries out each operation; Triton's, except for what follows."""

    memory: Memory

    def __init__(self) -> None:
        super().__init__()
        precisions = ("tf32", "tf32x3", "ieee", "bf16x3", "bf16x6")
        self.options = interpreter.InterpreterOptions(
            allowed_dot_input_precisions=precisions, debug=True, sanitize_overflow=False
        )

    def get_bf16(self, value):  # which Triton's lacks before 3.9
        return TensorHandle(np.array([value], jnp.bfloat16), tl.bfloat16)

    # The trailing arguments, how to cache, differ between versions of Triton.

    def create_masked_load(self, ptrs, mask, other, *_, **__):
        kind = ptrs.get_element_ty()
        filler = np.zeros((), _numpy_type(kind)) if other is None else other.data
        return TensorHandle(self.memory.load(ptrs.data, mask.data, filler, _numpy_type(kind)), kind)

    def create_masked_store(self, ptrs, value, mask, *_, **__):
        self.memory.store(ptrs.data, value.data, mask.data, _numpy_type(ptrs.get_element_ty()))

    def create_atomic_rmw(self, rmwOp, ptr, val, mask, *_):
        combine = _ATOMICS[rmwOp.name]
        return self._one_by_one(ptr, mask.data, lambda old, new: combine(old, new), val)

    def create_atomic_cas(self, ptr, cmp, val, *_):
        return self._one_by_one(ptr, True, lambda old, expected, new: np.where(old == expected, new, old), cmp, val)

    def _one_by_one(self, ptr, mask, update, *values):
        """Replaces each element by `update` of it and the lane's values; returns the elements as they were."""
        kind = _numpy_type(ptr.get_element_ty())
        pointers = ptr.data.reshape(-1)
        lanes = [np.broadcast_to(v.data, ptr.data.shape).reshape(-1) for v in values]
        old = np.zeros(pointers.shape, kind)
        for i in np.flatnonzero(np.broadcast_to(mask, ptr.data.shape)):
            one = slice(i, i + 1)
            old[one] = self.memory.load(pointers[one], np.True_, old[one], kind)
            self.memory.store(pointers[one], update(old[one], *(v[one] for v in lanes)), np.True_, kind)
        return TensorHandle(old.reshape(ptr.data.shape), values[-1].dtype.scalar)

    def cast_impl(self, src, dst_type):
        return TensorHandle(_converted(src.data, _numpy_type(dst_type)), dst_type.scalar)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if rounding_mode is not None and rounding_mode.name != "RTNE":
            raise NotImplementedError(f"Floats are rounded to nearest here, and {rounding_mode.name} was asked for.")
        return self.cast_impl(src, dst_type)

    def create_splat(self, ret_ty, arg):
        # A comparison of scalars has its operands' type to Triton, but the values have their own.
        return TensorHandle(np.full(ret_ty.shape, arg.data.reshape(-1)[0], arg.data.dtype), arg.dtype.scalar)

    def create_erf(self, arg):
        return TensorHandle(scipy.special.erf(arg.data), arg.dtype.scalar)

    def create_dot(self, a, b, d, *_):
        kind = d.data.dtype
        return TensorHandle(a.data.astype(kind) @ b.data.astype(kind) + d.data, d.dtype.scalar)


_builder = Builder()
_semantic = TritonSemantic(_builder)

_ATOMICS: dict[str, Callable] = {
    **dict.fromkeys(("ADD", "FADD"), np.add),
    **dict.fromkeys(("MIN", "UMIN"), np.minimum),
    **dict.fromkeys(("MAX", "UMAX"), np.maximum),
    "AND": np.bitwise_and,
    "OR": np.bitwise_or,
    "XOR": np.bitwise_xor,
    "XCHG": lambda old, new: new,
}


# Reductions. Both methods take the place of `self`'s, a class of Triton's.


def _reduce(self, input):
    """Combines neighbours until one is left: the function is associative, and tiles have powers of two."""
    tensors, axis = self.unravel(input, self.axis)
    parts = [np.moveaxis(t.handle.data, axis, 0) for t in tensors]
    while len(parts[0]) > 1:
        parts = _combined(self, tensors, [p[0::2] for p in parts], [p[1::2] for p in parts])
    results = [p[0] for p in parts]
    if self.keep_dims:
        results = [
            np.expand_dims(p, tuple(range(input[0].handle.data.ndim)) if self.axis is None else axis) for p in results
        ]
    return [self.to_tensor(p, t.dtype) for p, t in zip(results, tensors, strict=True)]


def _scan(self, input):
    """Combines each element with those 1, 2, 4, ... before it (Hillis and Steele, 1986)."""
    parts = [np.moveaxis(t.handle.data, self.axis, 0) for t in input]
    step = 1
    while step < len(parts[0]):
        combined = _combined(self, input, [np.roll(p, step, axis=0) for p in parts], parts)
        parts = [np.concatenate([p[:step], q[step:]]) for p, q in zip(parts, combined, strict=True)]
        step *= 2
    return [self.to_tensor(np.moveaxis(p, 0, self.axis), t.dtype) for p, t in zip(parts, input, strict=True)]


def _combined(self, tensors, first, second) -> list[np.ndarray]:
    sides = [[self.to_tensor(p, t.dtype) for p, t in zip(side, tensors, strict=True)] for side in (first, second)]
    results = self.combine_fn.fn(*sides[0], *sides[1])
    return [r.handle.data for r in (results if isinstance(results, tuple) else (results,))]


# CUDA's library of functions


def _leading_zeros(x: np.ndarray) -> np.ndarray:
    bits = x.dtype.itemsize * 8
    return bits - np.frexp(x.view(f"uint{bits}").astype(np.float64))[1]


_LIBDEVICE = {
    "acos": np.arccos,
    "acosh": np.arccosh,
    "asin": np.arcsin,
    "asinh": np.arcsinh,
    "atan": np.arctan,
    "atan2": np.arctan2,
    "atanh": np.arctanh,
    "cbrt": np.cbrt,
    "clz": _leading_zeros,
    "cosh": np.cosh,
    "cyl_bessel_i1": scipy.special.i1,
    "erfc": scipy.special.erfc,
    "erfinv": scipy.special.erfinv,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "fmod": np.fmod,
    "lgamma": scipy.special.gammaln,
    "log1p": np.log1p,
    "nextafter": np.nextafter,
    "popc": lambda x: np.bitwise_count(x.view(f"uint{8 * x.dtype.itemsize}")),
    "pow": np.power,
    "rint": np.rint,
    "round": lambda x: np.trunc(x + np.copysign(0.5, x)),
    "sinh": np.sinh,
    "tan": np.tan,
    "tanh": np.tanh,
}


def _stand_in(name: str):
    def call(*arguments):
        if name not in _LIBDEVICE:
            raise NotImplementedError(f"libdevice.{name} has no counterpart on the CPU. Here are {list(_LIBDEVICE)}.")
        tensors = [a for a in arguments if isinstance(a, tl.tensor)]
        like = max(tensors, key=lambda a: a.type.is_block())
        dtype = like.handle.data.dtype
        arrays = [a.handle.data if isinstance(a, tl.tensor) else np.asarray(a, dtype) for a in arguments]
        result = np.asarray(_LIBDEVICE[name](*arrays)).astype(dtype)
        kind = tl.block_type(like.dtype, list(result.shape)) if like.type.is_block() else like.dtype
        return tl.tensor(TensorHandle(result, like.dtype), kind)

    return call
