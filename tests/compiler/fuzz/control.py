"""Loops and branches, with statements of all kinds in them."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from tests.compiler.fuzz.body import MOST_ELEMENTS, Body, NoOperand, Value, exact, numeric
from tests.compiler.fuzz.elementwise import ELEMENTWISE
from tests.compiler.fuzz.products import PRODUCTS
from tests.compiler.fuzz.refs import SLICED
from tests.compiler.fuzz.shapes import MOVING, REDUCING


def carried(inner: Body, carry: Sequence[Value]) -> str:
    """What a turn of a loop hands on: values no larger than those that it got."""
    results = []
    for c in carry:
        try:
            fresh = lambda v, c=c: v.text != c.text and (c.special or not v.special)  # noqa: E731
            new = inner.fitting(c.shape, c.dtype, c.bound, exact, fresh)
        except NoOperand:
            new = c
        results.append(new.text if new.bound <= c.bound else c.text)
    return f"return {', '.join(results)}{',' * (len(results) == 1)}"


def loop(body: Body):
    first = body.pick(exact)
    outer = [first, body.pick(exact)] if body.chance(2) else [first]
    carry = [dataclasses.replace(v, text=body.name("c")) for v in outer]
    index = Value(body.name("i"), (), "int32", 8)
    inner = body.nested(index, *carry)
    inner.steps(3, ELEMENTWISE + MOVING + REDUCING + PRODUCTS + SLICED)
    function, last = body.name("turn"), carried(inner, carry)
    inner.lines.insert(0, f"({', '.join(c.text for c in carry)},) = carry")
    body.block(f"def {function}({index.text}, carry):", inner, last)
    low, high = body.one_of(((0, 3), (1, 4), (0, 1), (2, 2), ("pl.program_id(0)", 3), (0, "pl.program_id(0) + 1")))
    results = [dataclasses.replace(v, text=body.name()) for v in outer]
    starts = f"({', '.join(v.text for v in outer)},)"
    unroll = ", unroll=2" if isinstance(low, int) and isinstance(high, int) and body.chance(4) else ""
    if not body.ids and not (isinstance(low, int) and isinstance(high, int)):
        low, high = 0, 2
    body.lines.append(
        f"({', '.join(r.text for r in results)},) = lax.fori_loop({low}, {high}, {function}, {starts}{unroll})"
    )
    body.values += results


def scan_of_rows(body: Body):
    """`lax.scan` over the rows of a value, with a carry and a row of results for each."""
    rows = body.pick(lambda v: v.rank > 0, exact)
    start = body.pick(exact)
    carry = dataclasses.replace(start, text=body.name("c"))
    row = dataclasses.replace(rows, text=body.name("r"), shape=rows.shape[1:])
    inner = body.nested(carry, row)
    inner.steps(3, ELEMENTWISE + REDUCING)
    last = carried(inner, [carry])
    result = inner.pick()
    if math.prod(result.shape) * rows.shape[0] > MOST_ELEMENTS or result.rank > 2:
        raise NoOperand
    function, total = body.name("turn"), dataclasses.replace(start, text=body.name())
    stacked = dataclasses.replace(result, text=body.name(), shape=(rows.shape[0], *result.shape))
    body.block(f"def {function}({carry.text}, {row.text}):", inner, f"{last.rstrip(',')}, {result.text}")
    reverse = ", reverse=True" if body.chance(2) else ""
    body.lines.append(f"{total.text}, {stacked.text} = lax.scan({function}, {start.text}, {rows.text}{reverse})")
    body.values += [total, stacked]


def while_loop(body: Body):
    start = body.pick(exact, numeric, lambda v: not v.special)
    carry = dataclasses.replace(start, text=body.name("c"))
    inner = body.nested(carry)
    inner.steps(2, ELEMENTWISE)
    function, last = body.name("turn"), carried(inner, [carry])
    inner.lines.insert(0, f"n, {carry.text} = carry")
    body.block(f"def {function}(carry):", inner, last.replace("return ", "return n + 1, ").rstrip(","))
    result = dataclasses.replace(start, text=body.name())
    test = f"lambda c: (c[0] < 3) & (jnp.max(c[1]) {body.one_of('<>')} {body.one_of((0, 2, 5))})"
    body.lines.append(f"_, {result.text} = lax.while_loop({test}, {function}, (0, {start.text}))")
    body.values.append(result)


def branch(body: Body):
    like = body.pick(lambda v: not v.dtype.startswith("float8"))
    which = body.pick(lambda v: v.shape == () and v.exact and v.dtype in ("bool", "int32"))
    count = 2 if which.dtype == "bool" else 3
    functions, bound, error = [], 0.0, 0.0
    for _ in range(count):
        inner = body.nested(like)
        inner.steps(2, ELEMENTWISE + REDUCING + MOVING + SLICED)
        result = inner.fitting(like.shape, like.dtype, math.inf, lambda v: like.special or not v.special)
        functions.append(body.name("branch"))
        body.block(f"def {functions[-1]}():", inner, f"return {result.text}")
        bound, error = max(bound, result.bound), max(error, result.error)
    call = (
        f"lax.cond({which.text}, {', '.join(functions)})"
        if count == 2
        else f"lax.switch({which.text}, [{', '.join(functions)}])"
    )
    body.let(call, like.shape, like.dtype, like, bound=bound, error=error, ulps=0)


CONTROL: list[Callable[[Body], Any]] = [loop, loop, while_loop, branch, scan_of_rows]
FAMILIES = [ELEMENTWISE, ELEMENTWISE, REDUCING, MOVING, PRODUCTS, SLICED, CONTROL]


def anything(body: Body):
    body.one_of(body.one_of(FAMILIES))(body)
