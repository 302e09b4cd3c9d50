"""What a function's kernels became, by `inspect`, and which of its ops run as kernels and why, by `explain`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType

from jtile import borrowed
from jtile.compiler import launch
from jtile.compiler.launch import Launch
from jtile.compiler.pallas import adopting
from jtile.compiler.rewrite import equations
from jtile.compiler.target import Occupancy, Target
from jtile.op.lowering import choose, choose_tile, folded
from jtile.op.primitive import Call, TileOp, TilePrimitive
from jtile.op.rules import ungrouped
from jtile.op.sharding import Layout, axes_of, in_words


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """A compiled kernel.

    Attributes:
      name: the kernel's name.
      target: the chip's name.
      source: its Triton or Gluon source, each part of what Pallas became below the line of Pallas that it came from.
      ptx: its assembly.
      instructions: how often the assembly has each instruction that computes matrix products or moves data:
        `ld.global.v4.b32` loads 16 bytes at once, `cp.async.bulk.tensor` copies a tile.
      registers: of a thread.
      spill_bytes: of a thread's values that found no register; zero in a good kernel.
      shared_bytes: shared memory of a thread block.
      threads: of a thread block.
      occupancy: how many of its blocks a multiprocessor holds at once, and what there is not enough of for more.
      tensor_core_instructions: matrix products in the assembly.
      tma_instructions: copies by the Tensor Memory Accelerator in the assembly.
    """

    name: str
    target: str
    source: str = dataclasses.field(repr=False)
    ptx: str = dataclasses.field(repr=False)
    instructions: dict[str, int] = dataclasses.field(repr=False)
    registers: int
    spill_bytes: int
    shared_bytes: int
    threads: int
    occupancy: Occupancy
    tensor_core_instructions: int
    tma_instructions: int

    def __str__(self) -> str:
        return _kernel_table([self])


class KernelReports(list[KernelReport]):
    """Reports of several kernels; printed, a table."""

    def __str__(self) -> str:
        return _kernel_table(self) if self else "no kernels"


def inspect(fn: Callable, *args: Any, target: str | Target | None = "NVIDIA H200") -> list[KernelReport]:
    """Compiles the kernels in a function and reports what they became. Nothing runs, and no GPU is needed.

    Ops that choose their implementation choose as they would on the GPU. A kernel compiled once is listed once, however
    often it is launched.

    Args:
      fn: a function that JAX can trace: jtile's ops, `jtile.triton_call` and Pallas kernels, under any of JAX's
        transformations. Kernels without `jtile.CompilerParams`, which JAX's own backend compiles when `fn` runs, are
        shown as `jtile.retarget_pallas(fn)` has them.
      *args: its arguments, pytrees of arrays or of `jax.ShapeDtypeStruct`s. Only shapes and dtypes count.
      target: the chip's name; None for the GPU of this machine.

    Returns:
      A report for each kernel, in the order in which the program first launches them. Printed, a table.

    Raises:
      ValueError: jtile knows no such chip.
      RuntimeError: `target=None` on a machine without a GPU.

    Example:
      >>> import jax.numpy as jnp, jtile
      >>> from jax.experimental import pallas as pl
      >>> def double(x_ref, y_ref):
      ...     y_ref[...] = x_ref[...] * 2
      >>> def f(x):
      ...     return pl.pallas_call(double, out_shape=x, compiler_params=jtile.CompilerParams(num_warps=2))(x)
      >>> [kernel] = inspect(f, jax.ShapeDtypeStruct((512,), jnp.float32))
      >>> kernel.name, kernel.threads, kernel.spill_bytes
      ('double', 64, 0)
    """
    chip = Target.current() if target is None else target if isinstance(target, Target) else Target.named(target)
    return KernelReports(report(one, chip) for one in launches(fn, args, chip))


def launches(fn: Callable, args: Sequence, target: Target) -> list[Launch]:
    """The kernels that a function launches on a chip, each once."""
    # A new function each time: JAX would take a lowering that it remembers, and no kernel would be seen.
    traced = jax.jit(lambda *args: fn(*args))
    with jax.sharding.use_abstract_mesh(target.abstract_mesh), launch.recording() as found, adopting():
        traced.trace(*jax.tree.map(_abstract, args)).lower(lowering_platforms=("cuda",))
    return list({(one.compiled.name, one.compiled.cubin): one for one in found}.values())


def _abstract(leaf):
    """An array's shape and dtype, without the devices that it lives on."""
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=getattr(leaf, "weak_type", False))


def report(one: Launch, target: Target) -> KernelReport:
    """What the kernel of a launch became."""
    compiled = one.compiled
    return KernelReport(
        name=compiled.name,
        target=target.name,
        source=one.source.annotated if one.source else compiled.source,
        ptx=compiled.ptx,
        instructions=compiled.instructions,
        registers=compiled.registers,
        spill_bytes=compiled.spill_bytes,
        shared_bytes=compiled.shared_bytes,
        threads=compiled.threads,
        occupancy=target.occupancy(
            compiled.registers, compiled.shared_bytes, compiled.threads, compiled.tensor_memory_columns
        ),
        tensor_core_instructions=compiled.tensor_core_instructions,
        tma_instructions=compiled.tma_instructions,
    )


