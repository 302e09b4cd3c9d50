"""Kernels run by Pallas' interpreter, with jtile's meaning at the edges of arrays."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.extend.core import Literal

from jtile.compiler.rewrite import map_pallas_calls


def interpret_pallas(fn: Callable) -> Callable:
    """`fn` with every `pallas_call` in it run by Pallas' interpreter, on any platform.

    As in a compiled kernel, and unlike in plain `interpret=True`, lanes past the edge of an array read as 0; what is
    written there is dropped. Slices `ref[pl.ds(start, size)]` that run past their *block* are clamped by the
    interpreter: choose blocks that hold them whole.

    Args:
      fn: a function of arrays, or of pytrees of them.

    Returns:
      A function with the same arguments and results.

    Example:
      >>> def double(x_ref, y_ref):
      ...     y_ref[...] = x_ref[...] * 2
      >>> x = jnp.arange(3.0)
      >>> call = pl.pallas_call(double, out_shape=x, in_specs=[pl.BlockSpec((4,))], out_specs=pl.BlockSpec((4,)))
      >>> print(interpret_pallas(call)(x))
      [0. 2. 4.]
    """
    return map_pallas_calls(fn, _interpret)


def _interpret(params, *operands):
    mapping, aliases = params["grid_mapping"], params["input_output_aliases"]
    blocks = list(mapping.block_mappings)
    shapes = [_whole_blocks(block, mapping.grid) for block in blocks]
    for i, o in aliases:  # one buffer, and so one shape
        j = len(operands) + o
        shapes[i] = shapes[j] = tuple(map(max, shapes[i], shapes[j]))
    padded = [
        jnp.pad(x, [(0, n - m) for m, n in zip(x.shape, shape, strict=True)])
        for x, shape in zip(operands, shapes, strict=False)
    ]
    avals = [b.array_aval.update(shape=s) for b, s in zip(blocks, shapes, strict=True)]
    blocks = tuple(b.replace(array_aval=a) for b, a in zip(blocks, avals, strict=True))
    out_shapes = shapes[len(operands) :]
    results = pl.pallas_call_p.bind(
        *padded,
        **{
            **params,
            "grid_mapping": mapping.replace(block_mappings=blocks),
            "out_avals": tuple(a.update(shape=s) for a, s in zip(params["out_avals"], out_shapes, strict=True)),
            "interpret": True,
        },
    )
    return [
        y if y.shape == a.shape else jax.lax.slice(y, (0,) * y.ndim, a.shape)
        for y, a in zip(results, params["out_avals"], strict=True)
    ]


def _whole_blocks(block, grid) -> tuple[int, ...]:
    """The array's shape, extended to hold whole blocks, and a spare one where the index map may point past the last."""
    grid_axes = dict(zip(block.index_map_jaxpr.invars, grid, strict=True))
    shape = []
    for dimension, index, n in zip(
        block.block_shape, block.index_map_jaxpr.outvars, block.array_aval.shape, strict=True
    ):
        size = 1 if isinstance(dimension, pl.Squeezed) else dimension.block_size
        step = 1 if isinstance(dimension, pl.Element) else size
        count = index.val + 1 if isinstance(index, Literal) else grid_axes.get(index, math.inf)
        inside = (count - 1) * step + size <= pl.cdiv(n, size) * size
        shape.append(pl.cdiv(n, size) * size + (0 if inside else size))
    return tuple(shape)
