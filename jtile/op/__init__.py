from jtile.op.primitive import Implementation, TileOp, check_known
from jtile.op.sharding import over_devices

__all__ = ["Implementation", "TileOp", "check_known", "over_devices"]
