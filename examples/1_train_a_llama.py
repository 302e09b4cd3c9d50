"""Trains a Llama byte by byte on the source of Python's standard library.

    python examples/1_train_a_llama.py                # 0.8 million parameters: minutes on two CPU cores
    python examples/1_train_a_llama.py --size 125m    # on a GPU

Ctrl-C or SIGTERM saves and stops, and the same command then goes on where it stopped, to the same losses. A finished
run starts again. The output folder has checkpoints/, losses.json and loss.png.
"""

import argparse
import dataclasses
import functools
import json
import platform
import resource
import shutil
import signal
import sys
import sysconfig
import time
import zlib
from pathlib import Path
from typing import Any

# models/ lies beside examples/ and is no part of the package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from models import llama

DEFAULTS = {
    "tiny": dict(steps=800, batch_size=16, sequence=128, learning_rate=5e-3),
    "125m": dict(steps=200, batch_size=64, sequence=1024, learning_rate=3e-4),
}
VALIDATION_BYTES = 2**16
STEPS_IN_FLIGHT = 10  # between two looks at the loss, each of which waits for the device
PROMPT = "def read_lines(path):\n"
SAMPLE_BYTES = 400


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--size", choices=DEFAULTS, default="tiny")
    parser.add_argument("--steps", type=positive, help="optimizer steps")
    parser.add_argument("--batch-size", type=positive, help="sequences a step")
    parser.add_argument("--sequence", type=positive, help="bytes a sequence")
    parser.add_argument("--learning-rate", type=float, help="at its highest, after warm-up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--implementation", choices=["triton", "xla"], default=None, help="of every op of jtile")
    parser.add_argument("--output", type=Path, help="a folder; runs/SIZE by default")
    options = parser.parse_args(arguments)
    defaults = DEFAULTS[options.size] | dict(output=Path("runs") / options.size)
    return argparse.Namespace(**defaults | vars(options))


# The text: split by file, so that no part of a validation file is seen in training.


def read_standard_library() -> tuple[np.ndarray, np.ndarray]:
    """The bytes to train on and those to validate on: nine and one in ten of the files."""
    root = Path(sysconfig.get_path("stdlib"))
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        # Tests are two thirds of the library and much of them tables; installed packages are no part of it.
        if not {"site-packages", "dist-packages", "test", "tests"}.intersection(name.split("/")):
            parts[zlib.crc32(name.encode()) % 10 == 0].append(path.read_bytes())
    train, validation = (np.frombuffer(b"\n".join(parts[key]), np.uint8) for key in (False, True))
    return train, validation


def training_batch(text: np.ndarray, options: argparse.Namespace, step: int) -> np.ndarray:
    """Sequences from anywhere in the text. They follow from seed and step alone: resuming needs no state."""
    starts = np.random.default_rng((options.seed, step)).integers(len(text) - options.sequence, size=options.batch_size)
    return text[starts[:, None] + np.arange(options.sequence + 1)].astype(np.int32)


def validation_batches(text: np.ndarray, options: argparse.Namespace) -> np.ndarray:
    """The same sequences each time, evenly spaced: (batches, batch_size, sequence + 1)."""
    batches = max(1, VALIDATION_BYTES // (options.batch_size * options.sequence))
    starts = np.linspace(0, len(text) - options.sequence - 1, batches * options.batch_size).astype(int)
    windows = text[starts[:, None] + np.arange(options.sequence + 1)].astype(np.int32)
    return windows.reshape(batches, options.batch_size, -1)


# The training.


def make_optimizer(options: argparse.Namespace) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=options.learning_rate,
        warmup_steps=max(1, options.steps // 10),
        decay_steps=options.steps,
        end_value=options.learning_rate / 10,
    )
    matrices = functools.partial(jax.tree.map, lambda parameter: parameter.ndim > 1)
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.1, mask=matrices)
    )


def open_run(options: argparse.Namespace) -> ocp.CheckpointManager:
    """The run's checkpoints. A finished run starts again; another one's folder is left alone."""
    described = vars(options) | dict(python=platform.python_version())
    del described["output"]  # the folder may be moved
    description = options.output / "run.json"
    checkpoints = options.output.absolute() / "checkpoints"
    if description.exists():
        if (found := json.loads(description.read_text())) != described:
            differing = {name: found.get(name) for name in described if found.get(name) != described[name]}
            sys.exit(f"{options.output} holds another run, one with {differing}; choose another --output.")
        if (options.output / "losses.json").exists():
            shutil.rmtree(checkpoints)
            (options.output / "losses.json").unlink()
    options.output.mkdir(parents=True, exist_ok=True)
    description.write_text(json.dumps(described, indent=2))
    keep_two = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp.CheckpointManager(checkpoints, options=keep_two)


