from jtile.op.primitive import Implementation, TileOp

__all__ = ["Implementation", "TileOp"]
