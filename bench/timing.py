"""Device time of a function: many calls in flight, inputs that no cache holds."""

import statistics
import time
from collections.abc import Callable, Sequence

import jax

CALLS, ROUNDS, SETTLE = 20, 6, 0.05


def seconds(rivals: dict[str, tuple[Callable, Sequence[tuple]]]) -> dict[str, float]:
    """The median time of one call of each function over its input sets, the rivals taking turns.

    Each round sends `CALLS` calls, over the input sets in turn, before it waits: while the device works on one, the
    host prepares the next. A rival's inputs together should exceed the device's cache several times.

    A chip at its power limit runs faster after a function that drew little than after one that drew much. So each turn
    begins with `SETTLE` seconds of calls that are not counted, and every other round goes through the rivals backwards.
    """
    for function, inputs in rivals.values():
        jax.block_until_ready(function(*inputs[0]))
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(ROUNDS):
        for name, (function, inputs) in list(rivals.items())[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            while time.perf_counter() - start < SETTLE:
                jax.block_until_ready([function(*i) for i in inputs])
            start = time.perf_counter()
            for i in range(CALLS):
                out = function(*inputs[i % len(inputs)])
            jax.block_until_ready(out)
            times[name].append((time.perf_counter() - start) / CALLS)
    return {name: statistics.median(t) for name, t in times.items()}
