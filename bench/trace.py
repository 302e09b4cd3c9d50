"""What ran on the GPU, by JAX's profiler: also what PyTorch launches."""

import collections
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that took a while, in seconds on the profiler's clock."""

    name: str
    start: float
    duration: float
    device: str = ""

    @property
    def stop(self) -> float:
        return self.start + self.duration


@dataclasses.dataclass(frozen=True)
class Trace:
    """Kernels and copies on the GPU, and what the host was doing."""

    kernels: Sequence[Event]
    host: Sequence[Event]

    def annotations(self, prefix: str) -> list[Event]:
        return [event for event in self.host if event.name.startswith(prefix)]

    def shares(self) -> dict[str, tuple[float, int]]:
        """Of each kernel the seconds that it ran and how often, longest first."""
        found: dict[str, list[float]] = collections.defaultdict(list)
        for kernel in self.kernels:
            found[kernel.name].append(kernel.duration)
        pairs = {name: (sum(times), len(times)) for name, times in found.items()}
        return dict(sorted(pairs.items(), key=lambda item: -item[1][0]))


@contextlib.contextmanager
def recording(folder: Path) -> Iterator[None]:
    """Profile what runs inside, at little cost to it: Python's own calls are left out."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 1
    jax.profiler.start_trace(folder, profiler_options=options)
    try:
        yield
    finally:
        jax.profiler.stop_trace()


def read(folder: Path) -> Trace:
    """What `recording` left in a folder."""
    [file] = folder.rglob("*.xplane.pb")
    kernels, host = [], []
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        gpu = plane.name.startswith("/device:GPU")
        for line in plane.lines:
            if gpu and not line.name.startswith("Stream"):
                continue  # the same kernels again, by the operations that they belong to
            found = [Event(e.name, e.start_ns * 1e-9, e.duration_ns * 1e-9, plane.name) for e in line.events]
            (kernels if gpu else host).extend(found)
    return Trace(sorted(kernels, key=lambda e: e.start), host)