def peak_memory() -> int:
    """Bytes: of the GPU's memory, or of this process where there is no GPU."""
    if stats := jax.devices()[0].memory_stats():
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    train_text, validation_text = read_standard_library()
    manager = open_run(options)

    config = dataclasses.replace(
        llama.SIZES[options.size],
        dtype="bfloat16" if jax.default_backend() == "gpu" else "float32",
        implementation=options.implementation,
    )
    graph, params = nnx.split(llama.Llama(config, rngs=nnx.Rngs(options.seed)), nnx.Param)
    optimizer = make_optimizer(options)
    state = params, optimizer.init(params)
    # Losses: of "train" one a step, of "validation" pairs of step and loss.
    history: dict[str, Any] = dict(train=[], validation=[], tokens=0, seconds=0.0)

    def train(state, tokens):
        params, optimizer_state = state
        loss, gradients = jax.value_and_grad(lambda params: llama.loss(nnx.merge(graph, params), tokens))(params)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), loss

    @jax.jit
    def validate(params, batches):
        return jax.lax.map(lambda tokens: llama.loss(nnx.merge(graph, params), tokens), batches).mean()

    if (resumed := manager.latest_step()) is not None:
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        saved = manager.restore(
            resumed,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(target), history=ocp.args.JsonRestore()),
        )
        state, history = saved["state"], saved["history"]

    signals: list[int] = []

    def stop_soon(number, frame):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one stops at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_soon)

    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(
        f"{count / 1e6:.1f} million parameters, {config.dtype} on {jax.devices()[0].device_kind}; "
        f"{len(train_text) / 1e6:.1f} MB of Python to train on, {len(validation_text) / 1e6:.1f} MB to validate on"
    )
    if resumed is not None:
        print(f"going on after step {resumed}")

    # Compiled before the clock starts, for honest tokens/s.
    step = len(history["train"])
    train_step = jax.jit(train, donate_argnums=0).lower(state, training_batch(train_text, options, step)).compile()
    validation = validation_batches(validation_text, options)
    interval = max(1, options.steps // 10)
    pending: list[jax.Array] = []
    stopping = False

    with Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    ) as progress:
        bar = progress.add_task("", total=options.steps, completed=step, loss=float("nan"), speed=float("nan"))
        start = time.perf_counter()
        while step < options.steps and not stopping:
            state, loss = train_step(state, training_batch(train_text, options, step))
            pending.append(loss)
            step += 1
            stopping = bool(signals)
            at_interval = step % interval == 0 or step == options.steps
            if at_interval or stopping or len(pending) == STEPS_IN_FLIGHT:
                history["train"] += [float(loss) for loss in pending]
                history["tokens"] += len(pending) * options.batch_size * options.sequence
                history["seconds"] += time.perf_counter() - start
                pending = []
                loss, speed = history["train"][-1], history["tokens"] / history["seconds"]
                progress.update(bar, completed=step, loss=loss, speed=speed)
                if at_interval:
                    validation_loss = float(validate(state[0], validation))
                    history["validation"].append((step, validation_loss))
                    progress.console.print(f"step {step}: loss {loss:.3f}, validation {validation_loss:.3f}")
                if at_interval or stopping:
                    saved = dict(state=ocp.args.StandardSave(state), history=ocp.args.JsonSave(history))
                    manager.save(step, args=ocp.args.Composite(**saved))
                start = time.perf_counter()
    manager.close()
    if step < options.steps:
        print(f"stopped after step {step}; the same command goes on from there")
        sys.exit(128 + signals[0])

    print(
        f"validation loss {history['validation'][-1][1]:.3f} nats a byte; "
        f"{history['tokens'] / history['seconds']:,.0f} tokens/s; {peak_memory() / 2**30:.2f} GiB of memory at most"
    )
    print(f"a sample:\n\n{sample(nnx.merge(graph, state[0]), options)}\n")
    plot(history, options.output / "loss.png")
    (options.output / "losses.json").write_text(json.dumps(history | dict(peak_memory_bytes=peak_memory())))
    print(f"written to {options.output}: loss.png, losses.json")


def plot(history: dict[str, Any], path: Path) -> None:
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(history["train"]) + 1), history["train"], linewidth=0.7, label="training")
    axes.plot(*zip(*history["validation"], strict=True), marker="o", label="validation")
    axes.set(xlabel="step", ylabel="nats a byte", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def sample(model: llama.Llama, options: argparse.Namespace) -> str:
    """The prompt and what the model makes of it, which looks no further back than it was trained to."""
    text = list(PROMPT.encode())
    window = min(SAMPLE_BYTES, options.sequence // 2)
    for key in jax.random.split(jax.random.key(options.seed), SAMPLE_BYTES // window):
        prompt = jnp.array([text[-window:]], jnp.int32)
        text += llama.generate(model, prompt, window, temperature=0.9, top_k=40, key=key)[0].tolist()
    # A vocabulary larger than 256 has tokens that are no bytes, and that training makes vanishingly unlikely.
    return bytes(token for token in text if token < 256).decode(errors="replace")


if __name__ == "__main__":
    main()
