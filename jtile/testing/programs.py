"""What programs consist of: calls of tile primitives before they are compiled, and collectives after."""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Container
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxprs_in_params

from jtile.compiler.rewrite import equations, map_equations
from jtile.op.lowering import execute
from jtile.op.primitive import TilePrimitive

LAUNCHES = ("pallas_call", "triton_call")


def only_references(function: Callable) -> Callable:
    """`function` with each tile primitive replaced by its reference: an opinion that owes nothing to the op's rules."""

    def reference(equation: JaxprEqn):
        if not isinstance(equation.primitive, TilePrimitive):
            return None
        call = dataclasses.replace(equation.params["call"], implementation="xla")
        return functools.partial(execute, equation.primitive.op, call, "cpu")

    return map_equations(function, reference)


def launching(function: Callable) -> Callable:
    """`function` as it is lowered for a GPU: each tile primitive's kernel in its place."""

    def kernel(equation: JaxprEqn):
        if not isinstance(equation.primitive, TilePrimitive):
            return None
        return functools.partial(execute, equation.primitive.op, equation.params["call"], "cuda")

    return map_equations(function, kernel)


def launches(jaxpr: Jaxpr) -> int:
    """How many kernels a program launches."""
    return sum(e.primitive.name in LAUNCHES for e in equations(jaxpr))


def repeated_operands(jaxpr: Jaxpr, sizes: Container[int], count: int) -> list[tuple[int, ...]]:
    """Shapes of the arrays that kernels read and that are one of these sizes, repeated `count` times in memory."""
    found: list[tuple[int, ...]] = []
    made_by: dict[Any, Any] = {v: e for e in jaxpr.eqns for v in e.outvars}
    for e in jaxpr.eqns:
        if e.primitive.name not in LAUNCHES:
            for inner in jaxprs_in_params(e.params):
                found += repeated_operands(inner, sizes, count)
            continue
        for operand in e.invars:
            maker = None if isinstance(operand, Literal) else made_by.get(operand)
            while maker is not None and maker.primitive.name in ("reshape", "squeeze", "convert_element_type"):
                maker = made_by.get(maker.invars[0])
            if maker is not None and maker.primitive.name == "broadcast_in_dim":
                size, shape = math.prod(maker.invars[0].aval.shape), maker.outvars[0].aval.shape
                if size in sizes and math.prod(shape) == count * size:
                    found.append(shape)
    return found


def binds(function: Callable, *inputs) -> Counter[str]:
    """How often a program binds the tile primitive of each op."""
    program = equations(jax.make_jaxpr(function)(*inputs).jaxpr)
    return Counter(e.primitive.op.name for e in program if isinstance(e.primitive, TilePrimitive))


_COLLECTIVE = re.compile(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\((.*?)\)")
_ARRAY = re.compile(r"(%[\w.-]+) = \w+\[([\d,]*)\]")


def collectives(compiled: jax.stages.Compiled) -> Counter[str]:
    """How often a compiled program exchanges data between devices, by kind."""
    return Counter(kind for kind, _ in _COLLECTIVE.findall(compiled.as_text() or ""))


def exchanged(compiled: jax.stages.Compiled) -> int:
    """How many numbers each device gives to a compiled program's collectives."""
    text = compiled.as_text() or ""
    sizes = {name: math.prod(map(int, filter(None, shape.split(",")))) for name, shape in _ARRAY.findall(text)}
    return sum(sizes[name] for _, operands in _COLLECTIVE.findall(text) for name in re.findall(r"%[\w.-]+", operands))
