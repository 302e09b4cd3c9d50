"""Device time of a function: many calls in flight, inputs that no cache holds."""

import statistics
import time
from collections.abc import Callable, Sequence

import jax

CALLS, ROUNDS = 20, 5


def seconds(rivals: dict[str, tuple[Callable, Sequence[tuple]]]) -> dict[str, float]:
    """The median time of one call of each function over its input sets, the rivals taking turns.

    Each round sends `CALLS` calls, over the input sets in turn, before it waits: while the device works on one, the
    host prepares the next. A rival's inputs together should exceed the device's cache several times.
    """
    for function, inputs in rivals.values():
        jax.block_until_ready(function(*inputs[0]))
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(ROUNDS):
        for name, (function, inputs) in rivals.items():
            start = time.perf_counter()
            for i in range(CALLS):
                out = function(*inputs[i % len(inputs)])
            jax.block_until_ready(out)
            times[name].append((time.perf_counter() - start) / CALLS)
    return {name: statistics.median(t) for name, t in times.items()}
