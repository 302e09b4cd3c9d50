"""Whole programs: a kernel, its grid and its blocks."""

import contextlib
import dataclasses
import itertools
import linecache
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np

from tests.compiler.fuzz.body import (
    DTYPES,
    INTEGERS,
    MOST_ELEMENTS,
    PRECISION,
    SIZES,
    STORED,
    Body,
    NoOperand,
    Ref,
    Value,
    exact,
    greatest,
)
from tests.compiler.fuzz.control import anything
from tests.compiler.fuzz.refs import read


@dataclasses.dataclass(frozen=True, repr=False)
class Program:
    """A Pallas call as Python text.

    Attributes:
      text: defines `call`, a function of the operands.
      operands: what to fill each operand with: shape, dtype, bound, special.
      results: of each result what is known.
      seed: of the operands' numbers.
    """

    text: str
    operands: tuple[tuple[tuple[int, ...], str, float, bool], ...]
    results: tuple[Value, ...]
    seed: int

    def __repr__(self) -> str:
        return f"{self.text}# operands: {self.operands}, filled with seed {self.seed}\n"

    def _repr_pretty_(self, printer, cycle: bool) -> None:  # what hypothesis prints
        printer.text(repr(self))

    @property
    def call(self) -> Callable:
        file = f"<fuzz {zlib.crc32(self.text.encode()):x}>"
        linecache.cache[file] = (len(self.text), None, self.text.splitlines(keepends=True), file)
        module: dict[str, Any] = {}
        exec(compile(self.text, file, "exec"), module)
        return module["call"]

    def arrays(self) -> list[np.ndarray]:
        generator = np.random.default_rng(self.seed)
        return [_filled(generator, *operand) for operand in self.operands]


def _filled(generator, shape, dtype: str, bound: float, special: bool) -> np.ndarray:
    if dtype == "bool":
        return generator.integers(0, 2, shape).astype(bool)
    low = 0 if dtype.startswith("u") else -int(bound)
    if dtype in INTEGERS and bound == greatest(dtype):
        info = np.iinfo(dtype)
        return generator.integers(info.min, info.max, shape, dtype, endpoint=True)
    array = generator.integers(low, int(bound), shape, endpoint=True).astype(np.float32)
    if special:
        odd = generator.choice(np.array([np.inf, -np.inf, np.nan, -0.0], np.float32), shape)
        array = np.where(generator.integers(0, 4, shape) == 0, odd, array)
    return array.astype(jnp.dtype(dtype))


@dataclasses.dataclass
class _Spec:
    """A `BlockSpec` and its array's shape, dimension by dimension."""

    block: list[str]
    index: list[str]
    shape: list[int]

    def text(self, axes: Sequence[str]) -> str:
        return f"pl.BlockSpec(({_listed(self.block)}), lambda {', '.join(axes)}: ({_listed(self.index)}))"


def _listed(items: Sequence) -> str:
    return ", ".join(map(str, items)) + "," * (len(items) == 1)


