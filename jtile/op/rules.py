"""Batching and differentiation, read off an op's signature.

Notation: an op maps operands to results. Its `linear` op maps tangents to tangents at a point, and is what a JVP binds;
its lowering is the JVP of the reference, and its transpose is the op's own transpose rule, the backward kernel. Both
`linear` and `pullback` are ops themselves, so every rule here holds for derivatives of every order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import ad, batching

from jtile import borrowed
from jtile.op import sharding
from jtile.op.signature import Signature, Term

if TYPE_CHECKING:
    from jtile.op.primitive import Call, TileOp


def register(op: TileOp) -> None:
    for primitive in op.primitive, op.settled:
        primitive.def_impl(functools.partial(borrowed.apply_primitive, primitive))
        primitive.def_abstract_eval(functools.partial(abstract_eval, op))
        batching.primitive_batchers[primitive] = functools.partial(batch, op)
        ad.primitive_jvps[primitive] = functools.partial(jvp, op)


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
        expected = sharding.shape_of(term, sizes, leading)
        if result is not None and result.shape != expected:
            raise TypeError(
                f"{op.name}: the reference returned shape {result.shape} for `{term.name}`, whose dimensions ({term}) "
                f"make it {expected}"
            )
    return results


@contextlib.contextmanager
def named(op: TileOp, shapes: Sequence, call: Call):
    """What goes wrong inside tells which op it befell, and what the op was given."""
    try:
        yield
    except Exception as error:
        terms = [t for t, p in zip(op.signature.operands, call.present, strict=True) if p]
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
    terms = [t for t, p in zip(op.signature.operands, call.present, strict=True) if p]
    mapped = [axis is not None for axis in axes]
    rows = all(t.leading == m for t, m in zip(terms, mapped, strict=True)) and all(
        t.leading for t in op.signature.results
    )
    count = call.group_count

    def move(x, axis, mask):
        if axis is None:
            return x
        return jnp.moveaxis(x, axis, sum(mask) if rows else 0)

    moved = [move(x, axis, mask) for x, axis, mask in zip(operands, axes, call.groups, strict=True)]
    if not rows:
        groups = tuple((m, *mask) for m, mask in zip(mapped, call.groups, strict=True))
        call = dataclasses.replace(call, groups=groups)
    results = [r for r in op.bind(moved, call) if r is not None]
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
    results = op.bind(primals, call)
    if op.transpose_function:
        terms = op.signature.results
        results = tuple(
            r if r is None else checkpoint_name(r, f"{op.name}_{t.name}") for r, t in zip(results, terms, strict=True)
        )
    shapes = tuple(ungrouped(primals, call))
    saved = [r if s else None for r, s in zip(results, _saved_results(op, shapes, call), strict=True)]
    live = [None if is_zero(t) else t for t in tangents]
    none: tuple = ()  # the mask of an absent operand
    masks = call.expand(call.groups, none)
    everyone = (True,) * call.group_count
    operands = [*call.expand(primals), *saved, *call.expand(live)]
    every_mask = [*masks, *[everyone] * len(saved), *masks]
    tangent_call = dataclasses.replace(
        call,
        present=tuple(o is not None for o in operands),
        groups=tuple(m for o, m in zip(operands, every_mask, strict=True) if o is not None),
    )
    out = op.linear.bind([o for o in operands if o is not None], tangent_call)
    return (
        [r for r in results if r is not None],
        [
            ad.Zero(jax.typeof(r).to_tangent_aval()) if t is None else t
            for r, t in zip(results, out, strict=True)
            if r is not None
        ],
    )


@functools.lru_cache(maxsize=4096)
def _saved_results(op: TileOp, shapes: tuple, call: Call) -> tuple[bool, ...]:
    """Which results the transpose rule reads: the others need not be kept for the backward pass."""
    if op.transpose_function is None:
        return (False,) * len(op.signature.results)
    results = _result_shapes(op, shapes, call, jax.config.jax_enable_x64)
    cotangents = [
        None if r is None or t.saved or not jnp.issubdtype(r.dtype, jnp.floating) else r
        for r, t in zip(results, op.signature.results, strict=True)
    ]
    with borrowed.no_mesh():
        rule = functools.partial(op.transpose_function, **call.options)
        jaxpr = jax.make_jaxpr(lambda r, o, c: rule(tuple(o), r, tuple(c)))(
            results, call.expand(shapes), cotangents
        ).jaxpr
    used = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | {id(v) for v in jaxpr.outvars}
    variables = iter(jaxpr.invars)
    return tuple(r is not None and id(next(variables)) in used for r in results)


def linear_of(op: TileOp) -> TileOp:
    operands, results = op.signature.operands, op.signature.results
    count = len(operands) + len(results)
    linear = _derived(
        op,
        "jvp",
        [*operands, *results, *(t.renamed(f"{t.name}_tangent") for t in operands)],
        [t.renamed(f"{t.name}_tangent") for t in results],
    )

    @linear.reference
    def reference(*values, **static):
        primals, tangents = values[: len(operands)], values[count:]
        active = [i for i, t in enumerate(tangents) if t is not None]
        present, function = _differentiable(op, primals, active, static)
        _, out = jax.jvp(function, [primals[i] for i in active], [tangents[i] for i in active])
        return _scatter(out, present, len(results))

    for primitive in linear.primitive, linear.settled:
        ad.primitive_transposes[primitive] = functools.partial(transpose, op)
    return linear


def pullback_of(op: TileOp) -> TileOp:
    operands, results = op.signature.operands, op.signature.results
    pullback = _derived(
        op,
        "vjp",
        [*operands, *(t.renamed(f"{t.name}_cotangent") for t in results)],
        [t.renamed(f"{t.name}_cotangent") for t in operands],
    )

    @pullback.reference
    def reference(*values, **static):
        primals, cotangents = values[: len(operands)], values[len(operands) :]
        active = [i for i, x in enumerate(primals) if x is not None and jnp.issubdtype(x.dtype, jnp.floating)]
        present, function = _differentiable(op, primals, active, static)
        out, vjp = jax.vjp(function, *[primals[i] for i in active])
        given = [cotangents[i] for i in present]
        return _scatter(
            vjp([jnp.zeros_like(o) if c is None else c for o, c in zip(out, given, strict=True)]), active, len(operands)
        )

    return pullback


def _derived(op: TileOp, suffix: str, operands: Sequence[Term], results: Sequence[Term]) -> TileOp:
    from jtile.op.primitive import TileOp

    optional = functools.partial(map, lambda t: t.renamed(t.name, optional=True, saved=False, reduction="sum"))
    signature = Signature(tuple(optional(operands)), tuple(optional(results)), op.signature.derivative_whole)
    derived = TileOp(f"{op.name}_{suffix}", signature)
    derived.parent = op
    return derived


def _differentiable(op: TileOp, primals: Sequence, active: Sequence[int], static: dict) -> tuple[list[int], Callable]:
    """The reference as a function of its `active` operands to its floating results, and which results those are."""

    def function(*values):
        full = list(primals)
        for i, value in zip(active, values, strict=True):
            full[i] = value
        return op.reference_function(*full, **static)

    shapes = jax.eval_shape(function, *[primals[i] for i in active])
    present = [i for i, r in enumerate(shapes) if r is not None and jnp.issubdtype(r.dtype, jnp.floating)]
    return present, lambda *values: [function(*values)[i] for i in present]


def _scatter(values: Sequence, places: Sequence[int], count: int) -> tuple:
    found = dict(zip(places, values, strict=True))
    return tuple(found.get(i) for i in range(count))


def transpose(op: TileOp, cotangents: Sequence, *values, call: Call) -> list:
    """Transpose `op.linear`: from the results' cotangents to the operands' ones, by the op's backward kernel."""
    n, m = len(op.signature.operands), len(op.signature.results)
    everyone = (True,) * call.group_count
    full, masks = call.expand(values), call.expand(call.groups, ())
    operands, saved, tangents = full[:n], full[n : n + m], full[n + m :]
    shapes = _linear_results(op, values, call)
    incoming = iter(cotangents)
    cotangent = [None if s is None else next(incoming) for s in shapes]
    # A saved result has a cotangent in higher derivatives alone, and the rule does not take it.
    for_kernel = op.transpose_function is not None and all(
        c is None or is_zero(c) for c, t in zip(cotangent, op.signature.results, strict=True) if t.saved
    )
    if for_kernel and cotangent[0] is not None:
        cotangent[0] = ad.instantiate_zeros(cotangent[0])
    cotangent = [None if c is None or is_zero(c) else c for c in cotangent]
    active = [i for i, t in enumerate(tangents) if t is not None]

    def pull(*values):
        given = iter(values)
        groups = (tuple(None if v is None else next(given) for v in many) for many in (operands, saved, cotangent))
        if for_kernel:
            out = op.transpose_function(*groups, **call.options)  # type: ignore[misc]
        else:
            primals, _, outgoing = groups
            out = op.pullback(*primals, *outgoing, **call.options)
        return tuple(out[i] for i in active)

    given = [*operands, *saved, *cotangent]
    given_masks = [*masks[:n], *masks[n : n + m], *[everyone] * len(cotangent)]
    pairs = [(v, mask) for v, mask in zip(given, given_masks, strict=True) if v is not None]
    with sharding.on_parts(call):
        pulled = vmap_groups(pull, [mask for _, mask in pairs], call.group_count)(*[v for v, _ in pairs])

    def finish(i, value):
        if value is None:
            return None
        spare = tuple(axis for axis, has in enumerate(masks[n + m + i]) if not has)
        wide = jnp.promote_types(value.dtype, jnp.float32)
        value = jnp.sum(value, axis=spare, dtype=wide) if spare else value
        return sharding.match(value.astype(tangents[i].aval.dtype), tangents[i].aval)

    out = {i: finish(i, value) for i, value in zip(active, pulled, strict=True)}
    places = [None] * (n + m) + [out.get(i) for i in range(n)]
    return [place for place, present in zip(places, call.present, strict=True) if present]


def _linear_results(op: TileOp, values: Sequence, call: Call) -> tuple:
    avals = [v.aval if ad.is_undefined_primal(v) else jax.typeof(v) for v in values]
    return result_shapes(op.linear, avals, call)
