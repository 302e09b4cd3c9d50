"""One case: every rival checked against a float32 reference, and then timed, all of them in turn."""

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import rivals, timing
from bench.cases import BACKWARD, BOTH, FORWARD, PASSES, Case

CACHE = 64 << 20  # bytes, no smaller than the second-level cache of any supported chip
MOST_SETS = 256

FLOORS = {"B": "copy", "FLOP": "cuBLAS"}  # what a case is held to, timed among its rivals
PRODUCT = 8192  # the size of the matrix product that is the floor of cases bound by FLOPs

Row = dict[str, Any]


@dataclasses.dataclass
class Work:
    """What a rival is timed on, and what its first call told."""

    function: Callable
    inputs: Sequence[tuple]
    results: Sequence[jax.Array] = ()
    first_call_seconds: float = 0.0
    extra_bytes: int = 0  # beside the inputs, at most: temporaries and results


@dataclasses.dataclass(frozen=True)
class Options:
    """How long to measure, and whom."""

    rounds: int = 4
    settle: float = 0.03
    timed: float = 0.03
    rivals: Sequence[str] = tuple(rivals.RIVALS)
    passes: Sequence[str] = PASSES
    compile_only: bool = False  # and call once, for the caches on disk of jtile, JAX and PyTorch


def measure(case: Case, options: Options) -> Iterator[list[Row]]:
    """For each pass of a case, a row for each rival. One that cannot run has a `gap` in place of a time: the reason."""
    given = Given(case)
    _forget_torch()
    gaps, runners = rivals.gaps(case), {}
    for direction in case.work:
        if direction not in options.passes:
            continue
        start = time.perf_counter()
        reference = _Jax(given, rivals.REFERENCE, wide=True).work(direction, 1).results
        floor = FLOORS[case.unit]
        rows, works = {floor: _row(case, direction, floor)}, {floor: _floor(case, direction)}
        for name in options.rivals:
            entry = rivals.entry(name, case.op)
            if entry is None or direction not in entry.passes:
                continue
            rows[name] = _row(case, direction, name)
            if name in gaps:
                rows[name]["gap"] = gaps[name]
                continue
            make = _Jax if rivals.RIVALS[name].framework == "jax" else _Torch
            try:
                runner = runners[name] = runners.get(name) or make(given, name)
                work = runner.work(direction, 1 if options.compile_only else given.count)
                rows[name]["error"] = error(work.results, reference)
            except Exception as failure:  # a rival's, of whatever kind: the table names it, and goes on without
                rows[name]["gap"] = f"fails: {_brief(failure)}"
                continue
            works[name] = dataclasses.replace(work, results=())
        del reference
        if options.compile_only:
            for name, work in works.items():
                rows[name]["first_call_seconds"] = work.first_call_seconds
        else:
            _time(case, rows, works, options)
        del works
        rows[floor]["took"] = time.perf_counter() - start  # seconds, compiling and all
        yield list(rows.values())


class Given:
    """A case's operands, in as many sets as no cache holds, and cotangents of its results: the same for every rival."""

    def __init__(self, case: Case):
        self.case = case
        self.count = min(MOST_SETS, max(2, math.ceil(4 * CACHE / case.bytes)))
        self.sets = case.sets(self.count)
        floating = [name for name, x in self.sets[0].items() if _floating(x)]
        self.by = list(case.by or floating)
        self._cotangents: dict[tuple, jax.Array] = {}

    def cotangent(self, index: int, like):
        """For results of these shapes and dtypes. Its values are bfloat16's, and so the same in every dtype."""
        leaves, tree = jax.tree.flatten(like)
        return jax.tree.unflatten(tree, [self._cotangent(index, i, x.shape, x.dtype) for i, x in enumerate(leaves)])

    def _cotangent(self, index: int, number: int, shape: tuple[int, ...], dtype) -> jax.Array:
        key = index, number, shape, jnp.dtype(dtype).name
        if key not in self._cotangents:
            self._cotangents[key] = _narrow_normal(jax.random.key(1000 * number + index), shape, key[-1])
        return self._cotangents[key]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _narrow_normal(key, shape, dtype):
    return jax.random.normal(key, shape, jnp.bfloat16).astype(dtype)


