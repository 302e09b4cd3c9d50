"""Attention backward at head dims above 128: as `backward_kernel.py`, with the work of a program divided otherwise.

The gradients of 64 keys fill the registers of two groups of warps. One makes the weights and dvalue, the other the
weights' gradients and dkey, so that each product is one group's, in blocks as large as the tensor cores read well. The
first hands the weights to the second in shared memory, and gets their gradients back: each makes half of the columns of
dquery from them, a quarter at a time.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from jtile.ops.attention.hopper.band import banded_by_keys, place, query_block, step_back, visiting
from jtile.ops.attention.hopper.pipeline import arrive, flag, hand_on, matrix, meet, wait


@gluon.jit
def _statistic(stat_shared, number: gl.constexpr, step, layout: gl.constexpr, S: gl.constexpr):
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    both = stat_shared.index(step % S.stages).reinterpret(gl.float32, [2, S.block_q], plain)
    return both.index(number).load(gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def _columns(k, part: gl.constexpr, ds, zeros):
    """A quarter of the columns of dquery, transposed."""
    return warpgroup_mma(k.slice(part * 64, 64, 1).permute((1, 0)), ds, zeros, use_acc=False, is_async=True)


@gluon.jit
def _weights(
    dv_desc, q_ring, do_ring, kv, v_shared, stat_shared, dq, own, found, origin, visits, arrays, S: gl.constexpr
):  # fmt: skip
    p_room, ds_room = own
    dtype: gl.constexpr = v_shared.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, S.block_q, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, S.value_width, 16])
    queries = gl.arange(0, S.block_q, gl.SliceLayout(0, s_layout))
    k = matrix(kv.blocks.index(0))
    zeros = gl.zeros([64, S.block_q], gl.float32, s_layout)
    j, b, kh = place(S)
    start, whole_start, whole_stop, stop, blocks = visiting(j, b, kh, origin, visits, S)
    cols = j * S.block_k + gl.arange(0, 64, gl.SliceLayout(1, s_layout))
    rows = None
    if S.functions is not None:
        rows = S.functions.rows(b, cols, arrays)
    dv = gl.zeros([64, S.value_width], gl.float32, dv_layout)
    kv.wait(0)
    at = stop
    h = kh * S.group
    for step in range(S.group * (stop - start)):
        at, h = step_back(at, h, start, stop)
        i, masked = query_block(at, whole_start, whole_stop, blocks, S)
        row = i * S.block_q + queries
        columns = None
        if S.functions is not None:
            if S.functions.reads:
                columns = S.functions.columns(h, row, row + origin, rows, arrays)
        q_ring.wait(step)
        s = warpgroup_mma(k, q_ring.block(step).permute((1, 0)), zeros, use_acc=False)
        factor = 1.0
        if S.functions is not None:
            if S.functions.modifies:
                s, factor = S.functions.score(s, h, row, row + origin, rows, columns, arrays)
        x = s * S.slope - _statistic(stat_shared, 0, step, s_layout, S)
        q_ring.release(step)
        if S.masked:
            if masked:
                if S.functions is not None:
                    if S.functions.masks:
                        visible = S.functions.visible(h, row, row + origin, rows, columns, arrays)
                        x = gl.where(visible, x, -float("inf"))
                x = banded_by_keys(x, (row + origin)[None, :], cols[:, None], S)
        p = gl.exp2(x)
        wait(p_room.empty.index(0), step % 2 ^ 1)
        p_room.slot(0).store((p * factor).to(dtype))
        arrive(p_room.barrier(0))
        do_ring.wait(step)
        p_left = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, dv_layout, 2))
        dv = warpgroup_mma(p_left, do_ring.block(step), dv, is_async=True)
        ds_room.wait(step)
        ds = ds_room.slot(0)
        first = _columns(k, 0, ds, zeros)
        dv = warpgroup_mma_wait(1, deps=[dv])
        do_ring.release(step)
        second = _columns(k, 2, ds, zeros)
        first = warpgroup_mma_wait(1, deps=[first])
        hand_on(first, 4 * step, dq)
        second = warpgroup_mma_wait(0, deps=[second])
        ds_room.release(0)
        hand_on(second, 4 * step + 2, dq)
    if S.flags:
        flag(found, gl.sum(dv * 0.0, 1), S)
    meet()  # the other group is done with these values, which make room for dvalue
    matrix(v_shared.index(0)).store(dv.to(dtype))
    fence_async_shared()
    tma.async_store(dv_desc, [b, kh, j * S.block_k, 0], v_shared.index(0))
    tma.store_wait(0)


@gluon.jit
def _gradients(
    dk_desc, q_ring, do_ring, kv, v_shared, stat_shared, dq, own, found, origin, visits, S: gl.constexpr
):  # fmt: skip
    p_room, ds_room = own
    dtype: gl.constexpr = v_shared.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, S.block_q, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, S.key_width, 16])
    k, v = matrix(kv.blocks.index(0)), matrix(v_shared.index(0))
    ds_shared = ds_room.slot(0)
    zeros = gl.zeros([64, S.block_q], gl.float32, s_layout)
    j, b, kh = place(S)
    start, _, _, stop, _ = visiting(j, b, kh, origin, visits, S)
    dk = gl.zeros([64, S.key_width], gl.float32, dk_layout)
    kv.wait(0)
    for step in range(S.group * (stop - start)):
        do_ring.wait(step)
        dp = warpgroup_mma(v, do_ring.block(step).permute((1, 0)), zeros, use_acc=False)
        do_ring.release(step)
        q_ring.wait(step)
        difference = dp - _statistic(stat_shared, 1, step, s_layout, S)
        p_room.wait(step)
        p = p_room.slot(0).load(s_layout).to(gl.float32)
        p_room.release(0)
        ds = p * difference
        if S.functions is not None:
            if S.functions.masks:  # whatever is in a masked value
                ds = gl.where(p == 0.0, 0.0, ds)
        ds = ds.to(dtype)
        wait(ds_room.empty.index(0), step % 2 ^ 1)
        ds_shared.store(ds)
        fence_async_shared()
        arrive(ds_room.barrier(0))
        ds_room.wait(step)
        first = _columns(k, 1, ds_shared, zeros)
        ds_left = gl.convert_layout(ds, gl.DotOperandLayout(0, dk_layout, 2))
        dk = warpgroup_mma(ds_left, q_ring.block(step), dk, is_async=True)
        first = warpgroup_mma_wait(1, deps=[first])
        hand_on(first, 4 * step + 1, dq)
        second = _columns(k, 3, ds_shared, zeros)
        dk = warpgroup_mma_wait(1, deps=[dk])
        q_ring.release(step)
        second = warpgroup_mma_wait(0, deps=[second])
        hand_on(second, 4 * step + 3, dq)
    if S.flags:
        for part in gl.static_range(S.key_width // 64):
            some = k.slice(part * 64, 64, 1).load(s_layout)
            flag(found, gl.sum(some.to(gl.float32) * 0.0, 1), S)
        flag(found, gl.sum(dk * 0.0, 1), S)
    meet()  # the other group is done with these keys, which make room for dkey
    k.store((dk * S.scale).to(dtype))
    fence_async_shared()
    tma.async_store(dk_desc, [b, kh, j * S.block_k, 0], kv.blocks.index(0))
    tma.store_wait(0)


@gluon.jit
def compute(
    dk_desc, dv_desc, q, do, kv, v_shared, stat_shared, dq, own, found, origin, visits, arrays, group: gl.constexpr,
    S: gl.constexpr,
):  # fmt: skip
    if group == 0:
        _weights(dv_desc, q, do, kv, v_shared, stat_shared, dq, own, found, origin, visits, arrays, S)
    else:
        _gradients(dk_desc, q, do, kv, v_shared, stat_shared, dq, own, found, origin, visits, S)
