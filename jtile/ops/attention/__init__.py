"""Attention: softmax(scale · query keyᵀ) value, a block of keys at a time. No array of sequence x sequence exists.

The method is FlashAttention-2 (Dao, 2023, arXiv:2307.08691, section 3.1): its Algorithm 1 forward, its Algorithm 2
backward. The backward pass walks over the scores twice, by blocks of keys for dkey and dvalue and by blocks of queries
for dquery, so that each gradient is summed in one place and one order: no atomics, the same bits on every run.

`reference.py` is the meaning, `kernels.py` the method, `tiles.py` the sizes of its blocks.
"""

import math
from typing import Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jtile.op import Implementation, TileOp, check_known
from jtile.ops.attention import kernels, reference

# Spec. Query heads come in k groups of g, one group for each key head.

forward = TileOp(
    "dot_product_attention",
    "query: ... s (k g) d, key: ... t k d, value: ... t k e -> out: ... s (k g) e, lse: ... s (k g)",
    whole="s t d e",
)
backward = TileOp(
    "dot_product_attention_backward",
    "query: ... s (k g) d, key: ... t k d, value: ... t k e, "
    "out: ... s (k g) e, lse: ... s (k g), dout: ... s (k g) e, dlse?: ... s (k g) "
    "-> dquery: ... s (k g) d, dkey: ... t k d, dvalue: ... t k e",
    whole="s t d e",
)

forward.reference(reference.forward)
forward.kernel(kernels.forward)
backward.reference(reference.backward)
backward.kernel(kernels.backward)


@forward.limits
def forward_limits(query, key, value, *, scale, is_causal):
    for name, size in ("head_dim", query.shape[-1]), ("value_dim", value.shape[-1]):
        if not 16 <= size <= 256:
            return f"{name} is {size}, and its kernels take 16 to 256"
    if abs(scale) < 1e-20:
        return f"scale is {scale}, and its kernels divide by it"
    return None


@backward.limits
def backward_limits(query, key, value, out, lse, dout, dlse, **options):
    return forward_limits(query, key, value, **options)


# Derivative.


@forward.transpose
def forward_transpose(operands, results, cotangents, **options):
    return backward(*operands, *results, *cotangents, **options)


# Public name.


@overload
def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    return_lse: Literal[False] = False,
    implementation: Implementation = None,
) -> Array: ...


@overload
def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    return_lse: Literal[True],
    implementation: Implementation = None,
) -> tuple[Array, Array]: ...


def dot_product_attention(
    query: Float[Array, "*batch queries heads head_dim"],
    key: Float[Array, "*batch keys key_heads head_dim"],
    value: Float[Array, "*batch keys key_heads value_dim"],
    *,
    scale: float | None = None,
    is_causal: bool = False,
    return_lse: bool = False,
    implementation: Implementation = None,
) -> (
    Float[Array, "*batch queries heads value_dim"]
    | tuple[Float[Array, "*batch queries heads value_dim"], Float[Array, "*batch queries heads"]]
):
    """Scaled dot-product attention, softmax(scale · query keyᵀ) value, as `jax.nn.dot_product_attention` has it.

    Memory grows with the sequence, not with its square. Scores, softmax and all sums are float32. Float32 operands are
    multiplied in float32 (not TF32); with 16-bit operands the softmax's weights are rounded to their dtype before they
    meet `value`, and their gradients before they meet `query` and `key`. The kernels serve head dims 16 to 256, powers
    of two or not.

    Args:
        query: any leading shape, none included, then queries, heads and head dim.
        key: the same leading shape, keys, key heads and head dim. The number of key heads divides that of heads: query
            head h attends to key head h // (heads // key_heads). Fewer key heads than heads is grouped-query attention
            (Ainslie et al., 2023, arXiv:2305.13245), one is multi-query attention (Shazeer, 2019, arXiv:1911.02150).
        value: like `key`; its head dim may differ.
        scale: factor of the scores, a number known when tracing; by default 1 / √head_dim.
        is_causal: query i attends to keys 0 to i and no others. Positions count from the start of each sequence even
            where lengths differ, as in `jax.nn.dot_product_attention`, which masks by `jnp.tril`.
        return_lse: also return the logarithm of the sum over keys of exp(score).
        implementation: `None`, `"triton"`, `"xla"` or `"interpret"`, see `jtile.TileOp`.

    Returns:
        The output in the dtype of `query`, or with `return_lse` the pair of it and the float32 log-sum-exp (float64 for
        float64 operands), which is differentiable too. Where there are no keys at all these are 0 and -inf.

    Raises:
        ValueError: shapes do not match, dtypes differ or are not floating point, or `scale` is traced or not finite.
        NotImplementedError: the named implementation cannot serve the call.

    Source: Dao, FlashAttention-2, 2023, arXiv:2307.08691, section 3.1.

    Example:
        >>> import jax
        >>> import jtile
        >>> query = jax.random.normal(jax.random.key(0), (2, 128, 8, 64))
        >>> key = value = jax.random.normal(jax.random.key(1), (2, 128, 2, 64))
        >>> jtile.dot_product_attention(query, key, value, is_causal=True).shape
        (2, 128, 8, 64)
    """
    check_known("dot_product_attention", is_causal=is_causal, return_lse=return_lse)
    query, key, value = map(jnp.asarray, (query, key, value))
    sizes, _ = forward.signature.check(forward.name, [query.shape, key.shape, value.shape])
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            "dot_product_attention: `query`, `key` and `value` must have one dtype, "
            f"got {query.dtype}, {key.dtype} and {value.dtype}; cast them to the one to compute in"
        )
    if not jnp.issubdtype(query.dtype, jnp.floating):
        raise ValueError(f"dot_product_attention: operands must be floating point, got {query.dtype}; cast them")
    if isinstance(scale, jax.core.Tracer):
        raise ValueError(
            "dot_product_attention: `scale` must be a number known when tracing, got a traced array; "
            "multiply `query` by it and pass scale=1.0"
        )
    scale = max(1, sizes["d"]) ** -0.5 if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"dot_product_attention: `scale` must be finite, got {scale}")
    out, lse = forward(query, key, value, scale=scale, is_causal=bool(is_causal), implementation=implementation)
    return (out, lse) if return_lse else out
