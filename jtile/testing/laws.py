"""The laws, by subject: values and derivatives, `vmap`, control flow, devices, compilation."""

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jtile.compiler.launch import CUSTOM_CALL, EXPORT_CHECKS
from jtile.compiler.rewrite import equations
from jtile.compiler.target import Target
from jtile.op import TileOp
from jtile.op.signature import Term
from jtile.report import inspect
from jtile.testing.programs import binds, collectives, exchanged, launches, launching, repeated_operands
from jtile.testing.trial import Arrays, Trial, floating, law

TARGETS = ("NVIDIA A100", "NVIDIA H200", "NVIDIA B200")  # sm_80, sm_90 and sm_100


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


# Values and derivatives.


@law
def kernel(trial: Trial) -> None:
    """The kernel computes what the reference does."""
    trial.same(value, trial.operands())


@law
def gradient(trial: Trial) -> None:
    """`vjp`: the backward kernels compute the gradient of the reference."""
    trial.same(value_and_pullback, trial.operands(), trial.cotangents())


@law
def forward_mode(trial: Trial) -> None:
    """`jvp` and `linearize`."""
    inputs = trial.operands(), trial.tangents()
    expected = trial.expected(pushforward, *inputs)
    for derive in pushforward, linearized:
        trial.agree(jax.jit(derive(trial.kernel))(*inputs), expected)


@law
def second_order(trial: Trial) -> None:
    """Hessian-vector products: forward over reverse, and reverse over reverse."""
    operands, cotangents, tangents = trial.operands(), trial.cotangents(), trial.tangents()
    expected = trial.expected(forward_over_reverse, operands, cotangents, tangents)
    trial.agree(jax.jit(forward_over_reverse(trial.kernel))(operands, cotangents, tangents), expected)
    # The second derivative of <cotangents, f> is symmetric, and its gradient by the cotangents is what a `jvp` gives.
    pushed = trial.expected(pushforward, operands, tangents)
    expected = tuple(e | {"second by cotangent": p["tangent"]} for e, p in zip(expected, pushed, strict=True))
    trial.agree(jax.jit(reverse_over_reverse(trial.kernel))(operands, cotangents, tangents), expected)


@law
def dtypes(trial: Trial) -> None:
    """bfloat16 and float16, as exact as the reference in them."""
    for dtype in {"bfloat16", "float16"} - {trial.case.dtype}:
        gradient(trial.variant(dtype=dtype))


@law
def x64(trial: Trial) -> None:
    """JAX's 64-bit mode changes neither values nor dtypes."""
    inputs = trial.operands(), trial.cotangents()
    expected = trial.expected(value_and_pullback, *inputs)
    with jax.enable_x64(True):
        # Alone first: a result of another dtype has no pullback of these cotangents.
        trial.agree(jax.jit(value(trial.kernel))(inputs[0]), tuple({"value": e["value"]} for e in expected))
        trial.agree(jax.jit(value_and_pullback(trial.kernel))(*inputs), expected)


@law
def strict_promotion(trial: Trial) -> None:
    """JAX's strict modes, which promote neither dtypes nor ranks by themselves, refuse nothing."""
    trial = trial.variant(dtype="bfloat16")

    def results():
        return jax.jit(value_and_pullback(trial.kernel)).lower(trial.operands(), trial.cotangents()).out_info

    usual = results()
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        assert results() == usual, f"under strict promotion results are {results()} instead of {usual}"


@law
def shapes(trial: Trial) -> None:
    """Sizes of 1, odd sizes, and nothing at all."""
    case = trial.case
    free = [name for name in case.sizes if name not in case.fixed.split()]
    odd = {name: 3 if case.sizes[name] <= 8 else 17 for name in free}
    for sizes in dict.fromkeys(free, 1), odd:
        gradient(trial.variant(sizes={**case.sizes, **sizes}))
    compound = {factor for term in case.parsed.operands for dim in term.dims if len(dim) > 1 for factor in dim}
    bounds = {bound for low_high in case.integers.values() for bound in low_high}
    for name in case.split.split():
        # Nothing is known of the factors of an empty product, and there is no integer below 0.
        if name not in compound | bounds:
            gradient(trial.variant(sizes={**case.sizes, name: 0}))


# vmap. What it should give is put together from the samples taken one by one.


