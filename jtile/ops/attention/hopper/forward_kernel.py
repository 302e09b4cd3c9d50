"""Attention forward: FlashAttention-3's schedule (Shah et al., 2024, arXiv:2407.08608, section 3).

One warp loads. Two or three groups of four warps compute, each on 64 queries. While the tensor cores multiply for a
group, it works on the softmax of another block of keys: the scores of a block and the output of the block before are
under way together, and the weights are made while the latter still is. That groups take turns in sending off products,
as they do there, gained nothing here: see `bench/results/attention.md`.

A program goes on to another place in the order of work, if there are fewer programs than places: the next block's
queries and first keys are then loaded while the one before is finished.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from jtile.ops.attention.hopper.band import banded, key_block, listed, visited
from jtile.ops.attention.hopper.pipeline import flag, matrix, places, ring


@gluon.jit
def _tile(number, S: gl.constexpr):
    """The block of queries, the batch and the head of a place in the order of work. So many heads are worked on
    together as have room for their keys and values in the cache; of these the last blocks go first, which under a
    causal mask are the longest."""
    before = number // (S.together * S.query_blocks) * S.together
    together = gl.minimum(S.together, S.batch * S.heads - before)
    number -= before * S.query_blocks
    block = S.query_blocks - 1 - number // together
    head = before + number % together
    return block, head // S.heads, head % S.heads


@gluon.jit
def _load_block(number, n, step, q_desc, k_desc, v_desc, q, k, v, origin, visits, S: gl.constexpr):
    block, b, h = _tile(number, S)
    start, _, _, stop, blocks = visited(block, b, h, origin, visits, S)
    groups: gl.constexpr = S.groups
    for group in gl.static_range(groups):
        q.load(n * groups + group, q_desc, [b, h, block * S.block_q + group * 64, 0])
    for i in range(start, stop):
        place = [b, h // S.group, key_block(start + stop - 1 - i, blocks, S) * S.block_k, 0]
        k.load(step, k_desc, place)
        v.load(step, v_desc, place)
        step += 1
    return step


@gluon.jit
def _load(q_desc, k_desc, v_desc, q, k, v, order, origin, visits, S: gl.constexpr):
    n = 0
    step = 0
    number = order.claim(n, True)
    if S.loops:
        while number < S.blocks:
            step = _load_block(number, n, step, q_desc, k_desc, v_desc, q, k, v, origin, visits, S)
            n += 1
            number = order.claim(n)
    else:
        _load_block(number, n, step, q_desc, k_desc, v_desc, q, k, v, origin, visits, S)


@gluon.jit
def _scores(s, j, positions, cols, rows, columns, arrays, masked: gl.constexpr, S: gl.constexpr):
    """Scores of the products with block j of keys, -inf where a query does not see a key."""
    keys = j * S.block_k + cols
    if S.functions is not None:
        if S.functions.modifies:
            s = S.functions.score(s, keys, rows, columns, arrays)
    if masked:
        if S.functions is not None:
            if S.functions.masks:
                s = gl.where(S.functions.visible(keys, rows, columns, arrays), s, -float("inf"))
        s = banded(s, positions[:, None], keys[None, :], S)
    return s


@gluon.jit
def _softmax(s, peak, total, S: gl.constexpr):
    """Of a block of scores the weights, relative to the rows' largest scores so far; these and the sums of weights so
    far; and the factor by which what was summed before shrinks."""
    new_peak = gl.maximum(peak, gl.max(s, 1) * S.slope)
    p = gl.exp2(s * S.slope - new_peak[:, None])
    shrink = gl.exp2(peak - new_peak)
    return p, new_peak, total * shrink + gl.sum(p, 1), shrink


@gluon.jit
def _step(
    j, step, q, k, v, positions, cols, rows, arrays, peak, total, p, o, masked: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """Sends off the scores of block j and the output of the block before, and makes the weights of j meanwhile."""
    k.wait(step)
    zeros = gl.zeros([64, S.block_k], gl.float32, positions.type.layout.parent)
    s = warpgroup_mma(q, k.block(step).permute((1, 0)), zeros, use_acc=False, is_async=True)
    v.wait(step - 1)
    o = warpgroup_mma(p, v.block(step - 1), o, is_async=True)
    columns = None
    if S.functions is not None:
        if S.functions.reads and (masked or S.functions.modifies):
            columns = S.functions.columns(j * S.block_k + cols, rows, arrays)
    s = warpgroup_mma_wait(1, deps=[s])
    k.release(step)
    s = _scores(s, j, positions, cols, rows, columns, arrays, masked, S)
    weights, peak, total, shrink = _softmax(s, peak, total, S)
    v.wait(step - 1)  # it is there: the branch in this keeps the assembler from moving the next wait before the softmax
    o = warpgroup_mma_wait(0, deps=[o])
    v.release(step - 1)
    o = o * gl.convert_layout(shrink, gl.SliceLayout(1, o.type.layout))[:, None]
    return peak, total, gl.convert_layout(weights.to(p.dtype), p.type.layout), o


@gluon.jit
def _compute_block(
    number, n, step, results, q_ring, k, v, o_shared, origin, visits, arrays, group: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    o_desc, lse_ptr, found = results
    dtype: gl.constexpr = o_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, S.block_k, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, S.value_width, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    cols = gl.arange(0, S.block_k, gl.SliceLayout(0, s_layout))
    block, b, h = _tile(number, S)
    start, whole_start, whole_stop, stop, blocks = visited(block, b, h, origin, visits, S)
    row = block * S.block_q + group * 64
    queries = row + gl.arange(0, 64, row_layout)
    positions = queries + origin
    rows = None
    if S.functions is not None:
        rows = S.functions.rows(b, h, queries, positions, arrays)

    # The last block, which has no other's products to run beside.
    j = key_block(stop - 1, blocks, S)
    columns = None
    if S.functions is not None:
        if S.functions.reads:
            columns = S.functions.columns(j * S.block_k + cols, rows, arrays)
    q_ring.wait(n * S.groups + group)
    q = q_ring.block(n * S.groups + group)
    k.wait(step)
    s = warpgroup_mma(q, k.block(step).permute((1, 0)), gl.zeros([64, S.block_k], gl.float32, s_layout), use_acc=False)
    k.release(step)
    if S.lists is None:
        s = _scores(s, j, positions, cols, rows, columns, arrays, True, S)
    else:  # where the list ends with blocks to see whole, this is one, and where it is empty, none
        _, whole, count = listed(block, b, h, visits, S)
        plain = _scores(s, j, positions, cols, rows, columns, arrays, False, S)
        s = gl.where(whole == count, plain, _scores(s, j, positions, cols, rows, columns, arrays, True, S))
        s = gl.where(count == 0, -float("inf"), s)
    # What scores stay under counts as masked; where every query sees a key in this block, its peak rises above.
    peak = gl.full([64], -1e38, gl.float32, row_layout)
    total = gl.zeros([64], gl.float32, row_layout)
    if S.sinks is not None:  # a key more, of this score and of no value
        peak = gl.full(
            [64], gl.cast(gl.load(arrays[S.sinks] + h), gl.float32) * 1.4426950408889634, gl.float32, row_layout
        )
        total += 1.0
    p, peak, total, _ = _softmax(s, peak, total, S)
    p = gl.convert_layout(p.to(dtype), p_layout)
    o = gl.zeros([64, S.value_width], gl.float32, o_layout)
    step += 1

    whole_stop = gl.minimum(whole_stop, stop - 1)
    whole_start = gl.minimum(whole_start, whole_stop)
    for i in range(whole_stop, stop - 1):
        j = key_block(whole_stop + stop - 2 - i, blocks, S)
        peak, total, p, o = _step(j, step, q, k, v, positions, cols, rows, arrays, peak, total, p, o, True, S)
        step += 1
    for i in range(whole_start, whole_stop):
        j = key_block(whole_start + whole_stop - 1 - i, blocks, S)
        peak, total, p, o = _step(j, step, q, k, v, positions, cols, rows, arrays, peak, total, p, o, False, S)
        step += 1
    if S.masks_first:
        for i in range(start, whole_start):
            j = key_block(start + whole_start - 1 - i, blocks, S)
            peak, total, p, o = _step(j, step, q, k, v, positions, cols, rows, arrays, peak, total, p, o, True, S)
            step += 1

    if not S.out_in_query:
        q_ring.release(n * S.groups + group)
    v.wait(step - 1)
    o = warpgroup_mma(p, v.block(step - 1), o)
    v.release(step - 1)
    if S.flags:
        flag(found, gl.sum(o * 0.0, 1), S)
    lse = gl.where(total == 0.0, -float("inf"), 0.6931471805599453 * (peak + gl.log2(total)))
    gl.store(lse_ptr + (b * S.queries + queries) * S.heads + h, lse, queries < S.queries)
    over_total = gl.where(total == 0.0, 0.0, 1.0 / total)
    o = o * gl.convert_layout(over_total, gl.SliceLayout(1, o_layout))[:, None]
    tma.store_wait(0)
    matrix(o_shared.index(group)).store(o.to(dtype))
    fence_async_shared()
    tma.async_store(o_desc, [b, h, row, 0], o_shared.index(group))
    if S.out_in_query:
        tma.store_wait(0)
        q_ring.release(n * S.groups + group)
    return step


@gluon.jit
def _compute(
    o_desc, lse_ptr, found, q, k, v, o_shared, order, origin, visits, arrays, group: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    n = 0
    step = 0
    number = order.take(n, True)
    results = (o_desc, lse_ptr, found)
    if S.loops:
        while number < S.blocks:
            step = _compute_block(number, n, step, results, q, k, v, o_shared, origin, visits, arrays, group, S)
            n += 1
            number = order.take(n)
    else:
        _compute_block(number, n, step, results, q, k, v, o_shared, origin, visits, arrays, group, S)
    tma.store_wait(0)


@gluon.jit
def attention(
    q_desc, k_desc, v_desc, origin_ptr, visits, lists, array_0, array_1, array_2, array_3, array_4, array_5, array_6,
    array_7, o_desc, lse_ptr, found, counter, S: gl.constexpr,
):  # fmt: skip
    origin = 0
    if origin_ptr is not None:
        origin = gl.load(origin_ptr)
    visits = (visits, lists)
    arrays = (array_0, array_1, array_2, array_3, array_4, array_5, array_6, array_7)
    q = ring(q_desc, S.groups * S.query_stages, 1)
    k = ring(k_desc, S.stages, S.groups)
    v = ring(v_desc, S.stages, S.groups)
    order = places(counter, 4 * S.groups, S)
    o_shared = q.blocks
    if not S.out_in_query:
        o_shared = gl.allocate_shared_memory(o_desc.dtype, [S.groups, 1, 1, 64, S.value_width], o_desc.layout)
    fence_async_shared()
    if S.groups == 2:
        gl.warp_specialize(
            [
                (_compute, (o_desc, lse_ptr, found, q, k, v, o_shared, order, origin, visits, arrays, 0, S)),
                (_compute, (o_desc, lse_ptr, found, q, k, v, o_shared, order, origin, visits, arrays, 1, S)),
                (_load, (q_desc, k_desc, v_desc, q, k, v, order, origin, visits, S)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_compute, (o_desc, lse_ptr, found, q, k, v, o_shared, order, origin, visits, arrays, 0, S)),
                (_compute, (o_desc, lse_ptr, found, q, k, v, o_shared, order, origin, visits, arrays, 1, S)),
                (_compute, (o_desc, lse_ptr, found, q, k, v, o_shared, order, origin, visits, arrays, 2, S)),
                (_load, (q_desc, k_desc, v_desc, q, k, v, order, origin, visits, S)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )
