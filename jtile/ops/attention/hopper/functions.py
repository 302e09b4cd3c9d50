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
from jtile.ops.attention.variant import LOG2_E, Place, Variant, with_slope

HEAD = """import triton.language as tl
from triton.experimental import gluon
from triton.language.extra import libdevice
"""


@dataclasses.dataclass(frozen=True)
class Functions:
    """
    Attributes:
        text: a module with the functions that a schedule calls. Forward, where a block's rows are queries,
            `rows(batch, head, row, query, arrays)`, what depends on these alone;
            `columns(key, rows, arrays)`, what arrays have for a key, which is to be asked for before there are scores;
            `score(product, key, rows, columns, arrays)`, if scores are more than products of query and key;
            `visible(key, rows, columns, arrays)`, if operands or functions mask keys.
            Backward, where they are keys, `key` changes places with `head, row, query`, and `score` gives the
            derivative by the scaled product, too.
        slope: what scores are multiplied by to be exponents of 2.
        modifies, masks, reads: whether there is a `score`, a `visible`, and a `columns`.
    """

    text: str
    slope: float
    modifies: bool
    masks: bool
    reads: bool

    def __getattr__(self, name: str):
        if name not in ("rows", "columns", "score", "visible"):
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
    """Writes functions of numbers whose arguments are blocks, with the axes `order`; `axes` has each name's own."""

    def __init__(self, jaxpr, order: str):
        kernel = Kernel("attention", (), (), (), (), 0, 0, (), jaxpr, (), "a function of attention's scores")
        super().__init__(kernel, CompilerParams(), set())
        self.order_of_axes = order
        self.axes: dict[str, str] = {}

    def line(self, text: str) -> None:
        names, equals, value = text.partition(" = ")
        if equals:
            value, axes = self.spread_over(value)
            self.axes.update(dict.fromkeys(names.split(", "), axes))
        super().line(names + equals + value)

    def spread_over(self, text: str, axes: str = "") -> tuple[str, str]:
        """An expression with names that have fewer axes than others, or than `axes`, spread over all of them."""
        order = self.order_of_axes
        found = axes + "".join(self.axes.get(name, "") for name in re.findall(r"\w+", text))
        axes = "".join(a for a in order if a in found)

        def spread(match: re.Match) -> str:
            own = self.axes.get(match[0], axes)
            return match[0] if own in ("", axes) else match[0] + ("[:, None]" if own == order[0] else "[None, :]")

        return re.sub(r"\w+", spread, text), axes

    def tensor(self, value: Value) -> str:
        return value.text if value.constant is None else f"tl.cast({value.text}, {triton_type(value.dtype)})"


class _Given(NamedTuple):
    """An argument: an expression, its axes, its type and what is known of it."""

    text: str
    axes: str
    dtype: np.dtype
    bounds: Interval | None = None


def _write(name: str, parameters: Sequence[str], jaxpr, given: Sequence[_Given], order: str, results: Callable) -> str:
    """A function of the jaxpr's arguments; `results` writes what it returns."""
    writer = _Writer(jaxpr, order)
    operands = []
    for x in given:
        operands.append(writer.let(x.text, (), x.dtype, "x", bounds=x.bounds))
        writer.axes[operands[-1].text] = x.axes
    returned = results(writer, writer.run(jaxpr, operands))
    head = f"@gluon.jit\ndef {name}({', '.join(parameters)}, arrays):"
    return "\n".join([head, *writer.lines, f"    return {returned}"])


# Tracing


def _inlined(jaxpr, consts, operands, small):
    """The results of a jaxpr without the functions in it.

    Sums of integers that are `small` are exact as floats too: they are converted before, a row's and a column's numbers
    each by itself, not after, each element's.
    """
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *operands], strict=True))
    sums = {}

    def value(v):
        return v.val if isinstance(v, Literal) else values[v]

    def is_small(v):
        return isinstance(v, Literal) or any(values[v] is x for x in small)

    for eqn in jaxpr.eqns:
        given, name = list(map(value, eqn.invars)), eqn.primitive.name
        if name in ("add", "sub") and all(map(is_small, eqn.invars)):
            sums[eqn.outvars[0]] = eqn.primitive, given
        if name == "jit":
            inner = eqn.params["jaxpr"]
            found = _inlined(inner.jaxpr, inner.consts, given, small)
        elif name == "convert_element_type" and eqn.invars[0] in sums and eqn.params["new_dtype"] == jnp.float32:
            primitive, terms = sums[eqn.invars[0]]
            found = [primitive.bind(*(jax.lax.convert_element_type(x, jnp.float32) for x in terms))]
        else:
            found = eqn.primitive.bind(*given, **eqn.primitive.get_bind_params(eqn.params))
            found = found if eqn.primitive.multiple_results else [found]
        values.update(zip(eqn.outvars, found, strict=True))
    return list(map(value, jaxpr.outvars))


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


