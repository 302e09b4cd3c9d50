"""One case: every rival compiled, checked against a float32 reference, and then timed, all of them in turn."""

import dataclasses
import functools
import math
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import rivals, timing
from bench.apart import Apart
from bench.cases import BACKWARD, BOTH, FORWARD, PASSES, Case
from bench.lock import alone
from bench.timing import Work, brief

CACHE = 64 << 20  # bytes, no smaller than the second-level cache of any supported chip
MOST_SETS = 256

FLOORS = {"B": "copy", "FLOP": "cuBLAS"}  # what a case is held to, timed among its rivals
PRODUCT = 8192  # the size of the matrix product that is the floor of cases bound by FLOPs

Row = dict[str, Any]


@dataclasses.dataclass
class Prepared:
    """What a rival is timed on, and what its first call told."""

    work: Work
    results: Sequence[jax.Array]
    first_call_seconds: float
    extra_bytes: int  # beside the inputs, at most: temporaries and results
    temporary_bytes: int  # of which so much is no result


@dataclasses.dataclass(frozen=True)
class Options:
    """How long to measure, and whom. Processes that share a GPU have a file to lock while they use it."""

    rounds: int = 4
    settle: float = 0.03
    timed: float = 0.03
    rivals: Sequence[str] = tuple(rivals.RIVALS)
    passes: Sequence[str] = PASSES
    compile_only: bool = False  # for the caches on disk of jtile, JAX and PyTorch, which has to run for that
    lock: Path | None = None


def measure(case: Case, options: Options, aparts: Mapping[str, Apart]) -> Iterator[list[Row]]:
    """For each pass of a case, a row for each rival. One that cannot run has a `gap` in place of a time: the reason."""
    bench = Bench()
    parties = (bench, *aparts.values())
    gaps, floor = rivals.gaps(case), FLOORS[case.unit]
    for direction in case.work:
        if direction not in options.passes:
            continue
        rows, asked = {floor: _row(case, direction, floor)}, {}
        for name in options.rivals:
            entry = rivals.entry(name, case.op)
            if entry is None or direction not in entry.passes:
                continue
            row = rows[name] = _row(case, direction, name)
            if name in gaps:
                row["gap"] = gaps[name]
            else:
                asked[name] = aparts[rivals.RIVALS[name].framework] if rivals.RIVALS[name].apart else bench
        start = time.perf_counter()
        if options.compile_only:
            bench.compile(case, rivals.REFERENCE, direction, True)
        _ask("compile", asked, rows, case, direction, options.compile_only)
        rows[floor]["took_compiling"] = time.perf_counter() - start
        if not options.compile_only:
            with alone(options.lock):
                start = time.perf_counter()
                bench.works[floor] = _floor(case, direction)
                _ask("prepare", {n: party for n, party in asked.items() if "gap" not in rows[n]}, rows, case, direction)
                rows[floor]["took_preparing"] = time.perf_counter() - start
                start = time.perf_counter()
                turns = [party.turns() for party in parties]
                timing.take_turns(turns, rounds=options.rounds, settle=options.settle, timed=options.timed)
            _fill_in(case, rows, timing.finished(turns))
            rows[floor]["took_timing"] = time.perf_counter() - start
        for party in parties:
            party.forget()
        yield list(rows.values())


def lost(case: Case, options: Options, why: str) -> Iterator[list[Row]]:
    """What there is of a case whose process has ended."""
    for direction in (d for d in case.work if d in options.passes):
        having = (n for n in options.rivals if (e := rivals.entry(n, case.op)) and direction in e.passes)
        yield [_row(case, direction, name) | {"gap": why} for name in having]


def _ask(method: str, asked: Mapping[str, "Bench | Apart"], rows: dict[str, Row], case: Case, *given) -> None:
    """All processes at once; what this one is asked comes first, while the others are at work."""
    for name, party in asked.items():
        party.ask(method, name, case, name, *given)
    for name in sorted(asked, key=lambda name: rivals.RIVALS[name].apart):
        try:
            rows[name] |= asked[name].answer(name)
        except NotImplementedError as lack:
            rows[name]["gap"] = str(lack)
        except Exception as failure:  # a rival's, of whatever kind: the table names it, and goes on without
            rows[name]["gap"] = f"fails: {brief(failure)}"


