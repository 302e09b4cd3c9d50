"""Pallas kernels drawn at random, and what they compute compared with Pallas' interpreter.

    python -m tests.compiler.fuzz --examples 300                # the generated source in Triton's interpreter
    python -m tests.compiler.fuzz --examples 2000 --gpu         # the compiled kernels on a GPU

A kernel is drawn as the text of a Python program, so what fails can be read, copied and run.

How close the results must be follows from the program. Floats start as small integers, and while every number that an
expression can reach is an integer that its type holds, any order of operations gives the same bits: results must be
equal. Operations that round, or that libraries approximate, add to an error that is carried along (`Value.error`).
Where it would grow without bound, operands are clipped first.
"""

import itertools
import time
import traceback
from collections.abc import Callable

import hypothesis
import jax
import numpy as np

import jtile
from jtile.compiler.interpret import interpret_pallas
from tests.compiler.fuzz.body import PRECISION, STORED
from tests.compiler.fuzz.programs import Program, programs


def on_cpu(call: Callable) -> Callable:
    """The generated source, in Triton's interpreter."""
    return jtile.debug(call)


def on_gpu(call: Callable) -> Callable:
    return jax.jit(call)


def check(program: Program, run: Callable[[Callable], Callable]) -> None:
    """Compares what `run` makes of a program with what Pallas' interpreter does."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        # The kernels are small: compiling is what takes time. And every type rounds as it says.
        options = {"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False}
        expected = jax.jit(interpret_pallas(program.call), compiler_options=options)(*program.arrays())
    found = run(program.call)(*program.arrays())
    for f, e, known in zip(found, expected, program.results, strict=True):
        assert (f.shape, f.dtype) == (e.shape, e.dtype), (f, e)
        wide = np.float64 if known.dtype in (*PRECISION, *STORED) else np.int64
        f, e = np.asarray(f).astype(wide), np.asarray(e).astype(wide)
        if wide is np.float64 and not known.special:
            largest = np.max(np.abs(e), initial=0.0)
            assert largest <= known.bound + known.error, f"the fuzzer's bound is wrong: {largest} > {known.bound}"
        np.testing.assert_allclose(f, e, rtol=0, atol=known.error)


def examples(
    run: Callable[[Callable], Callable], count: int, seed: int, shrink: bool = True, report: bool = False
) -> None:
    """Draws and checks `count` programs. Raises at a mismatch, with the smallest program found that still shows it."""
    done, start, phase = itertools.count(1), time.monotonic(), hypothesis.Phase

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
        phases=[phase.generate, phase.shrink] if shrink else [phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(programs())
    def agrees(program):
        try:
            check(program, run)
        except Exception:
            if report and (number := next(done)) <= count:
                print(f"seed {seed}: kernel {number} does not agree:\n{program}", flush=True)
                for _ in range(count):  # what follows are attempts to make it smaller
                    next(done)
            raise
        if (number := next(done)) % 50 == 0 and report and number <= count:
            print(f"seed {seed}: {number} kernels agree, {time.monotonic() - start:.0f} s", flush=True)

    agrees()


def work(gpu: bool, count: int, seed: int, shrink: bool) -> str:
    """Runs in a process of its own; returns what went wrong, or nothing."""
    try:
        examples(on_gpu if gpu else on_cpu, count, seed, shrink, report=True)
    except Exception as error:
        return "".join(traceback.format_exception(error))
    return ""
