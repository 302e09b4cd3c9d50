"""Device time of functions, on inputs that no cache holds."""

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

from bench import trace

CALLS, ROUNDS, SETTLE, TIMED = 20, 6, 0.1, 0.05  # the last two in seconds

Rivals = Mapping[str, tuple[Callable, Sequence[tuple]]]  # functions, each with its input sets


def seconds(rivals: Rivals, *, rounds: int = ROUNDS, settle: float = SETTLE, timed: float = TIMED) -> dict[str, float]:
    """The median time of one call of each function over its input sets, the rivals taking turns.

    A turn sends up to `CALLS` calls at a time, over the input sets in turn, before it waits: while the device works on
    one, the host prepares the next. A rival's inputs together should exceed the device's cache several times.

    A chip at its power limit runs faster after a function that drew little than after one that drew much. So each turn
    begins with `settle` seconds of calls that are not counted, `timed` seconds are, and every other round goes through
    the rivals backwards.
    """
    for function, inputs in rivals.values():
        wait(function(*inputs[0]))
    # Of calls that take long, no more at a time than a turn needs.
    at_once = {name: min(CALLS, max(1, math.ceil(timed / _run(*work, 0.0, 2)))) for name, work in rivals.items()}
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(rounds):
        for name, work in _order(rivals, turn):
            _run(*work, settle, at_once[name])
            times[name].append(_run(*work, timed, at_once[name]))
    return {name: statistics.median(t) for name, t in times.items()}


def kernel_seconds(rivals: Rivals, *, rounds: int = 3, calls: int = 50) -> dict[str, float]:
    """The same for functions that take the device less time than the host needs to call them: the sum of their kernels'
    times, as the profiler has them. What passes between two kernels of a call is not in it.

    Raises:
      RuntimeError: the profiler saw no kernels, or not as many in each call.
    """
    for function, inputs in rivals.values():
        wait(function(*inputs[0]))
    with tempfile.TemporaryDirectory() as folder:
        with trace.recording(Path(folder)):
            for turn in range(rounds):
                for name, (function, inputs) in _order(rivals, turn):
                    time.sleep(1e-3)  # the device's clock is not quite the host's
                    with jax.profiler.TraceAnnotation(f"turn {turn}/{name}"):
                        _run(function, inputs, 0.0, calls)
                        time.sleep(1e-3)
        found = trace.read(Path(folder))
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in found.annotations("turn "):
        kernels = [k for k in found.kernels if turn.start <= k.start < turn.start + turn.duration]
        if not kernels or len(kernels) % calls:
            raise RuntimeError(f"the profiler has {len(kernels)} kernels of {calls} calls ({turn.name})")
        times[turn.name.partition("/")[2]].append(sum(k.duration for k in kernels) / calls)
    return {name: statistics.median(t) for name, t in times.items()}


def wait(out) -> None:
    """Wait for a result of JAX, or for all that PyTorch has been given to do."""
    leaves = jax.tree.leaves(out)
    if all(isinstance(x, jax.Array) for x in leaves):
        jax.block_until_ready(leaves)
    else:
        sys.modules["torch"].cuda.synchronize()


def _order(rivals: Rivals, turn: int):
    return list(rivals.items())[:: -1 if turn % 2 else 1]


def _run(function: Callable, inputs: Sequence[tuple], least: float, at_once: int) -> float:
    """Calls the function for at least so many seconds, `at_once` times before it waits; returns the time of a call."""
    start, elapsed, calls = time.perf_counter(), 0.0, 0
    while not calls or elapsed < least:
        for i in range(at_once):
            out = function(*inputs[(calls + i) % len(inputs)])
        wait(out)
        elapsed, calls = time.perf_counter() - start, calls + at_once
    return elapsed / calls
