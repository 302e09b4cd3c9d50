"""`python -m bench.sharding --size 1b`: the time of a training step of examples/3_shard_it.py in each of its modes.

The batch of a device is fixed: n devices do n times the work of one, and the speed-up is n times what they need
longer. With `--profile FOLDER` each mode leaves a trace of three steps there, for Perfetto or TensorBoard, and a table
tells where a step's time goes: what n devices lose is communication that nothing hides, and waiting.
"""

import argparse
import dataclasses
import datetime
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np

from bench import caches, results, trace
from models import llama

SCRIPT = Path(__file__).parent.parent / "examples" / "3_shard_it.py"
WARM_UP, PROFILED = 3, 3  # steps


def load_example():
    spec = importlib.util.spec_from_file_location("shard_it", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main(arguments: list[str] | None = None) -> list[dict]:
    example = load_example()
    parser = argparse.ArgumentParser(prog="python -m bench.sharding", description=__doc__)
    parser.add_argument("--modes", nargs="+", choices=example.MODES, default=example.MODES)
    parser.add_argument("--size", choices=llama.SIZES, default="1b")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a step on each device")
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20, help="steps measured")
    parser.add_argument("--profile", type=Path, help="folder for traces")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--compile-only", action="store_true", help="no times: fill the caches on disk")
    chosen = parser.parse_args(arguments)
    devices = jax.devices()
    dtype = "bfloat16" if devices[0].platform == "gpu" else "float32"
    config = dataclasses.replace(llama.SIZES[chosen.size], dtype=dtype)
    rows: list[dict] = []
    about = dict(
        date=datetime.date.today().isoformat(),
        chip=devices[0].device_kind,
        command=shlex.join(["python", "-m", "bench.sharding", *(sys.argv[1:] if arguments is None else arguments)]),
        commit=results.commit(),
        versions=results.versions(),
        xla_flags=os.environ.get("XLA_FLAGS", ""),
        size=chosen.size,
        batch_size=chosen.batch_size,
        sequence=chosen.sequence,
    )
    print(f"{chosen.size}, {chosen.batch_size} × {chosen.sequence} tokens a device, {devices[0].device_kind}")
    for mode in chosen.modes if chosen.compile_only else dict.fromkeys(("one", *chosen.modes)):
        count = 1 if mode == "one" else len(devices)
        batch_size = chosen.batch_size * count
        training = example.Training.plan(mode, config, example.parse_options(["--steps", "1000"]), devices)
        random = np.random.default_rng(0)
        tokens = [
            training.put(random.integers(256, size=(batch_size, chosen.sequence + 1), dtype=np.int32)) for _ in range(2)
        ]
        if chosen.compile_only:
            compile_ahead(training, tokens[0])
            print(f"{mode:17} compiled", flush=True)
            continue
        seconds, loss, shares = step_seconds(training, tokens, chosen, mode)
        one = rows[0]["seconds"] if rows else seconds
        row = dict(mode=mode, devices=count, seconds=seconds, tokens_per_second=batch_size * chosen.sequence / seconds)
        row["speed_up"] = count * one / seconds
        rows.append(row | (dataclasses.asdict(shares) if shares else {}))
        print(
            f"{mode:17} {count} devices  {seconds * 1e3:8.1f} ms a step  {row['tokens_per_second']:12,.0f} tokens/s  "
            f"{row['speed_up']:.3f} times one  (loss {loss:.3f})",
            flush=True,
        )
        if chosen.output:  # after each mode: some may not fit
            chosen.output.parent.mkdir(parents=True, exist_ok=True)
            chosen.output.write_text(json.dumps(about | dict(rows=rows), indent=1) + "\n")
    print(table(rows))
    return rows


# Where the time goes.

COMMUNICATION = re.compile(r"nccl|nvshmem|all_?(reduce|gather|to_?all)|reduce_?scatter|collective", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Shares:
    """What a device does in a step, in seconds, as a mean over devices. Waiting for the others to communicate is
    communication, too."""

    compute: float
    hidden: float  # communication while the device computes
    exposed: float  # communication while it does not
    idle: float

    @classmethod
    def of(cls, kernels: Iterable[trace.Event], steps: int) -> "Shares":
        """From what ran on all devices in so many steps."""
        kernels = list(kernels)
        devices = {k.device for k in kernels}
        span = max(k.stop for k in kernels) - min(k.start for k in kernels)
        found = []
        for device in devices:
            mine = [k for k in kernels if k.device == device]
            communication = covered(k for k in mine if COMMUNICATION.search(k.name))
            compute, busy = covered(k for k in mine if not COMMUNICATION.search(k.name)), covered(mine)
            exposed = busy - compute
            found.append((compute, communication - exposed, exposed, span - busy))
        return cls(*(sum(times) / (len(devices) * steps) for times in zip(*found, strict=True)))


def covered(events: Iterable[trace.Event]) -> float:
    """How long at least one of them was running."""
    total, until = 0.0, -float("inf")
    for event in sorted(events, key=lambda e: e.start):
        total += max(0.0, event.stop - max(event.start, until))
        until = max(until, event.stop)
    return total


def table(rows: Sequence[dict]) -> str:
    """Milliseconds a step, and what of them one device alone does not need; empty where no GPU was profiled."""
    rows = [row for row in rows if "compute" in row]
    if not rows:
        return ""
    columns = "step", "lost", "compute", "communication hidden", "communication exposed", "idle"
    lines = [f"| mode | {' | '.join(columns)} | speed-up |", "| --- |" + " --- |" * (len(columns) + 1)]
    for row in rows:
        lost = row["seconds"] - rows[0]["seconds"]
        times = [row["seconds"], lost, *(row[f.name] for f in dataclasses.fields(Shares))]
        lines.append(f"| {row['mode']} | {' | '.join(f'{t * 1e3:.1f}' for t in times)} | {row['speed_up']:.3f} |")
    return "\n".join(lines)


def compile_ahead(training, tokens) -> None:
    """Its functions, for the caches: nothing runs, and no memory is taken."""
    training.init.lower().compile()
    training.step.lower(jax.eval_shape(training.init), tokens).compile()


def step_seconds(training, tokens, chosen, mode) -> tuple[float, float, Shares | None]:
    """The mean time of a step, the last loss (NaN would be no training), and if it is profiled where the time goes."""
    training.state = training.init()

    def run(steps: int) -> float:
        for i in range(steps):
            training.state, loss = training.step(training.state, tokens[i % 2])
        return float(loss)  # waits for the last step

    run(WARM_UP)
    start = time.perf_counter()
    loss = run(chosen.steps)
    seconds = (time.perf_counter() - start) / chosen.steps
    if not chosen.profile:
        return seconds, loss, None
    folder = chosen.profile / mode
    shutil.rmtree(folder, ignore_errors=True)  # an earlier run's
    with trace.recording(folder):
        run(PROFILED)
    kernels = trace.read(folder).kernels
    return seconds, loss, Shares.of(kernels, PROFILED) if kernels else None


if __name__ == "__main__":
    caches.on_disk()
    main()
