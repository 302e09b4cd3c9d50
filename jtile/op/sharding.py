"""The mesh, read off an op's signature: which dimension may be split, what is gathered, and where sums are needed.

Every dimension is a *factor* of Shardy's sharding rules. A factor keeps the mesh axes of the first operand that splits
it, unless the kernel needs it whole. A result that lacks a split factor is a partial sum on each device, completed by
a `psum`, or as its reduction asks.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule, custom_partitioning
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jtile import borrowed
from jtile.context import setting
from jtile.op import rules
from jtile.op.signature import Dim, Term

if TYPE_CHECKING:
    from jtile.op.primitive import Call, TileOp

Dims = tuple[Dim, ...]
Spec = tuple[tuple[str, ...], ...]  # the mesh axes of each dimension
Split = tuple[tuple[str, tuple[str, ...]], ...]  # dimensions, and the mesh axes that split them


@dataclasses.dataclass(frozen=True)
class Layout:
    """The operands and results that are present in one call, each with the factors of its dimensions."""

    op: TileOp
    operands: tuple[tuple[Term, Dims], ...]
    results: tuple[tuple[Term, Dims], ...]
    sizes: dict[str, int]

    @classmethod
    def of(cls, op: TileOp, avals: Sequence, call: Call) -> Layout:
        shapes = call.expand([s.shape for s in rules.ungrouped(avals, call)])
        sizes, leading = op.signature.check(op.name, shapes)
        groups = tuple((f"G{axis}",) for axis in range(call.group_count))
        rows = tuple((f"L{axis}",) for axis in range(len(leading)))
        sizes |= {f"G{i}": n for i, n in enumerate(rules.group_sizes(avals, call))}
        sizes |= {f"L{i}": n for i, n in enumerate(leading)}

        def placed(term: Term, mask: Sequence[bool]) -> tuple[Term, Dims]:
            return term, (*itertools.compress(groups, mask), *(rows if term.leading else ()), *term.dims)

        present = zip(op.signature.results, rules.result_shapes(op, avals, call), strict=True)
        return cls(
            op,
            tuple(map(placed, call.given(op.signature.operands), call.groups)),
            tuple(placed(term, (True,) * call.group_count) for term, shape in present if shape is not None),
            sizes,
        )

    def rule(self) -> SdyShardingRule:
        """The same, in Shardy's words, which have no factors of size 1 in a compound dimension."""
        proper = lambda dim: tuple(f for f in dim if self.sizes[f] != 1) or dim[:1]  # noqa: E731
        operands, results = ([tuple(map(proper, dims)) for _, dims in many] for many in (self.operands, self.results))
        plain = {dim[0] for dims in (*operands, *results) for dim in dims if len(dim) == 1}
        kept = {f for dims in results for dim in dims for f in dim}
        factors = list(dict.fromkeys(f for dims in (*operands, *results) for dim in dims for f in dim))
        whole = self.op.signature.whole
        compound_only: dict[str, Any] = {f: self.sizes[f] for f in factors if f not in plain}
        mapping = lambda dims: ArrayMapping(*(dim[0] if len(dim) == 1 else CompoundFactor(*dim) for dim in dims))  # noqa: E731
        return SdyShardingRule(
            tuple(map(mapping, operands)),
            tuple(map(mapping, results)),
            need_replication_factors=tuple(f for f in factors if f in whole),
            reduction_factors=tuple(f for f in factors if f not in kept and f not in whole),
            **compound_only,
        )

    def assign(self, specs: Sequence[Spec], mesh, *, strict: bool = False) -> dict[str, tuple[str, ...]]:
        """The mesh axes of each factor, given how the operands are split. One that they do not divide is gathered.

        With `strict`, two operands that split what they share differently are an error: under an explicit mesh, moving
        data is the user's decision.
        """
        assigned: dict[str, tuple[str, ...]] = {}
        owner: dict[str, str] = {}
        for (term, dims), spec in zip(self.operands, specs, strict=True):
            mine = {f for dim in dims for f in dim}
            for dim, axes in zip(dims, spec, strict=True):
                factor = self._splittable(dim, axes)
                if factor is None:
                    continue
                other = next((f for f, used in assigned.items() if f != factor and set(used) & set(axes)), None)
                clash = factor if assigned.get(factor, axes) != axes else other if other in mine else None
                if strict and clash:
                    raise ValueError(
                        f"{self.op.name}: {in_words(clash)} is split over mesh axes {assigned[clash]} in "
                        f"`{owner[clash]}`, and {in_words(factor)} over {axes} in `{term.name}`; bring them together "
                        "with jax.sharding.reshard"
                    )
                if factor not in assigned and other is None:
                    assigned[factor], owner[factor] = axes, term.name
        fits = lambda f, axes: self.sizes[f] % math.prod(mesh.shape[a] for a in axes) == 0  # noqa: E731
        return {f: axes for f, axes in assigned.items() if fits(f, axes)}

    def settled(self, avals: Sequence, mesh) -> dict[str, tuple[str, ...]]:
        """The same where the operands' types tell how they are split."""
        return self.assign([axes_of(a.sharding.spec, a.ndim) for a in avals], mesh, strict=True)

    def _splittable(self, dim: Dim, axes: tuple[str, ...]) -> str | None:
        """Which factor of a dimension mesh axes split: the outermost one that is larger than 1."""
        factor = next((f for f in dim if self.sizes[f] > 1), None)
        return factor if axes and factor not in self.op.signature.whole else None

    def place(self, dims: Sequence[Dim], assigned: dict[str, tuple[str, ...]]) -> PartitionSpec:
        split = (next((assigned[f] for f in dim if f in assigned), None) for dim in dims)
        return PartitionSpec(*(axes if axes is None or len(axes) > 1 else axes[0] for axes in split))

    def reduced(self, dims: Sequence[Dim], assigned: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
        """The mesh axes over which a result with these dimensions is to be completed."""
        mine = {f for dim in dims for f in dim}
        return tuple(a for f, axes in assigned.items() if f not in mine for a in axes)


def in_words(factor: str) -> str:
    kinds = {"L": "leading dimension", "G": "vmapped dimension"}  # names in signatures are lowercase
    return f"{kinds[factor[0]]} {factor[1:]}" if factor[0] in kinds else f"dimension `{factor}`"


def axes_of(spec: PartitionSpec | None, ndim: int) -> Spec:
    entries = (*(spec or ()), *[None] * ndim)[:ndim]
    return tuple(() if e is None or e is PartitionSpec.UNCONSTRAINED else _axes(e) for e in entries)


def result_specs(op: TileOp, avals: Sequence, call: Call) -> list[PartitionSpec | None]:
    """How each present result is split under an explicit mesh; all `None` without one."""
    layout = Layout.of(op, avals, call)
    mesh = borrowed.explicit_mesh(avals)
    if mesh is None:
        return [None] * len(layout.results)
    assigned = layout.settled(avals, mesh)
    return [layout.place(dims, assigned) for _, dims in layout.results]


def match(value: jax.Array, aval) -> jax.Array:
    """`value` split as `aval` is, which an explicit mesh demands of a cotangent."""
    if borrowed.explicit_mesh([aval]) is None or jax.typeof(value).sharding == aval.sharding:
        return value
    return jax.sharding.reshard(value, aval.sharding)


def settled(avals: Iterable) -> bool:
    """Whether types tell how operands are split: there is a mesh, and none of its axes is XLA's to use."""
    mesh = borrowed.mesh_of(avals)
    return mesh is not None and AxisType.Auto not in mesh.axis_types


def split(op: TileOp, call: Call, mesh: AbstractMesh, operands: Sequence, avals: Sequence) -> Sequence[jax.Array]:
    """Run an op on every device's part of the operands, whose types tell how an explicit mesh splits them.

    Other than `partitioned` this leaves no Python behind for XLA to call, so the program can be exported.
    """
    layout = Layout.of(op, operands, call)
    assigned = layout.settled(avals, mesh)
    explicit = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    # In a lowering rule the operands' types have lost their mesh: to `shard_map` they are as under automatic axes.
    mesh = mesh.update_axis_types(dict.fromkeys(explicit, AxisType.Auto))
    specs = [tuple(layout.place(dims, assigned) for _, dims in many) for many in (layout.operands, layout.results)]
    # The op is bound again, where all axes are manual: lowered there it is traced without a mesh.
    local = functools.partial(_local, op, call, assigned, op.settled.bind)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.shard_map(
            local, mesh=mesh, in_specs=specs[0], out_specs=specs[1], axis_names=explicit, check_vma=False
        )(*operands)


def partitioned(op: TileOp, call: Call, operands: Sequence, around) -> Sequence[jax.Array]:
    """Run an op on every device's part of the operands, once XLA has chosen how to split them.

    `around` is the mesh of the `shard_map` in which this is lowered, if there is one: its manual axes have names, too.
    """
    layout = Layout.of(op, operands, call)
    whole = custom_partitioning(lambda *values: tuple(op.settled.bind(*values, call=call)))

    def alone(assigned, *parts):
        with borrowed.no_mesh():
            return _local(op, call, assigned, op.settled.bind, *parts)

    def partition(mesh, operand_infos, result_infos):
        del result_infos
        specs = [axes_of(getattr(i.sharding, "spec", None), len(i.shape)) for i in operand_infos]
        assigned = layout.assign(specs, mesh)
        shardings = lambda many: tuple(NamedSharding(mesh, layout.place(dims, assigned)) for _, dims in many)  # noqa: E731
        return around or mesh, functools.partial(alone, assigned), shardings(layout.results), shardings(layout.operands)

    whole.def_partition(partition, sharding_rule=layout.rule())
    return whole(*operands)


def bound_to_parts(op: TileOp, call: Call, split: Mapping[str, str | tuple[str, ...]], parts: Sequence) -> Sequence:
    """What `op.bind` returns, of operands that the user has split inside `shard_map`."""
    splittable = set().union(*(t.factors + ["..."] * t.leading for t in op.signature.operands)) - op.signature.whole
    for dim, axes in split.items():
        if dim not in splittable:
            raise ValueError(
                f"{op.name}: `split` names {dim!r}, and the op can be split along "
                f"{', '.join(map(repr, sorted(splittable))) or 'no dimension'}"
                + (f"; gather {dim!r} by jax.lax.all_gather" if dim in op.signature.whole else "")
            )
        try:
            jax.lax.axis_size(axes)
        except NameError:
            raise ValueError(
                f"{op.name}: mesh axes {_axes(axes)} are to split dimension {dim!r}, and not all of them are here; "
                "call the op inside a jax.shard_map over them"
            ) from None
    assigned = {"L0" if dim == "..." else dim: _axes(axes) for dim, axes in split.items()}
    return _local(op, call, assigned, op.bind, *parts)


def _local(op: TileOp, call: Call, assigned: dict[str, tuple[str, ...]], function: Callable, *parts: jax.Array):
    """Run `function` on one device's parts of the operands, and complete its results."""
    layout = Layout.of(op, parts, call)
    call = dataclasses.replace(call, split=tuple({**dict(call.split), **assigned}.items()))

    def inside(part, along: str | None):
        """Positions along a dimension, in this device's part of it."""
        if along not in assigned:
            return part
        return part - (jax.lax.axis_index(assigned[along]) * layout.sizes[along]).astype(part.dtype)

    results = function(*(inside(x, t.indexes) for x, (t, _) in zip(parts, layout.operands, strict=True)), call=call)
    return tuple(
        _completed(result, term.reduction, layout.reduced(dims, assigned))
        for result, (term, dims) in zip(results, layout.results, strict=True)
    )


# The same in the middle of a function: what the rest of it needs to know of the whole.

SPLIT: ContextVar[Split] = ContextVar("split", default=())


def on_parts(call: Call) -> AbstractContextManager:
    """A context for a reference, kernel or transpose rule whose operands are one device's parts: so are those of the
    ops that it calls."""
    return setting(SPLIT, call.split)


def over_devices(value: jax.Array, dim: str, reduction: Literal["sum", "logsumexp"] = "sum") -> jax.Array:
    """In a reference or kernel function: the reduction of `value`, computed from this device's part of dimension `dim`,
    over the devices that share it out. Where it is whole, `value` itself."""
    return _completed(value, reduction, dict(SPLIT.get()).get(dim, ()))


def _axes(entry: str | tuple[str, ...]) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else (entry,)


def _completed(result: jax.Array, reduction: str, axes: tuple[str, ...]) -> jax.Array:
    """The reduction over devices of what each made of its part."""
    if not axes:
        return result
    return _logsumexp(result, axes) if reduction == "logsumexp" else jax.lax.psum(result, axes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _logsumexp(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Over devices, by one exchange of one number: a maximum and then a sum would be two of two."""
    tracked = borrowed.varying_axes(jax.typeof(x))  # by `shard_map(check_vma=True)` alone
    return jax.nn.logsumexp(jax.lax.all_gather(x, axes, to="invarying" if tracked else "varying"), axis=0)


@_logsumexp.defjvp
def _logsumexp_jvp(axes, primals, tangents):
    """The transpose of this sum exchanges nothing: every device scales the cotangent by its own share."""
    (x,), (x_dot,) = primals, tangents
    y = _logsumexp(x, axes)
    share = jnp.exp(x - jnp.where(y == -jnp.inf, 0.0, y))
    return y, jax.lax.psum(share * x_dot, axes)
