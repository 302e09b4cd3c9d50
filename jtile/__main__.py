"""Tools on the command line.

`python -m jtile inspect MODULE:FUNCTION --args SHAPES` shows what a function's kernels become, without a GPU.
`python -m jtile tune --model llama:1b --batch 8 --seq 2048` finds the best tiles for everything that a model uses.
"""

import argparse
import ast
import functools
import importlib
import importlib.util
import operator
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from inspect import signature
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtile.compiler.build import TileTooLarge
from jtile.compiler.kernel import kernel_of
from jtile.compiler.launch import Launch
from jtile.compiler.params import CompilerParams
from jtile.compiler.rewrite import equations
from jtile.compiler.target import Target
from jtile.page import page
from jtile.report import KernelReport, explain, launches, report, table
from jtile.tuning import Tuning, search
from jtile.tuning import load as load_tuning

# A chip of each generation that Triton compiles for.
GENERATIONS = ("NVIDIA A100", "NVIDIA L4", "NVIDIA H200", "NVIDIA B200")

EXAMPLE = """example:
  python -m jtile inspect jtile:rms_norm --args 'bf16[4096, 1024], f32[1024]' --html rms_norm.html"""


class UsageError(ValueError):
    """What was asked for on the command line cannot be done."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jtile", description="Tile kernels as JAX operations: tools.")
    commands = parser.add_subparsers(dest="command")
    inspect_parser = commands.add_parser(
        "inspect",
        help="show what a function's kernels become",
        description="Compiles the kernels of a function, without a GPU, and shows their Triton source with the line of "
        "Pallas that each part came from, and what they use on each generation of chips.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inspect_parser.add_argument("function", metavar="MODULE:FUNCTION", help="MODULE is a name, or a path to a .py file")
    inspect_parser.add_argument(
        "--args", default="", help="its arguments, as in a call: 'bf16[8, 128], (f32[128], None), epsilon=1e-6'"
    )
    inspect_parser.add_argument("--grad", action="store_true", help="the kernels of its gradient too")
    inspect_parser.add_argument(
        "--target",
        action="append",
        metavar="CHIP",
        help='whose source to show, such as "NVIDIA H200" (the default); repeat it for several',
    )
    inspect_parser.add_argument("--only", action="store_true", help="compile for these chips alone: no comparison")
    inspect_parser.add_argument("--html", metavar="FILE", type=pathlib.Path, help="write all of it to a page too")
    tune_parser = commands.add_parser(
        "tune",
        help="find the best tiles for a model or a function",
        description="Measures on this machine's GPU which tiles are best for every call of a jtile op in a model's "
        "training step, or in a function and its gradient. The file is written after each call; after an interruption "
        "the same command goes on where it stopped. `with jtile.tuning.load(FILE):` has its tiles in force.",
    )
    what = tune_parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="NAME:SIZE", help="of models/NAME.py, such as llama:1b")
    what.add_argument("--function", metavar="MODULE:FUNCTION", help="as `inspect` takes it")
    tune_parser.add_argument("--batch", type=_positive, default=8, help="sequences of the model's training step")
    tune_parser.add_argument("--seq", type=_positive, default=2048, help="tokens of each")
    tune_parser.add_argument("--args", default="", help="the function's arguments, as `inspect` takes them")
    tune_parser.add_argument("--output", metavar="FILE", type=pathlib.Path, default="tiles.json")
    tune_parser.add_argument(
        "--processes", type=_positive, default=min(8, os.cpu_count() or 1), help="that compile (default: %(default)s)"
    )
    tune_parser.add_argument("--compile-only", action="store_true", help="measure nothing: fill the cache on disk")
    tune_parser.add_argument("--part", type=int, help=argparse.SUPPRESS)  # compile this part of so many processes
    given = parser.parse_args(arguments)
    if given.command is None:
        parser.print_help()
        return 0
    try:
        return inspect(given) if given.command == "inspect" else tune(given)
    except UsageError as error:
        print(f"jtile {given.command}: {error}", file=sys.stderr)
        return 2


def inspect(given: argparse.Namespace) -> int:
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")  # nothing runs: JAX need not look for a GPU, and complain of none
    named = [_target(name) for name in given.target or ["NVIDIA H200"]]
    targets = named if given.only else _with_other_generations(named)
    if given.html and not given.html.parent.is_dir():
        raise UsageError(f"--html: there is no folder {given.html.parent} to write {given.html.name} to.")
    function, (positional, keywords) = load(given.function), parse(given.args)
    try:
        signature(function).bind(*positional, **keywords)
    except TypeError as error:
        raise UsageError(f"--args: {error}. It is {given.function}{signature(function)}.") from None
    function, arrays = _call(function, positional, keywords, given.grad)
    compiled: dict[Target, list[Launch]] = {}
    refused: dict[Target, Exception] = {}
    for target in targets:
        try:
            compiled[target] = launches(function, arrays, target)
        except (TileTooLarge, NotImplementedError) as error:
            refused[target] = error
    for target, reason in refused.items():
        print(f"{target.name}: {reason}", file=sys.stderr)
    if not any(compiled.values()):
        if compiled:
            ops = explain(function, *arrays, target=targets[0].name)
            print(f"{given.function} launches no kernels, and has " + (f"these ops:\n{ops}" if ops else "no ops."))
        return 1
    reports = {target: [report(one, target) for one in found] for target, found in compiled.items()}
    _print_sources({target: reports[target] for target in named if target in reports})
    print(_resources(reports))
    if left := [name for name in _of_jax(function, arrays) if any(name == r.name for r in chain(*reports.values()))]:
        print(
            f"\nShown of {', '.join(left)} is what jtile makes of it. It runs so once {given.function} is wrapped in "
            "jtile.retarget_pallas; as it is, JAX's own backend compiles it."
        )
    for kernel in dict.fromkeys(r.name for found in reports.values() for r in found):
        print(f"\nInstructions of {kernel} in the assembly:\n{_instructions(kernel, reports)}")
    if given.html:
        given.html.write_text(page(f"{given.function} {given.args}".strip(), compiled, named))
        print(f"\nwrote {given.html}")
    return 1 if any(target in refused for target in named) else 0


def tune(given: argparse.Namespace) -> int:
    if not given.output.parent.is_dir():
        raise UsageError(f"--output: there is no folder {given.output.parent} to write {given.output.name} to.")
    known = load_tuning(given.output) if given.output.exists() else Tuning()
    function, arrays = _example(given)
    try:
        calls = search.calls_of(function, *arrays)
    except RuntimeError as error:
        raise UsageError(str(error)) from None
    done = {(entry.chip, entry.problem) for entry in known}
    left = [call for call in calls if (call.chip.model, call.problem) not in done]
    print(f"{len(calls)} calls have tiles to choose" + f", {len(calls) - len(left)} of them known" * (left != calls))
    if given.part is not None:
        search.prepare(left, given.part, given.processes)
        return 0
    try:
        if left and given.processes > 1:
            compile_in_processes(given)
        if given.compile_only:
            return 0
        start = time.perf_counter()
        for i, found in enumerate(search.search(left, _show_step)):
            known |= Tuning([found.entry])
            known.save(given.output)
            seconds = (time.perf_counter() - start) / (i + 1) * (len(left) - i - 1)
            tiles = f"{found.tried} tiles, {len(found.refused)} refused"
            print(f"\r[{i + 1}/{len(left)}] {Tuning([found.entry])} ({tiles}); {_duration(seconds)} left", flush=True)
    except KeyboardInterrupt:
        print(f"\nstopped; {given.output} has what was found, and the same command goes on from there")
        return 130
    print(f"wrote {given.output}: with jtile.tuning.load({str(given.output)!r}): ...")
    return 0


def compile_in_processes(given: argparse.Namespace) -> None:
    """What the search will compile, for the cache on disk: most of a compilation is Python, which has one thread."""
    command = [sys.executable, "-m", "jtile", "tune"]
    for name in ("model", "function", "batch", "seq", "args", "output", "processes"):
        if (value := getattr(given, name)) is not None:
            command += [f"--{name}", str(value)]
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    start, parts = time.perf_counter(), []
    try:
        for part in range(given.processes):
            quiet = subprocess.DEVNULL
            parts.append(subprocess.Popen([*command, "--part", str(part)], stdout=quiet, env=environment))
        for process in parts:
            if process.wait():
                raise RuntimeError(f"a process that compiles tiles ended with exit code {process.returncode}")
    finally:
        for process in parts:
            process.kill()
    print(f"compiled in {given.processes} processes, {_duration(time.perf_counter() - start)}", flush=True)


def _show_step(call, done: int, of: int) -> None:
    if sys.stdout.isatty():
        print(f"\r{call.op.name}: {done} of {of} tiles compiled ", end="", flush=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _example(given: argparse.Namespace) -> tuple[Callable, Sequence]:
    """What to tune: a model's training step, or a function and its gradient."""
    if given.function:
        function, (positional, keywords) = load(given.function), parse(given.args)
        arrays = [x for x in jax.tree.leaves((positional, keywords)) if isinstance(x, jax.ShapeDtypeStruct)]
        differentiable = any(jnp.issubdtype(x.dtype, jnp.floating) for x in arrays)
        return _call(function, positional, keywords, grad=differentiable)
    name, colon, size = given.model.partition(":")
    if not colon:
        raise UsageError(f"--model: name a model and its size, such as llama:1b; got {given.model!r}.")
    module = _module(f"models.{name}")
    if size not in module.SIZES:
        raise UsageError(f"--model: {name} has no size {size!r}. It has {', '.join(module.SIZES)}.")
    return module.example(size, given.batch, given.seq)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _target(name: str) -> Target:
    try:
        return Target.named(name)
    except ValueError as error:
        raise UsageError(f"--target: {error}") from None


