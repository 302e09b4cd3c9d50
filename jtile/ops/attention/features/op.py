"""Attention as tile ops: one for each set of operands, its backward pass, and gradients of what scores depend on."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jtile.op import TileOp
from jtile.ops.attention.features import gradients, kernels, reference
from jtile.ops.attention.features.variant import Operand, Variant
from jtile.ops.attention.reference import row_sums

# Spec. Query heads come in k groups of g, one group for each key head.

DIMENSIONS = {"b": "...", "h": "(k g)", "g": "k", "q": "s", "k": "t", "i": "i", "j": "j", "2": "two"}
QUERY_KEY_VALUE = "query: ... s (k g) d, key: ... t k d, value: ... t k e"
OUT = "out: ... s (k g) e, lse: ... s (k g)"
KERNEL_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
WIDEST = 576  # head dim, of DeepSeek's latent attention


def dimensions(operand: Operand) -> str:
    if operand.rank is not None:
        return " ".join(f"{operand.name}_{axis}" for axis in range(operand.rank))
    return " ".join(DIMENSIONS[axis] for axis in operand.axes)


def _whole(operands: tuple[Operand, ...]) -> str:
    extra = [d for o in operands for d in dimensions(o).split() if o.rank is not None or d in ("i", "j", "two")]
    return " ".join(["s t d e", *dict.fromkeys(extra)])


class Ops(NamedTuple):
    forward: TileOp
    backward: TileOp
    operand_gradients: dict[str, TileOp]


@functools.cache
def ops(operands: tuple[Operand, ...], differentiable: tuple[str, ...] = ()) -> Ops:
    """Attention with these operands. Those that are `differentiable` are floating point, and scores depend on them."""
    given = ", ".join([QUERY_KEY_VALUE, *(f"{o.name}: {dimensions(o)}" for o in operands)])
    residuals = f"{given}, {OUT}, dout: ... s (k g) e, dlse?: ... s (k g)"
    whole = _whole(operands)
    forward = TileOp("dot_product_attention", f"{given} -> {OUT}", whole=whole)
    backward = TileOp(
        "dot_product_attention_backward",
        f"{residuals} -> dquery: ... s (k g) d, dkey: ... t k d, dvalue: ... t k e",
        whole=whole,
    )
    forward.reference(reference.forward)
    forward.tiles(kernels.forward_tiles)
    forward.kernel(kernels.forward)
    forward.limits(_limits)
    forward.kernel_dtypes = KERNEL_DTYPES
    backward.reference(reference.backward)
    backward.kernel(kernels.backward)
    backward.limits(_limits)
    by_name = {o.name: o for o in operands}
    operand_gradients = {}
    for name in differentiable:
        op = TileOp(
            f"dot_product_attention_d{name}",
            f"{residuals} -> d{name}: {dimensions(by_name[name])}",
            whole=whole,
        )
        op.reference(functools.partial(reference.operand_gradient, operand=name))
        op.kernel(functools.partial(gradients.operand_gradient, operand=name))
        op.limits(_limits)
        operand_gradients[name] = op
    found = Ops(forward, backward, operand_gradients)
    forward.transpose(functools.partial(_transpose, found, operands))
    return found


def _limits(query, key, value, *rest, variant: Variant, **_):
    for name, size in ("head_dim", query.shape[-1]), ("value_dim", value.shape[-1]):
        if not 16 <= size <= WIDEST:
            return f"{name} is {size}, and its kernels take 16 to {WIDEST}"
    if abs(variant.scale) < 1e-20 and not variant.modifies:
        return f"scale is {variant.scale}, and its kernels divide by it"
    return None


# Derivative.


def _transpose(ops: Ops, operands: tuple[Operand, ...], inputs, results, cotangents, *, variant: Variant, **options):
    if inputs[0].dtype.itemsize == 1:
        raise NotImplementedError(
            f"dot_product_attention: attention of {inputs[0].dtype} has no gradient; cast them to bfloat16"
        )
    options |= {"variant": variant}
    given = *inputs, *results, *cotangents
    found = dict(zip((o.name for o in operands), inputs[3:], strict=True))

    def gradient(name):
        if name in ops.operand_gradients:
            return ops.operand_gradients[name](*given, **options)[0]
        return _dsinks(found[name], *results, *cotangents) if name == "sinks" else None

    return *ops.backward(*given, **options), *map(gradient, found)


def _dsinks(sinks, out, lse, dout, dlse):
    """A sink is a key whose value is 0: its weight P has the derivative P · (0 − delta)."""
    delta = row_sums(out, dout, dlse)
    weights = jnp.exp(sinks.astype(lse.dtype) - lse)
    return -jnp.sum(weights * delta, axis=range(lse.ndim - 1)).astype(sinks.dtype)


def call(query, key, value, named: dict[str, tuple[Operand, jax.Array]], variant: Variant, implementation):
    """Output and log-sum-exp. `named` are the operands that the variant is to have, with their arrays."""
    operands = tuple(operand for operand, _ in named.values())
    differentiable = tuple(
        o.name
        for o, array in named.values()
        if (o.name == "bias" or o.name.startswith("score_array")) and jnp.issubdtype(array.dtype, jnp.floating)
    )
    found = ops(operands, differentiable)
    return found.forward(
        query, key, value, *(a for _, a in named.values()), variant=variant, implementation=implementation
    )
