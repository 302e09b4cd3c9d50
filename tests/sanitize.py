"""NVIDIA's compute-sanitizer over tests that need a GPU: accesses out of bounds, races, reads of what nobody wrote.

    python -m tests.sanitize                                   # all three tools, a selection of the tests
    python -m tests.sanitize --tool memcheck --processes 8     # one tool, several processes
    python -m tests.sanitize --tool racecheck -- tests/laws.py -k "attention and kernel"

compute-sanitizer comes with CUDA's toolkit, and on PyPI as nvidia-cuda-sanitizer-api. It runs programs 10 to 100 times
slower. XLA's own kernels, which are told by their names, are watched by initcheck alone, since reads make sense only
where writes are seen; what it says of them is left out.
"""

import argparse
import collections
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

# What the Tensor Memory Accelerator writes initcheck takes for never written: results come back "uninitialized".
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


def sanitize(tool: str, arguments: list[str]) -> bool:
    """Runs pytest under a tool; returns whether the tests passed and the tool found nothing."""
    environment = os.environ | {
        # Each array an allocation of its own, so that its ends are known, and launches not hidden in CUDA graphs.
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        "XLA_FLAGS": "--xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=0",
    }
    exclude = [] if tool == "initcheck" else ["--kernel-name-exclude", f"regex={XLA.pattern}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [executable(), "--tool", tool, "--log-file", f"{folder}/log", "--report-api-errors", "no"]
        command += ["--require-cuda-init", "no", "--print-limit", "0", "--show-backtrace", "device", *exclude]
        command += [sys.executable, "-m", "pytest", "-m", "gpu"]
        tests = subprocess.run([*command, "-v", *arguments], env=environment).returncode
        path = pathlib.Path(folder, "log")
        log = path.read_text(errors="replace") if path.exists() else ""
    found = reports(log)
    alike = collections.Counter(re.sub("0x[0-9a-f]+", "0x…", text) for text in found)
    for text, count in alike.most_common(20):
        print(f"{count} times:\n{text}\n")
    summaries = re.findall(r" SUMMARY: (.*)", log)
    if not summaries:
        print(f"{tool} ended without a summary. Its log's end:\n{log[-4000:]}")
    ours, outcome = f"{len(found)} of them on kernels that are not XLA's", f"ended with {tests}" if tests else "passed"
    print(f"{tool}: {', '.join(summaries) or 'no summary'}, {ours}; the tests {outcome}", flush=True)
    return bool(summaries) and not found and not tests


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tool", choices=TOOLS, action="append", help="of several, one; by default all three")
    parser.add_argument("--processes", type=int, default=1, help="of pytest, at once")
    parser.add_argument("pytest", nargs="*", help="after `--`: arguments for pytest in place of the usual selection")
    options = parser.parse_args()
    processes = ["-n", str(options.processes)] if options.processes > 1 else []

    def tests(tool: str) -> list[str]:
        unseen = f"({SELECTION}) and not ({WRITTEN_UNSEEN})"
        return options.pytest or [*TESTS, "-k", unseen if tool == "initcheck" else SELECTION]

    return 0 if all([sanitize(tool, tests(tool) + processes) for tool in options.tool or TOOLS]) else 1


if __name__ == "__main__":
    sys.exit(main())