def _with_other_generations(named: Sequence[Target]) -> list[Target]:
    """These chips, and one of each generation that is not among them, by generation."""
    known = {target.compute_capability for target in named}
    others = [chip for chip in map(Target.named, GENERATIONS) if chip.compute_capability not in known]
    return sorted((*named, *others), key=lambda target: target.compute_capability)


def _of_jax(function: Callable, arrays: Sequence) -> list[str]:
    """The names of kernels that were written for JAX's own backend."""
    calls = (e.params for e in equations(jax.make_jaxpr(function)(*arrays).jaxpr) if e.primitive.name == "pallas_call")
    left = (p for p in calls if not p["interpret"] and not isinstance(p["compiler_params"], CompilerParams))
    return list(dict.fromkeys(kernel_of(params).name for params in left))


# What to print


def _print_sources(reports: dict[Target, list[KernelReport]]) -> None:
    """Each source once, for all the chips that share it."""
    chips: dict[tuple[str, str], list[str]] = {}
    for found in reports.values():
        for r in found:
            chips.setdefault((r.name, r.source), []).append(r.target)
    for (name, source), names in chips.items():
        print(f"Kernel {name} for {', '.join(dict.fromkeys(names))}:\n\n{source}")


def _resources(reports: dict[Target, list[KernelReport]]) -> str:
    head = ("kernel", "chip", "", "registers", "spills", "shared memory", "threads", "occupancy", "tensor core", "TMA")
    rows = [
        (
            r.name,
            r.target,
            f"sm_{target.compute_capability}",
            f"{r.registers}",
            f"{r.spill_bytes:,} B",
            f"{r.shared_bytes:,} B",
            f"{r.threads:,}",
            str(r.occupancy),
            f"{r.tensor_core_instructions:,}",
            f"{r.tma_instructions:,}",
        )
        for target, found in reports.items()
        for r in found
    ]
    return table(head, sorted(rows, key=lambda row: [r[0] for r in rows].index(row[0])))


