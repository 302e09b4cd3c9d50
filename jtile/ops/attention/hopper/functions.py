"""A variant's functions of a score and its place, as Gluon source for the schedule to call.

They are traced as functions of numbers, written by the rules of jtile's compiler, and get blocks: a number that depends
on the query alone becomes a vector along the rows, one that depends on the key alone a vector along the columns. What
depends on neither score nor key is a function of its own, `rows`, which the schedule calls once for a block of queries.
"""

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, Primitive

from jtile.compiler.build import load_text
from jtile.compiler.emit import Emitter
from jtile.compiler.kernel import Kernel
from jtile.compiler.params import CompilerParams
from jtile.compiler.primitives import approx_tanh
from jtile.compiler.rules import RULES, arithmetic, rule
from jtile.compiler.value import Interval, Value, triton_type
from jtile.ops.attention.variant import LOG2_E, Place, Variant

HEAD = """import triton.language as tl
from triton.experimental import gluon
from triton.language.extra import libdevice
"""


@dataclasses.dataclass(frozen=True)
class Functions:
    """
    Attributes:
        text: a module with the functions that the schedule calls:
            `rows(batch, head, row, query, arrays)`, what depends on these alone, the query's row and its number;
            `score(product, key, rows, arrays)`, if scores are more than products of query and key;
            `visible(key, rows, arrays)`, if operands or functions mask keys.
        slope: what scores are multiplied by to be exponents of 2.
        modifies, masks: whether there is a `score`, and a `visible`.
    """

    text: str
    slope: float
    modifies: bool
    masks: bool

    def __getattr__(self, name: str):
        if name not in ("rows", "score", "visible"):
            raise AttributeError(name)
        return _load(self.text, name)


@functools.cache
def _load(text: str, name: str):
    return load_text(name, text, f"<jtile attention {hashlib.sha256(text.encode()).hexdigest()[:16]}>")


# Reading

element_p = Primitive("attention_element")
element_p.def_abstract_eval(lambda *indices, array, shape, dtype: jax.core.ShapedArray((), dtype))


@rule("attention_element")
def _element(e: Emitter, eqn, *indices: Value) -> Value:
    """An element of one of the schedule's arrays."""
    array, shape, dtype = (eqn.params[name] for name in ("array", "shape", "dtype"))
    wide = math.prod(shape) >= 2**31
    terms = []
    for axis, index in enumerate(indices):
        stride = math.prod(shape[axis + 1 :])
        text = f"tl.cast({index.text}, tl.int64)" if wide and index.constant is None else index.text
        terms.append(text if stride == 1 else f"{text} * {stride}")
    return e.let(f"tl.load(arrays[{array}] + {' + '.join(terms) or '0'})", (), dtype, "element")


# Writing


class _Writer(Emitter):
    """Writes functions of numbers whose arguments are blocks. `axes` has for each name those of q and k that it has."""

    def __init__(self, jaxpr):
        kernel = Kernel("attention", (), (), (), (), 0, 0, (), jaxpr, (), "a function of attention's scores")
        super().__init__(kernel, CompilerParams(), set())
        self.axes: dict[str, str] = {}

    def line(self, text: str) -> None:
        names, equals, value = text.partition(" = ")
        if equals:
            value, axes = self.spread_over(value)
            self.axes.update(dict.fromkeys(names.split(", "), axes))
        super().line(names + equals + value)

    def spread_over(self, text: str, axes: str = "") -> tuple[str, str]:
        """An expression with names that have fewer axes than others, or than `axes`, spread over all of them."""
        axes = "".join(a for a in "qk" if any(a in self.axes.get(n, "") for n in re.findall(r"\w+", text)) or a in axes)

        def spread(match: re.Match) -> str:
            own = self.axes.get(match[0], axes)
            return match[0] if own in ("", axes) else match[0] + ("[:, None]" if own == "q" else "[None, :]")

        return re.sub(r"\w+", spread, text), axes

    def tensor(self, value: Value) -> str:
        return value.text if value.constant is None else f"tl.cast({value.text}, {triton_type(value.dtype)})"


class _Given(NamedTuple):
    """An argument: an expression, its axes, its type and what is known of it."""

    text: str
    axes: str
    dtype: np.dtype
    bounds: Interval | None = None


def _write(name: str, parameters: str, jaxpr, given: Sequence[_Given], results: Callable) -> str:
    """A function of the jaxpr's arguments; `results` writes what it returns."""
    writer = _Writer(jaxpr)
    operands = []
    for x in given:
        operands.append(writer.let(x.text, (), x.dtype, "x", bounds=x.bounds))
        writer.axes[operands[-1].text] = x.axes
    found = writer.run(jaxpr, operands)
    return "\n".join([f"@gluon.jit\ndef {name}({parameters}):", *writer.lines, f"    return {results(writer, found)}"])


# Tracing


