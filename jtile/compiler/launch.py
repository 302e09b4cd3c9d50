"""The custom call that launches a compiled kernel: no Python at run time, the machine code inside the program."""

import dataclasses
import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import mlir

from jtile import borrowed
from jtile.compiler.arguments import ALIGNMENT, Argument
from jtile.compiler.build import Compiled
from jtile.compiler.kernel import Kernel, Source
from jtile.context import setting

CUSTOM_CALL = "triton_kernel_call_ffi"  # jaxlib's, which the CUDA plugin registers

# `jax.export` refuses custom calls whose format jaxlib does not promise to keep: pass this as `disabled_checks`.
EXPORT_CHECKS = (jax.export.DisabledSafetyCheck.custom_call(CUSTOM_CALL),)


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel as a program launches it.

    Attributes:
      compiled: its machine code.
      grid: programs along x, y and z.
      kernel, source: what it was compiled from; None for a kernel written by hand.
      first_line: where the lines of `compiled.source` begin in the file that the assembly names.
    """

    compiled: Compiled
    grid: tuple[int, int, int]
    kernel: Kernel | None = None
    source: Source | None = None
    first_line: int = 1


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)


def recording() -> AbstractContextManager[list[Launch]]:
    """Collects every launch that is lowered inside, in order."""
    return setting(_recorded, [])


def launch(
    ctx,
    operands: Sequence,
    launched: Launch,
    arguments: Sequence[Argument],
    aliases: Mapping[int, int],
    metadata: Mapping[str, str] | None = None,
) -> Sequence:
    """Emits the custom call, from a lowering rule.

    Args:
      ctx, operands: the rule's.
      arguments: the kernel's, in order; arrays and descriptors take the next buffer, operands first.
      aliases: operand number to the result that shares its buffer.
      metadata: notes that profilers show with the call.

    Returns: the results.
    """
    if (launches := _recorded.get()) is not None:
        launches.append(launched)
    compiled, results = launched.compiled, list(ctx.avals_out)
    encodings = iter(compiled.descriptors)
    parameters = [p for argument in arguments for p in argument.launch_parameters(encodings)]
    if compiled.scratch_bytes:
        # Triton's kernels take it after their own parameters. Were it left to the launch to allocate, no CUDA graph
        # could hold the launch.
        programs = math.prod(launched.grid) * compiled.num_ctas
        results.append(jax.core.ShapedArray((programs * compiled.scratch_bytes,), jnp.uint8))
        parameters.append(borrowed.gpu_triton().create_array_parameter(0, ALIGNMENT))
    # XLA may hand a part of an array to a custom call where it lies, such as tokens[1:] for labels, and kernels are
    # compiled for addresses that are multiples of ALIGNMENT. What is behind a barrier is an array of its own.
    barrier = mlir.lower_fun(lambda *given: [jax.lax.optimization_barrier(x) for x in given], multiple_results=True)
    apart = barrier(ctx.replace(avals_out=ctx.avals_in), *operands)
    operands = [x if i in aliases else apart[i] for i, x in enumerate(operands)]  # one to write to is its own already
    call = jax.ffi.ffi_lowering(
        CUSTOM_CALL,
        api_version=4,
        operand_output_aliases=dict(aliases),
        operand_layouts=[_row_major(a) for a in ctx.avals_in],
        result_layouts=[_row_major(a) for a in results],
    )
    message = payload(compiled, launched.grid, parameters, metadata)
    return call(ctx.replace(avals_out=results), *operands, opaque=message)[: len(ctx.avals_out)]


def no_programs(ctx, operands: Sequence, aliases: Mapping[int, int]) -> Sequence:
    """Emits what a launch of no programs leaves behind, since CUDA refuses an empty grid."""

    def results(*values):
        return untouched(values, ctx.avals_out, aliases)

    return mlir.lower_fun(results, multiple_results=True)(ctx, *operands)


def untouched(operands: Sequence, types: Sequence, aliases: Mapping[int, int]) -> list:
    """Results that no program writes: those that share an operand's buffer keep its contents, the others are zero."""
    operand_of = {result: operand for operand, result in aliases.items()}
    return [operands[operand_of[i]] if i in operand_of else jnp.zeros(t.shape, t.dtype) for i, t in enumerate(types)]


def _row_major(aval) -> list[int]:
    return list(range(aval.ndim))[::-1]


def payload(
    compiled: Compiled, grid: tuple[int, int, int], parameters: Sequence[Any], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The launch message: the same bytes for the same kernel in every process, so that JAX's compilation cache hits."""
    takes_cubin = borrowed.custom_call_takes_cubin()
    kernel = borrowed.gpu_triton().TritonKernel(
        compiled.name,
        compiled.num_warps,
        compiled.num_ctas,
        compiled.shared_bytes,
        # With machine code the assembly is not read, but still tells kernels apart.
        hashlib.sha256(compiled.cubin).hexdigest() if takes_cubin else compiled.ptx,
        "",
        compiled.compute_capability,
    )
    call = borrowed.gpu_triton().TritonKernelCall(kernel, *grid, list(parameters))
    notes = json.dumps(dict(metadata), sort_keys=True).encode() if metadata else b""
    message = call.to_proto(compiled.name, notes)
    if takes_cubin:
        # Two protocol buffer messages in a row are one: fields of the second are added to the first.
        image = _field(1, compiled.cubin) + _field(2, compiled.name.encode()) + _field(3, compiled.shared_bytes)
        message += _field(1, _field(1, _field(11, image)))  # kernel_call.kernel.module_image
    return zlib.compress(message)


def _field(number: int, value: bytes | int) -> bytes:
    """A protocol buffer field: bytes (wire type 2) or an integer (wire type 0)."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(n: int) -> bytes:
    low_first = bytearray()
    while n > 0x7F:
        low_first.append(n & 0x7F | 0x80)
        n >>= 7
    low_first.append(n)
    return bytes(low_first)