def _instructions(kernel: str, reports: dict[Target, list[KernelReport]]) -> str:
    counts = {
        target: [r.instructions for r in found if r.name == kernel]
        for target, found in reports.items()
        if any(r.name == kernel for r in found)
    }
    names = sorted({name for found in counts.values() for one in found for name in one})
    head = ("instruction", *(f"sm_{target.compute_capability}" for target in counts))
    rows = [
        (name, *(" + ".join(str(one.get(name, 0)) for one in found) for found in counts.values())) for name in names
    ]
    return table(head, rows, right=True)


# What to inspect


def load(what: str) -> Callable:
    """The function `MODULE:FUNCTION`."""
    where, colon, name = what.rpartition(":")
    if not colon or not name:
        raise UsageError(f"name a function as MODULE:FUNCTION, such as jtile:rms_norm; got {what!r}.")
    module = _module(where)
    try:
        function = operator.attrgetter(name)(module)
    except AttributeError as error:
        functions = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise UsageError(f"{error}. {where} has {', '.join(functions) or 'no functions'}.") from None
    if not callable(function):
        raise UsageError(f"{what} is no function; it is {function!r}.")
    return function


def _module(where: str):
    path = pathlib.Path(where)
    if path.suffix == ".py":
        if not path.exists():
            raise UsageError(f"there is no file {where}.")
        sys.path.insert(0, str(path.resolve().parent))  # as if it were run
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        return module
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{where}.".startswith(f"{error.name}."):
            raise  # found, but it imports what isn't there
        raise UsageError(f"{error}. MODULE is a name as in `import`, or a path that ends in .py.") from None


