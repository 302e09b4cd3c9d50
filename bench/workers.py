"""Several processes for each GPU. While one has it for itself and measures, the others compile what comes next."""

import contextlib
import dataclasses
import functools
import itertools
import os
import queue
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from bench import measure, rivals
from bench.apart import Apart, Process
from bench.cases import Case
from bench.timing import Told

LIMIT = 300.0  # seconds for one case
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"

Job = tuple[Case, measure.Options]
Passes = list[list[measure.Row]]  # of one case the rows of each pass


class Worker:
    """Measures one case after another, with the processes apart that the rivals need.

    JAX keeps what memory it once had, so `share`, a part of the GPU's, is divided among the processes: PyTorch, and JAX
    beside it, have what is left.
    """

    def __init__(self, names: Sequence[str], share: float | None = None):
        mine, theirs = ({} if share is None else {FRACTION: f"{part * share:.3f}"} for part in (0.54, 0.26))
        os.environ.update(mine)
        chosen = [rivals.RIVALS[name] for name in names]
        needed = {rival.framework for rival in chosen if rival.apart and rival.missing() is None}
        self.aparts = {name: Apart(name, environment=theirs) for name in ("jax", "torch")}
        for name in needed:
            self.aparts[name].start()

    def measure(self, case: Case, options: measure.Options) -> Passes:
        return list(measure.measure(case, options, self.aparts))

    def close(self) -> None:
        for apart in self.aparts.values():
            apart.close()


def here(jobs: Sequence[Job], names: Sequence[str], until: Callable[[], bool]) -> Iterator[tuple[Case, Passes]]:
    """In this process, as long as `until` allows."""
    with contextlib.closing(Worker(names)) as worker:
        for case, options in itertools.takewhile(lambda _: until(), jobs):
            yield case, worker.measure(case, options)


def spread(
    jobs: Sequence[Job], names: Sequence[str], until: Callable[[], bool], processes: int, gpus: Sequence[str]
) -> Iterator[tuple[Case, Passes]]:
    """The same in so many processes, which share these GPUs. A case comes when it is done."""
    processes = min(processes, len(jobs))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        free: queue.SimpleQueue[tuple[Process, Path]] = queue.SimpleQueue()
        locks = {gpu: Path(folder) / f"gpu {gpu}" for gpu in gpus}
        for lock in locks.values():
            lock.touch()
        share = 1 / -(-processes // len(gpus))
        for gpu, i in zip(itertools.cycle(gpus), range(processes), strict=False):
            process = Process(
                f"worker {i}",
                functools.partial(Worker, names, share),
                LIMIT,
                {"CUDA_VISIBLE_DEVICES": gpu, "TORCHINDUCTOR_COMPILE_THREADS": "1"},
                daemon=False,  # it has processes of its own
            )
            process.start()
            stack.callback(process.close)
            free.put((process, locks[gpu]))

        def measured(job: Job) -> tuple[Case, Passes] | None:
            worker, lock = free.get()
            try:
                return _asked(worker, *job, lock) if until() else None
            finally:
                free.put((worker, lock))

        with ThreadPoolExecutor(processes) as threads:
            yield from filter(
                None, (done.result() for done in as_completed([threads.submit(measured, j) for j in jobs]))
            )


def _asked(worker: Process, case: Case, options: measure.Options, lock: Path) -> tuple[Case, Passes]:
    try:
        passes = worker.call("measure", case, dataclasses.replace(options, lock=lock))
    except Told as failure:
        return case, list(measure.lost(case, options, f"fails: {failure}"))
    if any(row.get("gap", "").startswith("fails") for rows in passes for row in rows):
        worker.close()  # what fails may leave a GPU's context that fails everything; the next case begins anew
    return case, passes


def visible_gpus(count: int) -> list[str]:
    """As `CUDA_VISIBLE_DEVICES` has the GPUs that JAX sees."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(i) for i in range(count)])[:count]
