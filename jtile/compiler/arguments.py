"""What a parameter of a kernel gets: an array, a number, a tensor descriptor, or a value fixed when compiling."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from jtile import borrowed

ALIGNMENT = 16  # bytes: XLA aligns buffers to at least this, and Triton then loads 16 bytes at once


def triton_type(dtype: np.dtype) -> str:
    """Triton's name for an element type."""
    kind = np.dtype(dtype).name
    if kind not in _TYPES:
        raise NotImplementedError(f"Triton has no element type {kind}; it has {', '.join(_TYPES)}.")
    return _TYPES[kind]


_TYPES = {
    "bool": "i1",
    **{f"int{bits}": f"i{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"u{bits}" for bits in (8, 16, 32, 64)},
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
    "float8_e4m3fn": "fp8e4nv",
    "float8_e5m2": "fp8e5",
}


# Values are compared by their `repr` too: to Python 1, 1.0 and True are equal, and to a kernel they are not.


@dataclasses.dataclass(frozen=True)
class Array:
    dtype: np.dtype
    bytes_to_zero: int = 0

    @property
    def triton_type(self) -> str:
        return f"*{triton_type(self.dtype)}"

    def aligned(self, parameter) -> bool:
        return not parameter.do_not_specialize_on_alignment

    def launch_parameters(self, encodings: Iterator) -> list:
        return [borrowed.gpu_triton().create_array_parameter(self.bytes_to_zero, ALIGNMENT)]

    def on_cpu(self, buffers: Iterator[np.ndarray]):
        """What `triton_on_cpu.run` takes for it; arrays are the next of the launch's buffers."""
        buffer = next(buffers)
        if self.bytes_to_zero:
            buffer[...] = 0
        return buffer


@dataclasses.dataclass(frozen=True)
class Scalar:
    text: str
    value: int | float
    triton_type: str

    @classmethod
    def of(cls, value, kind: str) -> "Scalar":
        return cls(repr(value), value, kind)

    def aligned(self, parameter) -> bool:
        """Whether Triton may count on a multiple of 16."""
        return type(self.value) is int and self.value % 16 == 0 and not parameter.do_not_specialize

    def launch_parameters(self, encodings: Iterator) -> list:
        return [borrowed.gpu_triton().create_scalar_parameter(self.value, self.triton_type)]

    def on_cpu(self, buffers: Iterator[np.ndarray]):
        return self.value


@dataclasses.dataclass(frozen=True)
class Constant:
    text: str
    value: Any
    triton_type = "constexpr"

    @classmethod
    def of(cls, value) -> "Constant":
        return cls(repr(value), value)

    def aligned(self, parameter) -> bool:
        return False

    def launch_parameters(self, encodings: Iterator) -> list:
        return []

    def on_cpu(self, buffers: Iterator[np.ndarray]):
        return self.value


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """How the Tensor Memory Accelerator sees an array: the host makes the descriptor when it launches the kernel.

    Attributes:
      shape, strides: of the array, in elements; the last stride is 1.
      block_shape: elements that one instruction moves.
      layout: of a block in shared memory; Gluon kernels state it, Triton chooses.
      padding: what lanes outside the array read as: "zero" or "nan".
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: tuple[int, ...]
    layout: Any = None
    padding: str = "zero"
    round_f32_to_tf32: bool = False

    @classmethod
    def of(cls, descriptor, where) -> "Descriptor":
        if descriptor.round_f32_to_tf32 and descriptor.base.dtype != np.float32:
            raise TypeError(f"{where}: round_f32_to_tf32 needs a float32 array, not {descriptor.base.dtype}.")
        return cls(
            dtype=np.dtype(descriptor.base.dtype),
            shape=tuple(map(int, descriptor.shape)),
            strides=tuple(map(int, descriptor.strides)),
            block_shape=tuple(map(int, descriptor.block_shape)),
            layout=descriptor.layout,
            padding=descriptor.padding,
            round_f32_to_tf32=descriptor.round_f32_to_tf32,
        )

    @property
    def triton_type(self) -> str:
        layout = "" if self.layout is None else f",{self.layout!r}"
        return f"tensordesc<{triton_type(self.dtype)}[{','.join(map(str, self.block_shape))}]{layout}>"

    def aligned(self, parameter) -> bool:
        return False

    def on_cpu(self, buffers: Iterator[np.ndarray]):
        from jtile.compiler.triton_on_cpu import Descriptor

        buffer = next(buffers)
        return Descriptor(buffer, self.shape, self.strides, self.block_shape, self.padding, self.round_f32_to_tf32)

    def launch_parameters(self, encodings: Iterator) -> list:
        """The descriptor, then its sizes and strides, as Triton lays out a kernel's parameters."""
        from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

        encoding, builders = next(encodings), borrowed.gpu_triton()
        # 11 in CUDA's enumeration CUtensorMapDataType rounds float32 to TF32 on the way to shared memory.
        element = 11 if self.round_f32_to_tf32 else TMA_DTYPE_DEVICE_TO_HOST[encoding["elem_type"]]
        descriptor = builders.create_tma_descriptor_parameter(
            elem_type=element,
            swizzle=encoding["swizzle"],
            shape=self.shape,
            strides=self.strides,
            block_shape=encoding["block_size"],
            oob_fill=1 if self.padding == "nan" else 0,
        )
        sizes = [builders.create_scalar_parameter(size, "i32") for size in self.shape]
        strides = [builders.create_scalar_parameter(stride, "i64") for stride in self.strides]
        return [descriptor, *sizes, *strides]


type Argument = Array | Scalar | Constant | Descriptor