def stacked(samples: Sequence[Arrays], axes: Mapping[str, int | None]) -> Arrays:
    """The samples of every operand that has an axis stacked along it; the first sample of the others."""

    def stack(name: str, first: jax.Array) -> Any:
        axis = axes[name]
        return first if axis is None else np.stack([s[name] for s in samples], axis)

    return {name: stack(name, first) for name, first in samples[0].items()}


def _together(samples: Sequence[dict[str, Arrays]], axes: Mapping[str, int | None] | None = None) -> dict[str, Arrays]:
    """Values and gradients of all samples, stacked; with `axes`, gradients of what `stacked` made."""

    def join(axis: int | None, *arrays) -> Any:
        if axis is None:
            return np.sum(np.stack(arrays), axis=0, dtype=np.float32).astype(arrays[0].dtype)
        return np.stack(arrays, axis)

    def joined(kind: str, name: str) -> Any:
        axis = 0 if axes is None or kind != "gradient" else axes[name]
        return join(axis, *(s[kind][name] for s in samples))

    return {kind: {name: joined(kind, name) for name in arrays} for kind, arrays in samples[0].items()}


def _stacked_cotangents(trial: Trial, count: int) -> Arrays:
    return jax.tree.map(lambda *x: np.stack(x), *map(trial.cotangents, range(count)))


def _one_by_one(trial: Trial, samples: Sequence[Arrays], mapped: Iterable[str]) -> list[tuple[Any, Any]]:
    """What the reference makes of the samples, of which all but the first count for the `mapped` operands alone."""
    given = [samples[0] | {n: sample[n] for n in mapped} for sample in samples]
    return [trial.expected(value_and_pullback, g, trial.cotangents(i)) for i, g in enumerate(given)]


