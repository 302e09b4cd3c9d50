"""`score_mod` and `mask_mod`: ordinary JAX functions of numbers, traced once and run on blocks inside of the kernels.

Arrays that such a function closes over become operands of the op. What it computes of them alone is computed outside,
by JAX, and differentiated there. What it takes from them at indices that depend on the place is read in the kernel.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.lax import GatherScatterMode

from jtile import borrowed


class Outer(NamedTuple):
    """An array that a function closes over, or what it computes of such arrays alone; no value inside of kernels."""

    aval: Any
    value: Any = None


class View(NamedTuple):
    """Elements of an array: for each of its axes the index that was chosen, or None where all are there."""

    outer: Outer
    indices: tuple
    axes: tuple[int, ...]  # those of the array's axes that the view has

    @classmethod
    def of(cls, outer: Outer) -> "View":
        rank = len(outer.aval.shape)
        return cls(outer, (None,) * rank, tuple(range(rank)))


class Unreadable(Exception):
    """An array is used otherwise than element by element."""


@dataclasses.dataclass(frozen=True)
class Walk:
    """A walk over the equations of a function: arrays outside, numbers inside.

    Attributes:
        inside: computes a function of numbers.
        outside: computes a function of arrays.
        read: the element of an `Outer` at these indices.
    """

    inside: Callable
    outside: Callable
    read: Callable

    def run(self, jaxpr: Jaxpr, consts: Sequence, operands: Sequence) -> list:
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *operands], strict=True))
        value = lambda v: v.val if isinstance(v, Literal) else values[v]  # noqa: E731
        for eqn in jaxpr.eqns:
            values.update(zip(eqn.outvars, self.equation(eqn, list(map(value, eqn.invars))), strict=True))
        return list(map(value, jaxpr.outvars))

    def equation(self, eqn, given: list) -> list:
        function = _function(eqn)
        arrays = [isinstance(x, Outer | View) for x in given]
        outside = (isinstance(x, Outer) or isinstance(v, Literal) for x, v in zip(given, eqn.invars, strict=True))
        if any(arrays) and all(outside):
            values = self.outside(function, *(x.value if isinstance(x, Outer) else x for x in given))
            return [Outer(v.aval, x) for v, x in zip(eqn.outvars, values, strict=True)]
        if eqn.primitive.name in ("jit", "remat2"):  # entered in any case: types in it may name the mesh of an array
            inner = eqn.params["jaxpr"]
            inner = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
            return self.run(inner.jaxpr, [Outer(jax.typeof(c), c) for c in inner.consts], given)
        if not any(arrays):
            return self.inside(function, *given)
        first, *rest = given
        if isinstance(first, View) or (isinstance(first, Outer) and first.aval.shape):
            view = View.of(first) if isinstance(first, Outer) else first
            return [self.part(eqn, view, list(map(self.number, rest)))]
        return self.inside(function, *map(self.number, given))

    def number(self, x):
        """`x` where a number is wanted: one that was computed outside is read."""
        if isinstance(x, Outer) and not x.aval.shape:
            return self.read(x, ())
        if isinstance(x, Outer | View):
            raise Unreadable
        return x

    def part(self, eqn, view: View, indices: list):
        match eqn.primitive.name:
            case "dynamic_slice":
                return self.sliced(view, eqn.params["slice_sizes"], indices)
            case "gather":
                return self.gathered(view, eqn.params, eqn.outvars[0].aval, *indices)
            case "squeeze" | "reshape":
                return self.without(view, eqn.outvars[0].aval.ndim)
        raise Unreadable

    def sliced(self, view: View, sizes: Sequence[int], starts: list) -> View:
        indices = list(view.indices)
        for axis, size, start in zip(view.axes, sizes, starts, strict=True):
            n = view.outer.aval.shape[axis]
            if view.indices[axis] is None and size == 1:
                indices[axis] = self.index(start, n)
            elif view.indices[axis] is None and size != n:
                raise Unreadable
        return view._replace(indices=tuple(indices))

    def gathered(self, view: View, params: dict, result, index):
        numbers, sizes, mode = (params[key] for key in ("dimension_numbers", "slice_sizes", "mode"))
        if numbers.operand_batching_dims or index.ndim != 1 or any(i is not None for i in view.indices):
            raise Unreadable
        indices, inside = list(view.indices), []
        for k, place in enumerate(numbers.start_index_map):
            [start] = self.inside(lambda index, k=k: [index[k]], index)
            n = view.outer.aval.shape[view.axes[place]]
            if sizes[place] != 1:
                raise Unreadable
            inside += self.inside(lambda start, n=n: [(start >= 0) & (start < n)], start)
            indices[view.axes[place]] = self.index(start, n)
        found = self.without(view._replace(indices=tuple(indices)), result.ndim)
        if mode != GatherScatterMode.FILL_OR_DROP:
            return found
        fill = params["fill_value"]
        if fill is None:
            fill = np.nan if jnp.issubdtype(result.dtype, jnp.inexact) else np.iinfo(result.dtype).min
        keep = lambda found, *tests: [jnp.where(jnp.all(jnp.stack(tests)), found, jnp.asarray(fill, result.dtype))]  # noqa: E731
        return self.inside(keep, self.number(found), *inside)[0]

    def without(self, view: View, rank: int):
        """The view without the axes of which one element was chosen; that element where none is left."""
        axes = tuple(axis for axis in view.axes if view.indices[axis] is None)
        if len(axes) != rank:
            raise Unreadable
        return view._replace(axes=axes) if axes else self.read(view.outer, view.indices)

    def index(self, index, n: int):
        """An index moved inside, as JAX moves the starts of slices."""
        return self.inside(lambda i: [jnp.clip(i, 0, n - 1)], index)[0]


def _function(eqn) -> Callable:
    def run(*operands):
        results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
        return list(results) if eqn.primitive.multiple_results else [results]

    return run


@dataclasses.dataclass(frozen=True)
class Mod:
    """A traced function. Those are equal that do the same, whichever arrays they close over.

    Attributes:
        key: what tells it from others.
        reads: for each time that it reads an array, in order, which one.
        dtype: of its result.
    """

    key: Hashable
    reads: tuple[int, ...]
    dtype: np.dtype
    jaxpr: Jaxpr = dataclasses.field(compare=False, repr=False)

    def depends_on(self, place: int) -> bool:
        """Whether it looks at the number in this place."""
        number = self.jaxpr.invars[place]
        return any(v is number for eqn in self.jaxpr.eqns for v in eqn.invars) or number in self.jaxpr.outvars

    def __call__(self, numbers: Sequence, read: Callable[[int, tuple], Any]):
        """The result at these numbers; `read(which, indices)` gives an element of an array that it closes over."""
        order = iter(self.reads)
        walk = Walk(
            inside=lambda function, *numbers: function(*numbers),
            outside=lambda function, *arrays: jax.eval_shape(function, *arrays),
            read=lambda outer, indices: read(next(order), indices),
        )
        avals: list[Any] = [v.aval for v in self.jaxpr.constvars]
        consts = [Outer(a, jax.ShapeDtypeStruct(a.shape, a.dtype)) for a in avals]
        [result] = walk.run(self.jaxpr, consts, numbers)
        return walk.number(result)


def trace(function: Callable, what: str, *numbers) -> tuple[Mod, list[jax.Array]]:
    """A function of numbers of these types, and the arrays that it reads.

    Raises:
        ValueError: it does not return a number, or uses an array otherwise than element by element.
    """
    with borrowed.no_mesh():  # of which numbers written in the function would remind the kernel
        jaxpr = jax.make_jaxpr(function)(*numbers)
    if len(jaxpr.out_avals) != 1 or jaxpr.out_avals[0].shape:
        raise ValueError(
            f"{what} must return one number, and returns {', '.join(a.str_short() for a in jaxpr.out_avals)}: it is "
            "called for one query and one key, and not for blocks of them"
        )
    arrays: list[jax.Array] = []
    reads: list[int] = []

    def read(outer, indices):
        found = next((i for i, x in enumerate(arrays) if x is outer.value), len(arrays))
        arrays.extend([outer.value] if found == len(arrays) else [])
        reads.append(found)
        return jax.ShapeDtypeStruct((), outer.aval.dtype)

    walk = Walk(inside=jax.eval_shape, outside=lambda function, *values: function(*values), read=read)
    consts = [Outer(v.aval, c) for v, c in zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True)]
    try:
        [result] = walk.run(jaxpr.jaxpr, consts, numbers)
        walk.number(result)
    except Unreadable:
        raise ValueError(
            f"{what} must read the arrays that it closes over element by element, as in `table[head, query - key]`; "
            "compute what needs whole arrays before"
        ) from None
    return Mod(_key(jaxpr.jaxpr), tuple(reads), jaxpr.out_avals[0].dtype, jaxpr.jaxpr), arrays


def _key(jaxpr: Jaxpr) -> Hashable:
    """Of what a function does, names of variables aside."""
    numbers = {v: i for i, v in enumerate([*jaxpr.constvars, *jaxpr.invars])}

    def atom(v):
        if isinstance(v, Literal):
            return str(v.aval), np.asarray(v.val).tobytes()
        return numbers.setdefault(v, len(numbers))

    def parameter(x):
        if isinstance(x, ClosedJaxpr):
            return _key(x.jaxpr), tuple(np.asarray(c).tobytes() for c in x.consts)
        if isinstance(x, Jaxpr):
            return _key(x)
        if isinstance(x, tuple | list):
            return tuple(map(parameter, x))
        return x if isinstance(x, Hashable) else str(x)

    def equation(eqn):
        params = tuple((name, parameter(value)) for name, value in sorted(eqn.params.items()))
        return eqn.primitive.name, params, tuple(map(atom, eqn.invars)), tuple(map(atom, eqn.outvars))

    avals = tuple(str(v.aval) for v in [*jaxpr.constvars, *jaxpr.invars])
    return avals, tuple(map(equation, jaxpr.eqns)), tuple(map(atom, jaxpr.outvars))
