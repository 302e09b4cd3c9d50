from jtile.op.primitive import Implementation, TileOp, check_known

__all__ = ["Implementation", "TileOp", "check_known"]