def _row(case: Case, direction: str, rival: str) -> Row:
    about = dict(case=case.name, op=case.op, table=case.table, at=case.at)
    return about | {"pass": direction, "rival": rival, "work": case.work[direction], "unit": case.unit}


def _time(case: Case, rows: dict[str, Row], works: Mapping[str, Work], options: Options) -> None:
    """Fill in what is measured."""
    pairs = {name: (work.function, work.inputs) for name, work in works.items()}
    times = timing.kernel_seconds(pairs, rounds=options.rounds, settle=options.settle, timed=options.timed)
    floor = next(iter(works))
    rate = (2 * PRODUCT**3 if case.unit == "FLOP" else rows[floor]["work"]) / times[floor]
    for name, work in works.items():
        amount = rate * times[name] if name == floor else rows[name]["work"]
        rows[name] |= dict(
            seconds=times[name],
            rate=amount / times[name],
            share=amount / times[name] / rate,  # of the floor
            extra_bytes=work.extra_bytes,
            first_call_seconds=work.first_call_seconds,
        )
        rows[name]["right"] = name == floor or rows[name]["error"] <= case.tolerance


def _floor(case: Case, direction: str) -> Work:
    """A copy of as many bytes in all, or a matrix product by cuBLAS."""
    if case.unit == "B":
        n = max(1, case.work[direction] // 2 // 4)
        count = min(MOST_SETS, max(2, math.ceil(4 * CACHE / (4 * n))))
        # A kernel that XLA makes: its copies of whole arrays are the driver's, which are slower.
        return Work(jax.jit(jnp.negative), [(jax.random.normal(jax.random.key(i), n),) for i in range(count)])
    keys = jax.random.split(jax.random.key(0), 4)
    a, b, c, d = (jax.random.normal(key, (PRODUCT, PRODUCT), jnp.bfloat16) for key in keys)
    return Work(jax.jit(jnp.dot), [(a, b), (c, d)])


# JAX


class _Jax:
    def __init__(self, given: Given, rival: str, wide: bool = False):
        entry = rivals.entry(rival, given.case.op)
        assert entry is not None
        self.given, self.wide = given, wide  # to float32
        self.function = entry.make(**given.case.options)

    def forward(self, operands):
        return self.function(**operands)

    def pulled(self, operands):
        """The results, and their pullback to the operands that the case differentiates by."""
        by = {name: operands[name] for name in self.given.by}
        return jax.vjp(lambda by: self.function(**operands | by), by)

    def both(self, operands, cotangent):
        out, pull = self.pulled(operands)
        return out, pull(cotangent)

    def inputs(self, direction: str, index: int) -> tuple:
        operands = self.given.sets[index]
        if self.wide:
            operands = {name: x.astype(jnp.float32) if _floating(x) else x for name, x in operands.items()}
        if direction == FORWARD:
            return (operands,)
        cotangent = self.given.cotangent(index, jax.eval_shape(self.forward, operands))
        return (operands, cotangent) if direction == BOTH else (self.compiled_pulled(operands)[1], cotangent)

    @functools.cached_property
    def compiled_pulled(self):
        return jax.jit(self.pulled)

    def work(self, direction: str, count: int) -> Work:
        function = jax.jit({FORWARD: self.forward, BACKWARD: _apply, BOTH: self.both}[direction])
        first = self.inputs(direction, 0)
        start = time.perf_counter()
        out = jax.block_until_ready(function(*first))
        seconds = time.perf_counter() - start
        memory = function.lower(*first).compile().memory_analysis()
        extra = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        rest = [self.inputs(direction, i) for i in range(1, count)]
        # Of results (out, {"x": dx, ...}) the gradients come in the order of their names, for every rival.
        return Work(function, [first, *rest], jax.tree.leaves(out), seconds, extra)


def _apply(pull, cotangent):
    return pull(cotangent)


def _floating(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


# PyTorch, on the same memory


class _Torch:
    def __init__(self, given: Given, rival: str):
        import torch

        entry = rivals.entry(rival, given.case.op)
        assert entry is not None
        self.given, self.torch, self.copies = given, torch, entry.writes
        self.function = entry.make(**given.case.options)
        self.by = sorted(given.by)

    def forward(self, operands):
        with self.torch.no_grad():
            return _tuple(self.function(**operands))

    def backward(self, out, by, cotangents):
        return self.torch.autograd.grad(out, by, cotangents, retain_graph=True)

    def both(self, operands, by, cotangents):
        out = _tuple(self.function(**operands))
        return out, self.torch.autograd.grad(out, by, cotangents)

    def inputs(self, direction: str, index: int) -> tuple:
        operands = self.operands(index, direction != FORWARD)
        if direction == FORWARD:
            return (operands,)
        out = _tuple(self.function(**operands))
        # JAX knows dtypes by the same names.
        like = [jax.ShapeDtypeStruct(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in out]
        cotangents = [self.tensor(x) for x in self.given.cotangent(index, like)]
        if direction == BOTH:
            del out
            operands = self.operands(index, True)  # the function may have written to them
        by = [operands[name] for name in self.by]
        return (operands, by, cotangents) if direction == BOTH else (out, by, cotangents)

    def operands(self, index: int, differentiated: bool) -> dict[str, Any]:
        tensors = {name: self.tensor(x) for name, x in self.given.sets[index].items()}
        if self.copies:
            tensors = {name: x.clone() for name, x in tensors.items()}
        return {n: x.requires_grad_() if differentiated and n in self.by else x for n, x in tensors.items()}

    def tensor(self, x: jax.Array):
        return self.torch.from_dlpack(jax.block_until_ready(x))

    def work(self, direction: str, count: int) -> Work:
        function = {FORWARD: self.forward, BACKWARD: self.backward, BOTH: self.both}[direction]
        cuda, start = self.torch.cuda, time.perf_counter()
        first = self.inputs(direction, 0)  # compiles the forward pass of the others
        cuda.synchronize()
        if direction == BACKWARD:
            start = time.perf_counter()
        out = function(*first)
        cuda.synchronize()
        seconds = time.perf_counter() - start
        as_rows = dict(memory_format=self.torch.contiguous_format)
        results = [jnp.from_dlpack(x.detach().clone(**as_rows)) for x in jax.tree.leaves(out)]
        del out
        before = cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        function(*first)
        cuda.synchronize()
        extra = cuda.max_memory_allocated() - before
        rest = [self.inputs(direction, i) for i in range(1, count)]
        return Work(function, [first, *rest], results, seconds, extra)


def _tuple(out) -> tuple:
    return out if isinstance(out, tuple) else (out,)


def _forget_torch() -> None:
    if torch := sys.modules.get("torch"):
        torch._dynamo.reset()  # it compiles a function a few times only, and each case is one more
        torch.cuda.empty_cache()


# Errors


@jax.jit
def relative_error(got, reference):
    """‖got − reference‖ / ‖reference‖."""
    wide = reference.astype(jnp.float32)
    return jnp.linalg.norm((got.astype(jnp.float32) - wide).ravel()) / jnp.linalg.norm(wide.ravel())


def error(got, reference) -> float:
    """The largest relative error of the arrays."""
    return float(np.max([relative_error(a, b) for a, b in zip(got, reference, strict=True)]))


def _brief(failure: BaseException) -> str:
    """Kind and first line."""
    text = next((line for line in str(failure).splitlines() if line.strip()), "")
    return f"{type(failure).__name__}: {text}"[:200]