def _inlined(jaxpr, consts, operands):
    """The results of a jaxpr without the functions in it."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *operands], strict=True))
    for eqn in jaxpr.eqns:
        given = [v.val if isinstance(v, Literal) else values[v] for v in eqn.invars]
        if eqn.primitive.name == "jit":
            inner = eqn.params["jaxpr"]
            found = _inlined(inner.jaxpr, inner.consts, given)
        else:
            found = eqn.primitive.bind(*given, **eqn.primitive.get_bind_params(eqn.params))
            found = found if eqn.primitive.multiple_results else [found]
        values.update(zip(eqn.outvars, found, strict=True))
    return [v.val if isinstance(v, Literal) else values[v] for v in jaxpr.outvars]


MOST_ROWS = 256  # of a block

NUMBER = jax.ShapeDtypeStruct((), jnp.int32)
SCORE = jax.ShapeDtypeStruct((), jnp.float32)
# Primitives of numbers that are as good for blocks.
ELEMENTWISE = {
    *(name for name, function in RULES.items() if function.__module__ == arithmetic.__name__),
    *("attention_element", "jit", "custom_jvp_call"),
}


def _operands(variant: Variant, shapes: Mapping[str, Any], slots: Mapping[str, int], row, place: Place, ends) -> dict:
    """What the variant's functions get: for each operand a number, or a function of indices."""

    def read(name, *indices):
        params = dict(array=slots[name], shape=shapes[name].shape, dtype=np.dtype(shapes[name].dtype))
        return element_p.bind(*map(jnp.int32, indices), **params)

    def at(name: str, axes: str):
        index = {"b": place.batch, "h": place.head, "q": row, "k": place.key}
        return read(name, *(jnp.minimum(index[a], ends[a]) if a in ends else index[a] for a in axes) or (0,))

    found: dict[str, Any] = {}
    for operand in variant.operands:
        if operand.rank is not None:
            found[operand.name] = lambda *indices, name=operand.name: read(name, *(indices or (0,)))
        elif operand.elementwise:
            found[operand.name] = at(operand.name, operand.axes)
    return found


@dataclasses.dataclass(frozen=True)
class Sizes:
    batch: int
    heads: int
    queries: int
    keys: int


def trace(variant: Variant, shapes: Mapping[str, Any], slots: Mapping[str, int], sizes: Sizes):
    """The jaxpr of (product, batch, head, row, query, key) -> score, visible; and the slope of scores."""
    ends = {"q": sizes.queries - 1, "k": sizes.keys - 1}
    capped = variant.soft_cap is not None and not (variant.score_mod or variant.has("bias"))
    # A window beside positions that all share is the schedule's own business.
    masks = variant if variant.has("query_offset") else dataclasses.replace(variant, window=(None, None))

    def both(product, batch, head, row, query, key):
        place = Place(batch, head, query, key)
        x = _operands(variant, shapes, slots, row, place, ends)
        place = Place(x.pop("batch_index", batch), x.pop("head_index", head), query, key)
        score = product
        if capped:
            score = approx_tanh((variant.scale / variant.soft_cap) * product)
        elif variant.modifies:
            score = variant.score(variant.scale * product, place, x)
        return score, masks.visible(place, x)

    traced = jax.make_jaxpr(both)(SCORE, *[NUMBER] * 5)
    traced = jax.make_jaxpr(lambda *x: _inlined(traced.jaxpr, traced.consts, x))(SCORE, *[NUMBER] * 5)
    slope = variant.soft_cap if capped else 1.0 if variant.modifies else variant.scale
    return traced.jaxpr, slope * LOG2_E


def obstacle(jaxpr) -> str | None:
    """Why functions cannot be written as functions of blocks."""
    strange = sorted({eqn.primitive.name for eqn in jaxpr.eqns} - ELEMENTWISE)
    return f"a function of its scores has `{strange[0]}`, which is not elementwise" if strange else None


def write(jaxpr, slope: float, sizes: Sizes) -> Functions:
    """The functions of a traced variant."""
    product, batch, head, row, query, key = jaxpr.invars
    score, visible = jaxpr.outvars
    of_rows = {batch, head, row, query}
    early, late = [], []
    for eqn in jaxpr.eqns:
        if of_rows.issuperset(v for v in eqn.invars if not isinstance(v, Literal)):
            early.append(eqn)
            of_rows.update(eqn.outvars)
        else:
            late.append(eqn)
    used = [v for eqn in late for v in eqn.invars] + [score, visible]
    held = list(dict.fromkeys(v for v in used if not isinstance(v, Literal) and v in of_rows)) or [batch]
    rows: list[_Given] = []

    def of_rows_alone(writer, found):
        for i, x in enumerate(found):
            rows.append(_Given(f"rows[{i}]", writer.axes.get(x.text, ""), x.dtype, x.bounds))
        return f"({', '.join(map(writer.tensor, found))},)"

    def part(name, parameters, invars, outvars, equations, given, results):
        inner = jaxpr.replace(invars=invars, outvars=outvars, eqns=equations, debug_info=jaxpr.debug_info)
        return _write(name, parameters, inner, given, results)

    integer = np.dtype(np.int32)
    place = [
        _Given("batch", "", integer, (0, sizes.batch - 1)),
        _Given("head", "", integer, (0, sizes.heads - 1)),
        _Given("row", "q", integer, (0, sizes.queries + MOST_ROWS)),
        _Given("query", "q", integer),
    ]
    texts = [
        part("rows", "batch, head, row, query, arrays", [batch, head, row, query], held, early, place, of_rows_alone)
    ]
    keys = [_Given("key", "k", integer, (0, sizes.keys + MOST_ROWS)), *rows]
    if modifies := score is not product:

        def whole(writer, found):
            text, axes = writer.spread_over(writer.tensor(found[0]))
            return text if axes == "qk" else f"tl.broadcast({text}, product)[0]"

        given = [_Given("product", "qk", np.dtype(np.float32)), *keys]
        texts.append(part("score", "product, key, rows, arrays", [product, key, *held], [score], late, given, whole))
    if masks := not isinstance(visible, Literal):
        spread = lambda writer, found: writer.spread_over(writer.tensor(found[0]), "qk")[0]  # noqa: E731
        texts.append(part("visible", "key, rows, arrays", [key, *held], [visible], late, keys, spread))
    return Functions("\n\n\n".join([HEAD, *texts]) + "\n", slope, modifies, masks)
