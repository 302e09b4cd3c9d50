"""Reading and writing blocks and scratch."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st

from tests.compiler.fuzz.body import STORED, Body, NoOperand, Ref, Value, alike


def read(body: Body, ref: Ref, index: str, shape) -> Value:
    value = Value(body.name(), tuple(shape), ref.dtype, ref.bound, 0.0, ref.special)
    body.lines.append(f"{value.text} = {ref.name}[{index}]")
    if ref.dtype in STORED:
        return body.let(f"{value.text}.astype(jnp.float32)", shape, "float32", bound=ref.bound)
    body.values.append(value)
    return value


def sliced(body: Body):
    if not body.refs:
        raise NoOperand
    ref = body.one_of(body.refs)
    if not ref.shape:
        raise NoOperand
    axis = body.draw(st.integers(0, len(ref.shape) - 1))
    n, leading = ref.shape[axis], ":, " * axis
    start = body.draw(st.integers(0, n - 1))
    rest = ref.shape[:axis], ref.shape[axis + 1 :]
    counters = [v for v in body.values if v.text.startswith("i") and v.shape == ()]
    match body.one_of(("at", "slice", "stride", "turn", "pick")):
        case "at":
            read(body, ref, f"{leading}{start}", (*rest[0], *rest[1]))
        case "slice":
            size = body.draw(st.integers(1, n - start))
            read(body, ref, f"{leading}pl.ds({start}, {size})", (*rest[0], size, *rest[1]))
        case "stride":
            size = (n - start + 1) // 2
            read(body, ref, f"{leading}pl.ds({start}, {size}, stride=2)", (*rest[0], size, *rest[1]))
        case "turn" if counters:
            read(body, ref, f"{leading}{counters[-1].text} % {n}", (*rest[0], *rest[1]))
        case "pick":
            picks = body.pick(lambda v: v.rank == 1 and v.dtype == "int32")
            read(body, ref, f"{leading}{picks.text} % {n}", (*rest[0], *picks.shape, *rest[1]))


def masked(body: Body):
    ref = body.one_of(body.refs or [None])
    if ref is None or ref.dtype in STORED or not ref.shape:
        raise NoOperand
    mask = body.pick(lambda v: v.dtype == "bool" and v.shape == ref.shape)
    other = {"bool": "True"}.get(ref.dtype, str(body.one_of((0, 1, 7))))
    bound = 1 if ref.dtype == "bool" else max(ref.bound, 7)
    value = Value(body.name(), ref.shape, ref.dtype, bound, 0.0, ref.special)
    body.lines.append(f"{value.text} = jtile.load({ref.name}, mask={mask.text}, other=jnp.{ref.dtype}({other}))")
    body.values.append(value)


def write(body: Body):
    """What is read afterwards, by other threads too, is what was written."""
    refs = [ref for ref in body.refs if ref.writable]
    if not refs:
        raise NoOperand
    ref = body.one_of(refs)
    suits = lambda v: v.exact and (ref.special or not v.special)  # noqa: E731
    if not ref.shape or body.chance(2):
        value = body.fitting(ref.shape, ref.dtype, ref.bound, suits)
        body.lines.append(f"{ref.name}[...] = {value.text}")
        return
    axis = body.draw(st.integers(0, len(ref.shape) - 1))
    whole = Value("", ref.shape, ref.dtype, 0)
    part = body.pick(suits, lambda v: alike(v, whole, axis) and v.shape[axis] <= ref.shape[axis])
    part = body.tame(body.cast(part, ref.dtype), ref.bound)
    start = body.draw(st.integers(0, ref.shape[axis] - part.shape[axis]))
    body.lines.append(f"{ref.name}[{':, ' * axis}pl.ds({start}, {part.shape[axis]})] = {part.text}")


def conditionally(body: Body):
    """Writes under `pl.when`."""
    test = body.pick(lambda v: v.shape == () and v.exact and v.dtype in ("bool", "int32"))
    inner = body.nested()
    write(inner)
    body.lines.append(f"@pl.when({test.text}{' > 0' if test.dtype == 'int32' else ''})")
    body.block(f"def {body.name('write')}():", inner)


SLICED: list[Callable[[Body], Any]] = [sliced, sliced, masked, write, conditionally]
