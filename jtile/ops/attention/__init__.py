"""Attention: softmax(scale · query keyᵀ) value, a block of keys at a time. No array of sequence x sequence exists.

`plain.py` is attention with a scale and a causal mask, whose schedules are the fastest (`kernels.py`, `hopper`).
`features` is attention with everything else, in any combination, by one schedule; its public functions are these.
"""

from jtile.ops.attention.features.dot_product import dot_product_attention
from jtile.ops.attention.features.flex import BlockMask, create_block_mask, flex_attention

__all__ = ["BlockMask", "create_block_mask", "dot_product_attention", "flex_attention"]
