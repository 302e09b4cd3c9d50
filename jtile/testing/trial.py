"""What a law is given: an op on operands of its own, and the op's reference to compare it with."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtile.op import Implementation, TileOp
from jtile.op.signature import Signature, Term
from jtile.testing.programs import only_references

Arrays = dict[str, jax.Array]  # by name


@dataclasses.dataclass(frozen=True)
class Case:
    """Operands to try an op on.

    Args:
        signature: the operands and results of one call in the language of `jtile.TileOp`, with every dimension named:
            `"x: batch d, scale: d -> y: batch d"`. Operands that are left out are absent.
        sizes: the size of every dimension. Choose one for `split` that your devices divide.
        options: the op's other arguments.
        integers: for each integer operand the range of its values, the end excluded. A bound may name a dimension:
            `{"labels": (0, "vocabulary")}`.
        split: the dimensions that devices may share out, separated by blanks. The laws of sharding demand that no data
            moves, but for one sum where a result lacks the dimension. They hold trivially where there is none.
        exchanged: for a dimension over which a result is more than one sum: how many numbers devices exchange for each
            of the result's values.
        axis_names: for a dimension over which a function completes its results itself inside `jax.shard_map`: the
            argument that takes the mesh axis. Of a `TileOp` it is `split`, and of other functions results are summed.
        fixed: the dimensions that cannot take any size; the law of shapes leaves these alone.
        dtype: of the floating operands.
        dtypes: of operands that have another, which they keep whatever the law.
        typical: sizes met in practice, at which the kernels must not spill registers. Default: `sizes`.
        tolerance: multiplies the allowed errors, which `Trial.agree` explains.
    """

    signature: str
    sizes: Mapping[str, int]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    integers: Mapping[str, tuple[int | str, int | str]] = dataclasses.field(default_factory=dict)
    split: str = ""
    exchanged: Mapping[str, int] = dataclasses.field(default_factory=dict)
    axis_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: str = ""
    dtype: str = "float32"
    dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    typical: Mapping[str, int] | None = None
    tolerance: float = 1.0

    def __post_init__(self):
        terms = self.parsed.operands
        dims, names = {factor for t in terms for factor in t.factors}, {t.name for t in terms}
        for what, given, known in (
            ("sizes", self.sizes, dims),
            ("split", self.split.split(), dims),
            ("exchanged", self.exchanged, dims),
            ("axis_names", self.axis_names, dims),
            ("fixed", self.fixed.split(), dims),
            ("typical", self.typical or (), dims),
            ("integers", self.integers, names),
            ("dtypes", self.dtypes, names),
        ):
            if unknown := sorted(set(given) - known):
                raise ValueError(f"Case: `{what}` names {unknown[0]!r}, which is not in {self.signature!r}")
        for what, sizes in ("sizes", self.sizes), ("typical", self.typical or self.sizes):
            if missing := sorted(dims - set(sizes)):
                raise ValueError(f"Case: `{what}` lacks dimension {missing[0]!r} of {self.signature!r}")

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.sizes.items())
        options = "".join(f" {name}={value!r}" for name, value in self.options.items())
        return f"[{self.signature}] {sizes} {self.dtype}{options}"

    @functools.cached_property
    def parsed(self) -> Signature:
        return Signature.parse(self.signature)

    def shape(self, term: Term) -> tuple[int, ...]:
        return term.shape(self.sizes, ())

    def dtype_of(self, term: Term) -> str:
        return "int32" if term.name in self.integers else self.dtypes.get(term.name, self.dtype)

    def operands(self, seed: int = 0) -> Arrays:
        """Standard normal, or uniform in the range given for integers."""
        random = np.random.default_rng(seed)

        def make(term: Term) -> jax.Array:
            if term.name in self.integers:
                low, high = (self.sizes[b] if isinstance(b, str) else b for b in self.integers[term.name])
                values = random.integers(low, high, self.shape(term))
            else:
                values = random.standard_normal(self.shape(term))
            return jnp.asarray(values, self.dtype_of(term))

        return {t.name: make(t) for t in self.parsed.operands}

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {t.name: jax.ShapeDtypeStruct(self.shape(t), self.dtype_of(t)) for t in self.parsed.operands}


LAWS: dict[str, Callable[["Trial"], None]] = {}


def law(function: Callable[["Trial"], None]) -> Callable[["Trial"], None]:
    """Add a law, under the function's name. It raises an exception where an op breaks it."""
    LAWS[function.__name__] = function
    return function


