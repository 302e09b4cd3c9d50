"""jtile: tile kernels as first-class JAX operations."""

from jtile.op import TileOp
from jtile.ops.gated_activation import gated_activation
from jtile.ops.rms_norm import rms_norm
from jtile.ops.rope import rope
from jtile.ops.softmax_cross_entropy import softmax_cross_entropy

__all__ = ["TileOp", "gated_activation", "rms_norm", "rope", "softmax_cross_entropy"]
