"""Attention as tile ops: one for each set of operands, its backward pass, and gradients of what scores depend on."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jtile.op import Implementation, TileOp
from jtile.ops.attention import gradients, kernels, reference, tiles
from jtile.ops.attention.reference import row_sums
from jtile.ops.attention.variant import Operand, Variant

# Spec. Query heads come in k groups of g, one group for each key head.

DIMENSIONS = {"b": "...", "h": "(k g)", "g": "k", "q": "s", "k": "t", "i": "i", "j": "j", "2": "two"}
QUERY_KEY_VALUE = "query: ... s (k g) d, key: ... t k d, value: ... t k e"
OUT = "out: ... s (k g) e, lse: ... s (k g)"
ORIGIN = Operand("origin", "")
KERNEL_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
WIDEST = 576  # head dim, of DeepSeek's latent attention


def dimensions(operand: Operand) -> str:
    if operand.rank is not None:
        return " ".join(f"{operand.name}_{axis}" for axis in range(operand.rank))
    return " ".join(DIMENSIONS[axis] for axis in operand.axes)


def _whole(operands: tuple[Operand, ...]) -> str:
    """The dimensions that kernels need whole, that of queries where there are lists of its blocks."""
    given = [d for o in operands for d in dimensions(o).split() if o.rank is not None or d in ("i", "j", "two")]
    return " ".join(["t d e", *["s"] * ("i" in given), *dict.fromkeys(given)])


class Ops(NamedTuple):
    forward: TileOp
    backward: TileOp
    operand_gradients: dict[str, TileOp]


@functools.cache
def ops(operands: tuple[Operand, ...], differentiable: tuple[str, ...] = ()) -> Ops:
    """Attention with these operands. Those that are `differentiable` are floating point, and scores depend on them."""
    terms = [f"{o.name}{'[s]' if o == ORIGIN else ''}: {dimensions(o)}" for o in operands]
    given = ", ".join([QUERY_KEY_VALUE, *terms])
    residuals = f"{given}, {OUT}, dout: ... s (k g) e, dlse?: ... s (k g)"
    gradients_of = "dquery: ... s (k g) d, dkey: ... t k d, dvalue: ... t k e"
    by_name = {o.name: o for o in operands}

    def made(name: str, signature: str, parts, tiles_function, notes=None, **options) -> TileOp:
        op = TileOp(name, signature, whole=_whole(operands))
        meaning, kernel = (functools.partial(part, **options) for part in parts)
        op.reference(meaning)
        op.kernel(kernel)
        op.tiles(tiles_function)
        op.limits(_limits)
        if notes is not None:
            op.notes(notes)
        return op

    forward = made(
        "dot_product_attention",
        f"{given} -> {OUT}",
        (reference.forward, kernels.forward),
        tiles.forward,
        tiles.notes,
    )
    forward.kernel_dtypes = KERNEL_DTYPES
    backward = made(
        "dot_product_attention_backward",
        f"{residuals} -> {gradients_of}",
        (reference.backward, kernels.backward),
        tiles.backward,
        tiles.notes,
    )
    operand_gradients = {
        name: made(
            f"dot_product_attention_d{name}",
            f"{residuals} -> d{name}: {dimensions(by_name[name])}",
            (reference.operand_gradient, gradients.operand_gradient),
            tiles.operand_gradient,
            operand=name,
        )
        for name in differentiable
    }
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


def _transpose(ops: Ops, operands: tuple[Operand, ...], inputs, results, cotangents, **options):
    if inputs[0].dtype.itemsize == 1:
        raise NotImplementedError(
            f"dot_product_attention: attention of {inputs[0].dtype} has no gradient; cast them to bfloat16"
        )
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


def call(
    query,
    key,
    value,
    named: dict[str, tuple[Operand, jax.Array]],
    variant: Variant,
    axis_name: str | tuple[str, ...] | None,
    implementation: Implementation,
):
    """Output and log-sum-exp. `named` are the operands that the variant is to have, with their arrays."""
    square = axis_name is None and query.shape[-3] == key.shape[-3]
    variant = dataclasses.replace(variant, operands=tuple(operand for operand, _ in named.values()), square=square)
    if variant.numbers_queries and variant.splits_queries:
        named = named | {"origin": (ORIGIN, jnp.int32(0))}
        variant = dataclasses.replace(variant, operands=(*variant.operands, ORIGIN))
    differentiable = tuple(
        o.name
        for o, array in named.values()
        if (o.name == "bias" or o.name.startswith("score_array")) and jnp.issubdtype(array.dtype, jnp.floating)
    )
    return ops(variant.operands, differentiable).forward(
        query,
        key,
        value,
        *(array for _, array in named.values()),
        variant=variant,
        split={} if axis_name is None else {"s": axis_name},
        implementation=implementation,
    )