def trace(
    variant: Variant, shapes: Mapping[str, Any], slots: Mapping[str, int], sizes: Sizes, *, with_derivative: bool
):
    """The jaxpr of (product, batch, head, row, query, key) -> score, its derivative, visible; and the scores' slope."""
    ends = {"q": sizes.queries - 1, "k": sizes.keys - 1}
    # A cap alone: tanh in one instruction, whose error is below that of rounding operands and weights to 16 bits.
    cap = None if variant.score_mod or variant.has("bias") else variant.soft_cap
    # A window beside positions that all share is the schedule's own business.
    masks = variant if variant.has("query_offset") else dataclasses.replace(variant, window=(None, None))

    def both(product, batch, head, row, query, key):
        x = _operands(variant, shapes, slots, row, Place(batch, head, query, key), ends)
        place = Place(x.pop("batch_index", batch), x.pop("head_index", head), query, key)
        scores: tuple = (product,)
        if cap is not None:
            score = approx_tanh((variant.scale / cap) * product)
            scores = (score, 1 - score * score) if with_derivative else (score,)
        elif variant.modifies and with_derivative:
            scores = with_slope(variant.score)(variant.scale * product, place, x)
        elif variant.modifies:
            scores = (variant.score(variant.scale * product, place, x),)
        return *scores, masks.visible(place, x)

    traced = jax.make_jaxpr(both)(SCORE, *[NUMBER] * 5)
    few = not variant.has("origin") and max(sizes.queries, sizes.keys) < 2**23
    inlined = lambda *x: _inlined(traced.jaxpr, traced.consts, x, x[3:] if few else ())  # noqa: E731
    traced_again = jax.make_jaxpr(inlined)(SCORE, *[NUMBER] * 5)
    slope = cap or (1.0 if variant.modifies else variant.scale)
    return traced_again.jaxpr, slope * LOG2_E


def obstacle(jaxpr) -> str | None:
    """Why functions cannot be written as functions of blocks."""
    strange = sorted({eqn.primitive.name for eqn in jaxpr.eqns} - ELEMENTWISE)
    return f"a function of its scores has `{strange[0]}`, which is not elementwise" if strange else None


def write(jaxpr, slope: float, sizes: Sizes, variant: Variant, order: str) -> Functions:
    """The functions of a traced variant, of blocks with these axes: what is known of their rows is computed once."""
    integer, queries = np.dtype(np.int32), (0, sizes.queries + MOST_ROWS)
    given = dict(
        product=_Given("product", order, np.dtype(np.float32)),
        batch=_Given("batch", "", integer, (0, sizes.batch - 1)),
        head=_Given("head", "", integer, (0, sizes.heads - 1)),
        row=_Given("row", "q", integer, queries),
        query=_Given("query", "q", integer, None if variant.has("origin") else queries),
        key=_Given("key", "k", integer, (0, sizes.keys + MOST_ROWS)),
    )
    variables = dict(zip(given, jaxpr.invars, strict=True))
    *scores, visible = jaxpr.outvars
    once, each = ["batch", "head", "row", "query"], ["key"]
    if order == "kq":
        once, each = ["batch", "key"], ["head", "row", "query"]

    early, late, of_rows = _depending(jaxpr.eqns, {variables[name] for name in once})
    used = [v for eqn in late for v in eqn.invars] + [*scores, visible]
    held = list(dict.fromkeys(v for v in used if not isinstance(v, Literal) and v in of_rows))
    held = held or [variables["batch"]]
    _, _, of_columns = _depending(jaxpr.eqns, {variables[name] for name in ("batch", "head", *each)})
    read = [v for eqn in late if eqn.primitive is element_p for v in eqn.outvars if v in of_columns]
    before = _needed(late, read)
    late = _needed([eqn for eqn in late if not set(eqn.outvars) & set(read)], [*scores, visible])
    rows: list[_Given] = []
    columns: list[_Given] = []

    def part(name, names, given_rows, invars, outvars, equations, results):
        inner = jaxpr.replace(
            invars=[*(variables[n] for n in names), *invars],
            outvars=outvars,
            eqns=equations,
            debug_info=jaxpr.debug_info,
        )
        parameters = [*names, *{"rows": [], "columns": ["rows"]}.get(name, ["rows", "columns"])]
        return _write(name, parameters, inner, [*(given[n] for n in names), *given_rows], order, results)

    def kept(name, those, writer, found):
        those += [_Given(f"{name}[{i}]", writer.axes.get(x.text, ""), x.dtype, x.bounds) for i, x in enumerate(found)]
        return f"({', '.join(map(writer.tensor, found))},)"

    def spread(writer, x):
        return writer.spread_over(writer.tensor(x), order)[0]

    def block(writer, found):
        whole = writer.axes.get(found[0].text, "") == order
        texts = [spread(writer, x) for x in found]
        return ", ".join([texts[0] if whole else f"tl.broadcast({texts[0]}, product)[0]", *texts[1:]])

    texts = [part("rows", once, [], [], held, early, functools.partial(kept, "rows", rows))]
    if read:
        texts.append(part("columns", each, rows, held, read, before, functools.partial(kept, "columns", columns)))
    known = [*rows, *columns], [*held, *read]
    if variant.modifies:
        texts.append(part("score", ["product", *each], *known, scores, late, block))
    if masks := not isinstance(visible, Literal):
        texts.append(part("visible", each, *known, [visible], late, lambda writer, found: spread(writer, *found)))
    return Functions("\n\n\n".join([HEAD, *texts]) + "\n", slope, variant.modifies, masks, bool(read))


def _depending(equations, on: set) -> tuple[list, list, set]:
    """The equations that depend on these variables alone, and those that do not; and all variables that do."""
    yes, no = [], []
    for eqn in equations:
        if on.issuperset(v for v in eqn.invars if not isinstance(v, Literal)):
            yes.append(eqn)
            on.update(eqn.outvars)
        else:
            no.append(eqn)
    return yes, no, on


def _needed(equations, results) -> list:
    """Those of the equations that results depend on."""
    wanted = {v for v in results if not isinstance(v, Literal)}
    found: list = []
    for eqn in reversed(equations):
        if not wanted.isdisjoint(eqn.outvars):
            found.insert(0, eqn)
            wanted.update(v for v in eqn.invars if not isinstance(v, Literal))
    return found