def _pairwise(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Few subsets, among which for any two names there are one with both, one with the first and one with the second:
    by each bit of a name's number those where it is 0 and those where it is 1, and all."""
    bits = range((len(names) - 1).bit_length())
    halves = [tuple(n for i, n in enumerate(names) if (i >> bit & 1) == side) for bit in bits for side in (0, 1)]
    return [*halves, tuple(names)]


@law
def vmap(trial: Trial) -> None:
    """`vmap` over every subset of the operands, of the gradient and inside it: one launch, and no operand repeated."""
    samples = [trial.operands(seed) for seed in range(3)]
    cotangents = _stacked_cotangents(trial, 3)
    on_gpu = trial.function("triton")

    def program(function: Callable, *inputs) -> Jaxpr:
        return jax.make_jaxpr(launching(function))(*inputs).jaxpr

    functions = {on_gpu: (samples[0],), value_and_pullback(on_gpu): (samples[0], trial.cotangents())}
    needed = functools.cache(lambda function: launches(program(function, *functions[function])))
    unseen = {(n, axis) for n, x in samples[0].items() for axis in range(x.ndim + 1)}

    def axes(mapped: Iterable[str], turn: int) -> dict[str, int | None]:
        """Another axis for each operand, and another with each turn, counted from the front and from the back."""

        def axis(i: int, name: str) -> int:
            count = samples[0][name].ndim + 1
            unseen.discard((name, (i + turn) % count))
            return (i + turn) % count - count * (turn % 2)

        return {n: axis(i, n) if n in mapped else None for i, n in enumerate(samples[0])}

    def check_program(mapped: Sequence[str], turn: int) -> None:
        inner = axes(mapped, turn)
        operands = stacked(samples, inner)
        over = ", ".join(mapped)
        unmapped = {x.size for n, x in operands.items() if n not in mapped and x.size > 1}
        for function, inputs in functions.items():
            n = len(inputs)
            mapping = program(jax.vmap(function, in_axes=(inner, 0)[:n]), *(operands, cotangents)[:n])
            found = launches(mapping)
            assert found == needed(function), f"vmap over {over} launches {found} kernels instead of {needed(function)}"
            repeated = repeated_operands(mapping, unmapped, 3)
            assert not repeated, f"vmap over {over} repeats operands that it does not map: kernels read {repeated}"

    def check_values(mapped: Sequence[str], turn: int) -> None:
        inner, outer = axes(mapped, turn), axes(mapped, turn + 1)

        def both(operands, moved, cotangents):
            within = jax.vmap(value_and_pullback(trial.kernel), in_axes=(inner, 0))(operands, cotangents)
            return within, value_and_pullback(jax.vmap(trial.kernel, in_axes=(outer,)))(moved, cotangents)

        within, outside = jax.jit(both)(stacked(samples, inner), stacked(samples, outer), cotangents)
        expected = list(zip(*_one_by_one(trial, samples, mapped), strict=True))
        trial.agree(within, tuple(_together(e) for e in expected))
        trial.agree(outside, tuple(_together(e, outer) for e in expected))

    subsets = [s for r in range(len(samples[0])) for s in itertools.combinations(samples[0], r + 1)]
    for turn, mapped in enumerate(subsets):
        check_program(mapped, turn)
    # Values of more than four operands for some subsets alone: each takes a compilation, and six have 63 of them.
    for turn, mapped in enumerate(subsets if len(samples[0]) <= 4 else _pairwise(list(samples[0]))):
        check_values(mapped, turn)
    left = [axes(samples[0], turn) for turn in itertools.takewhile(lambda _: unseen, itertools.count())]
    expected = zip(*_one_by_one(trial, samples, samples[0]), strict=True)
    values = tuple({"value": _together(e)["value"]} for e in expected)
    found = jax.jit(
        lambda many: [value(jax.vmap(trial.kernel, in_axes=(a,)))(x) for a, x in zip(left, many, strict=True)]
    )
    for actual in found([stacked(samples, every) for every in left]):
        trial.agree(actual, values)


@law
def nested_vmap(trial: Trial) -> None:
    """`vmap` over one operand inside `vmap` over all, and the other way round."""
    names = list(trial.operands())
    everything = dict.fromkeys(names, 0)
    cotangents = _stacked_cotangents(trial, 2)

    def check(name: str) -> None:
        one = {n: 0 if n == name else None for n in names}
        samples = [[trial.operands(10 * i + j) for j in range(3)] for i in range(2)]
        operands = stacked([stacked(inner, one) for inner in samples], everything)
        swapped = operands | {name: np.swapaxes(operands[name], 0, 1)}
        over_all = lambda f: jax.vmap(f, in_axes=(everything, 0))  # noqa: E731
        over_one = lambda f: jax.vmap(f, in_axes=(one, None))  # noqa: E731

        def both(operands, swapped, cotangents):
            function = value_and_pullback(trial.kernel)
            return over_all(over_one(function))(operands, cotangents), over_one(over_all(function))(swapped, cotangents)

        def expected(i: int, j: int):
            given = samples[i][0] | {name: samples[i][j][name]}
            return trial.expected(value_and_pullback, given, trial.cotangents(i))

        each = [[expected(i, j) for j in range(3)] for i in range(2)]
        whole = tuple(_together([_together([e[which] for e in row]) for row in each]) for which in range(2))
        inside, outside = jax.jit(both)(operands, swapped, cotangents)
        trial.agree(inside, whole)
        trial.agree(outside, jax.tree.map(lambda x: np.swapaxes(x, 0, 1), whole))

    for name in dict.fromkeys((names[0], names[-1])):
        check(name)


# Control flow


@law
def scan(trial: Trial) -> None:
    """`scan` over the operands that share the first dimension, with the others, the weights, closed over."""
    terms = trial.case.parsed.operands
    axes = {t.name: 0 if terms[0].dims[0] in t.dims else None for t in terms}
    samples = [trial.operands(seed) for seed in range(3)]

    def scanned(f):
        def function(operands):
            fixed = {n: x for n, x in operands.items() if axes[n] is None}
            moving = {n: x for n, x in operands.items() if axes[n] is not None}
            return jax.lax.scan(lambda _, xs: (None, f({**fixed, **xs})), None, moving, length=3)[1]

        return value_and_pullback(function)

    actual = jax.jit(scanned(trial.kernel))(stacked(samples, axes), _stacked_cotangents(trial, 3))
    expected = zip(*_one_by_one(trial, samples, [n for n, axis in axes.items() if axis == 0]), strict=True)
    trial.agree(actual, tuple(_together(e, axes) for e in expected))


@law
def control_flow(trial: Trial) -> None:
    """A branch of `cond`, and its gradient, in a `while_loop`."""

    def zeros_like(f, *inputs):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(f, *inputs))

    def branches(f):
        def function(repeat, operands, cotangents):
            def branch(operands):
                return jax.lax.cond(repeat > 1, f, lambda x: zeros_like(f, x), operands)

            def step(carry):
                return carry[0] - 1, value_and_pullback(branch)(operands, cotangents)

            nothing = zeros_like(value_and_pullback(branch), operands, cotangents)
            return jax.lax.while_loop(lambda carry: carry[0] > 0, step, (repeat, nothing))[1]

        return function

    inputs = trial.operands(), trial.cotangents()
    actual = jax.jit(branches(trial.kernel))(jnp.int32(2), *inputs)
    trial.agree(actual, trial.expected(value_and_pullback, *inputs))