class Trial:
    """One op on one case: what a law is given.

    `kernel` and `reference` take a dictionary of operands and return one of results.
    """

    def __init__(self, op: TileOp | Callable, case: Case, implementation: Implementation = None):
        self.op, self.case = op, case
        if isinstance(op, TileOp):
            self._check_names(op)
        self.implementation = implementation or ("triton" if jax.default_backend() == "gpu" else "interpret")
        self.name = op.name if isinstance(op, TileOp) else op.__name__
        self.kernel = self.function(self.implementation)
        self.reference = only_references(self.function("xla"))
        self.compiled = functools.cache(lambda derive: jax.jit(derive(self.reference)))

    def check(self, law: str) -> None:
        """Raise what `failure` returns."""
        if failure := self.failure(law):
            raise failure

    def failure(self, law: str) -> Exception | None:
        """What goes wrong under a law, if anything does."""
        try:
            LAWS[law](self)
        except Exception as failure:
            failure.add_note(f"{self.name} breaks the law `{law}` in the case {self.case}")
            return failure
        return None

    def variant(self, **changes) -> "Trial":
        """The same op on a changed case."""
        other = Trial(self.op, dataclasses.replace(self.case, **changes), self.implementation)
        if not changes.keys() - {"sizes", "dtype"}:
            other.compiled = self.compiled  # the same function, of other arrays
        return other

    def _check_names(self, op: TileOp) -> None:
        for mine, its in (
            (self.case.parsed.operands, op.signature.operands),
            (self.case.parsed.results, op.signature.results),
        ):
            names = [t.name for t in its]
            for term in mine:
                if term.name not in names:
                    raise ValueError(f"{op.name} has no `{term.name}`, which the case names; it has {', '.join(names)}")

    def function(self, implementation: Implementation, **more) -> Callable[[Arrays], Arrays]:
        """The op by an implementation; `more` are further arguments."""
        options: dict[str, Any] = {**self.case.options, "implementation": implementation, **more}
        wanted = [t.name for t in self.case.parsed.results]

        def call_op(op: TileOp, operands: Arrays) -> Arrays:
            results = op(*(operands.get(t.name) for t in op.signature.operands), **options)
            named = dict(zip((t.name for t in op.signature.results), results, strict=True))
            return {name: named[name] for name in wanted}

        def call_function(function: Callable, operands: Arrays) -> Arrays:
            results = jax.tree.leaves(function(**operands, **options))
            if len(results) != len(wanted):
                raise ValueError(f"{self.name} returns {len(results)} arrays, and the case names {', '.join(wanted)}")
            return dict(zip(wanted, results, strict=True))

        if isinstance(self.op, TileOp):
            return functools.partial(call_op, self.op)
        return functools.partial(call_function, self.op)

    def operands(self, seed: int = 0) -> Arrays:
        return self.case.operands(seed)

    def cotangents(self, seed: int = 0) -> Arrays:
        """One for each floating result."""
        return _normal(jax.eval_shape(self.reference, self.case.shapes()), 1000 + seed)

    def tangents(self, seed: int = 0) -> Arrays:
        """One for each floating operand."""
        return _normal(self.case.shapes(), 2000 + seed)

    def same(self, derive: Callable[[Callable], Callable], *inputs) -> None:
        """Assert that `derive(kernel)` and `derive(reference)` are the same function at these inputs."""
        self.agree(jax.jit(derive(self.kernel))(*inputs), self.expected(derive, *inputs))

    def expected(self, derive: Callable[[Callable], Callable], *inputs) -> tuple[Any, Any]:
        """What the reference computes: from operands in their own dtypes, and from the same in float32."""
        own = self.compiled(derive)(*inputs)
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if is_floating(x) else x, inputs)
        narrow = any(x.dtype != w.dtype for x, w in zip(jax.tree.leaves(inputs), jax.tree.leaves(wide), strict=True))
        return own, self.compiled(derive)(*wide) if narrow else own

    def agree(self, actual, expected: tuple[Any, ...]) -> None:
        """Assert that `actual` is what `expected` returned, but for rounding.

        The truth t is what the reference makes of the operands in float32. The error allowed each value is the sum of

        * one unit in the last place of t in the result's dtype, for the result's own rounding;
        * 4 log₂ n units in the last place in float32 of the array's largest value, for sums of up to n terms in another
          order: added by blocks or in trees they are log₂ n roundings deep. n is the product of all dimensions;
        * 4 units in the last place in float32 of 1, the size of operands and cotangents, for terms that cancel;
        * twice the largest error of the reference in the operands' own dtypes, which is zero in float32: what the
          reference loses by intermediate rounding, a kernel may lose too.
        """
        own, truth = expected
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(own)]
        names = [jax.tree_util.keystr(path, simple=True, separator=" of ") for path in paths]
        problems = map(self._difference, names, *map(jax.tree.leaves, (actual, own, truth)))
        if found := [problem for problem in problems if problem]:
            raise AssertionError("\n".join(found))

    def _difference(self, name: str, got, low, high) -> str | None:
        if got.shape != low.shape or got.dtype != low.dtype:
            return f"{name} is {got.dtype}{list(got.shape)}, and the reference's is {low.dtype}{list(low.shape)}"
        units = float(jnp.finfo(low.dtype).eps) if is_floating(low) else 0
        got, low, high = (np.asarray(x, np.float64) for x in (got, low, high))
        finite = np.isfinite(high)
        size, lost = np.where(finite, np.abs(high), 0), np.where(finite, np.abs(low - high), 0)
        allowed = units * size + 2 * lost.max(initial=0)
        if units:
            depth = math.log2(max(2, math.prod(self.case.sizes.values())))
            allowed += 4 * np.finfo(np.float32).eps * (1 + depth * size.max(initial=0))
        allowed *= self.case.tolerance
        error = np.where(got == high, 0, np.abs(got - high))
        wrong = ~(error <= allowed)
        if not wrong.any():
            return None
        worst = np.unravel_index(np.argmax(np.where(wrong, np.nan_to_num(error, nan=np.inf), -1)), wrong.shape)
        return (
            f"{name}, shape {got.shape}: {wrong.sum()} of {wrong.size} values are wrong. The worst, at "
            f"{tuple(map(int, worst))}, is {got[worst]:.7g} instead of {high[worst]:.7g}: the error is "
            f"{error[worst]:.2g}, and {allowed[worst]:.2g} is allowed"
        )


def is_floating(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def floating(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in arrays.items() if is_floating(x)}


def _normal(shapes: Mapping[str, jax.ShapeDtypeStruct], seed: int) -> Arrays:
    random = np.random.default_rng(seed)
    return {n: jnp.asarray(random.standard_normal(s.shape), s.dtype) for n, s in floating(shapes).items()}
