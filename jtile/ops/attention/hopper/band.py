"""Which keys a query sees, and so which blocks visit each other.

Query i stands at position i + origin among the keys, and sees keys from position + low to position + high, where there
are such; `None` is no bound. Causal attention has high = 0, a window of w keys to the left low = -w. Blocks visit each
other where some of their positions do, past the ends of arrays too, so that both directions agree.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def visible(positions, cols, S: gl.constexpr):
    seen = cols < S.keys
    if S.low is not None:
        seen = seen & (cols >= positions + S.low)
    if S.high is not None:
        seen = seen & (cols <= positions + S.high)
    return seen


@gluon.jit
def first_key_block(i, origin, S: gl.constexpr):
    """The first block of keys that block i of queries visits."""
    if S.low is None:
        return 0
    else:
        return gl.maximum(i * S.block_q + origin + S.low, 0) // S.block_k


@gluon.jit
def key_blocks(i, origin, S: gl.constexpr):
    """The blocks of keys that block i of queries visits, [start, stop), at least one, and those of them that all of its
    queries see whole, [whole_start, whole_stop)."""
    position = i * S.block_q + origin
    start = gl.minimum(first_key_block(i, origin, S), S.key_blocks - 1)
    stop = S.key_blocks
    whole_start = start
    whole_stop = S.keys // S.block_k
    if S.low is not None:
        whole_start = gl.maximum(position + S.block_q + S.low + S.block_k - 2, 0) // S.block_k
    if S.high is not None:
        stop = gl.minimum(stop, gl.maximum(position + S.block_q + S.high + S.block_k - 1, 0) // S.block_k)
        whole_stop = gl.minimum(whole_stop, gl.maximum(position + S.high + 1, 0) // S.block_k)
    return start, whole_start, whole_stop, gl.maximum(stop, start + 1)


@gluon.jit
def query_blocks(j, origin, S: gl.constexpr):
    """The blocks of queries that visit block j of keys, [start, stop), and those whose queries all see it whole,
    [whole_start, whole_stop)."""
    col = j * S.block_k - origin  # as the queries count
    start = 0
    stop = S.query_blocks
    whole_start = 0
    whole_stop = S.query_blocks
    if S.high is not None:
        start = gl.minimum(gl.maximum(col - S.high, 0) // S.block_q, stop)
        whole_start = gl.maximum(col + S.block_k + S.block_q - 2 - S.high, 0) // S.block_q
    if S.low is not None:
        stop = gl.minimum(stop, gl.maximum(col + S.block_k - 1 - S.low + S.block_q, 0) // S.block_q)
        whole_stop = gl.maximum(col - S.low + 1, 0) // S.block_q
    whole_stop = gl.where((j + 1) * S.block_k > S.keys, 0, whole_stop)
    return start, whole_start, whole_stop, gl.maximum(stop, start)
