"""Operations for kernels that Pallas itself does not have: JAX keeps their like in its own backend for Triton.

Kernels that use them run in Pallas' interpreter too, but for inline assembly.
"""

import enum
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import ArrayLike

from jtile import borrowed

source_info_util.register_exclusion(__file__)  # a kernel's source and errors name the kernel's line, not this file's

# Loads, stores and products


def load(
    ref: Any,
    *,
    mask: ArrayLike | None = None,
    other: ArrayLike | None = None,
    cache_modifier: str | None = None,
    eviction_policy: str | None = None,
    volatile: bool = False,
) -> jax.Array:
    """`ref[...]`, where a mask holds.

    Args:
      ref: a ref, or a part of one, `ref.at[indices]`.
      mask: booleans that broadcast to what is read. Where they are False nothing is read, and the result is `other`.
      other: what broadcasts to the result; 0 if left out, and then it is 0 on GPUs alone: do not rely on it.
      cache_modifier: `".ca"` caches at all levels, `".cg"` in L2 alone.
      eviction_policy: `"evict_first"` or `"evict_last"`: which data L2 gives up first.
      volatile: read memory, whatever is cached: for what other programs write.

    Example:
      >>> from jax.experimental import pallas as pl
      >>> def kernel(x_ref, y_ref):
      ...     y_ref[...] = load(x_ref, mask=x_ref[...] > 1, other=-1.0)
      >>> x = jnp.arange(4.0)
      >>> print(pl.pallas_call(kernel, out_shape=x, interpret=True)(x))
      [-1. -1.  2.  3.]
    """
    if other is not None and mask is None:
        raise ValueError("load: `other` is for where a mask does not hold, and there is no mask. Pass one.")
    return borrowed.load(
        ref,
        None,
        mask=mask,
        other=other,
        cache_modifier=cache_modifier,
        eviction_policy=eviction_policy,
        volatile=volatile,
    )


def store(ref: Any, val: jax.Array, *, mask: ArrayLike | None = None, eviction_policy: str | None = None) -> None:
    """`ref[...] = val`, where a mask holds; arguments as for `load`.

    Example:
      >>> from jax.experimental import pallas as pl
      >>> def kernel(x_ref, y_ref):
      ...     y_ref[...] = jnp.zeros(4)
      ...     store(y_ref, x_ref[...] * 2, mask=x_ref[...] > 1)
      >>> x = jnp.arange(4.0)
      >>> print(pl.pallas_call(kernel, out_shape=x, interpret=True)(x))
      [0. 0. 4. 6.]
    """
    borrowed.store(ref, None, val, mask=mask, eviction_policy=eviction_policy)


def dot(
    a: jax.Array,
    b: jax.Array,
    trans_a: bool = False,
    trans_b: bool = False,
    allow_tf32: bool | None = None,
    precision: Any = None,
) -> jax.Array:
    """The product of two matrices, in the type in which tensor cores sum: float32, int32 of integers, float64.

    Args:
      a, b: (m, k) and (k, n).
      trans_a, trans_b: take the operand's transpose.
      allow_tf32: of float32, whether tensor cores may round operands to TF32: 10 bits of mantissa.
      precision: as for `jax.lax.dot_general`, in place of `allow_tf32`.

    Raises:
      ValueError: an operand that is no matrix; both `allow_tf32` and `precision`.

    Example:
      >>> dot(jnp.ones((2, 16), jnp.bfloat16), jnp.ones((4, 16), jnp.bfloat16), trans_b=True).dtype
      dtype('float32')
    """
    if a.ndim != 2 or b.ndim != 2:
        raise ValueError(
            f"dot: operands are matrices; these have shapes {a.shape} and {b.shape}. Use jax.numpy.matmul."
        )
    if allow_tf32 is not None:
        if precision is not None:
            raise ValueError(f"dot: {allow_tf32=} and {precision=} say the same thing. Leave one out.")
        precision = jax.lax.Precision.DEFAULT if allow_tf32 else jax.lax.Precision.HIGHEST
    common = jnp.promote_types(a.dtype, b.dtype)
    summed = jnp.int32 if jnp.issubdtype(common, jnp.integer) else jnp.promote_types(common, jnp.float32)
    dimensions = ((0 if trans_a else 1,), (1 if trans_b else 0,)), ((), ())
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=summed)


# Atomic operations


