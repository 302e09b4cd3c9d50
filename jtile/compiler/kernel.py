"""A `pallas_call` equation, normalised: what the emitter needs to know, and nothing of how Pallas stores it."""

import dataclasses
import hashlib
import itertools
import keyword
import linecache
import os.path
import re
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.experimental import pallas as pl

from jtile.compiler.arguments import Array, Descriptor


class UnsupportedKernel(NotImplementedError):
    """A kernel that cannot become Triton source: says what, where in the user's code, and what to write instead."""


class TileTooLarge(ValueError):
    """A kernel that asks for more than a thread block may have: of elements in a tile, shared memory, threads,
    registers or tensor memory."""


@dataclasses.dataclass(frozen=True)
class Dimension:
    """How one dimension of an array is cut into blocks: a program sees `size` elements from `index * step`."""

    size: int
    step: int  # the block's size, or 1 where the index map counts elements (`pl.Element`, squeezed)
    squeezed: bool  # size 1, and dropped from the kernel's view


@dataclasses.dataclass(frozen=True)
class Ref:
    """An operand or result of the kernel: a row-major array, and the block of it that a program sees."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    block: tuple[Dimension, ...]
    index_map: Any  # jaxpr: an integer per grid axis, the prefetched refs -> an integer per dimension; None: all zero

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(int(np.prod(self.shape[i + 1 :], dtype=np.int64)) for i in range(len(self.shape)))


@dataclasses.dataclass(frozen=True)
class Scratch:
    """A ref of memory that a program has for itself: on a GPU its registers, so a variable of the Triton function."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A `pallas_call`, normalised.

    Attributes:
      name: a valid identifier.
      grid: programs along each axis, the axes that `jax.vmap` added included; None where the size is traced.
      axis_names: their names, if they have any.
      mapped: the axes that `jax.vmap` added, outermost first. The kernel's own `pl.program_id` does not count them.
      refs: inputs, then outputs. The first inputs are the grid's traced sizes, which the kernel does not see as refs.
      num_prefetched: how many of the next inputs are there whole for the index maps to read.
      scratch: what each program has for itself.
      jaxpr: the kernel's body; one input variable per ref that it sees, then one for each of `scratch`.
      input_output_aliases: pairs (input, output) that share one buffer.
      where: the kernel function's file and line.
    """

    name: str
    grid: tuple[int | None, ...]
    axis_names: tuple[Hashable, ...]
    mapped: tuple[int, ...]
    refs: tuple[Ref, ...]
    num_inputs: int
    num_prefetched: int
    scratch: tuple[Scratch, ...]
    jaxpr: Any
    input_output_aliases: tuple[tuple[int, int], ...]
    where: str

    @property
    def own_axes(self) -> tuple[int, ...]:
        """The axes of the grid that the kernel's author knows of."""
        return tuple(axis for axis in range(len(self.grid)) if axis not in self.mapped)

    @property
    def known_grid(self) -> tuple[int, ...]:
        """The grid's sizes that are not traced."""
        return tuple(n for n in self.grid if n is not None)

    @property
    def num_sizes(self) -> int:
        """How many sizes of the grid are traced."""
        return self.grid.count(None)

    @property
    def inputs(self) -> tuple[Ref, ...]:
        return self.refs[: self.num_inputs]

    @property
    def outputs(self) -> tuple[Ref, ...]:
        return self.refs[self.num_inputs :]


