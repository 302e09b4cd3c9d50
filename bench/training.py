"""`python -m bench.training --size 1b`: a training step of Llama, end to end, and where its time goes.

The same model, batch and optimiser (AdamW; float32 parameters, bfloat16 activations), each time in a process of its
own: `models/llama.py` on jtile's kernels, fast and lean (with `remat="selective"`); the same in plain XLA with cuDNN's
attention; and Hugging Face's Llama in PyTorch under torch.compile, without and with Liger-Kernel. All compile at once,
and then train one after the other. Results of a day are merged into one file, however many runs they took.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import caches, results
from bench.apart import import_torchs_triton

JAX: dict[str, dict[str, Any]] = {  # how each computes
    "jtile": dict(implementation="triton"),
    "jtile, lean": dict(implementation="triton", remat="selective"),
    "XLA and cuDNN": dict(implementation="cudnn", linear_loss=False),
}
CONTENDERS = (*JAX, "torch.compile", "torch.compile and Liger-Kernel")
WARM_UP, PROFILED, KERNELS_KEPT = 3, 2, 40
PREPARING = 0.7  # of the time that there is
READY = "ready to train"

# What a kernel is for, by its name; the first that fits.
GROUPS = {
    "attention": r"attention|flash|fmha|sdpa|cudnn_generated|fprop_ampere|bprop",
    "loss": r"cross_entropy|nll_loss|log_softmax",
    "matrix products": r"gemm|cutlass|nvjet|wgmma|cublas|xmma|matmul|dot_",
    "norms": r"norm|rsqrt",
    "rotary positions": r"rope|rotary",
    "activation": r"gated_activation|swiglu|silu",
    "optimiser": r"adam|multi_tensor|foreach",
    "copies": r"memcpy|copy|memset",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    parser.add_argument("--size", default="1b", help="of models/llama.py")
    parser.add_argument("--batch", type=int, default=12, help="sequences a step")
    parser.add_argument("--seq", type=int, default=2048, help="tokens of each")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--limit", type=float, default=600, help="seconds for all of them together")
    parser.add_argument("--compile-only", action="store_true", help="no times: fill the caches on disk")
    parser.add_argument("--output", type=Path, help="file to write (default: in bench/results/<chip>/)")
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)  # in this process
    given = parser.parse_args(arguments)
    caches.on_disk()
    if given.only:
        given.output.write_text(json.dumps(measure(given)))
        return 0
    run = {
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", "bench.training", *sys.argv[1:]]),
        "commit": results.commit(),
        "versions": results.versions(),
    }
    chip, rows, path = "unknown", [], given.output
    for row in measured_apart(given):
        print(line(row), flush=True)
        if given.compile_only:
            continue
        rows.append(row | {"size": given.size, "batch": given.batch, "seq": given.seq})
        chip = row.get("chip", chip)
        if given.output or chip != "unknown":
            path = given.output or results.of_today(chip, f"training_{given.size}_")
            merge(path, chip, run, rows)  # what was measured before an interruption is there
    if rows and path is not None:
        print(f"\n{markdown(results.read(path))}\n\nwrote {path}")
    return 1 if any("gap" in row and row["contender"] in JAX for row in rows) else 0


def merge(path: Path, chip: str, run: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Put a run's rows into a file. They take the place of earlier ones, but a gap takes that of gaps alone."""
    content = results.read(path) if path.exists() else {"runs": [], "rows": []}
    content["chip"] = chip
    if run not in content["runs"]:
        content["runs"].append(run)
    known = {_key(row): row for row in content["rows"]}
    for row in rows:
        if "gap" not in row or "gap" in known.get(_key(row), row):
            known[_key(row)] = row | {"run": content["runs"].index(run)}
    content["rows"] = sorted(known.values(), key=lambda row: CONTENDERS.index(row["contender"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def _key(row: dict[str, Any]) -> tuple:
    return row["contender"], row["size"], row["batch"], row["seq"]


def measured_apart(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What each contender measured, or why it could not. None prepares while another trains."""
    start = time.monotonic()
    to_prepare, to_train = start + PREPARING * given.limit, start + given.limit
    if given.compile_only:
        to_prepare = to_train
    with contextlib.ExitStack() as stack:
        contenders = [stack.enter_context(contextlib.closing(Contender(name, given))) for name in given.contenders]
        gaps = {contender: contender.prepared(to_prepare) for contender in contenders}
        for contender, gap in gaps.items():
            yield {"contender": contender.name, "gap": gap} if gap else contender.result(to_train)


class Contender:
    """A process that prepares, says so, and trains when it is told to."""

    def __init__(self, name: str, given: argparse.Namespace):
        self.name, self.limit = name, given.limit
        self.folder = tempfile.TemporaryDirectory()
        self.output, self.errors = Path(self.folder.name) / "row.json", Path(self.folder.name) / "errors"
        command = [sys.executable, "-m", "bench.training", "--only", name, "--output", str(self.output)]
        for option in ("size", "batch", "seq", "steps"):
            command += [f"--{option}", str(getattr(given, option))]
        command += ["--compile-only"] * given.compile_only
        memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**memory, **os.environ},
            )
        self.ready = False
        self.listener = threading.Thread(target=self.listen)
        self.listener.start()

    def close(self) -> None:
        self.process.kill()
        self.listener.join()
        self.process.communicate()
        self.folder.cleanup()

    def listen(self) -> None:
        assert self.process.stdout is not None
        self.ready = any(text.strip() == READY for text in self.process.stdout)

    def prepared(self, deadline: float) -> str | None:
        """Waits until it is; returns why it is not."""
        self.listener.join(max(0.0, deadline - time.monotonic()))
        if self.listener.is_alive():
            self.process.kill()
            self.listener.join()
        if self.ready:
            return None
        self.process.wait()
        return self.gap()

    def result(self, deadline: float) -> dict[str, Any]:
        try:
            self.process.communicate("go\n", timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        if self.process.returncode or not self.output.exists():
            return {"contender": self.name, "gap": self.gap()}
        return json.loads(self.output.read_text())

    def gap(self) -> str:
        if self.process.returncode == -signal.SIGKILL:
            return f"took longer than its part of {self.limit:.0f} s"
        lines = [text for text in self.errors.read_text().splitlines() if text.strip()] or ["no output"]
        told = next((text for text in reversed(lines) if re.match(r"[\w.]*(Error|Exception)\b", text)), lines[-1])
        return f"fails: {told[:300]}"


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """One contender, in this process."""
    start = time.perf_counter()
    training = (_Jax if given.only in JAX else _Torch)(given.only, given)
    training.prepare()
    prepared = time.perf_counter() - start
    print(READY, flush=True)
    sys.stdin.readline()
    if given.compile_only:
        return {"contender": given.only, "compile_seconds": prepared}
    return train(training, given, prepared)


def train(training: "_Jax | _Torch", given: argparse.Namespace, prepared: float) -> dict[str, Any]:
    """Train for a few steps; tokens a second, peak memory, and each kernel's share."""
    start = time.perf_counter()
    first_loss = training.run(1)
    first_step = prepared + time.perf_counter() - start
    training.run(WARM_UP)
    start = time.perf_counter()
    last_loss = training.run(given.steps)
    seconds = (time.perf_counter() - start) / given.steps
    peak = training.peak_bytes()
    kernels = training.kernels()
    busy = sum(time for time, _ in kernels.values())
    return {
        "contender": given.only,
        "chip": training.chip,
        "seconds": seconds,
        "tokens_per_second": given.batch * given.seq / seconds,
        "peak_bytes": peak,
        "first_step_seconds": first_step,
        "losses": [first_loss, last_loss],
        "busy_seconds": busy / PROFILED,  # of a step, on the device
        "groups": {group: time / busy for group, time in grouped(kernels).items()},
        "kernels": [
            {"name": kernel[:120], "share": time / busy, "calls": count / PROFILED}
            for kernel, (time, count) in list(kernels.items())[:KERNELS_KEPT]
        ],
    }


def grouped(kernels: dict[str, tuple[float, int]]) -> dict[str, float]:
    """Seconds by what kernels are for."""
    found = dict.fromkeys([*GROUPS, "other elementwise and reductions"], 0.0)
    for name, (seconds, _) in kernels.items():
        fits = (group for group, pattern in GROUPS.items() if re.search(pattern, name, re.IGNORECASE))
        found[next(fits, "other elementwise and reductions")] += seconds
    return found


class _Jax:
    def __init__(self, name: str, given: argparse.Namespace):
        import jax
        import optax
        from flax import nnx

        from models import llama

        self.jax, self.chip = jax, jax.devices()[0].device_kind
        config = dataclasses.replace(llama.SIZES[given.size], dtype="bfloat16", **JAX[name])
        graph, _ = nnx.split(nnx.eval_shape(lambda: llama.Llama(config, rngs=nnx.Rngs(0))), nnx.Param)
        optimizer = optax.adamw(1e-4, b1=0.9, b2=0.95, weight_decay=0.1)

        @jax.jit
        def initial():
            params = nnx.split(llama.Llama(config, rngs=nnx.Rngs(0)), nnx.Param)[1]
            return params, optimizer.init(params)

        def step(state, tokens):
            params, optimizer_state = state
            loss, gradients = jax.value_and_grad(lambda p: llama.loss(nnx.merge(graph, p), tokens))(params)
            updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
            return (optax.apply_updates(params, updates), optimizer_state), loss

        self.step = jax.jit(step, donate_argnums=0)
        self.initial = initial
        shape = given.batch, given.seq + 1
        self.batches = [jax.random.randint(jax.random.key(i), shape, 0, config.vocab_size) for i in range(2)]

    @functools.cached_property
    def state(self):
        return self.initial()

    def prepare(self) -> None:
        state = self.jax.eval_shape(self.initial)
        self.initial = self.initial.lower().compile()
        self.step = self.step.lower(state, self.batches[0]).compile()

    def run(self, steps: int) -> float:
        for i in range(steps):
            self.state, loss = self.step(self.state, self.batches[i % 2])
        return float(loss)  # waits for the last step

    def peak_bytes(self) -> int:
        return self.jax.devices()[0].memory_stats()["peak_bytes_in_use"]

    def kernels(self) -> dict[str, tuple[float, int]]:
        from bench import trace

        with tempfile.TemporaryDirectory() as folder:
            with trace.recording(Path(folder)):
                self.run(PROFILED)
            return trace.read(Path(folder)).shares()


class _Torch:
    def __init__(self, name: str, given: argparse.Namespace):
        import_torchs_triton()
        import torch
        import transformers

        from models import llama

        self.torch, self.chip = torch, torch.cuda.get_device_name()
        if "Liger" in name:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama()
        torch.manual_seed(0)
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # layers that are alike are compiled once
        values = llama.write_config(llama.SIZES[given.size])
        self.config = transformers.LlamaConfig(**values, attn_implementation="sdpa", use_cache=False)
        shape = given.batch, given.seq
        self.batches = [torch.randint(self.config.vocab_size, shape, device="cuda") for _ in range(2)]

    def prepare(self) -> None:
        """PyTorch compiles when it runs. Two layers are like all."""
        from transformers import LlamaConfig

        self.step_of(LlamaConfig(**{**self.config.to_dict(), "num_hidden_layers": 2}))(self.batches[0])
        self.torch.cuda.empty_cache()
        self.torch.cuda.reset_peak_memory_stats()

    @functools.cached_property
    def step(self):
        return self.step_of(self.config)

    def step_of(self, config):
        import transformers

        torch = self.torch
        with torch.device("cuda"):
            model = transformers.LlamaForCausalLM(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, (0.9, 0.95), weight_decay=0.1, fused=True)
        # By regions, as PyTorch's documentation recommends.
        for layer in model.model.layers:
            layer.compile()
        model.loss_function = torch.compile(model.loss_function)

        def step(tokens):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return step

    def run(self, steps: int) -> float:
        for i in range(steps):
            loss = self.step(self.batches[i % 2])
        return float(loss)

    def peak_bytes(self) -> int:
        return self.torch.cuda.max_memory_allocated()

    def kernels(self) -> dict[str, tuple[float, int]]:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            self.run(PROFILED)
            self.torch.cuda.synchronize()
        averages = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
        averages.sort(key=lambda event: -event.self_device_time_total)
        return {event.key: (event.self_device_time_total * 1e-6, event.count) for event in averages}


# What was measured


def line(row: dict[str, Any]) -> str:
    if "gap" in row:
        return f"{row['contender']}: gap: {row['gap']}"
    if "compile_seconds" in row:
        return f"{row['contender']}: compiled in {row['compile_seconds']:.0f} s"
    return (
        f"{row['contender']}: {row['tokens_per_second']:,.0f} tokens/s, {row['peak_bytes'] / 2**30:.1f} GiB, "
        f"{row['seconds'] * 1e3:.1f} ms a step, the first after {row['first_step_seconds']:.0f} s, "
        f"loss {row['losses'][0]:.3f} to {row['losses'][1]:.3f}"
    )


def markdown(found: dict[str, Any]) -> str:
    """What a file of measurements has, for people."""
    parts = []
    for setting in dict.fromkeys((row["size"], row["batch"], row["seq"]) for row in found["rows"]):
        rows = [row for row in found["rows"] if _key(row)[1:] == setting]
        size, batch, seq = setting
        parts += [
            f"Llama {size}, {batch} × {seq} tokens a step, AdamW, float32 parameters and bfloat16 activations, on one "
            f"{found['chip']}, {', '.join(dict.fromkeys(found['runs'][row['run']]['date'] for row in rows))}:",
            table(rows),
        ]
        if any("gap" not in row for row in rows):
            parts += ["Where the time goes, by what kernels are for:", profile(rows)]
    return "\n\n".join(parts)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Tokens a second and peak memory as Markdown, beside jtile's. Speeds of different runs don't compare."""
    mine = next((row for row in rows if row["contender"] == "jtile" and "gap" not in row), None)
    lines = ["| training step | tokens/s | peak memory | jtile's tokens/s | jtile's memory |", "| --- |" + " --- |" * 4]
    for row in rows:
        if "gap" in row:
            lines.append(f"| {row['contender']} | gap: {row['gap']} | | | |")
            continue
        ratios = ["", ""]
        if mine is not None:
            ratios = [f"{mine[field] / row[field]:.2f} times" for field in ("tokens_per_second", "peak_bytes")]
            ratios[0] = ratios[0] if row["run"] == mine["run"] else ""
        measured = [f"{row['tokens_per_second']:,.0f}", f"{row['peak_bytes'] / 2**30:.1f} GiB"]
        lines.append(f"| {row['contender']} | {' | '.join(measured + ratios)} |")
    return "\n".join(lines)


def profile(rows: Sequence[dict[str, Any]]) -> str:
    """Milliseconds of a step by what kernels are for, as Markdown."""
    rows = [row for row in rows if "gap" not in row]
    lines = [f"| of a step | {' | '.join(row['contender'] for row in rows)} |", "| --- |" + " --- |" * len(rows)]
    for group in (*GROUPS, "other elementwise and reductions"):
        lines.append(f"| {group} | {' | '.join(_share(row, row['groups'][group]) for row in rows)} |")
    idle = [f"{max(0.0, row['seconds'] - row['busy_seconds']) * 1e3:.1f} ms" for row in rows]
    return "\n".join([*lines, f"| between kernels | {' | '.join(idle)} |"])


def _share(row: dict[str, Any], share: float) -> str:
    return f"{share * row['busy_seconds'] * 1e3:.1f} ms ({share:.0%})" if math.isfinite(share) else ""


if __name__ == "__main__":
    sys.exit(main())
