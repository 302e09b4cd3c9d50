"""The laws that every op obeys, and `check_op`, which tells whether yours does.

A law is a function of a trial: an op, random operands for it, and the op's reference, in which nothing but `jax.numpy`
is left, so that JAX's own rules transform it. The law asks something of the op and compares the answer with the
reference's. `LAWS` holds them all by name.
"""

import dataclasses
import functools
import itertools
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jtile.compiler.launch import CUSTOM_CALL, EXPORT_CHECKS
from jtile.compiler.rewrite import equations, map_equations
from jtile.compiler.target import Target
from jtile.op import Implementation, TileOp
from jtile.op.lowering import execute
from jtile.op.primitive import TilePrimitive
from jtile.op.signature import Signature, Term
from jtile.report import inspect

Arrays = dict[str, jax.Array]  # by name

TARGETS = ("NVIDIA A100", "NVIDIA H100", "NVIDIA B200")  # sm_80, sm_90 and sm_100


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
        return tuple(math.prod(self.sizes[factor] for factor in dim) for dim in term.dims)

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


def check_op(
    op: TileOp | Callable,
    cases: Iterable[Case],
    *,
    laws: Iterable[str] | None = None,
    implementation: Implementation = None,
    report: Callable[[str], Any] | None = None,
) -> None:
    """Check that an op keeps the laws: right under every transformation of JAX, on every kind of mesh, in every dtype.

    The laws of sharding need several devices. `jax.config.update("jax_num_cpu_devices", 8)` simulates them, and serves
    where there is one GPU, too.

    Args:
        op: a `TileOp`, or a function such as `jtile.rms_norm` that calls some. Its operands and options are passed to a
            function by name, and so is `implementation`.
        cases: the operands to try it on. Small ones do: the laws of dtypes and shapes vary them.
        laws: names of laws in `LAWS`; all of them by default.
        implementation: what to check against the reference. Default: `"triton"` on a GPU and `"interpret"` elsewhere.
        report: called with a line of text after each check. `print` will do.

    Raises:
        ExceptionGroup: of everything that went wrong. A note tells the op, the law and the case of each, and an
            `AssertionError` says by how much which value is wrong, and where.

    Example:
        >>> import jtile
        >>> from jtile.testing import Case, check_op
        >>> case = Case("x: rows d, scale: d -> y: rows d", {"rows": 4, "d": 10})
        >>> check_op(jtile.rms_norm, [case], laws=["kernel", "gradient", "second_order"])
    """
    failures = []
    for trial in [Trial(op, case, implementation) for case in cases]:
        for name in LAWS if laws is None else laws:
            start = time.perf_counter()
            failure = trial.failure(name)
            if failure:
                failures.append(failure)
            if report:
                seconds = time.perf_counter() - start
                report(f"{'✗' if failure else '✓'} {name:18} {seconds:5.1f} s   {LAWS[name].__doc__}")
    if failures:
        raise ExceptionGroup(f"{len(failures)} checks failed", failures)


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
        return Trial(self.op, dataclasses.replace(self.case, **changes), self.implementation)

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

    def agree(self, actual, expected: tuple[Any, Any]) -> None:
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


# Programs that call tile primitives.


def only_references(function: Callable) -> Callable:
    """`function` with each tile primitive replaced by its reference: an opinion that owes nothing to the op's rules."""

    def reference(equation: JaxprEqn):
        if not isinstance(equation.primitive, TilePrimitive):
            return None
        call = dataclasses.replace(equation.params["call"], implementation="xla")
        return functools.partial(execute, equation.primitive.op, call, "cpu")

    return map_equations(function, reference)


def binds(function: Callable, *inputs) -> Counter[str]:
    """How often a program binds the tile primitive of each op."""
    program = equations(jax.make_jaxpr(function)(*inputs).jaxpr)
    return Counter(e.primitive.op.name for e in program if isinstance(e.primitive, TilePrimitive))


