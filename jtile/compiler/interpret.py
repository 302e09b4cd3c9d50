"""Kernels run by Pallas' interpreter, with jtile's meaning at the edges of arrays."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.extend.core import Literal, jaxpr_as_fun

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
    mapping, outs = params["grid_mapping"], params["out_avals"]
    # Grid sizes and prefetched operands have no blocks, and stay as they are.
    leading = mapping.num_dynamic_grid_bounds + mapping.num_index_operands
    whole, operands = operands[:leading], operands[leading:]
    blocks = list(mapping.block_mappings)
    pads = [_padding(block, mapping.grid) for block in blocks]
    for i, o in params["input_output_aliases"]:  # one buffer, and so one shape
        i -= mapping.num_index_operands
        pads[i] = pads[len(operands) + o] = list(map(max, pads[i], pads[len(operands) + o]))
    padded = [jnp.pad(x, pad) if any(map(any, pad)) else x for x, pad in zip(operands, pads, strict=False)]
    blocks = [_padded(block, pad) for block, pad in zip(blocks, pads, strict=True)]
    out_shapes = [b.array_aval.shape for b in blocks[len(operands) :]]
    results = pl.pallas_call_p.bind(
        *whole,
        *padded,
        **{
            **params,
            "grid_mapping": mapping.replace(block_mappings=tuple(blocks)),
            "out_avals": tuple(a.update(shape=s) for a, s in zip(outs, out_shapes, strict=True)),
            "interpret": True,
        },
    )
    return [
        y[tuple(slice(low, low + n) for (low, _), n in zip(pad, a.shape, strict=True))]
        for y, a, pad in zip(results, outs, pads[len(operands) :], strict=True)
    ]


def _padding(block, grid) -> list[tuple[int, int]]:
    """Zeros to put before and after an array, in each dimension, so that every block that is asked for exists.

    The last block is made whole. Where the index map may point outside, a spare block at either end stands for all that
    lies there: the interpreter clamps indices.
    """
    sizes = (n if isinstance(n, int) else math.inf for n in grid)  # a traced size may be any
    programs = dict(zip(block.index_map_jaxpr.invars, sizes, strict=False))
    pads = []
    for dimension, index, n in zip(
        block.block_shape, block.index_map_jaxpr.outvars, block.array_aval.shape, strict=True
    ):
        size, step = _size(dimension), _step(dimension)
        count = index.val + 1 if isinstance(index, Literal) else programs.get(index, math.inf)
        whole = pl.cdiv(n, size) * size
        inside = 1 <= count and (count - 1) * step + size <= whole
        pads.append((0, whole - n) if inside else (size, whole - n + size))
    return pads


def _padded(block, pads):
    """The block of an array so padded."""

    def index_map(*ids):
        indices = jaxpr_as_fun(block.index_map_jaxpr)(*ids)
        shifts = (low // _step(d) for d, (low, _) in zip(block.block_shape, pads, strict=True))
        return [i + shift for i, shift in zip(indices, shifts, strict=True)]

    shape = tuple(low + n + high for n, (low, high) in zip(block.array_aval.shape, pads, strict=True))
    jaxpr = block.index_map_jaxpr
    if any(low for low, _ in pads):
        jaxpr = jax.make_jaxpr(index_map)(*(v.aval for v in jaxpr.invars))
    return block.replace(array_aval=block.array_aval.update(shape=shape), index_map_jaxpr=jaxpr)


def _size(dimension) -> int:
    return 1 if isinstance(dimension, pl.Squeezed) else dimension.block_size


def _step(dimension) -> int:
    """Elements from one index to the next."""
    return 1 if isinstance(dimension, pl.Element) else _size(dimension)
