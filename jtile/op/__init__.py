from jtile.op.primitive import TileOp

__all__ = ["TileOp"]