class Bench:
    """The rivals of one process, for one pass of a case at a time."""

    def __init__(self) -> None:
        self.given: Given | None = None
        self.runners: dict[str, _Jax | _Torch] = {}
        self.forget()

    def forget(self) -> None:
        """What is of one pass alone, and takes memory."""
        self.works: dict[str, Work] = {}
        self.asked: dict[str, tuple] = {}
        self.reference: Sequence[jax.Array] = ()
        if self.given is not None:
            self.given.forget()
        if torch := sys.modules.get("torch"):
            torch.cuda.empty_cache()

    def ask(self, method: str, name: str, *given) -> None:
        self.asked[name] = method, given

    def answer(self, name: str) -> Row:
        method, given = self.asked[name]
        return getattr(self, method)(*given)

    def compile(self, case: Case, name: str, direction: str, run: bool) -> Row:
        """Takes no memory or time of the GPU, unless PyTorch is to compile, which does so when it runs."""
        start = time.perf_counter()
        runner = self.runner(case, name)
        runner.compile(direction, run)
        seconds = time.perf_counter() - start
        if not run:
            reference = self.runner(case, rivals.REFERENCE)
            reference.compile(direction, run)
            if isinstance(runner, _Jax):
                _errors.lower(runner.results(direction), reference.results(direction)).compile()
        return {"first_call_seconds": seconds}

    def prepare(self, case: Case, name: str, direction: str) -> Row:
        """Runs a rival once, and compares. Its work, of as many input sets as no cache holds, is kept."""
        runner = self.runner(case, name)
        if not self.reference:
            self.reference = self.runner(case, rivals.REFERENCE).work(direction, 1).results
            self.given.forget()  # its cotangents are in float32
        prepared = runner.work(direction, self.given.count)
        self.works[name] = prepared.work
        kept = "first_call_seconds", "extra_bytes", "temporary_bytes"
        found = {field: getattr(prepared, field) for field in kept}
        return found | {"error": float(np.max(_errors(prepared.results, self.reference)))}

    def runner(self, case: Case, name: str) -> "_Jax | _Torch":
        if self.given is None or self.given.case.name != case.name:
            self.given, self.runners = Given(case), {}
            _forget_torch()
        if name not in self.runners:
            torch = name != rivals.REFERENCE and rivals.RIVALS[name].framework == "torch"
            self.runners[name] = (_Torch if torch else _Jax)(self.given, name)
        return self.runners[name]

    def turns(self) -> timing.Turns:
        self.reference = ()
        return timing.Turns(self.works)


class Given:
    """A case's operands, in as many sets as no cache holds, and cotangents of its results: the same for every rival."""

    def __init__(self, case: Case):
        self.case = case
        self.count = min(MOST_SETS, max(2, math.ceil(4 * CACHE / case.bytes)))
        made = case.maker().lower(jax.random.key(0))
        self.shapes = made.out_info
        self._make = made.compile()
        self.by = list(case.by or (name for name, x in self.shapes.items() if _floating(x)))
        self.forget()

    def operands(self, index: int) -> dict[str, jax.Array]:
        """One set."""
        if index not in self._sets:
            self._sets[index] = self._make(jax.random.key(index))
        return self._sets[index]

    def forget(self) -> None:
        """What takes memory."""
        self._sets: dict[int, dict[str, jax.Array]] = {}
        self._cotangents: dict[tuple, jax.Array] = {}

    def cotangent(self, index: int, like):
        """For results of these shapes and dtypes. Its values are bfloat16's, and so the same in every dtype."""
        leaves, tree = jax.tree.flatten(like)
        return jax.tree.unflatten(tree, [self._cotangent(index, i, x.shape, x.dtype) for i, x in enumerate(leaves)])

    def _cotangent(self, index: int, number: int, shape: tuple[int, ...], dtype) -> jax.Array:
        key = index, number, shape, jnp.dtype(dtype).name
        if key not in self._cotangents:
            self._cotangents[key] = _normal(jax.random.key(1000 * number + index), shape, "bfloat16", key[-1])
        return self._cotangents[key]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key, shape, drawn, dtype):
    return jax.random.normal(key, shape, drawn).astype(dtype)


