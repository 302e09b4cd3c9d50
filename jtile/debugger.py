"""`debug`: kernels run on the CPU as the source that they became, where a breakpoint or a print in it works."""

import functools
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from jtile import borrowed
from jtile.compiler.build import load, load_text, triton_version
from jtile.compiler.emit import emit
from jtile.compiler.kernel import Source, kernel_of
from jtile.compiler.launch import untouched
from jtile.compiler.pallas import params_of, print_source
from jtile.compiler.rewrite import equations, evaluate, map_equations
from jtile.compiler.triton_call import triton_call_p
from jtile.compiler.value import stored
from jtile.op.lowering import execute
from jtile.op.primitive import TilePrimitive


def debug(fn: Callable, *, folder: str | os.PathLike | None = None) -> Callable:
    """`fn` with its kernels run on the CPU, as the Triton source that jtile generates for the GPU.

    Every `pallas_call` becomes its source, and each program of its grid runs that, one after the other, in this process
    and in plain Python, on NumPy arrays: tiles can be printed, `breakpoint()` stops, and an access outside of an array
    raises. Ops run their kernels as they would on a GPU, and kernels of `jtile.triton_call` their own source.

    It is for small arrays: an operation on a tile takes microseconds. What the GPU adds is left out: programs that run
    at once, TF32 products (here in float32), and inline assembly.

    Args:
      fn: a function of arrays or pytrees of them. Differentiate first: `debug(jax.grad(f))`. Under `jax.jit`, `vmap`
        and in loops kernels run too, but on a thread of XLA's.
      folder: where to keep the source, to read and to change. A kernel's file is named for it and for the source that
        was generated; it is written when it is missing, and otherwise run as it is, your changes included.

    Returns:
      A function with the same arguments and results.

    Raises:
      ImportError: Triton is not installed.
      jtile.compiler.triton_on_cpu.OutOfBounds: when it is called, if a program reads or writes outside of an array.
      jtile.compiler.kernel.UnsupportedKernel: when it is called, if a kernel cannot become Triton source.

    `examples/5_find_a_bug.py` finds a bug by a print in the source.

    Example:
      >>> def double(x_ref, y_ref):
      ...     y_ref[...] = x_ref[...] * 2
      >>> f = pl.pallas_call(double, out_shape=jax.ShapeDtypeStruct((4,), jnp.float32))
      >>> print(jtile.debug(f)(jnp.arange(4.0)))
      [0. 2. 4. 6.]
    """
    triton_version()
    folder = None if folder is None else pathlib.Path(folder)

    def replace(eqn: JaxprEqn) -> Callable[..., Sequence[jax.Array]] | None:
        params = eqn.params
        if eqn.primitive.name == "pallas_call" and not params["interpret"]:
            return _varying(functools.partial(_run_pallas, params, folder))
        if eqn.primitive is triton_call_p:
            return _varying(functools.partial(_run_triton, params))
        if isinstance(eqn.primitive, TilePrimitive):
            on_gpu = functools.partial(execute, eqn.primitive.op, params["call"], "cuda")
            return _varying(map_equations(on_gpu, replace))
        # What `jit` encloses runs here and now, not in a program of XLA's.
        if eqn.primitive.name in ("jit", "pjit") and any(map(replace, equations(params["jaxpr"]))):
            return functools.partial(evaluate, params["jaxpr"], replace)
        return None

    return map_equations(fn, replace)


def _varying(fn: Callable[..., Sequence[jax.Array]]) -> Callable[..., list[jax.Array]]:
    """`fn`, which knows nothing of meshes, for use in `shard_map(check_vma=True)`.

    Its results vary over every axis that one of its operands varies over.
    """

    def call(*operands):
        axes = frozenset().union(*(borrowed.varying_axes(jax.typeof(x)) for x in operands))

        def varying(*operands):
            with borrowed.varying_unchecked():
                results = fn(*operands)
            missing = (tuple(sorted(axes - borrowed.varying_axes(jax.typeof(y)))) for y in results)
            return [jax.lax.pcast(y, m, to="varying") if m else y for y, m in zip(results, missing, strict=True)]

        # Step by step, JAX would take each of the steps in between to give the same on every device.
        return (jax.jit(varying) if axes else varying)(*operands)

    return call


def _on_host(
    run: Callable[..., None], results: Sequence, aliases: dict[int, int], operands: Sequence
) -> list[jax.Array]:
    """The results that `run` writes, given copies of the operands and arrays for the results, as NumPy arrays.

    Here and now where the operands are known; inside of a compiled program as a callback.
    """
    types = [jax.ShapeDtypeStruct(r.shape, r.dtype) for r in results]

    def on_host(*operands):
        inputs = [np.array(x, order="C") for x in operands]
        outputs = [np.full(t.shape, _unwritten(t.dtype), t.dtype) for t in types]
        for i, o in aliases.items():
            outputs[o] = inputs[i]
        run(*inputs, *outputs)
        return outputs

    if any(isinstance(x, jax.core.Tracer) for x in operands):
        return jax.pure_callback(on_host, types, *operands, vmap_method="sequential")
    return [jnp.asarray(y) for y in on_host(*operands)]


def _unwritten(dtype) -> float | int:
    """What results hold at first, so that whatever a kernel fails to write shows."""
    return math.nan if jnp.issubdtype(dtype, jnp.floating) else 77


def _run_pallas(params: dict[str, Any], folder: pathlib.Path | None, *operands) -> list[jax.Array]:
    kernel = kernel_of(params)
    aliases = dict(kernel.input_output_aliases)
    if 0 in kernel.grid:
        return untouched(operands, kernel.outputs, aliases)
    source = emit(kernel, params_of(params))
    if params["debug"]:
        print_source(source)

    def run(*arrays):
        from jtile.compiler import triton_on_cpu

        in_memory = [x.astype(stored(x.dtype), copy=False) for x in arrays]
        buffers = (in_memory[i] for i in source.buffers)
        triton_on_cpu.run(_loaded(source, folder), [a.on_cpu(buffers) for a in source.arguments], source.grid)
        for array, contents in zip(arrays, in_memory, strict=True):
            array[...] = contents

    return _on_host(run, kernel.outputs, aliases, operands)


def _loaded(source: Source, folder: pathlib.Path | None):
    """The source's function; with a folder, as the file there has it."""
    if folder is None:
        return load(source)
    path = folder / f"{source.name}_{source.digest}.py"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(source.annotated)
    return load_text(source.name, path.read_text(), str(path))


def _run_triton(params: dict[str, Any], *operands) -> list[jax.Array]:
    kernel, aliases = params["kernel"], dict(params["aliases"])
    if 0 in params["grid"]:
        return untouched(operands, params["types"], aliases)
    if kernel.is_gluon():
        raise NotImplementedError(
            f"jtile.debug runs Triton's own kernels; {kernel.fn.__name__} is written in Gluon, whose layouts and "
            "barriers have no meaning on a CPU. Debug the Pallas kernel beside it, or the op's reference."
        )

    def run(*arrays):
        from jtile.compiler import triton_on_cpu

        buffers = iter(arrays)
        triton_on_cpu.run(kernel, [a.on_cpu(buffers) for a in params["arguments"]], params["grid"])

    return _on_host(run, params["types"], aliases, operands)
