"""The time of functions: many calls in flight, on inputs that no cache holds."""

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax

CALLS = 20

Work = tuple[Callable, Sequence[tuple]]  # a function and its input sets


def seconds[Name: Hashable](
    rivals: Mapping[Name, Work],
    *,
    rounds: int = 6,
    settle: float = 0.1,
    timed: float = 0.05,
    wait: Callable[[Any], Any] = jax.block_until_ready,
) -> dict[Name, float]:
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
    at_once = {
        name: max(1, min(CALLS, math.ceil(timed / run(*work, least=0.0, at_once=2, wait=wait))))
        for name, work in rivals.items()
    }
    times: dict[Name, list[float]] = {name: [] for name in rivals}
    for turn in range(rounds):
        for name, work in in_turn(rivals, turn):
            run(*work, least=settle, at_once=at_once[name], wait=wait)
            times[name].append(run(*work, least=timed, at_once=at_once[name], wait=wait))
    return {name: statistics.median(t) for name, t in times.items()}


def in_turn[Name: Hashable](rivals: Mapping[Name, Work], turn: int) -> list[tuple[Name, Work]]:
    return list(rivals.items())[:: -1 if turn % 2 else 1]


def run(
    function: Callable, inputs: Sequence[tuple], *, least: float, at_once: int, wait: Callable[[Any], Any]
) -> float:
    """Calls the function for at least so many seconds, `at_once` times before it waits; returns the time of a call."""
    start, elapsed, calls = time.perf_counter(), 0.0, 0
    while not calls or elapsed < least:
        for i in range(at_once):
            out = function(*inputs[(calls + i) % len(inputs)])
        wait(out)
        elapsed, calls = time.perf_counter() - start, calls + at_once
    return elapsed / calls
