"""NVIDIA's compute-sanitizer over tests that need a GPU: accesses out of bounds, races, reads of what nobody wrote.

    python -m tests.sanitize                                   # all three tools, a selection of the tests
    python -m tests.sanitize --tool memcheck --processes 8     # one tool, several processes
    python -m tests.sanitize --tool racecheck -- tests/laws.py -k "attention and kernel"

compute-sanitizer comes with CUDA's toolkit, and on PyPI as nvidia-cuda-sanitizer-api. It runs programs 10 to 100 times
slower, so the tests are dealt out to several processes, each under a compute-sanitizer of its own: one that follows
child processes attaches to every run of ptxas, and has crashed on so many. XLA's own kernels, which are told by their
names, are watched by initcheck alone, since reads make sense only where writes are seen; what it says of them is left
out.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile

TOOLS = ("memcheck", "racecheck", "initcheck")

# Each kernel of the compiler's tests, kernels drawn at random, and every op forward and backward, all small.
TESTS = ["tests/compiler/test_on_gpu.py", "tests/compiler/test_fuzz.py", "tests/laws.py"]
SELECTION = (
    "test_kernels_compute or test_compiled_kernels or test_no_elements or test_descriptors or test_gluon "
    "or test_warp_specialised or test_cluster or (test_law_on_gpu and (kernel or gradient))"
)

# What the Tensor Memory Accelerator writes initcheck takes for never written: results come back "uninitialized". Under
# it the compiler makes no use of TMA, whether or not it is asked to, and tests of TMA itself are left out.
WRITTEN_UNSEEN = "test_descriptors or test_gluon or test_warp_specialised"

XLA = re.compile(r"fusion|^wrapped_|^(input|loop|copy|transpose|concatenate|iota|broadcast|convert|reduce|sort)_|"
                 r"^_Z|cub|cublas|cutlass|gemm|RepeatBuffer|cudnn|::")  # fmt: skip

PREFIX = "========="  # of each line that compute-sanitizer writes


def reports(log: str) -> list[str]:
    """What compute-sanitizer found in kernels that are not XLA's."""
    lines = [line.removeprefix(PREFIX).rstrip() for line in log.splitlines() if line.startswith(PREFIX)]
    text = "\n".join(line for line in lines if not line.endswith("COMPUTE-SANITIZER") and " SUMMARY: " not in line)
    found = []
    for report in filter(str.strip, text.split("\n\n")):
        kernels = re.findall(r"\bat (\S+?)\+0x[0-9a-f]+", report)
        if not kernels or not all(XLA.search(kernel) for kernel in kernels):
            found.append(report)
    return found


def executable() -> str:
    """Where compute-sanitizer is."""
    nearby = [
        pathlib.Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"),
        *pathlib.Path("/usr/local").glob("cuda-*/bin"),
        *pathlib.Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin"),
    ]
    found = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], *map(str, nearby)]))
    if found is None:
        raise SystemExit(
            "compute-sanitizer was not found: pip install nvidia-cuda-sanitizer-api, or put CUDA's bin on PATH."
        )
    return found


def pytest_configure():
    """What this module does as a plugin of pytest, for initcheck: no Pallas kernel gets TMA."""
    from jtile.compiler import schedule

    chosen = schedule.schedules

    def without_tma(kernel, params, target):
        return chosen(kernel, dataclasses.replace(params, tma=False), target)

    schedule.schedules = without_tma


def collect(arguments: list[str]) -> list[str]:
    """The names of the tests that pytest selects."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--collect-only", *arguments]
    output = subprocess.run(command, capture_output=True, text=True)
    tests = [line for line in output.stdout.splitlines() if "::" in line]
    if output.returncode or not tests:
        raise SystemExit(f"pytest collected no tests:\n{output.stdout}{output.stderr}")
    return tests


def watch(tool: str, tests: list[str], folder: pathlib.Path) -> tuple[int, str]:
    """Runs tests in one process under a tool; returns how pytest ended and the tool's log."""
    environment = os.environ | {
        # Each array an allocation of its own, so that its ends are known, and launches not hidden in CUDA graphs.
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        "XLA_FLAGS": "--xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=0",
    }
    names, log = folder / "tests", folder / "log"
    names.write_text("\n".join(tests))
    exclude = [] if tool == "initcheck" else ["--kernel-name-exclude", f"regex={XLA.pattern}"]
    command = [executable(), "--tool", tool, "--target-processes", "application-only", "--log-file", str(log)]
    command += ["--report-api-errors", "no", "--print-limit", "0", "--show-backtrace", "device", *exclude]
    command += [sys.executable, "-m", "pytest", "-m", "gpu", "-v", f"@{names}"]
    command += ["-p", "tests.sanitize"] if tool == "initcheck" else []
    ended = subprocess.run(command, env=environment).returncode
    return ended, log.read_text(errors="replace") if log.exists() else ""


def sanitize(tool: str, tests: list[str], processes: int) -> bool:
    """Runs tests under a tool; returns whether they passed and the tool found nothing."""
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(processes) as executor:
        shares = [tests[i::processes] for i in range(min(processes, len(tests)))]
        folders = [pathlib.Path(folder, str(i)) for i in range(len(shares))]
        for path in folders:
            path.mkdir()
        ends = list(executor.map(functools.partial(watch, tool), shares, folders))
    found = [report for _, log in ends for report in reports(log)]
    alike = collections.Counter(re.sub("0x[0-9a-f]+", "0x…", text) for text in found)
    for text, count in alike.most_common(20):
        print(f"{count} times:\n{text}\n")
    clean = not found
    for share, (ended, log) in zip(shares, ends, strict=True):
        summary = ", ".join(re.findall(r" SUMMARY: (.*)", log))
        if not summary:
            print(f"{tool} ended without a summary. Its log's end:\n{log[-4000:]}")
        clean = clean and bool(summary) and not ended
        outcome = f"pytest ended with {ended}" if ended else "passed"
        print(f"{tool}, {len(share)} tests: {summary or 'no summary'}; {outcome}")
    print(f"{tool}: {len(tests)} tests, {len(found)} reports on kernels that are not XLA's", flush=True)
    return clean


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tool", choices=TOOLS, action="append", help="of several, one; by default all three")
    parser.add_argument("--processes", type=int, default=1, help="at once")
    parser.add_argument("pytest", nargs="*", help="after `--`: arguments for pytest in place of the usual selection")
    options = parser.parse_args()

    def selected(tool: str) -> list[str]:
        unseen = f"({SELECTION}) and not ({WRITTEN_UNSEEN})"
        return collect(options.pytest or [*TESTS, "-k", unseen if tool == "initcheck" else SELECTION])

    return 0 if all([sanitize(tool, selected(tool), options.processes) for tool in options.tool or TOOLS]) else 1


if __name__ == "__main__":
    sys.exit(main())
