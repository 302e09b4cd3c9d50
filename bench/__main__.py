"""Measures jtile on this machine's GPU.

`python -m bench run` times jtile's ops and their rivals in turn, checks each against a float32 reference, and writes
`bench/results/<chip>/<date>.json` after every case; `--tables sizes core widths sequences` measures the sweeps too.

With `--processes` several measure at once, on all GPUs that are visible. On each GPU one at a time runs anything, while
the others trace and compile; the rivals of a case always share a GPU. On a new machine fill the caches on disk first:

    python -m bench run --tables core sizes widths sequences --processes 12 --compile-only
    python -m bench run --tables core sizes widths sequences --processes 4

`python -m bench report` makes tables and plots of what is there. `python -m bench list` shows cases and rivals.
`python -m bench pallas` times Pallas kernels through jtile and through JAX's own backend.
"""

import argparse
import dataclasses
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench import caches, cases, measure, report, results, rivals, workers


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run_parser = commands.add_parser("run", help="measure the ops on this machine's GPU")
    run_parser.add_argument("--filter", default="", help="only cases whose name matches this regular expression")
    run_parser.add_argument("--tables", nargs="+", choices=cases.TABLES, default=["core"], help="(default: core)")
    run_parser.add_argument(
        "--rivals",
        nargs="+",
        choices=rivals.RIVALS,
        metavar="RIVAL",
        help=f"(default: all; in sweeps {', '.join(rivals.IN_SWEEPS)})",
    )
    run_parser.add_argument("--passes", nargs="+", choices=cases.PASSES, default=cases.PASSES, metavar="PASS")
    run_parser.add_argument(
        "--compile-only",
        action="store_true",
        help="no times: fill the caches on disk",
    )
    run_parser.add_argument("--cold", action="store_true", help="with empty caches, for honest times to first call")
    run_parser.add_argument("--quick", action="store_true", help="half as long, and less exact")
    run_parser.add_argument("--processes", type=int, default=1, help="that share the GPUs (default: this one alone)")
    run_parser.add_argument(
        "--part", type=part, help="I/N: every N-th case from the I-th on, in one run with the others"
    )
    run_parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no case is begun")
    run_parser.add_argument("--output", type=Path, help="file to write (default: in bench/results/<chip>/)")
    report_parser = commands.add_parser("report", help="tables and plots of the newest results of every chip")
    report_parser.add_argument("--write", action="store_true", help="put the tables into README.md, and draw the plots")
    commands.add_parser("list", help="show cases and rivals")
    pallas_parser = commands.add_parser("pallas", help="measure Pallas kernels, through jtile and JAX's own backend")
    pallas_parser.add_argument("--filter", default="", help="only cases whose name matches this regular expression")
    pallas_parser.add_argument("--output", type=Path, help="file to write (default: in bench/results/<chip>/)")
    given = parser.parse_args(arguments)
    match given.command:
        case "run":
            return run(given)
        case "pallas":
            return run_pallas(given)
        case "list":
            show_list()
        case "report" if given.write:
            report.write()
        case "report":
            print(report.markdown())
    return 0


def run(given: argparse.Namespace) -> int:
    set_up(given.cold)
    device = gpu()
    console = Console(width=150 if not sys.stdout.isatty() else None, highlight=False)
    names = given.rivals or list(rivals.RIVALS)
    for name in names:
        if gap := rivals.RIVALS[name].missing():
            console.print(f"[yellow]{name} is a gap in every table: {gap}[/]")
    jobs, tables = chosen_jobs(given)
    until = time.monotonic() + given.limit
    spread = (jobs, names, lambda: time.monotonic() < until)
    if given.processes > 1:
        measured = workers.spread(*spread, given.processes, workers.visible_gpus(jax.local_device_count()))
    else:
        measured = workers.here(*spread)
    file = None
    if not given.compile_only:
        path = given.output or results.of_today(device.device_kind)
        file = results.Results(path, device.device_kind, join=given.part is not None)
    failed, left = [], {case.name: None for case, _ in jobs}
    with progress(console) as bar:
        task = bar.add_task("", total=len(jobs))
        for case, passes in measured:
            del left[case.name]
            bar.update(task, description=case.name, advance=1)
            for rows in passes:
                if file is None:
                    firsts = (f"{row['rival']} {row.get('gap') or first_call(row)}" for row in rows[1:])
                    console.print(f"{case.name}, {rows[0]['pass']}: {', '.join(firsts)}")
                    continue
                file.add(row | about for about in tables[case.name] for row in rows)
                console.print(report.rows_table(rows))
                failed += [row for row in rows if row["rival"] == "jtile" and ("gap" in row or not row["right"])]
    if left:
        console.print(f"[yellow]time is up: {len(left)} cases are left: {', '.join(left)}[/]")
    if file is not None:
        console.print(f"wrote {file.path}")
    for row in failed:
        reason = row.get("gap") or f"an error of {row['error']:.1e}"
        console.print(f"[red]jtile, {row['case']}, {row['pass']}: {reason}[/]")
    return 1 if failed else 0