def _input_spec(draw, block: Sequence[int], grid: Sequence[int], axes: Sequence[str]) -> _Spec:
    spec = _Spec([], [], [])
    choose = lambda options: options[draw(st.integers(0, len(options) - 1))]  # noqa: E731
    if grid and draw(st.integers(0, 3)) == 3:  # one matrix of several
        a = draw(st.integers(0, len(grid) - 1))
        spec.block.append("None")
        spec.index.append(axes[a])
        spec.shape.append(max(grid[a] - draw(st.integers(0, 1)), 1))
    for size in block:
        ragged = draw(st.integers(0, min(size - 1, 3)))
        how = choose(("whole", "blocks", "blocks", "blocks", "shifted", "shared", "windows")) if grid else "whole"
        a = draw(st.integers(0, max(len(grid) - 1, 0)))
        if how == "whole":
            whole = (str(size), "0", size - ragged)
        elif how == "blocks":
            index = choose((axes[a], f"{grid[a] - 1} - {axes[a]}"))
            whole = (str(size), index, grid[a] * size - ragged)
        elif how == "shifted":  # some blocks lie before the array, or after it
            whole = (str(size), f"{axes[a]} {choose(('- 1', '+ 1'))}", grid[a] * size - ragged)
        elif how == "shared":
            whole = (str(size), f"{axes[a]} // 2", (grid[a] + 1) // 2 * size - ragged)
        else:
            step = choose((1, 2, 3))
            whole = (f"pl.Element({size})", f"{axes[a]} * {step} - {choose((0, 1))}", grid[a] * step + size - ragged)
        spec.block.append(whole[0])
        spec.index.append(whole[1])
        spec.shape.append(whole[2])
    return spec


def _output_spec(draw, block: Sequence[int], grid: Sequence[int], axes: Sequence[str], ragged: int = 3) -> _Spec:
    """Every program has a block of its own, of which the last may lack up to so many elements."""
    spec = _Spec([], [], [])
    free = list(range(len(grid)))
    for size in block:
        if free and draw(st.integers(0, 2)):
            a = free.pop(draw(st.integers(0, len(free) - 1)))
            index = axes[a] if draw(st.integers(0, 2)) else f"{grid[a] - 1} - {axes[a]}"
            spec.block.append(str(size))
            spec.index.append(index)
            spec.shape.append(grid[a] * size - draw(st.integers(0, min(size - 1, ragged))))
        else:
            spec.block.append(str(size))
            spec.index.append("0")
            spec.shape.append(size)
    for a in free:
        spec.block.insert(0, "None")
        spec.index.insert(0, axes[a])
        spec.shape.insert(0, grid[a])
    return spec


def _store(body: Body, name: str, v: Value) -> Value:
    """Writes a value to an output, sometimes in pieces or over what was there; returns what is known of the output."""
    how = body.one_of(("plain", "plain", "plain", "halves", "when", "masked", "add"))
    result = v
    if how == "halves" and v.rank and v.shape[0] % 2 == 0:
        half = v.shape[0] // 2
        body.lines.append(f"{name}[pl.ds(0, {half})] = {v.text}[:{half}]")
        body.lines.append(f"{name}[pl.ds({half}, {half})] = {v.text}[{half}:]")
        return result
    body.lines.append(f"{name}[...] = {v.text}")
    with contextlib.suppress(NoOperand):
        if how == "when":
            other = body.fitting(v.shape, v.dtype) if v.dtype not in STORED else v
            test = body.pick(lambda v: v.shape == () and v.exact and v.dtype in ("bool", "int32"))
            body.lines.append(f"@pl.when({test.text}{' > 0' if test.dtype == 'int32' else ''})")
            body.lines += ["def _():", f"    {name}[...] = {other.text}"]
        elif how == "masked" and v.rank:
            mask = body.pick(lambda m: m.dtype == "bool" and m.shape == v.shape)
            other = body.fitting(v.shape, v.dtype) if v.dtype not in STORED else v
            body.lines.append(f"jtile.store({name}.at[...], {other.text}, mask={mask.text})")
        elif how == "add" and v.dtype in ("int32", "float32") and v.exact:
            body.lines.append(f"{name}[...] += 1")
            return dataclasses.replace(v, bound=v.bound + 1)
        else:
            return result
        result = dataclasses.replace(
            v, bound=max(v.bound, other.bound), error=max(v.error, other.error), special=v.special or other.special
        )
    return result


@st.composite
def programs(draw) -> Program:
    grid = draw(st.sampled_from(((2,), (), (1,), (3,), (2, 3), (3, 2), (4, 1), (2, 2, 2), (3, 1, 2), (2, 1, 3, 2))))
    axes = ["i", "j", "k", "l"][: len(grid)]
    names = itertools.count(1)
    body = Body(draw, [], names, ids=len(grid))
    common = [body.one_of(SIZES) for _ in range(draw(st.integers(1, 3)))]
    while math.prod(common) > MOST_ELEMENTS // 2:
        common[common.index(max(common))] //= 2
    specs, operands, refs = [], [], []

    def operand(block, dtype, spec, number):
        special = dtype in PRECISION and body.chance(3)
        if dtype in INTEGERS:
            bound = greatest(dtype) if body.chance(2) else 5.0
        else:
            bound = 1.0 if dtype == "bool" else float(body.one_of((1, 4, 8)))
        specs.append(spec)
        operands.append((tuple(spec.shape), dtype, bound, special))
        refs.append(Ref(f"{'abcdef'[number]}_ref", tuple(block), dtype, bound, special))

    for number in range(draw(st.integers(1, 3))):
        block = [1 if body.chance(8) else n for n in common][body.one_of((0, 0, 0, 0, 1)) * (len(common) > 1) :]
        if body.chance(4):
            block = [body.one_of(SIZES) if body.chance(2) else n for n in block]
        if math.prod(block) > MOST_ELEMENTS:
            block = common
        operand(block, body.one_of((*PRECISION, *PRECISION, *DTYPES)), _input_spec(draw, block, grid, axes), number)
    aliases = {}
    aliased = body.chance(6)
    if aliased:
        spec = _output_spec(draw, common, grid, axes)
        aliases[len(specs)] = 0
        operand(common, body.one_of([d for d in DTYPES if d not in STORED]), spec, len(specs))
    body.refs = [ref for i, ref in enumerate(refs) if i not in aliases]
    for ref in refs:
        read(body, ref, "...", ref.shape)
    written, own = [], []
    for _ in range(draw(st.integers(0, 2))):  # memory to write and read: results that no edge cuts, or scratch
        with contextlib.suppress(NoOperand):
            v = body.pick(exact)
            if body.chance(2):
                ref = Ref(f"own{len(own)}_ref", v.shape, v.dtype, v.bound, v.special, writable=True)
                own.append(ref)
            else:
                ref = Ref(f"written{len(written)}_ref", v.shape, v.dtype, v.bound, v.special, writable=True)
                written.append(ref)
            body.lines.append(f"{ref.name}[...] = {v.text}")
            body.refs.append(ref)
    body.steps(16, [anything])
    outputs, results = [], []
    leaves = body.leaves() or body.values[-1:]
    for number in range(min(draw(st.integers(1, 4)), len(leaves))):
        name = f"{'xyzw'[number]}_ref"
        if number == 0 and aliased:
            source, spec = refs[-1], specs[-1]
            matching = [v for v in reversed(body.values) if v.shape == source.shape]
            value = body.cast(matching[0], source.dtype) if _castable(matching[0], source.dtype) else None
            value = value or next(v for v in body.values if v.shape == source.shape and v.dtype == source.dtype)
        else:
            value = leaves[number]
            wanted = body.one_of((value.dtype, value.dtype, *DTYPES))
            if _castable(value, wanted):
                value = body.cast(value, wanted)
            spec = _output_spec(draw, value.shape, grid, axes)
        outputs.append(spec)
        results.append(dataclasses.replace(_store(body, name, value), shape=tuple(spec.shape)))
    for ref in written:
        outputs.append(_output_spec(draw, ref.shape, grid, axes, ragged=0))
        results.append(Value("", tuple(outputs[-1].shape), ref.dtype, ref.bound, special=ref.special))
    parameters = [r.name for r in refs] + [f"{n}_ref" for n in "xyzw"[: len(results) - len(written)]]
    parameters += [r.name for r in written + own]
    mapped = 0 if aliased or not body.chance(5) else body.one_of((2, 3))
    in_axes = [0 if body.chance(2) else None for _ in operands]
    in_axes[0] = 0
    params = {
        "num_warps": body.one_of((4, 1, 2, 8)),
        "num_stages": body.one_of((2, 1, 3)),
        "tma": body.one_of((None, None, True)),
    }
    lines = [
        "import jax",
        "import jax.numpy as jnp",
        "from jax import lax",
        "from jax.experimental import pallas as pl",
        "from jax.experimental.pallas import tpu as pltpu",
        "",
        "import jtile",
        "",
        "",
        f"def kernel({', '.join(parameters)}):",
        *(f"    {line}" for line in body.lines),
        "",
        "",
        "call = pl.pallas_call(",
        "    kernel,",
        f"    grid=({_listed(grid)}),",
        f"    in_specs=[{', '.join(s.text(axes) for s in specs)}],",
        f"    out_specs=[{', '.join(s.text(axes) for s in outputs)}],",
        "    out_shape=["
        + ", ".join(
            f"jax.ShapeDtypeStruct(({_listed(s.shape)}), jnp.{v.dtype})" for s, v in zip(outputs, results, strict=True)
        )
        + "],",
        f"    scratch_shapes=[{', '.join(f'pltpu.VMEM(({_listed(r.shape)}), jnp.{r.dtype})' for r in own)}],",
        f"    input_output_aliases={aliases},",
        f"    compiler_params=jtile.CompilerParams({', '.join(f'{k}={v}' for k, v in params.items())}),",
        ")",
    ]
    if mapped:
        lines.append(f"call = jax.vmap(call, in_axes={tuple(in_axes)})")
        operands = [
            ((mapped, *s), *rest) if a == 0 else (s, *rest) for a, (s, *rest) in zip(in_axes, operands, strict=True)
        ]
        results = [dataclasses.replace(v, shape=(mapped, *v.shape)) for v in results]
    return Program("\n".join(lines) + "\n", tuple(map(tuple, operands)), tuple(results), draw(st.integers(0, 99)))


def _castable(v: Value, dtype: str) -> bool:
    if v.dtype == dtype:
        return True
    if dtype in PRECISION:
        return True
    return not v.special and (v.exact or dtype in STORED)
