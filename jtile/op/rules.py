"""Batching and differentiation, read off an op's signature.

Notation: an op maps operands to results. Its `linear` op maps tangents to tangents at a point, and is what a JVP binds;
its lowering is the JVP of the reference, and its transpose is the op's own transpose rule, the backward kernel. Both
`linear` and `pullback` are ops themselves, so every rule here holds for derivatives of every order.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import ad, batching

from jtile import borrowed
from jtile.op import sharding
from jtile.op.signature import Signature, Term

if TYPE_CHECKING:
    from jtile.op.primitive import Call, TileOp, TilePrimitive

type Terms = tuple[Term, ...]


def register(primitive: TilePrimitive) -> None:
    primitive.def_impl(functools.partial(borrowed.apply_primitive, primitive))
    primitive.def_abstract_eval(functools.partial(abstract_eval, primitive.op))
    batching.primitive_batchers[primitive] = functools.partial(batch, primitive.op)
    ad.primitive_jvps[primitive] = functools.partial(jvp, primitive.op)


# Shapes


def group_sizes(avals: Sequence, call: Call) -> tuple[int, ...]:
    """The size of each group axis, outermost first."""
    sizes: dict[int, int] = {}
    for aval, mask in zip(avals, call.groups, strict=True):
        axes = [axis for axis, has in enumerate(mask) if has]
        sizes.update(zip(axes, aval.shape, strict=False))
    return tuple(sizes[axis] for axis in range(call.group_count))


def ungrouped(avals: Sequence, call: Call) -> list[jax.ShapeDtypeStruct]:
    """The operands as one group sees them."""
    return [
        jax.ShapeDtypeStruct(aval.shape[sum(mask) :], aval.dtype) for aval, mask in zip(avals, call.groups, strict=True)
    ]


def result_shapes(op: TileOp, operands: Sequence, call: Call) -> tuple[jax.ShapeDtypeStruct | None, ...]:
    """Shape and dtype of every result as one group sees it, `None` where it is absent."""
    return _result_shapes(op, tuple(ungrouped(operands, call)), call, jax.config.jax_enable_x64)


@functools.lru_cache(maxsize=4096)
def _result_shapes(op: TileOp, shapes: tuple, call: Call, x64: bool) -> tuple:
    with borrowed.no_mesh(), named(op, shapes, call):
        results = jax.eval_shape(lambda *a: op.reference_function(*call.expand(a), **dict(call.static)), *shapes)
    terms = op.signature.results
    if not isinstance(results, tuple) or len(results) != len(terms):
        got = f"a tuple of {len(results)}" if isinstance(results, tuple) else "no tuple"
        names = ", ".join(t.name for t in terms)
        raise TypeError(f"{op.name}: the reference must return a tuple of {len(terms)} ({names}), got {got}")
    sizes, leading = op.signature.check(op.name, [None if s is None else s.shape for s in call.expand(shapes)])
    for term, result in zip(terms, results, strict=True):
        if result is None and not term.optional:
            raise TypeError(f"{op.name}: the reference returned None for `{term.name}`, which is not marked optional")
        expected = term.shape(sizes, leading)
        if result is not None and result.shape != expected:
            raise TypeError(
                f"{op.name}: the reference returned shape {result.shape} for `{term.name}`, whose dimensions ({term}) "
                f"make it {expected}"
            )
    return results


def with_absent(shapes: Sequence, present: Iterable) -> tuple:
    """One entry for every result of the signature, `None` where it is absent."""
    results = iter(present)
    return tuple(None if s is None else next(results) for s in shapes)


@contextlib.contextmanager
def named(op: TileOp, shapes: Sequence, call: Call):
    """A context for an op's functions: what goes wrong in them tells which op it befell, and what it was given; and
    types and ranks are promoted as they expect, whatever rules the user has JAX follow."""
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield
    except Exception as error:
        terms = call.given(op.signature.operands)
        given = (f"`{t.name}` {s.dtype}{list(s.shape)}" for t, s in zip(terms, shapes, strict=True))
        error.add_note(f"This is {op.name} of {', '.join(given)}.")
        raise


def abstract_eval(op: TileOp, *avals, call: Call) -> list:
    groups = group_sizes(avals, call)
    shapes = [r for r in result_shapes(op, avals, call) if r is not None]
    specs = sharding.result_specs(op, avals, call)
    return [
        borrowed.make_aval((*groups, *r.shape), r.dtype, like=avals, spec=spec)
        for r, spec in zip(shapes, specs, strict=True)
    ]


def vary_together(operands: Sequence) -> list:
    """Inside `shard_map`, make every operand vary over the axes that any of them varies over.

    The transpose of this cast is the sum over devices that a replicated weight's gradient needs, taken in float32.
    """
    axes = frozenset().union(*(borrowed.varying_axes(jax.typeof(x)) for x in operands))

    def cast(x):
        missing = tuple(sorted(axes - borrowed.varying_axes(jax.typeof(x))))
        if not missing:
            return x
        narrow = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32
        wide = x.astype(jnp.float32) if narrow else x
        return jax.lax.pcast(wide, missing, to="varying").astype(x.dtype)

    return [cast(x) for x in operands]


# Batching


def batch(op: TileOp, operands: Sequence, axes: Sequence, *, call: Call):
    """`vmap` is one launch: the mapped axis joins the leading shape where it can, else it becomes a group axis.

    It joins `...` when every operand and every result that has `...` is mapped and no operand without it is: rows are
    rows. Otherwise results would be summed over it, or operands repeated in memory, so it becomes a group axis.
    """
    terms = call.given(op.signature.operands)
    mapped = [axis is not None for axis in axes]
    rows = all(t.leading == m for t, m in zip(terms, mapped, strict=True)) and all(
        t.leading for t in op.signature.results
    )
    count = call.group_count

    moved = [
        x if axis is None else jnp.moveaxis(x, axis, sum(mask) if rows else 0)
        for x, axis, mask in zip(operands, axes, call.groups, strict=True)
    ]
    if not rows:
        groups = tuple((m, *mask) for m, mask in zip(mapped, call.groups, strict=True))
        call = replace(call, groups=groups)
    results = op.bind(*moved, call=call)
    return results, [count if rows else 0] * len(results)


def vmap_groups(function: Callable, masks: Sequence[Sequence[bool]], count: int) -> Callable:
    """`function` mapped over every group axis; `masks` tells which argument has which."""
    for axis in reversed(range(count)):
        function = jax.vmap(function, in_axes=[0 if mask[axis] else None for mask in masks])
    return function


# Differentiation


def is_zero(tangent) -> bool:
    return isinstance(tangent, ad.Zero) or tangent.dtype == jax.dtypes.float0


def jvp(op: TileOp, primals: Sequence, tangents: Sequence, *, call: Call):
    results = with_absent(result_shapes(op, primals, call), op.bind(*primals, call=call))
    if op.transpose_function:
        names = (f"{op.name}_{t.name}" for t in op.signature.results)
        results = tuple(r if r is None else checkpoint_name(r, n) for r, n in zip(results, names, strict=True))
    needed = _saved_results(op, tuple(ungrouped(primals, call)), call)
    saved = [r if s else None for r, s in zip(results, needed, strict=True)]
    everyone = (True,) * call.group_count
    masks = call.expand(call.groups, everyone)
    operands = [*call.expand(primals), *saved, *call.expand([None if is_zero(t) else t for t in tangents])]
    tangent_call = call.on(operands, [*masks, *[everyone] * len(saved), *masks])
    present = [o for o in operands if o is not None]
    out = with_absent(result_shapes(op.linear, present, tangent_call), op.linear.bind(*present, call=tangent_call))
    moving = [(r, t) for r, t in zip(results, out, strict=True) if r is not None]
    return [r for r, _ in moving], [ad.Zero(jax.typeof(r).to_tangent_aval()) if t is None else t for r, t in moving]


@functools.lru_cache(maxsize=4096)
def _saved_results(op: TileOp, shapes: tuple, call: Call) -> tuple[bool, ...]:
    """Which results the transpose rule reads: the others need not be kept for the backward pass."""
    if op.transpose_function is None:
        return (False,) * len(op.signature.results)
    results = _result_shapes(op, shapes, call, jax.config.jax_enable_x64)
    cotangents = [None if t.saved else _floating(r) for r, t in zip(results, op.signature.results, strict=True)]
    with borrowed.no_mesh(), named(op, shapes, call):
        rule = functools.partial(op.transpose_function, **call.options)
        jaxpr = jax.make_jaxpr(lambda r, o, c: rule(tuple(o), r, tuple(c)))(
            results, call.expand(shapes), cotangents
        ).jaxpr
    used = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | {id(v) for v in jaxpr.outvars}
    variables = iter(jaxpr.invars)
    return tuple(r is not None and id(next(variables)) in used for r in results)


def linear_of(op: TileOp) -> TileOp:
    operands, results = op.signature.operands, op.signature.results
    linear = _derived(op, "jvp", (*operands, *results), "tangent", operands, results)

    @linear.reference
    def reference(*values, **static):
        primals, tangents = values[: len(operands)], values[-len(operands) :]
        active = tuple(x if t is not None else None for x, t in zip(primals, tangents, strict=True))
        return jax.jvp(_differentiable(op, primals, static), active, tangents)[1]

    for primitive in linear.primitive, linear.settled:
        ad.primitive_transposes[primitive] = functools.partial(transpose, op)
    return linear


def pullback_of(op: TileOp) -> TileOp:
    operands, results = op.signature.operands, op.signature.results
    pullback = _derived(op, "vjp", operands, "cotangent", results, operands)

    @pullback.reference
    def reference(*values, **static):
        primals, cotangents = values[: len(operands)], values[len(operands) :]
        out, vjp = jax.vjp(_differentiable(op, primals, static), *map(_floating, primals))
        given = (jnp.zeros_like(o) if c is None and o is not None else c for o, c in zip(out, cotangents, strict=True))
        return vjp(tuple(given))

    return pullback


def _derived(op: TileOp, name: str, point: Terms, word: str, incoming: Terms, outgoing: Terms) -> TileOp:
    """An op that takes, at a point, incoming tangents or cotangents, by that word, to outgoing ones."""
    from jtile.op.primitive import TileOp

    def terms(these: Terms, form: str) -> Terms:
        return tuple(replace(t, name=form.format(t.name), optional=True, saved=False, reduction="sum") for t in these)

    moving = f"{{}}_{word}"
    given = terms(point, "{}") + terms(incoming, moving)
    derived = TileOp(f"{op.name}_{name}", Signature(given, terms(outgoing, moving), op.signature.derivative_whole))
    derived.parent = op
    return derived


def _floating(x):
    """What has a derivative; None otherwise, which to JAX is a tree of no arrays."""
    return x if x is not None and jnp.issubdtype(x.dtype, jnp.floating) else None


def _differentiable(op: TileOp, primals: Sequence, static: dict) -> Callable:
    """The reference as a function of operands that are not None, the others being `primals`, to floating results."""

    def function(*active):
        operands = (p if x is None else x for p, x in zip(primals, active, strict=True))
        return tuple(map(_floating, op.reference_function(*operands, **static)))

    return function


def transpose(op: TileOp, cotangents: Sequence, *values, call: Call) -> Sequence:
    """Transpose `op.linear`: from the results' cotangents to the operands' ones, by the op's backward kernel."""
    n, m = len(op.signature.operands), len(op.signature.results)
    everyone = (True,) * call.group_count
    full, masks = call.expand(values), call.expand(call.groups, everyone)
    tangents = full[n + m :]
    avals = [v.aval if ad.is_undefined_primal(v) else jax.typeof(v) for v in values]
    cotangent = list(with_absent(result_shapes(op.linear, avals, call), cotangents))
    # A saved result has a cotangent in higher derivatives alone, and the rule does not take it.
    for_kernel = op.transpose_function is not None and all(
        c is None or is_zero(c) for c, t in zip(cotangent, op.signature.results, strict=True) if t.saved
    )
    if for_kernel and cotangent[0] is not None:
        cotangent[0] = ad.instantiate_zeros(cotangent[0])
    cotangent = [None if c is None or is_zero(c) else c for c in cotangent]

    def pull(*values):
        operands, saved, outgoing = values[:n], values[n : n + m], values[n + m :]
        if for_kernel:
            pulled = op.transpose_function(operands, saved, outgoing, **call.options)  # type: ignore[misc]
        else:
            pulled = op.pullback(*operands, *outgoing, **call.options)
        return tuple(None if t is None else p for t, p in zip(tangents, pulled, strict=True))

    def finish(value, tangent, mask):
        if value is None:
            return None
        spare = tuple(axis for axis, has in enumerate(mask) if not has)
        wide = jnp.promote_types(value.dtype, jnp.float32)
        value = jnp.sum(value, axis=spare, dtype=wide) if spare else value
        return sharding.match(value.astype(tangent.aval.dtype), tangent.aval)

    with named(op.linear, ungrouped(avals, call), call), sharding.on_parts(call):
        mapped = vmap_groups(pull, [*masks[: n + m], *[everyone] * m], call.group_count)
        pulled = map(finish, mapped(*full[: n + m], *cotangent), tangents, masks[n + m :])
        return call.given([None] * (n + m) + list(pulled))