def parse(text: str) -> tuple[list, dict[str, Any]]:
    """Positional and keyword arguments from text: arrays as `f32[8, 128]`, and literals, tuples, lists and dicts."""
    try:
        # `f32[]`, a scalar, is not Python; what stands in quotes stays as it is.
        python = re.sub(r"('[^']*'|\"[^\"]*\")|(\w)\[\]", lambda m: m[1] or f"{m[2]}[()]", text)
        call = ast.parse(f"f({python})", mode="eval").body
    except SyntaxError as error:
        raise UsageError(f"--args {text!r} does not read as the arguments of a call: {error.msg}.") from None
    if not isinstance(call, ast.Call) or any(k.arg is None for k in call.keywords):
        raise UsageError(f"--args {text!r} does not read as the arguments of a call.")
    return [_value(a, text) for a in call.args], {str(k.arg): _value(k.value, text) for k in call.keywords}


def _value(node: ast.expr, text: str) -> Any:
    match node:
        case ast.Subscript(ast.Name(name)):
            return _array(name, node.slice, text)
        case ast.Tuple(items):
            return tuple(_value(item, text) for item in items)
        case ast.List(items):
            return [_value(item, text) for item in items]
        case ast.Dict(keys, items) if None not in keys:
            return {_value(k, text): _value(v, text) for k, v in zip(keys, items, strict=True) if k is not None}
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise UsageError(
            f"--args: {ast.unparse(node)!r} is neither an array, such as f32[8, 128] or i32[], nor a Python literal."
        ) from None


def _array(name: str, node: ast.expr, text: str) -> jax.ShapeDtypeStruct:
    if name not in DTYPES:
        raise UsageError(f"--args: there is no type {name!r}. There are {', '.join(DTYPES)}.")
    try:
        shape = ast.literal_eval(node)
    except ValueError:
        shape = None
    shape = shape if isinstance(shape, tuple) else (shape,)
    if not all(type(n) is int and n >= 0 for n in shape):
        raise UsageError(f"--args: the shape of {ast.unparse(node)!r} must be numbers, as in {name}[8, 128].")
    dtype = np.dtype(DTYPES[name])
    if dtype.itemsize == 8 and not jax.config.jax_enable_x64:
        raise UsageError(f"--args: {name} has 64 bits, which JAX has with JAX_ENABLE_X64=1 in the environment.")
    return jax.ShapeDtypeStruct(shape, dtype)


# JAX's short names and the long ones.
DTYPES = {
    **{f"{short}{bits}": f"{long}{bits}" for short, long in (("i", "int"), ("u", "uint")) for bits in (8, 16, 32, 64)},
    **{f"f{bits}": f"float{bits}" for bits in (16, 32, 64)},
    "bf16": "bfloat16",
    "f8_e4m3fn": "float8_e4m3fn",
    "f8_e5m2": "float8_e5m2",
    "bool": "bool",
}
DTYPES |= {long: long for long in DTYPES.values()}


def _call(function: Callable, args: list, kwargs: dict[str, Any], grad: bool) -> tuple[Callable, list]:
    """The function of the arrays alone, and those; its gradient for all that have one, if so asked."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = [x for x in leaves if isinstance(x, jax.ShapeDtypeStruct)]

    def call(*given):
        rest = iter(given)
        filled = [next(rest) if isinstance(x, jax.ShapeDtypeStruct) else x for x in leaves]
        args, kwargs = jax.tree.unflatten(tree, filled)
        return function(*args, **kwargs)

    if not grad:
        return call, arrays
    floating = [i for i, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating)]
    if not floating:
        raise UsageError("--grad: no argument is an array of floats, so there is nothing to differentiate by.")

    def loss(*given):
        results = [y for y in jax.tree.leaves(call(*given)) if jnp.issubdtype(y.dtype, jnp.floating)]
        return functools.reduce(operator.add, (jnp.sum(y.astype(jnp.float32)) for y in results))

    return jax.value_and_grad(loss, argnums=tuple(floating)), arrays


if __name__ == "__main__":
    sys.exit(main())
