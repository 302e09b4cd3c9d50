"""Matrix products."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from jtile.compiler.rules import rule
from jtile.compiler.rules.arithmetic import cast
from jtile.compiler.rules.reduction import summands
from jtile.compiler.rules.shape import joined, reshaped, transposed
from jtile.compiler.value import Value, constant, float8, stored, tile, triton_type

# Fewest terms that every supported Triton takes in a product, by the operands' bytes.
LEAST_TERMS = {1: 32, 2: 16, 4: 16, 8: 16}

# float32 products. By default tensor cores round operands to TF32 (10 bits of mantissa), as XLA does on GPUs.
PRECISIONS = {
    None: "tf32",
    jax.lax.Precision.DEFAULT: "tf32",
    jax.lax.Precision.HIGH: "tf32x3",
    jax.lax.Precision.HIGHEST: "ieee",
    jax.lax.DotAlgorithmPreset.DEFAULT: "tf32",
    jax.lax.DotAlgorithmPreset.TF32_TF32_F32: "tf32",
    jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3: "tf32x3",
    jax.lax.DotAlgorithmPreset.F32_F32_F32: "ieee",
    jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3: "bf16x3",
    jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X6: "bf16x6",
}

# Fewest rows and columns of one of several products.
LEAST_SIDE = 16

# float8 products. By default Hopper's tensor cores sum with 14 bits (DeepSeek-V3, section 3.3.2), as XLA lets them;
# asked for more, the sums of 32 terms are added up in float32.
FAST_SUMS = (
    None,
    jax.lax.Precision.DEFAULT,
    jax.lax.DotAlgorithmPreset.DEFAULT,
    jax.lax.DotAlgorithmPreset.ANY_F8_ANY_F8_F32_FAST_ACCUM,
)


@rule("dot_general")
def dot_general(e, eqn, a: Value, b: Value, accumulator: Value | None = None):
    """a @ b, plus the accumulator if given. Terms are summed in float32 (integers in int32), then rounded.

    Batch dimensions are merged into one, and so are those summed over, and those that only one operand has.
    """
    (contract_a, contract_b), (batch_a, batch_b) = eqn.params["dimension_numbers"]
    out = eqn.outvars[0].aval
    a, b = cast(e, a, stored(a.dtype)), cast(e, b, stored(b.dtype))
    if {a.dtype.name, b.dtype.name} != {"float8_e4m3fn", "float8_e5m2"}:  # the one mixture that the hardware takes
        common = np.dtype(np.int8) if a.dtype == b.dtype == np.bool_ else np.dtype(jnp.promote_types(a.dtype, b.dtype))
        a, b = cast(e, a, common), cast(e, b, common)
    free_a = [i for i in range(len(a.shape)) if i not in (*contract_a, *batch_a)]
    free_b = [i for i in range(len(b.shape)) if i not in (*contract_b, *batch_b)]
    # Only what is summed over has an axis even if it has none.
    a = _merged(e, a, *filter(len, (batch_a, free_a)), contract_a)
    b = _merged(e, b, *filter(len, (batch_b,)), contract_b, *filter(len, (free_b,)))
    a, b = e.filled(a, (len(a.shape) - 1,), 0), e.filled(b, (int(bool(batch_b)),), 0)
    summed = _sums_in(a.dtype, out.dtype)
    shape = (*a.shape[:-1], *b.shape[1 + bool(batch_b) :])
    if not free_a or not free_b:
        text = _weighted_sum(e, a, b, bool(free_a), bool(free_b), summed)
    elif jnp.issubdtype(a.dtype, np.integer) and a.dtype not in (np.int8, np.uint8) or summed == np.int64:
        text = _column_by_column(e, a, b, shape, summed)
    elif batch_a and min(tile(shape[-2:])) < LEAST_SIDE:
        # Several products of matrices so small that tensor cores need them repeated, Triton 3.9 gets wrong.
        text = _column_by_column(e, cast(e, a, summed), cast(e, b, summed), shape, summed)
    else:
        folds = accumulator is not None and a.dtype != np.uint8 and shape == out.shape and out.dtype == summed
        text = _tensor_cores(e, eqn, a, b, shape, accumulator if folds else None)
        accumulator = None if folds else accumulator
    if shape != out.shape:
        text = reshaped(e, e.let(text, shape, summed, "dot"), out.shape).text
    if out.dtype != summed:
        text = cast(e, e.let(text, out.shape, summed, "dot"), out.dtype).text
    if accumulator is not None:
        text = f"{accumulator.text} + {text}"
    return e.let(text, out.shape, out.dtype, "dot")


def _merged(e, x: Value, *groups: Sequence[int]) -> Value:
    """`x` with the axes of each group, in order, made one."""
    ordered = transposed(e, x, [axis for group in groups for axis in group])
    return reshaped(e, ordered, tuple(math.prod(x.shape[axis] for axis in group) for group in groups))


def _tensor_cores(e, eqn, a: Value, b: Value, shape: tuple[int, ...], accumulator: Value | None) -> str:
    terms = LEAST_TERMS[a.dtype.itemsize]
    a, b = _lengthened(e, a, len(a.shape) - 1, terms), _lengthened(e, b, len(b.shape) - 2, terms)
    if a.dtype == np.uint8:
        return _unsigned_bytes(e, a, b, shape)
    operands = [e.tensor(a), e.tensor(b)]
    if accumulator is not None:
        operands.append(f"acc={e.tensor(accumulator)}")
    precision = eqn.params["precision"]
    if a.dtype == np.float32:
        operands.append(f'input_precision="{_precision(e, precision)}"')
    if float8(a.dtype) and not all(p in FAST_SUMS for p in _asked(precision)):
        operands.append("max_num_imprecise_acc=32")
    return f"tl.dot({', '.join(operands)})"


def _lengthened(e, x: Value, axis: int, terms: int) -> Value:
    """`x` with zeros after it, up to a number of elements along an axis that tensor cores take."""
    n = x.tile[axis]
    x = dataclasses.replace(x, shape=(*x.shape[:axis], n, *x.shape[axis + 1 :]))  # its padding is 0 already
    while n < terms:
        zeros = constant(0, x.shape, x.dtype)
        x = joined(e, x, zeros, axis)
        n *= 2
    return x


def _unsigned_bytes(e, a: Value, b: Value, shape: tuple[int, ...]) -> str:
    """Tensor cores take signed bytes: sum(a b) = sum((a - 128) (b - 128)) + 128 (sum(a) + sum(b)) - 128² terms."""
    signed = (f"tl.cast({x.text} ^ 128, tl.int8, bitcast=True)" for x in (a, b))
    rank, terms = len(shape), a.shape[-1]
    rows, columns = (
        e.let(f"tl.sum(tl.cast({x.text}, tl.int32), axis={axis})", (), np.int32, "sum").text
        for x, axis in ((a, rank - 1), (b, rank - 2))
    )
    lead = ":, " * (rank - 2)
    sums = f"{rows}[{lead}:, None] + {columns}[{lead}None, :]"
    return f"tl.dot({', '.join(signed)}) + ({sums}) * 128 - {terms * 128**2}"


def _column_by_column(e, a: Value, b: Value, shape: tuple[int, ...], summed) -> str:
    """The sum over k of a[:, k] * b[k, :], one after the other: for what tensor cores lack."""
    rank, terms = len(shape), a.shape[-1]
    total = e.let(f"tl.full({list(tile(shape))}, 0, {triton_type(summed)})", shape, summed, "total")
    k = e.name("k")
    e.loops += 1
    with e.block(f"for {k} in tl.range(0, {terms}):"):
        parts = []
        for x, axis in ((a, rank - 1), (b, rank - 2)):
            chosen = f"tl.where({e.lanes(terms, axis, rank)} == {k}, {e.tensor(x)}, 0)"
            text = f"tl.sum(tl.cast({chosen}, {triton_type(summed)}), axis={axis}, keep_dims=True)"
            parts.append(e.let(text, (), summed, "part").text)
        e.line(f"{total.text} += {parts[0]} * {parts[1]}")
    return total.text


def _weighted_sum(e, a: Value, b: Value, has_rows: bool, has_columns: bool, summed) -> str:
    """The product when one operand is a vector (for each batch): sum over the contracted axis of products."""
    batched = len(a.shape) - 1 - has_rows
    axis = batched + has_rows
    texts = []
    for x, other in ((a, has_columns), (b, has_rows)):
        text = e.tensor(cast(e, x, summed))
        if other:
            text = e.let(text, x.shape, summed, "factor").text if not text.isidentifier() else text
            kept = [":"] * batched
            text += f"[{', '.join([*kept, 'None', ':'] if has_rows else [*kept, ':', 'None'])}]"
        texts.append(text)
    products = Value(f"{texts[0]} * {texts[1]}", (), summed, product=True)
    return f"tl.sum({summands(products)}, axis={axis}, dtype={triton_type(summed)})"


def _asked(precision) -> tuple:
    """What each operand asks for."""
    return precision if isinstance(precision, tuple) else (precision,)


def _precision(e, precision) -> str:
    """The most precise that either operand asks for."""
    asked = _asked(precision)
    unknown = [p for p in asked if p not in PRECISIONS]
    if unknown:
        raise e.unsupported(
            f"a float32 product of precision {unknown[0]} has no form in Triton",
            f"Ask for one of {', '.join(str(p) for p in PRECISIONS)}.",
        )
    order = ["tf32", "bf16x3", "tf32x3", "bf16x6", "ieee"]
    return max((PRECISIONS[p] for p in asked), key=order.index)


def accumulations(equations, uses) -> dict:
    """Sums `acc + a @ b` whose product is used nowhere else: result of the sum -> (product's equation, acc).

    Written as one operation, the sum happens inside the tensor core's accumulator.
    """
    products = {eqn.outvars[0]: eqn for eqn in equations if eqn.primitive.name == "dot_general"}
    sums = {}
    for eqn in equations:
        if eqn.primitive.name not in ("add", "add_any"):
            continue
        for term, other in (eqn.invars[::-1], eqn.invars):
            product = None if isinstance(term, Literal) else products.get(term)
            if (
                product is not None
                and uses[term] == 1
                and other is not term
                and _sums_in(product.invars[0].aval.dtype, term.aval.dtype) == term.aval.dtype
                and other.aval.shape == term.aval.shape
            ):
                sums[eqn.outvars[0]] = product, other
                break
    return sums


def _sums_in(dtype, result) -> np.dtype:
    """The type in which products of operands of this type are summed."""
    if jnp.issubdtype(dtype, np.integer) or dtype == np.bool_:
        return np.dtype(np.int64 if result.itemsize == 8 else np.int32)
    return np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)
