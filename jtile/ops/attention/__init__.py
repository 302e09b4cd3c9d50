"""Attention: softmax(scale · query keyᵀ) value, a block of keys at a time. No array of sequence x sequence exists.

A call is lowered to a `Variant`: an elementwise function of scores, a predicate of what is visible, and the blocks that
are visited; what it leaves out is in no kernel. The method is FlashAttention-2 (Dao, 2023, arXiv:2307.08691, section
3.1): its Algorithm 1 forward, its Algorithm 2 backward. The backward pass walks over the scores twice, by blocks of
keys for dkey and dvalue and by blocks of queries for dquery, so that each gradient is summed in one place and one
order: no atomics, the same bits on every run.

`dot_product.py` and `flex.py` are the public functions, `op.py` makes tile ops of them. `variant.py` says what varies,
`visits.py` which blocks are visited, `mods.py` how users' functions get into kernels; `reference.py` is the meaning,
`kernels.py` and `gradients.py` the method, `tiles.py` the sizes of blocks. On Hopper `hopper` does in its own schedule
what it serves.
"""

from jtile.ops.attention.dot_product import dot_product_attention
from jtile.ops.attention.flex import BlockMask, create_block_mask, flex_attention

__all__ = ["BlockMask", "create_block_mask", "dot_product_attention", "flex_attention"]
