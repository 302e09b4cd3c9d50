"""jtile: tile kernels as first-class JAX operations."""

from jtile import losses, testing, tuning
from jtile.compiler.interpret import interpret_pallas
from jtile.compiler.launch import EXPORT_CHECKS
from jtile.compiler.pallas import retarget_pallas
from jtile.compiler.params import CompilerParams
from jtile.compiler.primitives import (
    approx_exp2,
    approx_tanh,
    atomic_add,
    atomic_and,
    atomic_cas,
    atomic_max,
    atomic_min,
    atomic_or,
    atomic_xchg,
    atomic_xor,
    debug_barrier,
    dot,
    elementwise_inline_asm,
    load,
    max_contiguous,
    store,
)
from jtile.compiler.triton_call import triton_call
from jtile.debugger import debug
from jtile.op import TileOp
from jtile.ops.attention import BlockMask, create_block_mask, dot_product_attention, flex_attention
from jtile.ops.dropout import dropout
from jtile.ops.gated_activation import gated_activation
from jtile.ops.linear_cross_entropy import linear_cross_entropy
from jtile.ops.norm import gated_rms_norm, group_norm, layer_norm, rms_norm
from jtile.ops.qk_norm_rope import qk_norm_rope
from jtile.ops.rope import rope
from jtile.ops.softmax import log_softmax, softmax
from jtile.ops.softmax_cross_entropy import softmax_cross_entropy
from jtile.report import explain, inspect
from jtile.tuning.search import autotune

__all__ = [
    "EXPORT_CHECKS",
    "BlockMask",
    "CompilerParams",
    "TileOp",
    "approx_exp2",
    "approx_tanh",
    "atomic_add",
    "atomic_and",
    "atomic_cas",
    "atomic_max",
    "atomic_min",
    "atomic_or",
    "atomic_xchg",
    "atomic_xor",
    "autotune",
    "create_block_mask",
    "debug",
    "debug_barrier",
    "dot",
    "dot_product_attention",
    "dropout",
    "elementwise_inline_asm",
    "explain",
    "flex_attention",
    "gated_activation",
    "gated_rms_norm",
    "group_norm",
    "inspect",
    "interpret_pallas",
    "layer_norm",
    "linear_cross_entropy",
    "load",
    "log_softmax",
    "losses",
    "max_contiguous",
    "qk_norm_rope",
    "retarget_pallas",
    "rms_norm",
    "rope",
    "softmax",
    "softmax_cross_entropy",
    "store",
    "testing",
    "triton_call",
    "tuning",
]