_COLLECTIVE = re.compile(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\((.*?)\)")
_ARRAY = re.compile(r"(%[\w.-]+) = \w+\[([\d,]*)\]")


def collectives(compiled: jax.stages.Compiled) -> Counter[str]:
    """How often a compiled program exchanges data between devices, by kind."""
    return Counter(kind for kind, _ in _COLLECTIVE.findall(compiled.as_text() or ""))


def exchanged(compiled: jax.stages.Compiled) -> int:
    """How many numbers each device gives to a compiled program's collectives."""
    text = compiled.as_text() or ""
    sizes = {name: math.prod(map(int, filter(None, shape.split(",")))) for name, shape in _ARRAY.findall(text)}
    return sum(sizes[name] for _, operands in _COLLECTIVE.findall(text) for name in re.findall(r"%[\w.-]+", operands))


# Derived functions: each takes the kernel or the reference.


def value(f: Callable) -> Callable:
    return lambda operands: {"value": f(operands)}


def on_floats(f: Callable, operands: Arrays) -> Callable:
    return lambda floats: floating(f({**operands, **floats}))


def pullback(f: Callable) -> Callable:
    return lambda *inputs: {"gradient": value_and_pullback(f)(*inputs)["gradient"]}


def value_and_pullback(f: Callable) -> Callable:
    def function(operands, cotangents):
        out, vjp = jax.vjp(on_floats(f, operands), floating(operands))
        return {"value": out, "gradient": vjp(cotangents)[0]}

    return function


def pushforward(f: Callable) -> Callable:
    def function(operands, tangents):
        _, out = jax.jvp(on_floats(f, operands), [floating(operands)], [tangents])
        return {"tangent": out}

    return function


def linearized(f: Callable) -> Callable:
    def function(operands, tangents):
        _, linear = jax.linearize(on_floats(f, operands), floating(operands))
        return {"tangent": linear(tangents)}

    return function


def forward_over_reverse(f: Callable) -> Callable:
    def function(operands, cotangents, tangents):
        gradient = lambda floats: pullback(f)({**operands, **floats}, cotangents)  # noqa: E731
        return {"second": jax.jvp(gradient, [floating(operands)], [tangents])[1]["gradient"]}

    return function


def reverse_over_reverse(f: Callable) -> Callable:
    def function(operands, cotangents, tangents):
        gradient = lambda floats, given: pullback(f)({**operands, **floats}, given)  # noqa: E731
        _, vjp = jax.vjp(gradient, floating(operands), cotangents)
        return dict(zip(("second", "second by cotangent"), vjp({"gradient": tangents}), strict=True))

    return function


# The laws.

LAWS: dict[str, Callable[[Trial], None]] = {}


def law(function: Callable[[Trial], None]) -> Callable[[Trial], None]:
    """Add a law, under the function's name. It raises an exception where an op breaks it."""
    LAWS[function.__name__] = function
    return function


@law
def kernel(trial: Trial) -> None:
    """The kernel computes what the reference does."""
    trial.same(value, trial.operands())


@law
def gradient(trial: Trial) -> None:
    """The backward kernels compute the gradient of the reference."""
    trial.same(value_and_pullback, trial.operands(), trial.cotangents())


@law
def forward_mode(trial: Trial) -> None:
    """`jvp` and `linearize`."""
    trial.same(pushforward, trial.operands(), trial.tangents())
    trial.same(linearized, trial.operands(), trial.tangents())


@law
def second_order(trial: Trial) -> None:
    """Forward-mode and reverse-mode derivatives of the gradient."""
    for derive in forward_over_reverse, reverse_over_reverse:
        trial.same(derive, trial.operands(), trial.cotangents(), trial.tangents())


@law
def dtypes(trial: Trial) -> None:
    """bfloat16 and float16, as exact as the reference in them."""
    for dtype in {"bfloat16", "float16"} - {trial.case.dtype}:
        gradient(trial.variant(dtype=dtype))


@law
def x64(trial: Trial) -> None:
    """JAX's 64-bit mode changes neither values nor dtypes."""
    inputs = trial.operands(), trial.cotangents()
    for derive, given in (value, inputs[:1]), (value_and_pullback, inputs):
        expected = trial.expected(derive, *given)
        with jax.enable_x64(True):
            trial.agree(jax.jit(derive(trial.kernel))(*given), expected)


@law
def shapes(trial: Trial) -> None:
    """Sizes of 1, odd sizes, and nothing at all."""
    case = trial.case
    free = [name for name in case.sizes if name not in case.fixed.split()]
    odd = {name: 3 if name in case.split.split() else 17 for name in free}
    for sizes in dict.fromkeys(free, 1), odd:
        gradient(trial.variant(sizes={**case.sizes, **sizes}))
    compound = {factor for term in case.parsed.operands for dim in term.dims if len(dim) > 1 for factor in dim}
    bounds = {bound for low_high in case.integers.values() for bound in low_high}
    for name in case.split.split():
        # Nothing is known of the factors of an empty product, and there is no integer below 0.
        if name not in compound | bounds:
            gradient(trial.variant(sizes={**case.sizes, name: 0}))


# vmap


def stacked(samples: Sequence[Arrays], axes: Mapping[str, int | None]) -> Arrays:
    """The samples of every operand that has an axis stacked along it; the first sample of the others."""

    def stack(name: str, first: jax.Array) -> jax.Array:
        axis = axes[name]
        return first if axis is None else jnp.stack([s[name] for s in samples], axis)

    return {name: stack(name, first) for name, first in samples[0].items()}


def _stacked_cotangents(trial: Trial, count: int) -> Arrays:
    return jax.tree.map(lambda *x: jnp.stack(x), *map(trial.cotangents, range(count)))


@law
def vmap(trial: Trial) -> None:
    """`vmap` over every subset of the operands, of the gradient and inside it, in one launch."""
    samples = [trial.operands(seed) for seed in range(3)]
    cotangents = _stacked_cotangents(trial, 3)
    launches = binds(trial.kernel, samples[0])

    def check(mapped: Sequence[str]) -> None:
        axes = {n: i % (x.ndim + 1) if n in mapped else None for i, (n, x) in enumerate(samples[0].items())}
        operands = stacked(samples, axes)
        found = binds(jax.vmap(trial.kernel, in_axes=(axes,)), operands)
        assert found == launches, f"vmap over {', '.join(mapped)} launches {dict(found)} instead of {dict(launches)}"
        trial.same(lambda f: jax.vmap(value_and_pullback(f), in_axes=(axes, 0)), operands, cotangents)
        trial.same(lambda f: value_and_pullback(jax.vmap(f, in_axes=(axes,))), operands, cotangents)

    for count in range(1, len(samples[0]) + 1):
        for mapped in itertools.combinations(samples[0], count):
            check(mapped)


@law
def nested_vmap(trial: Trial) -> None:
    """`vmap` over one operand inside `vmap` over all, and the other way round."""
    names = list(trial.operands())
    everything = dict.fromkeys(names, 0)

    def check(name: str) -> None:
        one = {n: 0 if n == name else None for n in names}
        inner = [stacked([trial.operands(10 * i + j) for j in range(3)], one) for i in range(2)]
        operands, cotangents = stacked(inner, everything), _stacked_cotangents(trial, 2)
        over_all = lambda f: jax.vmap(f, in_axes=(everything, 0))  # noqa: E731
        over_one = lambda f: jax.vmap(f, in_axes=(one, None))  # noqa: E731
        trial.same(lambda f: over_all(over_one(value_and_pullback(f))), operands, cotangents)
        operands[name] = jnp.swapaxes(operands[name], 0, 1)
        trial.same(lambda f: over_one(over_all(value_and_pullback(f))), operands, cotangents)

    for name in dict.fromkeys((names[0], names[-1])):
        check(name)


# Control flow


@law
def scan(trial: Trial) -> None:
    """`scan` over the operands that share the first dimension, with the others, the weights, closed over."""
    terms = trial.case.parsed.operands
    axes = {t.name: 0 if terms[0].dims[0] in t.dims else None for t in terms}
    operands = stacked([trial.operands(seed) for seed in range(3)], axes)

    def scanned(f):
        def function(operands):
            fixed = {n: x for n, x in operands.items() if axes[n] is None}
            moving = {n: x for n, x in operands.items() if axes[n] is not None}
            return jax.lax.scan(lambda _, xs: (None, f({**fixed, **xs})), None, moving, length=3)[1]

        return value_and_pullback(function)

    trial.same(scanned, operands, _stacked_cotangents(trial, 3))


@law
def control_flow(trial: Trial) -> None:
    """A branch of `cond`, with its gradient, in a `while_loop`."""

    def branches(f):
        def function(repeat, operands, cotangents):
            def branch(operands):
                return jax.lax.cond(repeat > 1, f, lambda x: jax.tree.map(jnp.zeros_like, f(x)), operands)

            def step(carry):
                return carry[0] - 1, value_and_pullback(branch)(operands, cotangents)

            nothing = jax.tree.map(jnp.zeros_like, step((0, None))[1])
            return jax.lax.while_loop(lambda carry: carry[0] > 0, step, (repeat, nothing))[1]

        return function

    trial.same(branches, jnp.int32(2), trial.operands(), trial.cotangents())


@law
def checkpoint(trial: Trial) -> None:
    """Every policy. Residuals saved by name spare the forward kernel a second run."""
    inputs = trial.operands(), trial.cotangents()
    program = equations(jax.make_jaxpr(pullback(trial.kernel))(*inputs).jaxpr)
    saved = [e.params["name"] for e in program if e.primitive.name == "name"]
    by_name = jax.checkpoint_policies.save_only_these_names(*saved)
    policies = jax.checkpoint_policies
    for policy in None, policies.everything_saveable, policies.dots_saveable, by_name:
        rematerialised = jax.checkpoint(trial.kernel, policy=policy)
        trial.agree(jax.jit(value_and_pullback(rematerialised))(*inputs), trial.expected(value_and_pullback, *inputs))
    found, once = binds(pullback(rematerialised), *inputs), binds(pullback(trial.kernel), *inputs)
    assert found == once, f"with {saved} saved, checkpoint runs {dict(found)} instead of {dict(once)}"


@law
def repeats(trial: Trial) -> None:
    """The same bits on every run, from one trace."""
    traces = []

    def traced(operands):
        traces.append(operands)
        return trial.kernel(operands)

    run = jax.jit(value_and_pullback(traced))
    first, *others = [jax.block_until_ready(run(trial.operands(), trial.cotangents())) for _ in range(10)]
    assert len(traces) == 1, f"ten calls of a jitted function traced it {len(traces)} times"
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


# Devices


def devices() -> list[jax.Device]:
    """Those that programs run on, or CPUs if that is only one."""
    return jax.devices() if jax.device_count() > 1 else jax.devices("cpu")


@dataclasses.dataclass(frozen=True)
class Split:
    """One dimension of a case shared out among devices."""

    trial: Trial
    dim: str
    count: int

    AXIS = "i"

    @classmethod
    def of(cls, trial: Trial, dim: str, *, times: int = 1) -> "Split":
        """Over as many devices as can share the dimension and are there that many `times`."""
        if devices()[0].platform == "cpu" and trial.implementation == "triton":
            trial = Trial(trial.op, trial.case, "interpret")
        return cls(trial, dim, math.gcd(trial.case.sizes[dim], len(devices()) // times))

    @classmethod
    def every(cls, trial: Trial, *, times: int = 1) -> "list[Split]":
        """Each dimension named in `Case.split`."""
        splits = [cls.of(trial, dim, times=times) for dim in trial.case.split.split()]
        for split in splits:
            if split.count == 1:
                raise ValueError(
                    f"the size of `{split.dim}`, {trial.case.sizes[split.dim]}, and the number of devices, "
                    f"{len(devices()) // times}, need a common divisor; choose another size, or simulate devices by "
                    'jax.config.update("jax_num_cpu_devices", 8)'
                )
        return splits

    @classmethod
    def others(cls, trial: Trial) -> "list[Split]":
        """The dimensions that are not named there, but that arrays have and devices can share."""
        dims = {dim[0]: None for term in trial.case.parsed.operands for dim in term.dims}
        splits = [cls.of(trial, dim) for dim in dims if dim not in trial.case.split.split()]
        return [split for split in splits if split.count > 1]

    def mesh(self, kind: AxisType) -> jax.sharding.Mesh:
        return jax.make_mesh((self.count,), (self.AXIS,), axis_types=(kind,), devices=devices()[: self.count])

    def axis(self, term: Term) -> int | None:
        """Which axis of an array this dimension is, or is the outermost factor of."""
        return next((axis for axis, dim in enumerate(term.dims) if dim[0] == self.dim), None)

    def spec(self, term: Term) -> PartitionSpec:
        return PartitionSpec(*(self.AXIS if axis == self.axis(term) else None for axis in range(len(term.dims))))

    def operand_specs(self) -> dict[str, PartitionSpec]:
        return {t.name: self.spec(t) for t in self.trial.case.parsed.operands}

    def result_specs(self) -> dict[str, PartitionSpec]:
        return {t.name: self.spec(t) for t in self.trial.case.parsed.results}

    def inputs(self, mesh) -> tuple[Arrays, Arrays]:
        """Operands and cotangents, each device holding its part."""

        def place(arrays, specs):
            return {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in arrays.items()}

        return place(self.trial.operands(), self.operand_specs()), place(self.trial.cotangents(), self.result_specs())

    def lacking(self, terms: Iterable[Term]) -> int:
        """How many numbers there are in the floating arrays that lack the dimension, each a sum over devices."""
        case = self.trial.case
        return sum(math.prod(case.shape(t)) for t in terms if self.axis(t) is None and t.name not in case.integers)

    def name_in(self, op: TileOp) -> str:
        """What the op calls the dimension."""
        places = {t.name: self.axis(t) for t in self.trial.case.parsed.operands}
        name, place = next((name, place) for name, place in places.items() if place is not None)
        [dims] = [t.dims for t in op.signature.operands if t.name == name]
        [rank] = [len(t.dims) for t in self.trial.case.parsed.operands if t.name == name]
        return dims[place - rank][0] if rank - place <= len(dims) else "..."

    def on_parts(self) -> Callable[[Arrays], Arrays]:
        """The op on one device's part, its results completed over devices, inside `shard_map` or `pmap`."""
        trial = self.trial
        if isinstance(trial.op, TileOp):
            return trial.function(trial.implementation, split={self.name_in(trial.op): self.AXIS})
        if self.dim in trial.case.axis_names:
            return trial.function(trial.implementation, **{trial.case.axis_names[self.dim]: self.AXIS})
        lacking = {t.name for t in trial.case.parsed.results if self.axis(t) is None}

        def summed(operands):
            return {n: jax.lax.psum(x, self.AXIS) if n in lacking else x for n, x in trial.kernel(operands).items()}

        return summed


def _on_mesh(split: Split, kind: AxisType) -> dict[str, Arrays]:
    """Check values and gradients on a mesh, and return them."""
    trial = split.trial
    with jax.set_mesh(mesh := split.mesh(kind)):
        actual = jax.jit(value_and_pullback(trial.kernel))(*split.inputs(mesh))
    trial.agree(actual, trial.expected(value_and_pullback, trial.operands(), trial.cotangents()))
    return actual


@law
def auto_sharding(trial: Trial) -> None:
    """Sharded arrays give what one device does."""
    for split in Split.every(trial):
        _on_mesh(split, AxisType.Auto)


@law
def explicit_sharding(trial: Trial) -> None:
    """The same under an explicit mesh, where types tell how results are split."""
    for split in Split.every(trial):
        actual = _on_mesh(split, AxisType.Explicit)
        for found, specs in (
            (actual["value"], split.result_specs()),
            (actual["gradient"], split.operand_specs()),
        ):
            for name, x in found.items():
                spec = jax.typeof(x).sharding.spec
                assert spec == specs[name], f"`{name}` is split as {spec} instead of {specs[name]}"


@law
def gathering(trial: Trial) -> None:
    """Operands sharded along other dimensions are gathered, and results are right."""
    cotangents = trial.cotangents()
    for split, kind in itertools.product(Split.others(trial), (AxisType.Auto, AxisType.Explicit)):
        with jax.set_mesh(mesh := split.mesh(kind)):
            operands, _ = split.inputs(mesh)
            actual = jax.jit(value_and_pullback(trial.kernel))(operands, cotangents)
        trial.agree(actual, trial.expected(value_and_pullback, trial.operands(), cotangents))


@law
def exchanges(trial: Trial) -> None:
    """Devices exchange the sums that the mathematics needs and nothing else, counted in programs for four H200s."""
    trial, signature = Trial(trial.op, trial.case, "triton"), trial.case.parsed
    for dim, kind in itertools.product(trial.case.split.split(), AxisType):
        split = Split(trial, dim, math.gcd(trial.case.sizes[dim], 4))
        axis_type = AxisType.Explicit if kind == AxisType.Explicit else AxisType.Auto
        mesh = Target.named(TARGETS[1]).make_mesh((split.count,), (split.AXIS,), (axis_type,))
        forward, backward = _programs(split, mesh, manual=kind == AxisType.Manual)
        for name, program, needed in (
            ("forward", forward, split.lacking(signature.results) * trial.case.exchanged.get(split.dim, 1)),
            ("backward", backward, split.lacking(signature.operands)),
        ):
            found, numbers = collectives(program), exchanged(program)
            assert numbers == needed, (
                f"the {name} pass with `{split.dim}` split over {split.count} devices, {kind.name}, exchanges "
                f"{numbers} numbers by {dict(found)}, and needs {needed}"
            )


def _programs(split: Split, mesh, manual: bool) -> tuple[jax.stages.Compiled, jax.stages.Compiled]:
    """The compiled forward pass, which returns what the backward pass reads, and that backward pass."""
    trial, ins, outs = split.trial, split.operand_specs(), split.result_specs()
    function = trial.kernel
    if manual:
        function = jax.shard_map(split.on_parts(), mesh=mesh, in_specs=(ins,), out_specs=outs)

    def placed(shapes, shardings):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    with jax.set_mesh(mesh):
        operands = placed(trial.case.shapes(), {n: NamedSharding(mesh, spec) for n, spec in ins.items()})
        lowered = jax.jit(lambda x: jax.vjp(on_floats(function, x), floating(x))).lower(operands)
        forward = lowered.compile()
        out, pull = placed(lowered.out_info, forward.output_shardings)
        return forward, jax.jit(lambda pull, cotangents: pull(cotangents)).lower(pull, out).compile()


@law
def shard_map(trial: Trial) -> None:
    """With and without `check_vma`, over all axes or one, and its gradient, outside and inside."""
    inputs = trial.operands(), trial.cotangents()
    expected = trial.expected(value_and_pullback, *inputs)

    def check(split: Split, mesh, check_vma: bool) -> None:
        specs = dict(mesh=mesh, axis_names={split.AXIS}, check_vma=check_vma)
        ins, outs = split.operand_specs(), split.result_specs()
        function = split.on_parts()
        mapped = jax.shard_map(function, in_specs=(ins,), out_specs=outs, **specs)
        trial.agree(jax.jit(value_and_pullback(mapped))(*inputs), expected)
        if not check_vma:
            return  # gradients taken inside are then sums over one device's part only, as users of it expect
        inside = jax.shard_map(
            value_and_pullback(function),
            in_specs=(ins, outs),
            out_specs={"value": outs, "gradient": {n: ins[n] for n in floating(trial.operands())}},
            **specs,
        )
        trial.agree(jax.jit(inside)(*inputs), expected)
        try:
            everywhere = {n: PartitionSpec() for n in outs}
            jax.eval_shape(jax.shard_map(trial.kernel, in_specs=(ins,), out_specs=everywhere, **specs), inputs[0])
        except ValueError:
            return
        raise AssertionError("shard_map accepts out_specs=P() for results that differ between devices")

    for split in Split.every(trial):
        check(split, split.mesh(AxisType.Auto), True)
        check(split, split.mesh(AxisType.Auto), False)
    for split in Split.every(trial, times=2):
        sizes, names, kinds = (split.count, 2), (split.AXIS, "other"), (AxisType.Auto,) * 2
        check(split, jax.make_mesh(sizes, names, axis_types=kinds, devices=devices()[: 2 * split.count]), True)


@law
def pmap(trial: Trial) -> None:
    """Over each dimension that may be split."""
    signature = trial.case.parsed
    inputs = trial.operands(), trial.cotangents()

    def over(split: Split) -> Callable:
        ins = {t.name: split.axis(t) for t in signature.operands}
        outs = {t.name: split.axis(t) for t in signature.results}

        def parts(x, axis):
            return x if axis is None else x.reshape(*x.shape[:axis], split.count, -1, *x.shape[axis + 1 :])

        def whole(x, axis):
            return x if axis is None else x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

        mapped = jax.pmap(
            split.on_parts(),
            axis_name=split.AXIS,
            in_axes=(ins,),
            out_axes=outs,
            devices=devices()[: split.count],
        )

        def function(operands):
            results = mapped({n: parts(x, ins[n]) for n, x in operands.items()})
            return {n: whole(x, outs[n]) for n, x in results.items()}

        return function

    for split in Split.every(trial):
        trial.agree(value_and_pullback(over(split))(*inputs), trial.expected(value_and_pullback, *inputs))


# Compilation


@law
def compiles(trial: Trial) -> None:
    """For sm_80, sm_90 and sm_100, with no GPU, and with no registers spilled."""
    trial = trial.variant(sizes=trial.case.typical or trial.case.sizes)
    shapes = trial.case.shapes()
    cotangents = floating(jax.eval_shape(trial.reference, shapes))
    for target in TARGETS:
        reports = inspect(value_and_pullback(trial.function("triton")), shapes, cotangents, target=target)
        assert reports, f"no kernel is launched on {target}"
        for report in reports:
            assert report.spill_bytes == 0, f"{report.name} spills {report.spill_bytes} bytes of registers on {target}"


@law
def export(trial: Trial) -> None:
    """For CPU and CUDA at once, with no GPU; then read back and run."""
    inputs = trial.operands(), trial.cotangents()
    program = jax.jit(value_and_pullback(trial.function(None)))
    with jax.sharding.use_abstract_mesh(Target.named(TARGETS[1]).abstract_mesh):
        exported = jax.export.export(program, platforms=("cpu", "cuda"), disabled_checks=EXPORT_CHECKS)(*inputs)
    assert CUSTOM_CALL in exported.mlir_module(), "the program for CUDA has no kernel"
    again = jax.export.deserialize(exported.serialize())
    trial.agree(jax.jit(again.call)(*inputs), trial.expected(value_and_pullback, *inputs))