@law
def checkpoint(trial: Trial) -> None:
    """`checkpoint` with every policy; residuals saved by name spare the forward kernel a second run."""
    inputs = trial.operands(), trial.cotangents()
    program = equations(jax.make_jaxpr(pullback(trial.kernel))(*inputs).jaxpr)
    saved = list(dict.fromkeys(e.params["name"] for e in program if e.primitive.name == "name"))
    policies = jax.checkpoint_policies
    by_name = policies.save_only_these_names(*saved)
    offloading = dict(offload_src="device", offload_dst="pinned_host")
    every = (
        None,
        policies.everything_saveable,
        policies.nothing_saveable,
        policies.dots_saveable,
        policies.dots_with_no_batch_dims_saveable,
        policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
        policies.save_anything_except_these_names(*saved),
        policies.save_any_names_but_these(*saved[:1]),
        policies.save_and_offload_only_these_names(
            names_which_can_be_saved=saved[1:], names_which_can_be_offloaded=saved[:1], **offloading
        ),
        policies.save_from_both_policies(policies.dots_saveable, by_name),
        by_name,
    )

    def under_every_policy(*inputs):
        return [value_and_pullback(jax.checkpoint(trial.kernel, policy=policy))(*inputs) for policy in every]

    expected = trial.expected(value_and_pullback, *inputs)
    for actual in jax.jit(under_every_policy)(*inputs):
        trial.agree(actual, expected)
    rematerialised = jax.checkpoint(trial.kernel, policy=by_name)
    found, once = binds(pullback(rematerialised), *inputs), binds(pullback(trial.kernel), *inputs)
    assert found == once, f"with {saved} saved, checkpoint runs {dict(found)} instead of {dict(once)}"


@law
def custom_vjp(trial: Trial) -> None:
    """`custom_vjp` around the op, whose rules call the op's own."""

    def wrapped(f: Callable) -> Callable:
        def function(operands):
            on_operands = on_floats(f, operands)
            call = jax.custom_vjp(on_operands)
            call.defvjp(lambda floats: jax.vjp(on_operands, floats), lambda vjp, cotangents: vjp(cotangents))
            return call(floating(operands))

        return function

    inputs = trial.operands(), trial.cotangents()
    actual = jax.jit(value_and_pullback(wrapped(trial.kernel)))(*inputs)
    trial.agree(actual, trial.expected(value_and_pullback, *inputs))


@law
def donation(trial: Trial) -> None:
    """`grad` under `jit` with donated operands, whose memory the gradients take."""

    def loss(floats, operands, cotangents):
        results = on_floats(trial.kernel, operands)(floats)
        return sum(jnp.sum(x * cotangents[n], dtype=jnp.float32) for n, x in results.items())

    inputs = trial.operands(), trial.cotangents()
    expected = trial.expected(value_and_pullback, *inputs)
    given = jax.tree.map(jnp.copy, floating(inputs[0]))
    _, actual = jax.jit(jax.value_and_grad(loss), donate_argnums=0)(given, *inputs)
    kept = [name for name, x in given.items() if not x.is_deleted()]
    assert not kept, f"the memory of {', '.join(kept)} was donated and not used"
    trial.agree({"gradient": actual}, tuple({"gradient": e["gradient"]} for e in expected))


