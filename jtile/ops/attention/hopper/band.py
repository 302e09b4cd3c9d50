"""Which keys a query sees, and so which blocks visit each other.

Query i stands at position i + origin among the keys, and sees keys from position + low to position + high, where there
are such; `None` is no bound. Causal attention has high = 0, a window of w keys to the left low = -w. Blocks visit each
other where some of their positions do, past the ends of arrays too, so that both directions agree.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _ordered(x, a, b):
    """`x` where a <= b, and -inf elsewhere. In assembly it stays two instructions for an element: compilers make the
    comparisons of a block early, and pack and unpack their results. Nor do they take it out of a branch."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred yes; setp.le.s32 yes, $2, $3; selp.f32 $0, $1, 0fFF800000, yes; }",
        "=f,f,r,r",
        [x, a, b],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def banded(s, positions, cols, S: gl.constexpr):
    """Scores, by queries and keys, and -inf where a query does not see a key."""
    last = S.keys - 1
    if S.high is not None:
        last = gl.minimum(positions + S.high, last)
    s = _ordered(s, cols, last)
    if S.low is not None:
        s = _ordered(s, positions + S.low, cols)
    return s


@gluon.jit
def banded_by_keys(s, positions, cols, S: gl.constexpr):
    """As `banded`, of scores by keys and queries."""
    if S.high is not None:
        s = _ordered(s, gl.where(cols < S.keys, cols - S.high, 2147483647), positions)
    elif S.keys % S.block_k:
        s = _ordered(s, cols, S.keys - 1)
    if S.low is not None:
        s = _ordered(s, positions, cols - S.low)
    return s


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
    if S.masks_anywhere:
        whole_stop = whole_start
    return start, whole_start, whole_stop, gl.maximum(stop, start + 1)


@gluon.jit
def listed(i, b, h, visits, S: gl.constexpr):
    """Of a block of queries the row of lists, how many blocks in it all queries see whole, and how many it has."""
    row = b * S.lists.batch + h * S.lists.head + i // S.lists.rows
    return row, gl.load(visits[0] + row * 2) * S.lists.columns, gl.load(visits[0] + row * 2 + 1) * S.lists.columns


@gluon.jit
def visited(i, b, h, origin, visits, S: gl.constexpr):
    """As `key_blocks`, of one batch and head; where operands tell, it is read. And the list, if there is one, which has
    the blocks that all queries see whole first."""
    if S.lists is not None:
        row, whole_stop, stop = listed(i, b, h, visits, S)
        return 0, 0, whole_stop, gl.maximum(stop, 1), visits[1] + row * S.lists.length
    elif S.ranges is not None:
        at = visits[0] + (b * S.ranges + i) * 4
        start = gl.minimum(gl.load(at), S.key_blocks - 1)
        return start, gl.load(at + 1), gl.load(at + 2), gl.maximum(gl.load(at + 3), start + 1), None
    else:
        start, whole_start, whole_stop, stop = key_blocks(i, origin, S)
        return start, whole_start, whole_stop, stop, None


@gluon.jit
def key_block(n, blocks, S: gl.constexpr):
    """The number of the n-th block of keys that is visited."""
    if S.lists is not None:
        n = gl.load(blocks + n // S.lists.columns) * S.lists.columns + n % S.lists.columns
    return n


@gluon.jit
def place(S: gl.constexpr):
    """The block of keys, the batch and the head of a program. So many heads are worked on together as have room in the
    cache; of these the first blocks go first."""
    number = gl.program_id(0)
    before = number // (S.together * S.key_blocks) * S.together
    together = gl.minimum(S.together, S.batch * S.key_heads - before)
    number -= before * S.key_blocks
    head = before + number % together
    return number // together, head // S.key_heads, head % S.key_heads


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
    if S.masks_anywhere:
        whole_stop = 0
    return start, whole_start, whole_stop, gl.maximum(stop, start)


@gluon.jit
def visiting(j, b, kh, origin, visits, S: gl.constexpr):
    """As `query_blocks`, of one batch and key head; where operands tell, it is read. And the list, if there is one."""
    if S.lists is not None:
        row = b * S.lists.batch + kh * S.lists.head + j // S.lists.columns
        return 0, 0, 0, gl.load(visits[0] + row) * S.lists.rows, visits[1] + row * S.lists.length
    elif S.ranges is not None:
        at = visits[0] + (b * S.ranges + j) * 4
        start = gl.load(at)
        return start, gl.load(at + 1), gl.load(at + 2), gl.maximum(gl.load(at + 3), start), None
    else:
        start, whole_start, whole_stop, stop = query_blocks(j, origin, S)
        return start, whole_start, whole_stop, stop, None


@gluon.jit
def query_block(n, whole_start, whole_stop, blocks, S: gl.constexpr):
    """The number of the n-th block of queries that visits, and whether some query does not see some key."""
    if S.lists is not None:
        entry = gl.load(blocks + n // S.lists.rows)
        return entry // 2 * S.lists.rows + n % S.lists.rows, entry % 2 == 1
    else:
        return n, (n < whole_start) | (n >= whole_stop)


@gluon.jit
def turn(i, j, b, kh, origin, numbers, S: gl.constexpr):
    """How many blocks of keys before block j block i of queries visits."""
    if S.numbers is None:
        return j - first_key_block(i, origin, S)
    else:
        at = (b * S.numbers[0] + kh * S.numbers[1]) * S.key_blocks + j
        return gl.load(numbers + at * S.query_blocks + i)


@gluon.jit
def step_back(at, h, start, stop):
    """From a visit to the next one: of the blocks of queries the last comes first, and so for each head, from the one
    before the first."""
    h += gl.where(at == start, 1, 0)
    at = gl.where(at == start, stop, at) - 1
    return at, h
