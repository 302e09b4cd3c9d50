"""Which keys a query sees, and so which blocks visit each other.

Query i sees keys i + low to i + high, where there are such; `None` is no bound. Causal attention has high = 0, a window
of w keys to the left low = -w. Blocks visit each other where some of their positions do, past the ends of arrays too,
so that both directions agree.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def visible(rows, cols, S: gl.constexpr):
    seen = cols < S.keys
    if S.low is not None:
        seen = seen & (cols >= rows + S.low)
    if S.high is not None:
        seen = seen & (cols <= rows + S.high)
    return seen


@gluon.jit
def first_key_block(i, S: gl.constexpr):
    """The first block of keys that block i of queries visits."""
    if S.low is None:
        return 0
    else:
        return gl.maximum(i * S.block_q + S.low, 0) // S.block_k


@gluon.jit
def key_blocks(i, S: gl.constexpr):
    """The blocks of keys that block i of queries visits, [start, stop), at least one, and those of them that all of its
    queries see whole, [whole_start, whole_stop)."""
    row = i * S.block_q
    start = gl.minimum(first_key_block(i, S), S.key_blocks - 1)
    stop = S.key_blocks
    whole_start = start
    whole_stop = S.keys // S.block_k
    if S.low is not None:
        whole_start = gl.maximum(row + S.block_q + S.low + S.block_k - 2, 0) // S.block_k
    if S.high is not None:
        stop = gl.minimum(stop, gl.maximum(row + S.block_q + S.high + S.block_k - 1, 0) // S.block_k)
        whole_stop = gl.minimum(whole_stop, gl.maximum(row + S.high + 1, 0) // S.block_k)
    return start, whole_start, whole_stop, gl.maximum(stop, start + 1)


@gluon.jit
def query_blocks(j, S: gl.constexpr):
    """The blocks of queries that visit block j of keys, [start, stop), and those whose queries all see it whole,
    [whole_start, whole_stop)."""
    col = j * S.block_k
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
    whole_stop = gl.where(col + S.block_k > S.keys, 0, whole_stop)
    return start, whole_start, whole_stop, gl.maximum(stop, start)
