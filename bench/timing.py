"""Device time of rivals, which may be JAX's or PyTorch's, in this process or another."""

import bisect
import dataclasses
import itertools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import jax

from bench import trace

MOST_CALLS = 50
MOST_FRESH = 32 << 30  # bytes of inputs made anew for one turn


@dataclasses.dataclass
class Work:
    """A function and its input sets; with `fresh`, which copies one, each call gets a copy, to do with as it likes."""

    function: Callable
    inputs: Sequence[tuple]
    fresh: Callable[[tuple], tuple] | None = None
    fresh_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of a call, by the device's clock, or the host's where the profiler saw no kernels; or what went wrong."""

    seconds: float = math.nan
    clock: str = "device"
    gap: str | None = None


class Party(Protocol):
    """Who takes turns: the rivals of one process."""

    names: Sequence[str]

    def start(self) -> None: ...
    def turn(self, number: int, name: str, settle: float, timed: float) -> None: ...
    def finish(self) -> dict[str, Time]: ...


def wait(out) -> None:
    """Wait for a result of JAX, or for all that PyTorch has been given to do."""
    leaves = jax.tree.leaves(out)
    if all(isinstance(x, jax.Array) for x in leaves):
        jax.block_until_ready(leaves)
    else:
        sys.modules["torch"].cuda.synchronize()


def take_turns(parties: Sequence[Party], *, rounds: int = 4, settle: float = 0.03, timed: float = 0.03) -> None:
    """Calls each function over its input sets, the rivals taking turns.

    As in `jtile.tuning.timing`, a turn begins with `settle` seconds that are not counted, for the sake of the chip's
    power limit, and every other round goes through the rivals backwards.
    """
    with ThreadPoolExecutor() as at_once:  # a profile's start and end take each process a while
        list(at_once.map(lambda party: party.start(), parties))
    order = [(party, name) for party in parties for name in party.names]
    for number in range(rounds):
        for party, name in order[:: -1 if number % 2 else 1]:
            party.turn(number, name, settle, timed)


def finished(parties: Sequence[Party]) -> dict[str, Time]:
    """The median time of one call: the sum of its kernels' times on the device, as the profiler has them.

    What the host takes to call, and what passes between two kernels, is not in it: JAX leaves some ten microseconds
    between two programs, PyTorch fewer.
    """
    with ThreadPoolExecutor() as at_once:
        found = list(at_once.map(lambda party: party.finish(), parties))
    return {name: time for times in found for name, time in times.items()}


class Turns:
    """The rivals of this process."""

    def __init__(self, works: Mapping[str, Work]):
        self.works, self.names = works, list(works)
        self.calls: dict[str, int] = {}
        self.host: dict[str, list[float]] = {name: [] for name in works}
        self.failed: dict[str, str] = {}

    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.recording = trace.recording(Path(self.folder.name))
        self.recording.__enter__()

    def turn(self, number: int, name: str, settle: float, timed: float) -> None:
        if name not in self.failed:
            self._try(name, self._turn, number, name, settle, timed)

    def finish(self) -> dict[str, Time]:
        self.recording.__exit__(None, None, None)
        device = self._by_profiler(trace.read(Path(self.folder.name)))
        self.folder.cleanup()
        return {name: self._time(name, device[name]) for name in self.names}

    def _try(self, name: str, act: Callable, *given) -> None:
        try:
            act(*given)
        except Exception as failure:  # a rival's, of whatever kind: it has a gap, and the others go on
            self.failed[name] = brief(failure)

    def _count(self, name: str, work: Work, timed: float) -> None:
        once = self._run(work, 2)
        most = MOST_CALLS if work.fresh is None else max(1, min(MOST_CALLS, MOST_FRESH // max(1, work.fresh_bytes)))
        self.calls[name] = max(1, min(most, math.ceil(timed / once)))

    def _turn(self, number: int, name: str, settle: float, timed: float) -> None:
        work = self.works[name]
        if name not in self.calls:
            self._count(name, work, timed)
        calls = self.calls[name]
        start = time.perf_counter()
        while time.perf_counter() - start < settle:
            self._run(work, calls)
        self.host[name].append(self._run(work, calls, f"turn {number}/{name}"))

    @staticmethod
    def _run(work: Work, calls: int, label: str = "settling") -> float:
        """Seconds of a call by the host's clock."""
        sets = itertools.islice(itertools.cycle(work.inputs), calls)
        if work.fresh is not None:
            sets = [work.fresh(given) for given in sets]
            wait(sets)
        time.sleep(1e-3)  # the device's clock is not quite the host's
        with jax.profiler.TraceAnnotation(label):
            start = time.perf_counter()
            for given in sets:
                out = work.function(*given)
            wait(out)
            seconds = (time.perf_counter() - start) / calls
            time.sleep(1e-3)
        return seconds

    def _by_profiler(self, found: trace.Trace) -> dict[str, list[float]]:
        """Of each turn whose kernels are a whole number for each call."""
        times: dict[str, list[float]] = {name: [] for name in self.names}
        starts = [kernel.start for kernel in found.kernels]
        for turn in found.annotations("turn "):
            name = turn.name.partition("/")[2]
            first, last = (bisect.bisect_left(starts, at) for at in (turn.start, turn.start + turn.duration))
            kernels = found.kernels[first:last]
            if kernels and len(kernels) % self.calls[name] == 0:
                times[name].append(sum(k.duration for k in kernels) / self.calls[name])
        return times

    def _time(self, name: str, device: Sequence[float]) -> Time:
        if name in self.failed:
            return Time(gap=f"fails: {self.failed[name]}")
        if device:
            return Time(statistics.median(device))
        return Time(statistics.median(self.host[name]), "host")


class Told(RuntimeError):
    """What another process has said of its failure."""


def brief(failure: BaseException) -> str:
    """Kind and first line."""
    if isinstance(failure, Told):
        return str(failure)
    text = next((line for line in str(failure).splitlines() if line.strip()), "")
    return f"{type(failure).__name__}: {text}"[:300]
