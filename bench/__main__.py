"""Measures jtile on this machine's GPU.

`python -m bench run [--filter TEXT]` measures the ops, `python -m bench pallas [--filter TEXT]` Pallas kernels through
jtile and through JAX's own backend; `python -m bench report` prints the newest results as Markdown.
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from bench import pallas
from bench.cases import CASES, Case
from bench.timing import seconds

CACHE = 64 << 20  # bytes, no smaller than the second-level cache of any supported chip
RESULTS = pathlib.Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("run", "the ops"), ("pallas", "Pallas kernels through jtile and through JAX's own backend")):
        run_parser = commands.add_parser(name, help=f"measure {what} on this machine's GPU")
        run_parser.add_argument("--filter", default="", help="only cases whose name contains this")
        run_parser.add_argument("--output", type=pathlib.Path, help="file to write (default: in bench/results/<chip>/)")
    commands.add_parser("report", help="print the newest results of every chip as Markdown")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(CASES, measure, lambda rows: "\n".join(map(show, rows)), "", arguments)
    elif arguments.command == "pallas":
        print(pallas.summary(run(pallas.CASES, pallas.measure, pallas.show, "pallas_", arguments)))
    else:
        print(report())


def run(cases, measure, show, prefix: str, arguments) -> list[dict]:
    """Measures the cases chosen, prints each as it is done, and writes them all to a file."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        sys.exit(f"bench measures GPUs, and JAX sees only {device.device_kind}")
    chosen = [case for case in cases if arguments.filter in case.name]
    if not chosen:
        sys.exit(f"no case contains {arguments.filter!r}; there are: {', '.join(c.name for c in cases)}")
    rows: list[dict] = []
    for i, case in enumerate(chosen):
        measured = measure(case)
        rows += measured
        print(f"[{i + 1}/{len(chosen)}] {show(measured)}", flush=True)
    result = {
        "date": datetime.date.today().isoformat(),
        "chip": device.device_kind,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")} | triton_version(),
        "command": " ".join(["python", "-m", "bench", *sys.argv[1:]]),
        "commit": commit(),
        "rows": rows,
    }
    folder = RESULTS / device.device_kind.replace(" ", "_")
    path = arguments.output or folder / f"{prefix}{result['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {path}")
    return rows


def measure(case: Case) -> list[dict]:
    """Time and error of every rival: the forward pass, and the backward pass alone."""
    first = case.operands(jax.random.key(0))
    count = max(2, math.ceil(CACHE * 4 / sum(x.nbytes for x in jax.tree.leaves(first))))
    sets = [first, *(case.operands(jax.random.key(i)) for i in range(1, count))]
    forward = {name: (jax.jit(f), sets) for name, f in case.functions.items()}
    apply = jax.jit(lambda pull, cotangent: pull(cotangent))
    backward = {name: (apply, [pulled(f, operands) for operands in sets]) for name, f in case.functions.items()}
    judge = next(name for name in case.functions if name != "jtile")
    judged = case.functions[judge], wide(first) if judge == "xla" else first
    return [
        *compare(case, "forward", forward, jax.jit(judged[0])(*judged[1])),
        *compare(case, "backward", backward, apply(*pulled(*judged))),
    ]


def pulled(function, operands: tuple) -> tuple:
    """The function's pullback at the operands, to its floating ones, and a random cotangent for it."""
    integers = {i: x for i, x in enumerate(operands) if jnp.issubdtype(x.dtype, jnp.integer)}

    def of_floating(*floating):
        rest = iter(floating)
        return function(*(integers[i] if i in integers else next(rest) for i in range(len(operands))))

    out, pull = jax.jit(lambda *a: jax.vjp(of_floating, *a))(*(x for i, x in enumerate(operands) if i not in integers))
    return pull, jax.tree.map(
        lambda o: jax.random.normal(jax.random.key(7), o.shape, jnp.bfloat16).astype(o.dtype), out
    )


def compare(case: Case, direction: str, rivals: dict[str, tuple], reference) -> list[dict]:
    errors = {name: error(function(*inputs[0]), reference) for name, (function, inputs) in rivals.items()}
    del reference
    amount = {
        "forward": case.forward_flops or case.forward_bytes,
        "backward": case.backward_flops or case.backward_bytes,
    }
    return [
        {
            "case": case.name,
            "pass": direction,
            "rival": name,
            "seconds": time,
            "rate": amount[direction] / time,
            "unit": case.bound,
            "error": errors[name],
        }
        for name, time in seconds(rivals).items()
    ]


def wide(operands: tuple) -> tuple:
    """The same values in float32, for a reference whose only rounding is the inputs'."""
    return tuple(x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in operands)


@jax.jit
def relative_error(got, reference):
    """‖got − reference‖ / ‖reference‖."""
    return jnp.linalg.norm((got.astype(jnp.float32) - reference.astype(jnp.float32)).ravel()) / jnp.linalg.norm(
        reference.astype(jnp.float32).ravel()
    )


def error(got, reference) -> float:
    """The largest relative error of the arrays."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(reference), strict=True)
    return float(np.max([relative_error(a, b) for a, b in pairs]))


def show(row: dict) -> str:
    return (
        f"{row['case']:44s} {row['pass']:9s} {row['rival']:6s} {row['seconds'] * 1e3:9.3f} ms "
        f"{row['rate'] / 1e12:8.2f} T{row['unit']:7s} error {row['error']:.1e}"
    )


def report() -> str:
    """The newest results of every chip, as Markdown tables: rates, and jtile's time against the rival's."""
    lines = []
    for folder in sorted(p for p in RESULTS.iterdir() if p.is_dir()):
        result = json.loads(max(folder.glob("2*.json")).read_text())
        versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
        lines += [f"{result['chip']}, {result['date']}, {versions}:", ""]
        lines += ["| case | pass | jtile | rival | speed-up |", "| --- | --- | --- | --- | --- |"]
        by = {(r["case"], r["pass"], r["rival"]): r for r in result["rows"]}
        for (case, direction, rival), r in by.items():
            if rival == "jtile":
                continue
            mine = by[case, direction, "jtile"]
            rate = lambda r: f"{r['rate'] / 1e12:.{0 if 'FLOP' in r['unit'] else 2}f} T{r['unit']}"  # noqa: E731
            lines.append(
                f"| {case} | {direction} | {rate(mine)} | {rival} {rate(r)} | {r['seconds'] / mine['seconds']:.2f} |"
            )
        lines.append("")
        for path in sorted(folder.glob("pallas_*.json"))[-1:]:
            lines += [pallas.table(json.loads(path.read_text())["rows"]), ""]
    return "\n".join(lines)


def triton_version() -> dict[str, str]:
    import triton

    return {"triton": triton.__version__}


def commit() -> str:
    """The commit measured, for whoever wants to measure it again; "unknown" where git or the history is missing."""
    if shutil.which("git") is None:
        return "unknown"
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
