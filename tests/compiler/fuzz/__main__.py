"""The command: `python -m tests.compiler.fuzz --help`."""

import argparse
import concurrent.futures
import functools
import math
import multiprocessing
import os
import sys
import tempfile

from tests.compiler import fuzz


def main() -> int:
    parser = argparse.ArgumentParser(description=fuzz.__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=300, help="kernels to draw, in all")
    parser.add_argument("--seed", type=int, default=0, help="of the first process; the others count up from it")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--gpu", action="store_true", help="compile and run on the GPU")
    parser.add_argument("--no-shrink", action="store_true", help="report mismatches as drawn")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cuda,cpu" if options.gpu else "cpu"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    count = math.ceil(options.examples / options.processes)
    with (
        tempfile.TemporaryDirectory() as os.environ["JTILE_CACHE_DIR"],
        concurrent.futures.ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool,
    ):
        work = functools.partial(fuzz.work, options.gpu, count, shrink=not options.no_shrink)
        seeds = range(options.seed, options.seed + options.processes)
        failures = {seed: text for seed, text in zip(seeds, pool.map(work, seeds), strict=True) if text}
    for seed, text in failures.items():
        print(f"\n--seed {seed} --examples {count}:\n{text}")
    wrong = f"mismatches with seeds {list(failures)}" if failures else "no mismatch"
    print(f"{count * options.processes} kernels, {wrong}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