@law
def repeats(trial: Trial) -> None:
    """`jit` gives the same bits on every run, from one trace."""
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

    def gathered(self) -> int:
        """How many numbers a device gives where operands are gathered along the dimension."""
        case = self.trial.case
        return sum(math.prod(case.shape(t)) // self.count for t in case.parsed.operands if self.axis(t) is not None)

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

    def gradient_of_part(self, check_vma: bool) -> Callable:
        """Value and gradient of what `on_parts` returns, both taken inside `shard_map`.

        Without `check_vma` JAX has no other word for what devices share than a sum of what they have: of a cotangent
        that is given each then holds a part, and gradients of what devices share are left for the user to add up.
        """
        signature = self.trial.case.parsed
        shared = {t.name for t in (*signature.operands, *signature.results) if self.axis(t) is None}

        def function(operands, cotangents):
            if check_vma:
                return value_and_pullback(self.on_parts())(operands, cotangents)
            parts = {n: x / self.count if n in shared else x for n, x in cotangents.items()}
            found = value_and_pullback(self.on_parts())(operands, parts)
            summed = {n: jax.lax.psum(x, self.AXIS) if n in shared else x for n, x in found["gradient"].items()}
            return {"value": found["value"], "gradient": summed}

        return function


def _on_mesh(split: Split, kind: AxisType) -> dict[str, Arrays]:
    """Check values and gradients on a mesh, and return them."""
    trial = split.trial
    with jax.set_mesh(mesh := split.mesh(kind)):
        actual = jax.jit(value_and_pullback(trial.kernel))(*split.inputs(mesh))
    trial.agree(actual, trial.expected(value_and_pullback, trial.operands(), trial.cotangents()))
    return actual


@law
def auto_sharding(trial: Trial) -> None:
    """`jit` of sharded arrays gives what one device does."""
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
            actual = jax.jit(value_and_pullback(split.trial.kernel))(operands, cotangents)
        trial.agree(actual, trial.expected(value_and_pullback, trial.operands(), cotangents))


@dataclasses.dataclass(frozen=True)
class Way:
    """How a program tells that a dimension is split: by its arrays' shardings, or by `shard_map`."""

    kind: AxisType
    check_vma: bool | None = None  # of `shard_map`
    others: int = 1  # devices along an axis that nothing is split over, and that `shard_map` leaves alone

    def __str__(self) -> str:
        partly = " of one axis of two" if self.others > 1 else ""
        return self.kind.name if self.check_vma is None else f"shard_map{partly} with check_vma={self.check_vma}"


BY_SHARDINGS = Way(AxisType.Auto), Way(AxisType.Explicit)
# One dimension is split in the first two ways and the next in the other two.
BY_SHARD_MAP = (
    (Way(AxisType.Auto, check_vma=True), Way(AxisType.Auto, check_vma=False, others=2)),
    (Way(AxisType.Auto, check_vma=False), Way(AxisType.Auto, check_vma=True, others=2)),
)


@law
def exchanges(trial: Trial) -> None:
    """Devices exchange what the mathematics needs and nothing else, counted in programs for four H200s."""
    trial, signature = Trial(trial.op, trial.case, "triton"), trial.case.parsed

    def check(split: Split, way: Way, passes: str, programs: Sequence, needed: int) -> None:
        found, numbers = sum(map(collectives, programs), Counter()), sum(map(exchanged, programs))
        assert numbers == needed, (
            f"the {passes} with `{split.dim}` split over {split.count} devices, {way}, exchanges {numbers} numbers by "
            f"{dict(found)}, and needs {needed}"
        )

    def programs(dim: str, way: Way):
        split = Split(trial, dim, math.gcd(trial.case.sizes[dim], 4))
        shape, names = (split.count, way.others), (split.AXIS, "other")
        return split, *_programs(split, Target.named(TARGETS[1]).make_mesh(shape, names, (way.kind,) * 2), way)

    for i, dim in enumerate(trial.case.split.split()):
        for way in *BY_SHARDINGS, *BY_SHARD_MAP[i % 2]:
            split, forward, compile_backward = programs(dim, way)
            results, gradients = split.lacking(signature.results), split.lacking(signature.operands)
            sums = results * trial.case.exchanged.get(dim, 1)
            early = max(exchanged(forward) - sums, 0)  # of what gradients need, summed as early as the forward pass
            # Without `check_vma` JAX does not know what devices share. It takes what each has of a cotangent of a sum
            # for a part, as of a gradient that is whole already, and adds them up.
            unknown = 0 if way.check_vma is not False else early + results if early else sums
            check(split, way, "forward pass", (forward,), sums + min(early, gradients))
            both = forward, compile_backward()
            check(split, way, "forward and backward pass", both, sums + gradients + unknown)
            if not results:  # the gradients of all weights at once
                found = sum(map(collectives, both), Counter())
                assert found.total() <= 1, f"`{dim}` split, {way}, costs {dict(found)}, and needs one sum"
    for other, way in itertools.product(Split.others(trial), BY_SHARDINGS):
        split, forward, _ = programs(other.dim, way)  # an operand is gathered once, or a part of it will do
        check(split, way, "forward pass", (forward,), min(exchanged(forward), split.gathered()))


def _programs(split: Split, mesh, way: Way) -> tuple[jax.stages.Compiled, Callable[[], jax.stages.Compiled]]:
    """The compiled forward pass, which returns what the backward pass reads, and what compiles that backward pass."""
    trial, ins, outs = split.trial, split.operand_specs(), split.result_specs()
    function = trial.kernel
    if way.check_vma is not None:
        names = set(mesh.axis_names if way.others == 1 else [split.AXIS])
        manual = functools.partial(jax.shard_map, mesh=mesh, axis_names=names, check_vma=way.check_vma)
        function = manual(split.on_parts(), in_specs=(ins,), out_specs=outs)

    def placed(shapes, shardings):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    with jax.set_mesh(mesh):
        operands = placed(trial.case.shapes(), {n: NamedSharding(mesh, spec) for n, spec in ins.items()})
        lowered = jax.jit(lambda x: jax.vjp(on_floats(function, x), floating(x))).lower(operands)
        forward = lowered.compile()

    def backward():
        out, pull = placed(lowered.out_info, forward.output_shardings)
        with jax.set_mesh(mesh):
            return jax.jit(lambda pull, cotangents: pull(cotangents)).lower(pull, out).compile()

    return forward, backward


@law
def shard_map(trial: Trial) -> None:
    """`shard_map` with `check_vma` and without, over all axes or some, gradients in and out; no `P()` for parts."""
    inputs = trial.operands(), trial.cotangents()
    expected = trial.expected(value_and_pullback, *inputs)

    def check(split: Split, mesh, check_vma: bool) -> None:
        mapped = functools.partial(jax.shard_map, mesh=mesh, axis_names={split.AXIS}, check_vma=check_vma)
        ins, outs = split.operand_specs(), split.result_specs()
        outside = value_and_pullback(mapped(split.on_parts(), in_specs=(ins,), out_specs=outs))
        inside = mapped(
            split.gradient_of_part(check_vma),
            in_specs=(ins, outs),
            out_specs={"value": outs, "gradient": {n: ins[n] for n in floating(inputs[0])}},
        )
        for actual in jax.jit(lambda *inputs: (outside(*inputs), inside(*inputs)))(*inputs):
            trial.agree(actual, expected)

    def refused(split: Split, mesh) -> bool:
        everywhere = {n: PartitionSpec() for n in split.result_specs()}
        mapped = jax.shard_map(trial.kernel, mesh=mesh, in_specs=(split.operand_specs(),), out_specs=everywhere)
        try:
            jax.eval_shape(mapped, inputs[0])
        except ValueError:
            return True
        return False

    for split in Split.every(trial):
        mesh = split.mesh(AxisType.Auto)
        assert refused(split, mesh), "shard_map accepts out_specs=P() for results that differ between devices"
        for check_vma in True, False:
            check(split, mesh, check_vma)
    for split in Split.every(trial, times=2):
        sizes, names, kinds = (split.count, 2), (split.AXIS, "other"), (AxisType.Auto,) * 2
        mesh = jax.make_mesh(sizes, names, axis_types=kinds, devices=devices()[: 2 * split.count])
        for check_vma in True, False:
            check(split, mesh, check_vma)


@law
def pmap(trial: Trial) -> None:
    """`pmap` over each dimension that may be split."""
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
    """Kernels compile for sm_80, sm_90 and sm_100, with no GPU, and spill no registers."""
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
    """`jax.export` for CPU and CUDA at once, with no GPU; then read back and run."""
    inputs = trial.operands(), trial.cotangents()
    program = jax.jit(value_and_pullback(trial.function(None)))
    with jax.sharding.use_abstract_mesh(Target.named(TARGETS[1]).abstract_mesh):
        exported = jax.export.export(program, platforms=("cpu", "cuda"), disabled_checks=EXPORT_CHECKS)(*inputs)
    assert CUSTOM_CALL in exported.mlir_module(), "the program for CUDA has no kernel"
    again = jax.export.deserialize(exported.serialize())
    trial.agree(jax.jit(again.call)(*inputs), trial.expected(value_and_pullback, *inputs))