def _kernel_table(reports) -> str:
    columns = [field.name for field in dataclasses.fields(KernelReport) if field.repr]
    values = ([getattr(report, column) for column in columns] for report in reports)
    return table(columns, [[f"{v:,}" if isinstance(v, int) else str(v) for v in row] for row in values], right=True)


@dataclasses.dataclass(frozen=True)
class OpReport:
    """What one op in a function runs, and why, with which tile and why that, and what devices exchange for it."""

    name: str
    operands: str
    runs: str
    why: str
    tile: str = ""
    moves: str = ""
    count: int = 1


class Explanation(tuple[OpReport, ...]):
    """The ops of a function in order of appearance; prints as a table."""

    def __str__(self) -> str:
        columns = {
            "op": [f"{r.name} ×{r.count}" if r.count > 1 else r.name for r in self],
            "operands": [r.operands for r in self],
            "runs": [r.runs for r in self],
            "why": [r.why for r in self],
            "tile": [r.tile for r in self],
            "devices exchange": [r.moves for r in self],
        }
        shown = {name: column for name, column in columns.items() if any(column)}
        return table(list(shown), list(zip(*shown.values(), strict=True))) if self else "no ops"


def explain(fn: Callable, *args, target: str | None = None) -> Explanation:
    """Which implementation runs for each jtile op in a function, and why.

    Nothing is compiled or run.

    Args:
        fn: any function of JAX arrays, differentiated and transformed as you like.
        args: its arguments, arrays or `jax.ShapeDtypeStruct`s.
        target: the GPU to explain for, such as `"NVIDIA H200"`; `None` is where `fn` would run here.

    Returns:
        One report for each op, equal calls counted together. It prints as a table. Of a kernel it notes the tile, if
        the op has several, and whether that was tuned here, is shipped with jtile, was taken over from the nearest
        sizes or another chip, or is the op's own heuristic (see `jtile.tuning`). On a mesh it notes what devices
        exchange: on explicit axes what this call does, on automatic ones, which XLA is to use yet, what splitting a
        dimension would cost.

    Raises:
        NotImplementedError: an op was asked for an implementation that cannot serve it.
        ValueError: an unknown target.

    Example:
        >>> import jax, jax.numpy as jnp, jtile
        >>> x, scale = jnp.ones((4, 8)), jnp.ones(8)
        >>> [r.runs for r in jtile.explain(jtile.rms_norm, x, scale)]
        ['reference']
        >>> [r.runs for r in jtile.explain(jtile.rms_norm, x, scale, target="NVIDIA H200")]
        ['kernel']
    """
    chip = None if target is None else Target.named(target)
    platform = "cuda" if chip is not None else _platform_here()
    if chip is None and platform == "cuda":
        chip = Target.current()
    counts: dict[OpReport, int] = {}
    for eqn in equations(jax.make_jaxpr(fn)(*args).jaxpr):
        if not isinstance(eqn.primitive, TilePrimitive):
            continue
        op, call = eqn.primitive.op, eqn.params["call"]
        avals: list[Any] = [v.aval for v in eqn.invars]
        shapes = ungrouped(avals, call)
        choice = choose(op, shapes, call, platform)
        tile = choose_tile(op, shapes, call, chip) if choice.runs == "kernel" else None
        operands = ", ".join(f"{a.dtype.name}[{','.join(map(str, a.shape))}]" for a in avals)
        tile_text = f"{tile.tile} ({tile.source})" if tile and tile.tile is not None else ""
        why = choice.why
        if tile and op.notes_function:
            notes = op.notes_function(*folded(op, shapes, call), target=chip, tile=tile.tile, **dict(call.static))
            why = ", ".join(filter(None, (why, notes)))
        report = OpReport(op.name, operands, choice.runs, why, tile_text, _moves(op, call, avals))
        counts[report] = counts.get(report, 0) + 1
    return Explanation(dataclasses.replace(report, count=count) for report, count in counts.items())


def _moves(op: TileOp, call: Call, avals: Sequence) -> str:
    """What devices exchange for a call on a mesh, in words."""
    mesh = borrowed.mesh_of(avals)
    if mesh is None or mesh.size == 1:
        return ""
    layout = Layout.of(op, avals, call)
    if AxisType.Auto in mesh.axis_types:
        factors = {f for _, dims in layout.operands for dim in dims for f in dim if layout.sizes[f] > 1}
        kept = factors & op.signature.whole
        return f"all of {', '.join(map(in_words, sorted(kept)))} where it is split" if kept else ""
    assigned = layout.settled(avals, mesh)
    found = [
        f"all of {in_words(dim[0])} of `{term.name}`"
        for (term, dims), aval in zip(layout.operands, avals, strict=True)
        for dim, axes in zip(dims, axes_of(aval.sharding.spec, aval.ndim), strict=True)
        if axes and not any(assigned.get(f) == axes for f in dim)
    ]
    found += [
        f"the {term.reduction} of `{term.name}`" for term, dims in layout.results if layout.reduced(dims, assigned)
    ]
    return ", ".join(found)


def _platform_here() -> str:
    device = jax.devices()[0]
    return "cuda" if device.platform == "gpu" and "NVIDIA" in device.device_kind else device.platform


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: bool = False) -> str:
    """Rows under their header, the first column to the left and the others, if so asked, to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(w) if right and i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    )
    return "\n".join(line.rstrip() for line in lines)
