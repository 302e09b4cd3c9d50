"""Matrix products."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from jtile.compiler.rules import rule
from jtile.compiler.value import Value, tile, triton_type

# Fewest terms that a tensor core sums in one instruction, by the operands' bytes.
LEAST_TERMS = {1: 32, 2: 16, 4: 8, 8: 4}

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


@rule("dot_general")
def dot_general(e, eqn, a: Value, b: Value, accumulator: Value | None = None):
    """a @ b, plus the accumulator if given. Terms are summed in float32 (integers in int32), then rounded."""
    (contract_a, contract_b), (batch_a, batch_b) = eqn.params["dimension_numbers"]
    out = eqn.outvars[0].aval
    if {a.dtype.name, b.dtype.name} != {"float8_e4m3fn", "float8_e5m2"}:  # the one mixture that the hardware takes
        common = np.dtype(jnp.promote_types(a.dtype, b.dtype))
        a, b = _cast(e, a, common), _cast(e, b, common)
    a = e.filled(a, contract_a, 0)
    b = e.filled(b, contract_b, 0)
    free_a = [i for i in range(len(a.shape)) if i not in (*contract_a, *batch_a)]
    free_b = [i for i in range(len(b.shape)) if i not in (*contract_b, *batch_b)]
    if len(contract_a) != 1 or len(batch_a) > 1 or len(free_a) > 1 or len(free_b) > 1:
        raise e.unsupported(
            f"a product of shapes {a.shape} and {b.shape} over {contract_a} and {contract_b} has no form in Triton",
            "Multiply matrices, with at most one batch dimension, over one dimension; reshape the others together.",
        )
    summed = _sums_in(a.dtype)
    if not free_a or not free_b:
        text = _weighted_sum(a, b, (*batch_a, *contract_a, *free_a), (*batch_b, *contract_b, *free_b), summed)
    else:
        terms = tile((a.shape[contract_a[0]],))[0]
        least = LEAST_TERMS[a.dtype.itemsize]
        if terms < least:
            raise e.unsupported(
                f"a product of {a.dtype} over {terms} terms is smaller than the {least} that tensor cores sum at once",
                f"Widen the block to {least}: what lies past the array's edge reads as 0.",
            )
        operands = [
            _oriented(a, (*batch_a, *free_a, *contract_a)),
            _oriented(b, (*batch_b, *contract_b, *free_b)),
        ]
        if accumulator is not None:
            operands.append(f"acc={e.tensor(accumulator)}")
        if a.dtype == np.float32:
            operands.append(f'input_precision="{_precision(e, eqn.params["precision"])}"')
        text = f"tl.dot({', '.join(operands)})"
        accumulator = None
    if out.dtype != summed:
        text = f"tl.cast({text}, {triton_type(out.dtype)})"
    if accumulator is not None:
        text = f"{accumulator.text} + {text}"
    return e.let(text, out.shape, out.dtype, "dot")


def _cast(e, x: Value, dtype: np.dtype) -> Value:
    if x.dtype == dtype:
        return x
    text = f"tl.cast({e.tensor(x)}, {triton_type(dtype)})"
    return e.let(text, x.shape, dtype, dtype.name, zero_padded=x.zero_padded)


def _oriented(x: Value, order: tuple[int, ...]) -> str:
    if order == tuple(range(len(order))):
        return x.text
    return f"tl.trans({x.text})" if len(order) == 2 else f"tl.permute({x.text}, {list(order)})"


def _weighted_sum(a: Value, b: Value, order_a: tuple[int, ...], order_b: tuple[int, ...], summed) -> str:
    """The product when one operand is a vector (for each batch): sum over the contracted axis of products."""
    rank, axis = max(len(order_a), len(order_b)), min(len(order_a), len(order_b)) - 1
    texts = []
    for x, order in ((a, order_a), (b, order_b)):
        text = _oriented(x, order)
        if len(order) < rank:
            text = f"{text if text.isidentifier() else f'({text})'}[{', '.join([':'] * len(order) + ['None'])}]"
        texts.append(f"tl.cast({text}, {triton_type(summed)})" if x.dtype != summed else text)
    return f"tl.sum({texts[0]} * {texts[1]}, axis={axis}, dtype={triton_type(summed)})"


def _precision(e, precision) -> str:
    """The most precise that either operand asks for."""
    asked = precision if isinstance(precision, tuple) else (precision,)
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
                and _sums_in(product.invars[0].aval.dtype) == term.aval.dtype
                and other.aval.shape == term.aval.shape
            ):
                sums[eqn.outvars[0]] = product, other
                break
    return sums


def _sums_in(dtype) -> np.dtype:
    """The type in which products of this type are summed."""
    if jnp.issubdtype(dtype, np.integer):
        return np.dtype(np.int32)
    return np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)
