"""Normalisation: of rows (RMSNorm, LayerNorm, and RMSNorm with a gate), and of groups of channels."""

from jtile.ops.norm.gated_rms_norm import gated_rms_norm
from jtile.ops.norm.group_norm import group_norm
from jtile.ops.norm.layer_norm import layer_norm
from jtile.ops.norm.rms_norm import rms_norm

__all__ = ["gated_rms_norm", "group_norm", "layer_norm", "rms_norm"]