class Place(NamedTuple):
    """A line of the user's code."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{os.path.basename(self.file)}:{self.line}"

    @property
    def text(self) -> str:
        return linecache.getline(self.file, self.line).strip()


@dataclasses.dataclass(frozen=True)
class Source:
    """A kernel as Triton source.

    Attributes:
      name: the `@triton.jit` function to compile.
      text: a whole Python module, the same bytes in every process.
      arguments: what each parameter gets.
      buffers: the input or output that it is, inputs counted first.
      grid: programs to launch along x, y and z, within CUDA's limits.
      origins: for each line of `text` the user's line that it came from. It is no part of what is compiled: a kernel
        that moves in its file stays the same kernel.
      where: the kernel function's file and line, for errors; no part of it either.
    """

    name: str
    text: str
    arguments: tuple[Array | Descriptor, ...]
    buffers: tuple[int, ...]
    grid: tuple[int, int, int]
    origins: tuple[Place | None, ...] = dataclasses.field(default=(), compare=False, repr=False)
    where: str = dataclasses.field(default="", compare=False, repr=False)

    @property
    def label(self) -> str:
        """What errors call the kernel."""
        return f"{self.name} ({self.where})" if self.where else self.name

    @property
    def annotated(self) -> str:
        """`text` with the user's line, as a comment, above each part that came from it."""
        lines, last = [], None
        for line, origin in itertools.zip_longest(self.text.splitlines(), self.origins):
            if origin not in (None, last):
                indent = " " * (len(line) - len(line.lstrip()))
                lines.append(f"{indent}# {origin}: {origin.text}" if origin.text else f"{indent}# {origin}")
                last = origin
            lines.append(line)
        return "\n".join(lines) + "\n"

    @property
    def digest(self) -> str:
        """Tells texts apart, in names."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:8]


def kernel_of(params: dict[str, Any]) -> Kernel:
    """The kernel in the parameters of a `pallas_call` equation.

    Raises:
      UnsupportedKernel: the call uses what Triton cannot express: blocks that are gathered, clipped or padded.
    """
    mapping, jaxpr = params["grid_mapping"], params["jaxpr"]
    debug = jaxpr.debug_info
    function, _, where = debug.func_src_info.partition(" at ")
    name = _identifier(debug.func_name or function, "kernel")

    def unsupported(what: str, cure: str) -> UnsupportedKernel:
        return UnsupportedKernel(f"jtile cannot compile kernel {name} ({where}): {what}. {cure}")

    if params["mesh"] is not None:
        raise unsupported(
            "it is given a mesh of cores, which GPUs programmed through Triton don't have", "Use the grid instead."
        )
    names = _parameter_names(debug.arg_names, mapping)
    sizes = mapping.num_dynamic_grid_bounds
    refs = [Ref(next(names), (), np.dtype(np.int32), (), None) for _ in range(sizes)]
    for var in jaxpr.invars[mapping.slice_index_ops]:
        shape = tuple(var.aval.shape)
        block = tuple(Dimension(n, n, False) for n in shape)
        refs.append(Ref(next(names), shape, var.aval.dtype, block, None))
    for block in mapping.block_mappings:
        ref_name, aval = next(names), block.array_aval
        dimensions = tuple(_dimension(d, ref_name, unsupported) for d in block.block_shape)
        if not isinstance(aval.dtype, np.dtype):
            raise unsupported(
                f"{ref_name} is an array of {aval.dtype}",
                "Pass the data of keys, `jax.random.key_data(keys)`, and in the kernel `jax.random.wrap_key_data` it.",
            )
        refs.append(Ref(ref_name, tuple(aval.shape), aval.dtype, dimensions, block.index_map_jaxpr))
    scratch = [scratch_of(next(names), aval, unsupported) for aval in mapping.scratch_avals]
    return Kernel(
        name=name,
        grid=tuple(n if isinstance(n, int) else None for n in mapping.grid),
        axis_names=mapping.grid_names or (),
        mapped=tuple(mapping.vmapped_dims),
        refs=tuple(refs),
        num_inputs=sizes + mapping.num_index_operands + mapping.num_inputs,
        num_prefetched=mapping.num_index_operands,
        scratch=tuple(scratch),
        jaxpr=jaxpr,
        input_output_aliases=tuple((sizes + i, o) for i, o in params["input_output_aliases"]),
        where=where,
    )


def scratch_of(name: str, aval, unsupported: Callable) -> Scratch:
    """A ref allocated for one program. `unsupported` makes the error for what is no array, such as a semaphore."""
    if not hasattr(aval, "inner_aval") or not isinstance(aval.dtype, np.dtype):
        raise unsupported(
            f"{name} is allocated as {aval}",
            "Triton has arrays in registers: ask for `pl.ANY(shape, dtype)`; it synchronises threads by itself.",
        )
    return Scratch(name, tuple(aval.shape), np.dtype(aval.dtype))


def _dimension(block, ref_name, unsupported) -> Dimension:
    match block:
        case pl.Squeezed():
            return Dimension(1, 1, True)
        case pl.Blocked(size):
            return Dimension(size, size, False)
        case pl.Element(size, (0, 0)):
            return Dimension(size, 1, False)
    raise unsupported(
        f"the block of {ref_name} has a dimension {block}",
        "Use a plain size, None, or `pl.Element` without padding: reads past an array's end give 0 as it is.",
    )


def _parameter_names(argument_names, mapping) -> Iterator[str]:
    """The kernel's own parameter names, made valid and distinct."""
    given = list(argument_names or ())
    counts = {
        "index": mapping.num_index_operands,
        "in": mapping.num_inputs,
        "out": mapping.num_outputs,
        "scratch": mapping.num_scratch_operands,
    }
    fallback = [f"{kind}{i}_ref" for kind, count in counts.items() for i in range(count)]
    if len(given) != len(fallback):
        given = fallback
    sizes = [f"grid_{i}_ref" for i in range(mapping.num_dynamic_grid_bounds)]
    given, fallback = sizes + given, sizes + fallback
    taken = set()
    for name, spare in zip(given, fallback, strict=True):
        name = _identifier(name, spare)
        while name in taken:
            name += "_"
        taken.add(name)
        yield name


def _identifier(text: str | None, spare: str) -> str:
    """`text` as a Python identifier that the emitter does not use itself: `refs[0]` becomes `refs_0`."""
    name = re.sub(r"\W+", "_", text or "").strip("_")
    taken = re.fullmatch(r"tl|triton|libdevice|float|pid|(pid|lanes)_\d+", name)
    return spare if not name or name[0].isdigit() or keyword.iskeyword(name) or taken else name