def chosen_jobs(given: argparse.Namespace) -> tuple[list[workers.Job], dict[str, list[dict]]]:
    """Each case once, in the order of the tables that were asked for, and the places that it has in them."""
    length = dict(rounds=3, settle=0.015, timed=0.02) if given.quick else {}
    options = measure.Options(passes=given.passes, compile_only=given.compile_only, **length)
    found: dict[str, list[cases.Case]] = {}
    every = [case for table in given.tables for case in cases.CASES if case.table == table]
    for case in pick(every, given.filter):
        found.setdefault(case.name, []).append(case)
    jobs = []
    for same in found.values():
        swept = all(case.table != "core" for case in same)
        names = given.rivals or (rivals.IN_SWEEPS if swept else list(rivals.RIVALS))
        jobs.append((same[0], dataclasses.replace(options, rivals=names)))
    if given.part:
        first, step = given.part
        jobs = jobs[first - 1 :: step]
    if given.compile_only:  # kernels of matrix products take longest
        jobs.sort(key=lambda job: job[0].unit != "FLOP")
    return jobs, {name: [dict(table=case.table, at=case.at) for case in same] for name, same in found.items()}


def part(text: str) -> tuple[int, int]:
    first, of = map(int, text.split("/"))
    if not 1 <= first <= of:
        raise argparse.ArgumentTypeError(f"must be I/N with 1 ≤ I ≤ N, got {text}")
    return first, of


def set_up(cold: bool) -> None:
    """JAX and the caches on disk, in this process and those that it will start."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # each of them needs memory
    if cold:
        for variable in ("JTILE_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            os.environ[variable] = tempfile.mkdtemp(prefix="bench_")
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        jax.config.update("jax_enable_compilation_cache", False)
    else:
        caches.on_disk()


def first_call(row: measure.Row) -> str:
    return f"{row['first_call_seconds']:.1f} s"


def run_pallas(given: argparse.Namespace) -> int:
    from bench import pallas

    device = gpu()
    rows = []
    file = results.Results(given.output or results.of_today(device.device_kind, "pallas_"), device.device_kind)
    chosen = pick(pallas.CASES, given.filter)
    for i, case in enumerate(chosen):
        measured = pallas.measure(case)
        rows += measured
        file.add(measured)
        print(f"[{i + 1}/{len(chosen)}] {pallas.show(measured)}", flush=True)
    print(f"{pallas.summary(rows)}\nwrote {file.path}")
    return 0


def gpu() -> jax.Device:
    device = jax.devices()[0]
    if device.platform != "gpu":
        sys.exit(f"bench measures GPUs, and JAX sees only {device.device_kind}")
    return device


def pick(all_cases: Sequence, text: str) -> list:
    chosen = [case for case in all_cases if re.search(text, case.name)]
    if not chosen:
        sys.exit(f"no case matches {text!r}; there are: {', '.join(c.name for c in all_cases)}")
    return chosen


def progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def show_list() -> None:
    print("rivals:")
    for name, rival in rivals.RIVALS.items():
        print(f"  {name:16} {rival.missing() or rival.version()}")
    for table in cases.TABLES:
        print(f"cases of --tables {table}:")
        for case in (c for c in cases.CASES if c.table == table):
            running = [name for name in rivals.RIVALS if rivals.entry(name, case.op)]
            print(f"  {case.name:48} {', '.join(case.work)}: {', '.join(running)}")


if __name__ == "__main__":
    sys.exit(main())
