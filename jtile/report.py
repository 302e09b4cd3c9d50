"""What a function's kernels became: `inspect` compiles them for a chip, present or not, and reports."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jtile.compiler import launch
from jtile.compiler.build import Compiled
from jtile.compiler.target import Target


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """A compiled kernel.

    Attributes:
      name: the kernel's name.
      source: its Triton or Gluon source.
      ptx: its assembly.
      registers: of a thread.
      spill_bytes: of a thread's values that found no register; zero in a good kernel.
      shared_bytes: shared memory of a thread block.
      threads: of a thread block.
      tensor_core_instructions: matrix products in the assembly.
    """

    name: str
    source: str = dataclasses.field(repr=False)
    ptx: str = dataclasses.field(repr=False)
    registers: int
    spill_bytes: int
    shared_bytes: int
    threads: int
    tensor_core_instructions: int

    def __str__(self) -> str:
        return _table([self])


class KernelReports(list[KernelReport]):
    """Reports of several kernels; printed, a table."""

    def __str__(self) -> str:
        return _table(self) if self else "no kernels"


def inspect(fn: Callable, *args: Any, target: str | Target | None = "NVIDIA H200") -> list[KernelReport]:
    """Compiles the kernels in a function and reports what they became. Nothing runs, and no GPU is needed.

    Ops that choose their implementation choose as they would on the GPU. A kernel compiled once is listed once, however
    often it is launched.

    Args:
      fn: a function that JAX can trace: jtile's ops, `jtile.triton_call` and Pallas kernels with
        `jtile.CompilerParams`, under any of JAX's transformations.
      *args: its arguments, pytrees of arrays or of `jax.ShapeDtypeStruct`s. Only shapes and dtypes count.
      target: the chip's name; None for the GPU of this machine.

    Returns:
      A report for each kernel, in the order in which the program first launches them. Printed, a table.

    Raises:
      ValueError: jtile knows no such chip.
      RuntimeError: `target=None` on a machine without a GPU.

    Example:
      >>> def double(x_ref, y_ref):
      ...     y_ref[...] = x_ref[...] * 2
      >>> def f(x):
      ...     return pl.pallas_call(double, out_shape=x, compiler_params=jtile.CompilerParams(num_warps=2))(x)
      >>> [kernel] = inspect(f, jax.ShapeDtypeStruct((512,), jnp.float32))
      >>> kernel.name, kernel.threads, kernel.spill_bytes
      ('double', 64, 0)
    """
    chip = Target.current() if target is None else target if isinstance(target, Target) else Target.named(target)
    # A new function each time: JAX would take a lowering that it remembers, and no kernel would be seen.
    traced = jax.jit(lambda *args: fn(*args))
    with jax.sharding.use_abstract_mesh(chip.abstract_mesh), launch.recording() as kernels:
        traced.trace(*jax.tree.map(_abstract, args)).lower(lowering_platforms=("cuda",))
    distinct = {(k.name, k.cubin): k for k in kernels}
    return KernelReports(map(_report, distinct.values()))


def _abstract(leaf):
    """An array's shape and dtype, without the devices that it lives on."""
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=getattr(leaf, "weak_type", False))


def _report(kernel: Compiled) -> KernelReport:
    return KernelReport(**{field.name: getattr(kernel, field.name) for field in dataclasses.fields(KernelReport)})


def _table(reports) -> str:
    columns = [field.name for field in dataclasses.fields(KernelReport) if field.repr]
    values = [[getattr(report, column) for column in columns] for report in reports]
    rows = [columns, *([f"{v:,}" if isinstance(v, int) else v for v in row] for row in values)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
