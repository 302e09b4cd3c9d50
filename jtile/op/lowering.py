"""The one choice, made once for each platform: kernel, reference, or the kernel interpreted."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import mlir

from jtile import borrowed, tuning
from jtile.compiler.interpret import interpret_pallas
from jtile.compiler.pallas import adopting
from jtile.compiler.target import Target
from jtile.op import rules, sharding

if TYPE_CHECKING:
    from jtile.op.primitive import Call, TileOp, TilePrimitive


class Choice(NamedTuple):
    runs: Literal["kernel", "reference", "interpreted"]
    why: str
    fallback: bool = False  # the caller may have expected the kernel


class FallbackWarning(UserWarning):
    """An op runs its reference on a GPU because its kernel cannot serve the call."""


def register(primitive: TilePrimitive) -> None:
    mlir.register_lowering(primitive, functools.partial(lower, primitive, None))
    mlir.register_lowering(primitive, functools.partial(lower, primitive, "cuda"), platform="cuda")
    if not primitive.settled:
        borrowed.prim_requires_devices_during_lowering.add(primitive)


def choose(op: TileOp, shapes: Sequence, call: Call, platform: str) -> Choice:
    """Which implementation serves a call on a platform, and why.

    `shapes` are the operands given, as one group sees them. Raises `NotImplementedError` where the implementation that
    the caller named cannot serve.
    """
    if op.parent is not None:
        return Choice("reference", "forward-mode and higher derivatives come from the reference")
    if call.implementation == "xla":
        return Choice("reference", "implementation='xla'")
    if any(math.prod(s.shape) == 0 for s in shapes):
        return Choice("reference", "an operand is empty: there is nothing to launch")
    obstacle = _obstacle(op, shapes, call, platform)
    if obstacle and call.implementation:
        raise NotImplementedError(
            f"{op.name}: implementation={call.implementation!r} cannot serve this call: {obstacle}"
        )
    if obstacle:
        return Choice("reference", obstacle, fallback=platform == "cuda" and op.kernel_function is not None)
    if call.implementation == "interpret":
        return Choice("interpreted", "implementation='interpret'")
    return Choice("kernel", "implementation='triton'" if call.implementation else "lowered for an NVIDIA GPU")


def _obstacle(op: TileOp, shapes: Sequence, call: Call, platform: str) -> str | None:
    """Why the op's kernel cannot serve a call."""
    if op.kernel_function is None:
        return "the op has no kernel"
    for term, s in zip(call.given(op.signature.operands), shapes, strict=True):
        if jnp.issubdtype(s.dtype, jnp.inexact) and s.dtype.name not in op.kernel_dtypes:
            return f"`{term.name}` is {s.dtype.name}, and kernels take {', '.join(op.kernel_dtypes)}"
    if op.limits_function and (limit := op.limits_function(*folded(op, shapes, call), **dict(call.static))):
        return limit
    if call.implementation != "interpret" and platform != "cuda":
        return f"kernels run on NVIDIA GPUs, and this is lowered for {platform}"
    if call.implementation != "interpret" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'jtile[cuda13]', or 'jtile[offline]' where there is no GPU)"
    return None


def folded(op: TileOp, shapes: Sequence, call: Call) -> list[jax.ShapeDtypeStruct | None]:
    """The operands as the kernel gets them, of these that one group sees."""
    terms = call.given(op.signature.operands)
    return call.expand([jax.eval_shape(functools.partial(_fold, t), s) for t, s in zip(terms, shapes, strict=True)])


def choose_tile(op: TileOp, shapes: Sequence, call: Call, target: Target | None) -> tuning.Choice | None:
    """How the kernel of a call is launched on a chip, and why so, where the op leaves a choice."""
    if op.tiles_function is None:
        return None
    return tuning.choose(op, folded(op, shapes, call), call.static, target)


