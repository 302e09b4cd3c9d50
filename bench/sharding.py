"""`python -m bench.sharding --size 1b`: the time of a training step of examples/3_shard_it.py in each of its modes.

The batch of a device is fixed: n devices do n times the work of one, and the speed-up is n times what they need
longer. With `--profile FOLDER` each mode leaves a trace of three steps there, for Perfetto or TensorBoard.
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

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
    chosen = parser.parse_args(arguments)
    devices = jax.devices()
    dtype = "bfloat16" if devices[0].platform == "gpu" else "float32"
    config = dataclasses.replace(llama.SIZES[chosen.size], dtype=dtype)
    rows: list[dict] = []
    print(f"{chosen.size}, {chosen.batch_size} × {chosen.sequence} tokens a device, {devices[0].device_kind}")
    for mode in dict.fromkeys(("one", *chosen.modes)):
        count = 1 if mode == "one" else len(devices)
        batch_size = chosen.batch_size * count
        seconds, loss = step_seconds(example, mode, config, devices, batch_size, chosen)
        one = rows[0]["seconds"] if rows else seconds
        tokens = batch_size * chosen.sequence / seconds
        rows.append(
            dict(mode=mode, devices=count, seconds=seconds, tokens_per_second=tokens, speed_up=count * one / seconds)
        )
        print(
            f"{mode:17} {count} devices  {seconds * 1e3:8.1f} ms a step  {tokens:12,.0f} tokens/s  "
            f"{rows[-1]['speed_up']:.3f} times one  (loss {loss:.3f})",
            flush=True,
        )
    if chosen.output:
        about = dict(
            date=datetime.date.today().isoformat(),
            chip=devices[0].device_kind,
            jax=jax.__version__,
            size=chosen.size,
            batch_size=chosen.batch_size,
            sequence=chosen.sequence,
        )
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        chosen.output.write_text(json.dumps(about | dict(rows=rows), indent=1) + "\n")
    return rows


def step_seconds(example, mode, config, devices, batch_size, chosen) -> tuple[float, float]:
    """The mean time of a step, and the last loss: NaN would be no training."""
    options = example.parse_options(["--steps", "1000"])
    training = example.Training.start(mode, config, options, devices)
    random = np.random.default_rng(0)
    tokens = [
        training.put(random.integers(256, size=(batch_size, chosen.sequence + 1), dtype=np.int32)) for _ in range(2)
    ]

    def run(steps: int) -> float:
        for i in range(steps):
            training.state, loss = training.step(training.state, tokens[i % 2])
        return float(loss)  # waits for the last step

    run(WARM_UP)
    start = time.perf_counter()
    loss = run(chosen.steps)
    seconds = (time.perf_counter() - start) / chosen.steps
    with jax.profiler.trace(chosen.profile / mode) if chosen.profile else contextlib.nullcontext():
        run(PROFILED if chosen.profile else 1)
    return seconds, loss


if __name__ == "__main__":
    main()
