"""One case: every rival checked against a float32 reference, and then timed, all of them in turn."""

import dataclasses
import functools
import math
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import rivals, timing
from bench.apart import Apart
from bench.cases import BACKWARD, BOTH, FORWARD, PASSES, Case
from bench.timing import Work, brief

CACHE = 64 << 20  # bytes, no smaller than the second-level cache of any supported chip
MOST_SETS = 256

FLOORS = {"B": "copy", "FLOP": "cuBLAS"}  # what a case is held to, timed among its rivals
PRODUCT = 8192  # the size of the matrix product that is the floor of cases bound by FLOPs

Row = dict[str, Any]


@dataclasses.dataclass
class Prepared:
    """What a rival is timed on, where it runs in this process, and what its first call told."""

    work: Work | None
    results: Sequence[jax.Array]
    first_call_seconds: float
    extra_bytes: int  # beside the inputs, at most: temporaries and results
    temporary_bytes: int  # of which so much is no result
    error: float = 0.0


@dataclasses.dataclass(frozen=True)
class Options:
    """How long to measure, and whom."""

    rounds: int = 4
    settle: float = 0.03
    timed: float = 0.03
    rivals: Sequence[str] = tuple(rivals.RIVALS)
    passes: Sequence[str] = PASSES
    compile_only: bool = False  # and call once, for the caches on disk of jtile, JAX and PyTorch


def measure(case: Case, options: Options, aparts: Mapping[str, Apart]) -> Iterator[list[Row]]:
    """For each pass of a case, a row for each rival. One that cannot run has a `gap` in place of a time: the reason."""
    bench = Bench()
    gaps, floor = rivals.gaps(case), FLOORS[case.unit]
    for direction in case.work:
        if direction not in options.passes:
            continue
        start = time.perf_counter()
        rows, asked = {floor: _row(case, direction, floor)}, {}
        for party in (bench, *aparts.values()):
            party.forget()
        for name in options.rivals:
            entry = rivals.entry(name, case.op)
            if entry is None or direction not in entry.passes:
                continue
            row = rows[name] = _row(case, direction, name)
            if name in gaps:
                row["gap"] = gaps[name]
                continue
            rival = rivals.RIVALS[name]
            asked[name] = aparts[rival.framework] if rival.apart else bench
            asked[name].ask(case, name, direction, 1 if options.compile_only else None)
        bench.works[floor] = _floor(case, direction)
        for name in sorted(asked, key=lambda name: rivals.RIVALS[name].apart):  # which are at work meanwhile
            rows[name] |= _prepared(asked[name], name)
        prepared = time.perf_counter() - start
        if not options.compile_only:
            _time(case, rows, [party.turns() for party in (bench, *aparts.values())], options)
        # Seconds, compiling and all, and of those the ones before anything was timed.
        rows[floor] |= dict(took=time.perf_counter() - start, took_preparing=prepared)
        yield list(rows.values())


def _prepared(party: "Bench | Apart", name: str) -> Row:
    try:
        prepared = party.answer(name)
    except NotImplementedError as lack:
        return {"gap": str(lack)}
    except Exception as failure:  # a rival's, of whatever kind: the table names it, and goes on without
        return {"gap": f"fails: {brief(failure)}"}
    kept = "error", "extra_bytes", "temporary_bytes", "first_call_seconds"
    return {name: getattr(prepared, name) for name in kept}


class Bench:
    """The rivals of one process, for one pass of a case at a time."""

    def __init__(self) -> None:
        self.given: Given | None = None
        self.runners: dict[str, _Jax | _Torch] = {}
        self.forget()

    def forget(self) -> None:
        self.works: dict[str, Work] = {}
        self.asked: dict[str, tuple] = {}
        self.reference: Sequence[jax.Array] = ()

    def ask(self, case: Case, name: str, direction: str, count: int | None) -> None:
        self.asked[name] = case, name, direction, count

    def answer(self, name: str) -> Prepared:
        return self.prepare(*self.asked[name])

    def prepare(self, case: Case, name: str, direction: str, count: int | None) -> Prepared:
        """Runs a rival once, and compares. Its work, of so many input sets or as many as no cache holds, is kept."""
        if self.given is None or self.given.case.name != case.name:
            self.given, self.runners = Given(case), {}
            _forget_torch()
        prepared = self.runner(name).work(direction, count or self.given.count)
        if not self.reference:
            self.reference = self.runner(rivals.REFERENCE).work(direction, 1).results
        prepared.error, prepared.results = error(prepared.results, self.reference), ()
        self.works[name] = prepared.work
        return prepared

    def runner(self, name: str) -> "_Jax | _Torch":
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
    if case.blocks is not None:
        about |= dict(blocks=case.blocks, plain=case.plain)
    return about | {"pass": direction, "rival": rival, "work": case.work[direction], "unit": case.unit}


def _time(case: Case, rows: dict[str, Row], parties: Sequence[timing.Party], options: Options) -> None:
    """Fill in what is measured."""
    times = timing.kernel_seconds(parties, rounds=options.rounds, settle=options.settle, timed=options.timed)
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
        return Work(jax.jit(jnp.negative), [(jax.random.normal(jax.random.key(i), n),) for i in range(count)])
    keys = jax.random.split(jax.random.key(0), 4)
    a, b, c, d = (jax.random.normal(key, (PRODUCT, PRODUCT), jnp.bfloat16) for key in keys)
    return Work(jax.jit(jnp.dot), [(a, b), (c, d)])


# JAX


class _Jax:
    def __init__(self, given: Given, rival: str):
        entry = rivals.entry(rival, given.case.op)
        assert entry is not None
        self.given, self.wide = given, rival == rivals.REFERENCE  # in float32
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

    def work(self, direction: str, count: int) -> Prepared:
        dead = self.given.case.dead and direction != FORWARD
        step = {FORWARD: self.forward, BACKWARD: _apply, BOTH: self.both}[direction]
        function = jax.jit(step, donate_argnums=0 if dead else ())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")
            first = self.inputs(direction, 0)
            start = time.perf_counter()
            out = jax.block_until_ready(function(*(_fresh(first) if dead else first)))
            seconds = time.perf_counter() - start
            memory = function.lower(*first).compile().memory_analysis()
        extra = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        rest = [self.inputs(direction, i) for i in range(1, count)]
        size = sum(x.nbytes for x in jax.tree.leaves(first[0]))
        work = Work(function, [first, *rest], *((_fresh, size) if dead else ()))
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
        tensors = {name: self.tensor(x) for name, x in self.given.sets[index].items()}
        if self.writes:
            tensors = {name: x.clone() for name, x in tensors.items()}
        return {n: x.requires_grad_() if differentiated and n in self.by else x for n, x in tensors.items()}

    def tensor(self, x: jax.Array):
        return self.torch.from_dlpack(jax.block_until_ready(x))

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
