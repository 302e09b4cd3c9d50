"""Attention: softmax(scale · query keyᵀ) value, a block of keys at a time. No array of sequence x sequence exists.

The method is FlashAttention-2 (Dao, 2023, arXiv:2307.08691, section 3.1): its Algorithm 1 forward, its Algorithm 2
backward. The backward pass walks over the scores twice, by blocks of keys for dkey and dvalue and by blocks of queries
for dquery, so that each gradient is summed in one place and one order: no atomics, the same bits on every run.

`reference.py` is the meaning, `kernels.py` the method, `tiles.py` the sizes of its blocks.
"""

import jax.numpy as jnp

from jtile.op import TileOp
from jtile.ops.attention import kernels, reference, tiles

WIDEST = 256  # head dim

# Spec. Query heads come in k groups of g, one group for each key head. `origin` is the query beside key 0, and is
# there where the mask is causal: it tells a device with a part of the queries where its part begins.

forward = TileOp(
    "dot_product_attention",
    "query: ... s (k g) d, key: ... t k d, value: ... t k e, origin[s]?: -> out: ... s (k g) e, lse: ... s (k g)",
    whole="t d e",
)
backward = TileOp(
    "dot_product_attention_backward",
    "query: ... s (k g) d, key: ... t k d, value: ... t k e, origin[s]?:, "
    "out: ... s (k g) e, lse: ... s (k g), dout: ... s (k g) e, dlse?: ... s (k g) "
    "-> dquery: ... s (k g) d, dkey: ... t k d, dvalue: ... t k e",
    whole="t d e",
)

forward.reference(reference.forward)
forward.tiles(tiles.forward_tiles)
forward.kernel(kernels.forward)
backward.reference(reference.backward)
backward.tiles(tiles.backward_tiles)
backward.kernel(kernels.backward)


@forward.limits
def forward_limits(query, key, value, origin, *, scale):
    for name, size in ("head_dim", query.shape[-1]), ("value_dim", value.shape[-1]):
        if not 16 <= size <= WIDEST:
            return f"{name} is {size}, and its kernels take 16 to {WIDEST}"
    if abs(scale) < 1e-20:
        return f"scale is {scale}, and its kernels divide by it"
    return None


@backward.limits
def backward_limits(query, key, value, origin, out, lse, dout, dlse, **options):
    return forward_limits(query, key, value, origin, **options)


# Derivative.


@forward.transpose
def forward_transpose(operands, results, cotangents, **options):
    return *backward(*operands, *results, *cotangents, **options), None


def attention(query, key, value, *, scale: float, is_causal: bool, axis_name, implementation):
    """Output and log-sum-exp of operands that are checked."""
    return forward(
        query,
        key,
        value,
        jnp.int32(0) if is_causal else None,
        scale=scale,
        split={} if axis_name is None else {"s": axis_name},
        implementation=implementation,
    )
