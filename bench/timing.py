"""Device time of rivals, which may be JAX's or PyTorch's."""

import bisect
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import jax

from bench import trace
from jtile.tuning import timing
from jtile.tuning.timing import Work

MOST_CALLS = 50


def wait(out) -> None:
    """Wait for a result of JAX, or for all that PyTorch has been given to do."""
    leaves = jax.tree.leaves(out)
    if all(isinstance(x, jax.Array) for x in leaves):
        jax.block_until_ready(leaves)
    else:
        sys.modules["torch"].cuda.synchronize()


def kernel_seconds(
    rivals: Mapping[str, Work], *, rounds: int = 4, settle: float = 0.03, timed: float = 0.03
) -> dict[str, float]:
    """The median time of one call of each function over its input sets, the rivals taking turns: the sum of its
    kernels' times on the device, as the profiler has them.

    What the host takes to call, and what passes between two kernels, is not in it: JAX leaves some ten microseconds
    between two programs, PyTorch fewer. As in `jtile.tuning.timing`, a turn begins with `settle` seconds that are not
    counted, for the sake of the chip's power limit, and every other round goes through the rivals backwards.

    Raises:
      RuntimeError: the profiler saw no kernels, or not as many in each call.
    """
    calls = {}
    for name, work in rivals.items():
        wait(work[0](*work[1][0]))
        once = timing.run(*work, least=0.0, at_once=2, wait=wait)
        calls[name] = max(1, min(MOST_CALLS, math.ceil(timed / once)))
    with tempfile.TemporaryDirectory() as folder:
        with trace.recording(Path(folder)):
            for turn in range(rounds):
                for name, work in timing.in_turn(rivals, turn):
                    timing.run(*work, least=settle, at_once=calls[name], wait=wait)
                    time.sleep(1e-3)  # the device's clock is not quite the host's
                    with jax.profiler.TraceAnnotation(f"turn {turn}/{name}"):
                        timing.run(*work, least=0.0, at_once=calls[name], wait=wait)
                        time.sleep(1e-3)
        found = trace.read(Path(folder))
    times: dict[str, list[float]] = {name: [] for name in rivals}
    starts = [kernel.start for kernel in found.kernels]
    for turn in found.annotations("turn "):
        name = turn.name.partition("/")[2]
        first, last = (bisect.bisect_left(starts, at) for at in (turn.start, turn.start + turn.duration))
        kernels = found.kernels[first:last]
        if not kernels or len(kernels) % calls[name]:
            raise RuntimeError(f"the profiler has {len(kernels)} kernels of {calls[name]} calls ({turn.name})")
        times[name].append(sum(k.duration for k in kernels) / calls[name])
    if missing := [name for name, found in times.items() if not found]:
        raise RuntimeError(f"the profiler has no turns of {', '.join(missing)}")
    return {name: statistics.median(t) for name, t in times.items()}