def _row(case: Case, direction: str, rival: str) -> Row:
    about = dict(case=case.name, op=case.op, table=case.table, at=case.at)
    if case.blocks is not None:
        about |= dict(blocks=case.blocks, plain=case.plain)
    return about | {"pass": direction, "rival": rival, "work": case.work[direction], "unit": case.unit}


def _fill_in(case: Case, rows: dict[str, Row], times: Mapping[str, timing.Time]) -> None:
    """What was measured."""
    floor = next(iter(rows))
    rate = (2 * PRODUCT**3 if case.unit == "FLOP" else rows[floor]["work"]) / times[floor].seconds
    for name, row in rows.items():
        found = times.get(name, timing.Time(gap="its process ended before it was timed"))
        if found.gap is not None:
            row.setdefault("gap", found.gap)
            continue
        amount = rate * found.seconds if name == floor else row["work"]
        row |= dict(seconds=found.seconds, rate=amount / found.seconds, share=amount / found.seconds / rate)
        row["right"] = name == floor or row["error"] <= case.tolerance
        if found.clock != "device":
            row["clock"] = found.clock


def _floor(case: Case, direction: str) -> Work:
    """A copy of as many bytes in all, or a matrix product by cuBLAS."""
    if case.unit == "B":
        n = max(1, case.work[direction] // 2 // 4)
        count = min(MOST_SETS, max(2, math.ceil(4 * CACHE / (4 * n))))
        # A kernel that XLA makes: its copies of whole arrays are the driver's, which are slower.
        return Work(_negative, [(_normal(jax.random.key(i), (n,), "float32", "float32"),) for i in range(count)])
    shape, keys = (PRODUCT, PRODUCT), jax.random.split(jax.random.key(0), 4)
    a, b, c, d = (_normal(key, shape, "bfloat16", "bfloat16") for key in keys)
    return Work(jax.jit(jnp.dot), [(a, b), (c, d)])


_negative = jax.jit(jnp.negative)


# JAX


class _Jax:
    def __init__(self, given: Given, rival: str):
        entry = rivals.entry(rival, given.case.op)
        assert entry is not None
        self.given, self.wide = given, rival == rivals.REFERENCE  # in float32
        self.function = entry.make(**given.case.options)
        self.programs: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}  # that they took to compile
        self.results_of: dict[str, Any] = {}

    def widened(self, operands):
        return {n: x.astype(jnp.float32) if self.wide and _floating(x) else x for n, x in operands.items()}

    def forward(self, operands):
        return self.function(**self.widened(operands))

    def pulled(self, operands):
        """The results, and their pullback to the operands that the case differentiates by."""
        operands = self.widened(operands)
        by = {name: operands[name] for name in self.given.by}
        return jax.vjp(lambda by: self.function(**operands | by), by)

    def both(self, operands, cotangent):
        out, pull = self.pulled(operands)
        return out, pull(cotangent)

    @functools.cached_property
    def out(self):
        return jax.eval_shape(self.forward, self.given.shapes)

    @functools.cached_property
    def compiled_pulled(self) -> tuple:
        """The program, and what the pullback is like."""
        lowered = jax.jit(self.pulled).lower(self.given.shapes)
        return lowered.compile(), lowered.out_info[1]

    def inputs(self, direction: str, index: int) -> tuple:
        operands = self.given.operands(index)
        if direction == FORWARD:
            return (operands,)
        cotangent = self.given.cotangent(index, self.out)
        return (operands, cotangent) if direction == BOTH else (self.compiled_pulled[0](operands)[1], cotangent)

    def compile(self, direction: str, run: bool = False) -> None:
        if direction in self.programs:
            return
        start = time.perf_counter()
        step = {FORWARD: self.forward, BACKWARD: _apply, BOTH: self.both}[direction]
        given = self.compiled_pulled[1] if direction == BACKWARD else self.given.shapes
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")
            function = jax.jit(step, donate_argnums=0 if self.dead(direction) else ())
            lowered = function.lower(given, *(() if direction == FORWARD else (self.out,)))
            self.programs[direction] = lowered.compile()
        self.results_of[direction] = jax.tree.leaves(lowered.out_info)
        self.seconds[direction] = time.perf_counter() - start

    def results(self, direction: str) -> list[jax.ShapeDtypeStruct]:
        return self.results_of[direction]

    def dead(self, direction: str) -> bool:
        return self.given.case.dead and direction != FORWARD

    def work(self, direction: str, count: int) -> Prepared:
        self.compile(direction)
        program, dead = self.programs[direction], self.dead(direction)
        first = self.inputs(direction, 0)
        start = time.perf_counter()
        out = jax.block_until_ready(program(*(_fresh(first) if dead else first)))
        seconds = self.seconds[direction] + time.perf_counter() - start
        memory = program.memory_analysis()
        extra = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        rest = [self.inputs(direction, i) for i in range(1, count)]
        size = sum(x.nbytes for x in jax.tree.leaves(first[0]))
        work = Work(program, [first, *rest], *((_fresh, size) if dead else ()))
        # Of results (out, {"x": dx, ...}) the gradients come in the order of their names, for every rival.
        return Prepared(work, jax.tree.leaves(out), seconds, extra, memory.temp_size_in_bytes)


