"""`pl.pallas_call(..., compiler_params=jtile.CompilerParams(...))`: Pallas' own lowering, handed over to jtile."""

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

from jax.experimental import pallas as pl
from jax.interpreters import mlir

from jtile import borrowed
from jtile.compiler import launch
from jtile.compiler.kernel import Source, UnsupportedKernel, kernel_of
from jtile.compiler.params import CompilerParams
from jtile.compiler.rewrite import map_pallas_calls
from jtile.compiler.schedule import compile_kernel
from jtile.compiler.target import Target
from jtile.compiler.value import stored
from jtile.context import setting

_adopts: ContextVar[bool] = ContextVar("adopts", default=False)


def adopting() -> AbstractContextManager:
    """A context in which jtile lowers what was written for JAX's own Triton backend, as if given `retarget_pallas`."""
    return setting(_adopts, True)


def lower_pallas_call(platform: str, ctx, *operands, compiler_params, interpret, **params):
    """The lowering rule of a `pallas_call` for GPUs: jtile's parameters choose jtile, and others what JAX has."""
    if _adopts.get() and not interpret and is_for_triton(compiler_params):
        compiler_params = params_of(params | {"compiler_params": compiler_params})
    if interpret or not isinstance(compiler_params, CompilerParams):
        params |= dict(compiler_params=compiler_params, interpret=interpret)
        return borrowed.lower_pallas_call(ctx, *operands, **params)
    kernel = kernel_of(params)
    if platform != "cuda":
        raise UnsupportedKernel(f"jtile compiles for CUDA; {kernel.name} ({kernel.where}) is lowered for {platform}.")
    aliases = dict(kernel.input_output_aliases)
    if 0 in kernel.grid:
        return launch.no_programs(ctx, operands, aliases)
    source, compiled = compile_kernel(kernel, compiler_params, Target.of_lowering(ctx))
    if params["debug"]:
        print_source(source)
    # An input that has several descriptors is passed once for each.
    passed = [i for i in source.buffers if i < len(operands)]
    ctx = ctx.replace(avals_in=[ctx.avals_in[i] for i in passed])
    aliases = {passed.index(i): o for i, o in aliases.items()}
    operands = tuple(operands[i] for i in passed)
    launched = launch.Launch(compiled, source.grid, kernel, source)
    types = [[a.update(dtype=stored(a.dtype)) for a in avals] for avals in (ctx.avals_in, ctx.avals_out)]
    inner = ctx.replace(avals_in=types[0], avals_out=types[1])
    results = launch.launch(
        inner, _converted(ctx, operands, types[0]), launched, source.arguments, aliases, params["metadata"]
    )
    return _converted(inner.replace(avals_in=types[1]), results, ctx.avals_out)


def print_source(source: Source) -> None:
    """What `pallas_call(debug=True)` asks for."""
    print(f"The Triton source of pallas_call {source.label}:\n{source.annotated}")


def _converted(ctx, values, avals):
    """The context's operands in other types."""
    if list(ctx.avals_in) == list(avals):
        return values

    def convert(*arrays):
        return [x.astype(a.dtype) for x, a in zip(arrays, avals, strict=True)]

    return mlir.lower_fun(convert, multiple_results=True)(ctx.replace(avals_out=avals), *values)


# `jax.extend.pallas.register_lowering_rule` would do, were it not that JAX loads its own backend for Triton first, and
# fails where there is none.
for _platform in ("cuda", "rocm"):
    mlir.register_lowering(pl.pallas_call_p, functools.partial(lower_pallas_call, _platform), platform=_platform)


def retarget_pallas(fn: Callable, **params: Any) -> Callable:
    """`fn` with every `pallas_call` in it compiled by jtile on NVIDIA GPUs.

    Kernels written for JAX's own Triton backend keep their `num_warps` and `num_stages`; calls with `interpret=True`
    stay interpreted.

    Args:
      fn: a function of any arguments; those that are not arrays stay as they are.
      **params: fields of `CompilerParams` that every kernel in it gets instead of its own.

    Returns:
      A function with the same arguments and results, to be transformed and compiled like any other.

    Raises:
      ValueError: a field out of its range.
      TypeError: when it is called, if a kernel in it was written for a TPU or for Mosaic GPU.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def double(x_ref, y_ref):
      ...     y_ref[...] = x_ref[...] * 2
      >>> def f(x):
      ...     return pl.pallas_call(double, out_shape=x)(x)
      >>> [eqn] = jax.make_jaxpr(retarget_pallas(f))(jnp.ones(8)).eqns
      >>> eqn.params["compiler_params"].num_warps
      4
    """
    CompilerParams(**params)  # refuses what is wrong at once

    def retarget(call, *operands):
        if not call["interpret"]:
            call = call | {"compiler_params": dataclasses.replace(params_of(call), **params)}
        return pl.pallas_call_p.bind(*operands, **call)

    return map_pallas_calls(fn, retarget)


def params_of(params) -> CompilerParams:
    """How jtile is to compile a `pallas_call`, of whichever backend its parameters are."""
    given = params["compiler_params"]
    if given is None or isinstance(given, CompilerParams):
        return given or CompilerParams()
    if not is_for_triton(given):
        kernel = kernel_of(params)
        raise TypeError(
            f"retarget_pallas: kernel {kernel.name} ({kernel.where}) has compiler_params={given}, not Triton's: it is "
            "written for another kind of machine. Write it with plain jax.numpy operations on refs, without them."
        )
    return CompilerParams(**{name: value for name, value in vars(given).items() if value is not None})


def is_for_triton(compiler_params) -> bool:
    """Whether a `pallas_call` with these was written for JAX's own Triton backend, as one without any is."""
    return compiler_params is None or vars(compiler_params).keys() <= {"num_warps", "num_stages"}