class Atomic(enum.StrEnum):
    ADD = "add"
    MAX = "max"
    MIN = "min"
    AND = "and"
    OR = "or"
    XOR = "xor"
    XCHG = "xchg"
    CAS = "cas"


_WORDS = ("int32", "int64", "uint32", "uint64")
_NUMBERS = (*_WORDS, "float32", "float64")

# The types that the hardware changes so.
ATOMIC_TYPES = {
    **dict.fromkeys((Atomic.AND, Atomic.OR, Atomic.XOR), _WORDS),
    **dict.fromkeys((Atomic.MAX, Atomic.MIN, Atomic.XCHG, Atomic.CAS), _NUMBERS),
    Atomic.ADD: (*_NUMBERS, "float16", "bfloat16"),
}

_COMBINED: dict[Atomic, Callable] = {
    Atomic.ADD: jnp.add,
    Atomic.MAX: jnp.maximum,
    Atomic.MIN: jnp.minimum,
    Atomic.AND: jnp.bitwise_and,
    Atomic.OR: jnp.bitwise_or,
    Atomic.XOR: jnp.bitwise_xor,
    Atomic.XCHG: lambda old, new: new,
}


def atomic_add(ref: Any, idx: Any, val: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
    """`ref[idx] += val` as one step, which no other program's comes in between; returns what was there before.

    The order of programs is open, and with it the result's rounding: floats added atomically differ between runs.
    Lanes with the same index add one after the other.

    Args:
      ref: an input or output ref, or a part of one. Outputs start undefined: alias them to an input of zeros.
      idx: indices, `...` for all.
      val: what broadcasts to `ref[idx]`, of its dtype, or a Python number.
      mask: booleans that broadcast to `ref[idx]`; where False nothing happens, and the result is undefined.

    Raises:
      TypeError: the hardware has no such operation for the ref's type.

    Example:
      >>> from jax.experimental import pallas as pl
      >>> def count(x_ref, _, counts_ref):
      ...     atomic_add(counts_ref, x_ref[...], 1)
      >>> x, zeros = jnp.array([0, 2, 2, 3]), jnp.zeros(4, jnp.int32)
      >>> print(pl.pallas_call(count, out_shape=zeros, input_output_aliases={1: 0}, interpret=True)(x, zeros))
      [1 0 2 1]
    """
    return _atomic(Atomic.ADD, ref, idx, val, mask)


def atomic_max(ref: Any, idx: Any, val: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
    """`ref[idx] = max(ref[idx], val)` as `atomic_add` adds. NaN has no defined place in this order.

    Example:
      >>> from jax.experimental import pallas as pl
      >>> def kernel(x_ref, y_ref):
      ...     y_ref[0] = 3
      ...     y_ref[1] = atomic_max(y_ref, 0, x_ref[0])
      >>> print(pl.pallas_call(kernel, out_shape=jnp.zeros(2, jnp.int32), interpret=True)(jnp.array([5])))
      [5 3]
    """
    return _atomic(Atomic.MAX, ref, idx, val, mask)


def atomic_min(ref: Any, idx: Any, val: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
    """`ref[idx] = min(ref[idx], val)` as `atomic_add` adds. NaN has no defined place in this order.

    Example:
      >>> from jax.experimental import pallas as pl
      >>> def kernel(x_ref, y_ref):
      ...     y_ref[0] = 3
      ...     y_ref[1] = atomic_min(y_ref, 0, x_ref[0])
      >>> print(pl.pallas_call(kernel, out_shape=jnp.zeros(2, jnp.int32), interpret=True)(jnp.array([5])))
      [3 3]
    """
    return _atomic(Atomic.MIN, ref, idx, val, mask)


def atomic_and(ref: Any, idx: Any, val: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
    """`ref[idx] &= val` as `atomic_add` adds.

    Example:
      >>> from jax.experimental import pallas as pl
      >>> def kernel(x_ref, y_ref):
      ...     y_ref[0] = 3
      ...     y_ref[1] = atomic_and(y_ref, 0, x_ref[0])
      >>> print(pl.pallas_call(kernel, out_shape=jnp.zeros(2, jnp.int32), interpret=True)(jnp.array([5])))
      [1 3]
    """
    return _atomic(Atomic.AND, ref, idx, val, mask)


def atomic_or(ref: Any, idx: Any, val: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
    """`ref[idx] |= val` as `atomic_add` adds.

    Example:
      >>> from jax.experimental import pallas as pl
      >>> def kernel(x_ref, y_ref):
      ...     y_ref[0] = 3
      ...     y_ref[1] = atomic_or(y_ref, 0, x_ref[0])
      >>> print(pl.pallas_call(kernel, out_shape=jnp.zeros(2, jnp.int32), interpret=True)(jnp.array([5])))
      [7 3]
    """
    return _atomic(Atomic.OR, ref, idx, val, mask)


def atomic_xor(ref: Any, idx: Any, val: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
    """`ref[idx] ^= val` as `atomic_add` adds.

    Example:
      >>> from jax.experimental import pallas as pl
      >>> def kernel(x_ref, y_ref):
      ...     y_ref[0] = 3
      ...     y_ref[1] = atomic_xor(y_ref, 0, x_ref[0])
      >>> print(pl.pallas_call(kernel, out_shape=jnp.zeros(2, jnp.int32), interpret=True)(jnp.array([5])))
      [6 3]
    """
    return _atomic(Atomic.XOR, ref, idx, val, mask)


def atomic_xchg(ref: Any, idx: Any, val: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
    """`ref[idx] = val` as `atomic_add` adds: returns what was there before.

    Example:
      >>> from jax.experimental import pallas as pl
      >>> def kernel(x_ref, y_ref):
      ...     y_ref[0] = 3
      ...     y_ref[1] = atomic_xchg(y_ref, 0, x_ref[0])
      >>> print(pl.pallas_call(kernel, out_shape=jnp.zeros(2, jnp.int32), interpret=True)(jnp.array([5])))
      [5 3]
    """
    return _atomic(Atomic.XCHG, ref, idx, val, mask)


def atomic_cas(ref: Any, cmp: ArrayLike, val: ArrayLike) -> jax.Array:
    """Compare and swap: where `ref` holds `cmp` it becomes `val`, as one step; returns what was there before.

    Args:
      ref: an input or output ref, or a part of one, `ref.at[indices]`, which lies inside of the array.
      cmp, val: what broadcasts to it, of its dtype, or Python numbers.

    Raises: as `atomic_add` does.

    Example:
      >>> from jax.experimental import pallas as pl
      >>> def kernel(x_ref, y_ref):
      ...     y_ref[0] = 3
      ...     y_ref[1] = atomic_cas(y_ref.at[0], 3, x_ref[0])
      >>> print(pl.pallas_call(kernel, out_shape=jnp.zeros(2, jnp.int32), interpret=True)(jnp.array([5])))
      [5 3]
    """
    ref, transforms = borrowed.get_ref_and_transforms(ref, None, "atomic_cas")
    operands = [_given(Atomic.CAS, ref, transforms, x) for x in (cmp, val)]
    leaves, tree = jax.tree.flatten(transforms)
    return atomic_cas_p.bind(ref, *operands, *leaves, tree=tree)


def _atomic(operation: Atomic, ref, idx, val, mask) -> jax.Array:
    ref, transforms = borrowed.get_ref_and_transforms(ref, idx, f"atomic_{operation}")
    val = _given(operation, ref, transforms, val)
    if mask is not None:
        mask = jnp.broadcast_to(mask, val.shape)
    operands, tree = jax.tree.flatten((ref, transforms, val, mask))
    return atomic_rmw_p.bind(*operands, args_tree=tree, atomic_type=operation)


def _given(operation: Atomic, ref, transforms, x: ArrayLike) -> jax.Array:
    """`x` in the shape and type of what it meets."""
    aval: Any = borrowed.transform_type(transforms, jax.typeof(ref))
    if aval.dtype.name not in ATOMIC_TYPES[operation]:
        raise TypeError(
            f"atomic_{operation}: the hardware has none for {aval.dtype}, only for "
            f"{', '.join(ATOMIC_TYPES[operation])}. Use a ref of one of these."
        )
    x = jnp.asarray(x, aval.dtype) if isinstance(x, (bool, int, float)) else jnp.asarray(x)
    if x.dtype != aval.dtype:
        raise TypeError(f"atomic_{operation}: a value of type {x.dtype} for a ref of {aval.dtype}. Convert the value.")
    return jnp.broadcast_to(x, aval.shape)


# Named and parameterised like JAX's, since the same rules write them in Triton.
atomic_rmw_p = Primitive("atomic_rmw")
atomic_cas_p = Primitive("atomic_cas")
_EFFECTS = {borrowed.ReadEffect(0), borrowed.WriteEffect(0)}


@atomic_rmw_p.def_effectful_abstract_eval
def _atomic_rmw_type(*operands, args_tree, atomic_type):
    *_, val, _ = args_tree.unflatten(operands)
    return val, _EFFECTS


@atomic_cas_p.def_effectful_abstract_eval
def _atomic_cas_type(ref, cmp, val, *_, tree):
    return val, _EFFECTS


@borrowed.register_discharge_rule(atomic_rmw_p)
def _interpret_rmw(ctx, *operands, args_tree, atomic_type):
    contents, transforms, val, mask = args_tree.unflatten(operands)
    keep = jnp.ones(val.shape, bool) if mask is None else mask

    def update(old, val, keep):
        return jnp.where(keep, _COMBINED[atomic_type](old, val), old)

    contents, old = _one_by_one(update, contents, transforms, val, keep)
    return (contents, *[None] * (len(operands) - 1)), old


@borrowed.register_discharge_rule(atomic_cas_p)
def _interpret_cas(ctx, contents, cmp, val, *indices, tree):
    def update(old, cmp, val):
        return jnp.where(old == cmp, val, old)

    contents, old = _one_by_one(update, contents, tree.unflatten(indices), cmp, val)
    return (contents, *[None] * (2 + len(indices))), old


def _one_by_one(update: Callable, contents, transforms: Sequence, *operands):
    """`contents` after `update(old, *operands)` of the elements that `transforms` select, and what these held.

    Where index arrays may name an element twice, lane after lane.
    """
    numbers = jnp.arange(math.prod(contents.shape), dtype=jnp.int32).reshape(contents.shape)
    places = borrowed.transform_array(numbers, transforms)

    def step(flat, lane):
        place, *operands = lane
        old = flat[place]
        return flat.at[place].set(update(old, *operands)), old

    lanes = [x.reshape(-1) for x in (places, *operands)]
    if any(np.ndim(index) for transform in transforms for index in getattr(transform, "indices", ())):
        flat, old = jax.lax.scan(step, contents.reshape(-1), lanes)
    else:
        flat, old = step(contents.reshape(-1), lanes)
    return flat.reshape(contents.shape), old.reshape(places.shape)


# The machine's own instructions


def approx_tanh(x: jax.Array) -> jax.Array:
    """The hyperbolic tangent in one instruction, to about 11 bits (`tanh.approx` in PTX); exact off the GPU.

    Raises:
      TypeError: not float32, float16 or bfloat16.

    Example:
      >>> print(approx_tanh(jnp.float32(0)))
      0.0
    """
    if x.dtype.name not in TANH_CONSTRAINTS:
        raise TypeError(f"approx_tanh: one of {', '.join(TANH_CONSTRAINTS)} is needed, not {x.dtype}. Convert it.")
    return approx_tanh_p.bind(x)


# How assembly names the type, and its registers.
TANH_CONSTRAINTS = {"float32": ("f32", "f"), "float16": ("f16", "h"), "bfloat16": ("bf16", "h")}


def approx_exp2(x: jax.Array) -> jax.Array:
    """2 to the power of x in one instruction, to about 22 bits (`ex2.approx.ftz` in PTX); exact off the GPU.

    What would be less than 2⁻¹²⁶ is 0: `jnp.exp2` keeps such numbers, by three instructions more. It can be
    differentiated.

    Raises:
      TypeError: not float32.

    Example:
      >>> print(approx_exp2(jnp.float32(3)))
      8.0
    """
    if x.dtype != jnp.float32:
        raise TypeError(f"approx_exp2: float32 is needed, not {x.dtype}. Convert it.")
    return approx_exp2_p.bind(x)


def _instruction(name: str, meaning: Callable[[jax.Array], jax.Array]) -> Primitive:
    """What has a meaning wherever there is no such instruction."""
    primitive = Primitive(name)
    primitive.def_abstract_eval(lambda x: x)
    primitive.def_impl(meaning)
    batching.defvectorized(primitive)
    mlir.register_lowering(primitive, mlir.lower_fun(meaning, multiple_results=False))
    return primitive


approx_tanh_p = _instruction("approx_tanh", jnp.tanh)
approx_exp2_p = _instruction("approx_exp2", jnp.exp2)
ad.defjvp2(approx_exp2_p, lambda tangent, result, _: math.log(2) * result * tangent)


def joint_sums(terms: Sequence[jax.Array], axis: int) -> list[jax.Array]:
    """`jnp.sum` of arrays of one shape over an axis; on the GPU they share the exchanges between threads.

    Example:
      >>> print(*joint_sums([jnp.arange(4), jnp.ones(4)], axis=0))
      6 4.0
    """
    return joint_sums_p.bind(*terms, axis=axis)


def _separate_sums(*terms, axis):
    return [jnp.sum(term, axis=axis, dtype=term.dtype) for term in terms]


joint_sums_p = Primitive("joint_sums")
joint_sums_p.multiple_results = True
joint_sums_p.def_impl(_separate_sums)
mlir.register_lowering(joint_sums_p, mlir.lower_fun(_separate_sums))


@joint_sums_p.def_abstract_eval
def _joint_sums_types(*terms, axis):
    return [t.update(shape=(*t.shape[:axis], *t.shape[axis + 1 :])) for t in terms]


def elementwise_inline_asm(
    asm: str,
    *,
    args: Sequence[jax.Array],
    constraints: str,
    pack: int,
    result_shape_dtypes: Sequence[jax.ShapeDtypeStruct],
) -> Sequence[jax.Array]:
    """PTX for each element, or for each `pack` of them. It has no meaning off the GPU, nor in an interpreter.

    Args:
      asm: the code; `$0`, `$1`, ... are results, then arguments.
      args: arrays of one shape.
      constraints: of LLVM's inline assembly: `"=r,r"` for a 32-bit result and argument.
      pack: elements that one instance of the code takes from each argument; several share a 32-bit register.
      result_shape_dtypes: of the results.

    Example:
      >>> def count_bits(x):
      ...     [bits] = elementwise_inline_asm(
      ...         "popc.b32 $0, $1;", args=[x], constraints="=r,r", pack=1, result_shape_dtypes=[jax.typeof(x)])
      ...     return bits
      >>> jax.eval_shape(count_bits, jnp.ones(8, jnp.uint32)).dtype
      dtype('uint32')
    """
    if len({x.shape for x in args}) > 1:
        raise ValueError(f"elementwise_inline_asm: arguments have one shape; these have {[x.shape for x in args]}.")
    results = tuple(jax.ShapeDtypeStruct(r.shape, r.dtype) for r in result_shape_dtypes)
    return elementwise_inline_asm_p.bind(
        *args, asm=asm, constraints=constraints, pack=pack, result_shape_dtypes=results
    )


elementwise_inline_asm_p = Primitive("elementwise_inline_asm")
elementwise_inline_asm_p.multiple_results = True


@elementwise_inline_asm_p.def_abstract_eval
def _elementwise_inline_asm_types(*_, result_shape_dtypes, **__):
    return [borrowed.make_aval(r.shape, r.dtype, like=(), spec=None) for r in result_shape_dtypes]


def max_contiguous(x: jax.Array, values: int | Sequence[int]) -> jax.Array:
    """`x`, of which the compiler may believe that along each axis so many elements in a row count up by one.

    Example:
      >>> print(max_contiguous(jnp.arange(8), 8))
      [0 1 2 3 4 5 6 7]
    """
    return max_contiguous_p.bind(x, values=(values,) if isinstance(values, int) else tuple(values))


max_contiguous_p = Primitive("max_contiguous")
max_contiguous_p.def_abstract_eval(lambda x, values: x)
max_contiguous_p.def_impl(lambda x, values: x)
mlir.register_lowering(max_contiguous_p, lambda _, x, values: [x])


def debug_barrier() -> None:
    """Waits until all threads of the program are here. Triton puts barriers where they are needed by itself.

    Example:
      >>> from jax.experimental import pallas as pl
      >>> def kernel(x_ref, y_ref):
      ...     y_ref[...] = x_ref[...]
      ...     debug_barrier()
      >>> x = jnp.arange(4)
      >>> print(pl.pallas_call(kernel, out_shape=x, interpret=True)(x))
      [0 1 2 3]
    """
    debug_barrier_p.bind()


debug_barrier_p = Primitive("debug_barrier")
debug_barrier_p.multiple_results = True
debug_barrier_p.def_effectful_abstract_eval(lambda: ([], {borrowed.kernel_effect}))
mlir.register_lowering(debug_barrier_p, lambda _: [])
