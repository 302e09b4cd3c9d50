"""Device time of a function: many calls in flight, inputs that no cache holds."""

import statistics
import time
from collections.abc import Callable, Sequence

import jax

CALLS, ROUNDS, SETTLE, TIMED = 20, 6, 0.1, 0.05


def seconds(rivals: dict[str, tuple[Callable, Sequence[tuple]]]) -> dict[str, float]:
    """The median time of one call of each function over its input sets, the rivals taking turns.

    A turn sends `CALLS` calls at a time, over the input sets in turn, before it waits: while the device works on one,
    the host prepares the next. A rival's inputs together should exceed the device's cache several times.

    A chip at its power limit runs faster after a function that drew little than after one that drew much. So each turn
    begins with `SETTLE` seconds of calls that are not counted, `TIMED` seconds are, and every other round goes through
    the rivals backwards.
    """
    for function, inputs in rivals.values():
        jax.block_until_ready(function(*inputs[0]))
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(ROUNDS):
        for name, (function, inputs) in list(rivals.items())[:: -1 if turn % 2 else 1]:
            _run(function, inputs, SETTLE)
            times[name].append(_run(function, inputs, TIMED))
    return {name: statistics.median(t) for name, t in times.items()}


def _run(function: Callable, inputs: Sequence[tuple], least: float) -> float:
    """Calls the function for at least so many seconds; returns the time of a call."""
    start, elapsed, calls = time.perf_counter(), 0.0, 0
    while elapsed < least:
        for i in range(CALLS):
            out = function(*inputs[i % len(inputs)])
        jax.block_until_ready(out)
        elapsed, calls = time.perf_counter() - start, calls + CALLS
    return elapsed / calls
