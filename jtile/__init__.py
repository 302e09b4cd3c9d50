"""jtile: tile kernels as first-class JAX operations."""

from jtile.op import TileOp
from jtile.ops.rms_norm import rms_norm

__all__ = ["TileOp", "rms_norm"]
