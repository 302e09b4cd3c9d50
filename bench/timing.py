"""Device time of rivals, which may be JAX's or PyTorch's."""

import functools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax

from bench import trace
from jtile.tuning import timing
from jtile.tuning.timing import Work


def wait(out) -> None:
    """Wait for a result of JAX, or for all that PyTorch has been given to do."""
    leaves = jax.tree.leaves(out)
    if all(isinstance(x, jax.Array) for x in leaves):
        jax.block_until_ready(leaves)
    else:
        sys.modules["torch"].cuda.synchronize()


seconds = functools.partial(timing.seconds, wait=wait)


def kernel_seconds(rivals: dict[str, Work], *, rounds: int = 3, calls: int = 50) -> dict[str, float]:
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
                for name, work in timing.in_turn(rivals, turn):
                    time.sleep(1e-3)  # the device's clock is not quite the host's
                    with jax.profiler.TraceAnnotation(f"turn {turn}/{name}"):
                        timing.run(*work, least=0.0, at_once=calls, wait=wait)
                        time.sleep(1e-3)
        found = trace.read(Path(folder))
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in found.annotations("turn "):
        kernels = [k for k in found.kernels if turn.start <= k.start < turn.start + turn.duration]
        if not kernels or len(kernels) % calls:
            raise RuntimeError(f"the profiler has {len(kernels)} kernels of {calls} calls ({turn.name})")
        times[turn.name.partition("/")[2]].append(sum(k.duration for k in kernels) / calls)
    return {name: statistics.median(t) for name, t in times.items()}