@functools.cache
def _warn_once(op: TileOp, reason: str) -> None:
    why = f"{reason}. implementation='xla' asks for it without this warning"
    warnings.warn(f"{op.name} runs its reference on the GPU: {why}", FallbackWarning, stacklevel=2)


def lower(primitive: TilePrimitive, platform: str | None, ctx, *operands, call: Call):
    op, platform = primitive.op, platform or "/".join(ctx.module_context.platforms)

    def run(*values):
        if primitive.settled or sharding.settled(ctx.avals_in):
            if (mesh := borrowed.explicit_mesh(ctx.avals_in)) is not None:
                return list(sharding.split(op, call, mesh, values, ctx.avals_in))
            # These are a device's own arrays.
            return execute(op, call, platform, *values, find_target=functools.partial(Target.of_lowering, ctx))
        if borrowed.exporting(ctx) and borrowed.device_count(ctx) > 1:
            raise NotImplementedError(
                f"{op.name}: jax.export cannot save a program for {borrowed.device_count(ctx)} devices in which XLA is "
                "still to choose how the op is split. Call the op inside jax.shard_map, or shard its operands over a "
                "mesh whose axes are AxisType.Explicit: jax.make_mesh's default."
            )
        # The op is bound again, on parts: lowered there it knows its device.
        return list(sharding.partitioned(op, call, values, borrowed.mesh_around(ctx)))

    # Shardings and varying axes are settled by now. Kernels are traced without them, and need not know of them.
    plain = ctx.replace(avals_in=borrowed.plain_avals(ctx.avals_in), avals_out=borrowed.plain_avals(ctx.avals_out))
    with borrowed.no_mesh(ctx.avals_in), borrowed.own_source_lines(), adopting():
        return mlir.lower_fun(run, multiple_results=True)(plain, *operands)


def execute(
    op: TileOp,
    call: Call,
    platform: str,
    *operands: jax.Array,
    find_target: Callable[[], Target | None] = lambda: None,
) -> list[jax.Array]:
    """Compute the present results on one device, the one that `find_target` tells if a kernel needs to know."""
    choice = choose(op, rules.ungrouped(operands, call), call, platform)
    if choice.fallback:
        _warn_once(op, choice.why)
    if choice.runs == "reference":
        function = op.reference_function
    else:
        assert op.kernel_function is not None
        target = find_target() if choice.runs == "kernel" and op.tiles_function else None
        tile = choose_tile(op, rules.ungrouped(operands, call), call, target)
        function = functools.partial(op.kernel_function, **_given(op, call, tile))
    shapes = rules.result_shapes(op, operands, call)

    def one_group(*given):
        taken = given if choice.runs == "reference" else [*map(_fold, call.given(op.signature.operands), given)]
        results = function(*call.expand(taken), **dict(call.static))
        return [r.reshape(s.shape) for r, s in zip(results, shapes, strict=True) if s is not None]

    if choice.runs == "interpreted":
        one_group = interpret_pallas(one_group)
    mapped = rules.vmap_groups(one_group, call.groups, call.group_count)
    # Kernels count in 32 bits whatever the user's mode.
    bits = contextlib.nullcontext() if choice.runs == "reference" else jax.enable_x64(False)
    with rules.named(op, rules.ungrouped(operands, call), call), sharding.on_parts(call), bits:
        return mapped(*operands)


def _given(op: TileOp, call: Call, tile) -> dict[str, Any]:
    """What a kernel gets beside operands and static arguments."""
    given = {"tile": tile.tile} if tile else {}
    if op.overwrites:
        names = [t.name for t in call.given(op.signature.operands)]
        given["overwrite"] = all(call.groups[names.index(op.overwrites)])  # or other groups read the operand, too
    return given


def _fold(term, x):
    """`...` as one dimension."""
    if not term.leading:
        return x
    split = x.ndim - len(term.dims)
    return x.reshape(math.prod(x.shape[:split]), *x.shape[split:])