def _fresh(inputs: tuple) -> tuple:
    """The same with a copy of the first, which the function may overwrite."""
    return jax.tree.map(jnp.copy, inputs[0]), *inputs[1:]


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
        self.given, self.torch, self.writes = given, torch, entry.writes
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
        tensors = {name: self.tensor(x) for name, x in self.given.operands(index).items()}
        if self.writes:
            tensors = {name: x.clone() for name, x in tensors.items()}
        return {n: x.requires_grad_() if differentiated and n in self.by else x for n, x in tensors.items()}

    def tensor(self, x: jax.Array):
        return self.torch.from_dlpack(jax.block_until_ready(x))

    def compile(self, direction: str, run: bool) -> None:
        if run:
            self.work(direction, 1)

    def work(self, direction: str, count: int) -> Prepared:
        function = {FORWARD: self.forward, BACKWARD: self.backward, BOTH: self.both}[direction]
        fresh = self.fresh if self.writes and direction == BOTH else None
        cuda, start = self.torch.cuda, time.perf_counter()
        first = self.inputs(direction, 0)  # compiles the forward pass of the others
        cuda.synchronize()
        if direction == BACKWARD:
            start = time.perf_counter()
        out = function(*(first if fresh is None else fresh(first)))
        cuda.synchronize()
        seconds = time.perf_counter() - start
        as_rows = dict(memory_format=self.torch.contiguous_format)
        results = [jnp.from_dlpack(x.detach().clone(**as_rows)) for x in jax.tree.leaves(out)]
        del out
        given = first if fresh is None else fresh(first)
        cuda.synchronize()
        before = cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        function(*given)
        cuda.synchronize()
        extra = cuda.max_memory_allocated() - before
        del given
        rest = [self.inputs(direction, i) for i in range(1, count)]
        size = sum(x.nbytes for x in first[0].values()) if fresh else 0
        temporary = max(0, extra - sum(x.nbytes for x in results))
        return Prepared(Work(function, [first, *rest], fresh, size), results, seconds, extra, temporary)

    def fresh(self, inputs: tuple) -> tuple:
        """The same with copies of the operands."""
        operands, _, cotangents = inputs
        copies = {n: x.detach().clone().requires_grad_(x.requires_grad) for n, x in operands.items()}
        return copies, [copies[name] for name in self.by], cotangents


def _tuple(out) -> tuple:
    return out if isinstance(out, tuple) else (out,)


def _forget_torch() -> None:
    if torch := sys.modules.get("torch"):
        torch._dynamo.reset()  # it compiles a function a few times only, and each case is one more


# Errors


@jax.jit
def _errors(got, reference):
    """Of each array ‖got − reference‖ / ‖reference‖."""
    wide = [(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in zip(got, reference, strict=True)]
    return [jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()) for a, b in wide]
