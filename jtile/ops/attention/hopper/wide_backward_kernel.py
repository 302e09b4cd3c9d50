"""Attention backward at head dims above 128: as `backward_kernel.py`, with the work divided otherwise.

The gradients of 64 keys fill the registers of two groups. One group makes the weights and dvalue, the other their
gradients and dkey: each multiplies its operands once, in blocks as wide as the tensor cores read well. Each makes half
of the columns of dquery.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from jtile.ops.attention.hopper.backward_kernel import _load, _meet, _place, _set_turn, _wait_turn
from jtile.ops.attention.hopper.band import first_key_block, query_blocks, visible
from jtile.ops.attention.hopper.pipeline import arrive, matrix, pieces, ring, wait


@gluon.jit
def _add_dquery(dq_desc, turns, dq, origin, first: gl.constexpr, S: gl.constexpr):
    """One of three warps that add quarters of dquery, in turns: while a sum is on its way, the next begins."""
    j, b, kh = _place(S)
    start, _, _, stop = query_blocks(j, origin, S)
    for n in range(first, 4 * S.group * (stop - start), 3):
        step = n // 4
        piece = n % 4
        h = kh * S.group + step // (stop - start)
        i = stop - 1 - step % (stop - start)
        turn = turns + ((b * S.heads + h) * S.query_blocks + i) * 4 + piece
        number = j - first_key_block(i, origin, S)
        place = [b, h, i * S.block_q, piece * 64]
        dq.wait(n)
        _wait_turn(turn, number)
        if number == 0:
            tma.async_store(dq_desc, place, dq.slot(n))
        else:
            tma.async_atomic_add(dq_desc, place, dq.slot(n))
        tma.store_wait(0)
        dq.release(n)
        tma.store_wait(0, read_only=False)
        _set_turn(turn, number + 1)


@gluon.jit
def _hand_on(part, n, dq):
    """Half of a group's columns of dquery, transposed, to the warp that adds them."""
    wait(dq.empty.index(n % dq.slots), n // dq.slots % 2 ^ 1)
    dq.block(n).permute((1, 0)).store(part)
    fence_async_shared()
    arrive(dq.barrier(n))


@gluon.jit
def _weights(
    dv_desc, q_ring, do_ring, k_shared, v_shared, stat_shared, p_ring, ds_ring, dq, kv_full, origin, S: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_shared.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, S.block_q, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, S.value_width, 16])
    j, b, kh = _place(S)
    start, whole_start, whole_stop, stop = query_blocks(j, origin, S)
    positions = origin + gl.arange(0, S.block_q, gl.SliceLayout(0, s_layout))
    cols = j * S.block_k + gl.arange(0, 64, gl.SliceLayout(1, s_layout))
    k = matrix(k_shared.index(0))
    zeros = gl.zeros([64, S.block_q], gl.float32, s_layout)
    dv = gl.zeros([64, S.value_width], gl.float32, dv_layout)
    wait(kv_full, 0)
    i = stop
    for step in range(S.group * (stop - start)):
        i = gl.where(i == start, stop, i) - 1
        q_ring.wait(step)
        s = warpgroup_mma(k, q_ring.block(step).permute((1, 0)), zeros, use_acc=False)
        stat = stat_shared.index(step % S.stages).reinterpret(
            gl.float32, [2, S.block_q], gl.SwizzledSharedLayout(1, 1, 1, [0])
        )
        x = s * S.slope - stat.index(0).load(gl.SliceLayout(0, s_layout))[None, :]
        q_ring.release(step)
        if S.masked:
            if (i < whole_start) | (i >= whole_stop):
                x = gl.where(visible((i * S.block_q + positions)[None, :], cols[:, None], S), x, -float("inf"))
        p = gl.exp2(x).to(dtype)
        wait(p_ring.empty.index(0), step % 2 ^ 1)
        p_ring.blocks.index(0).store(p)
        arrive(p_ring.full.index(0))
        do_ring.wait(step)
        p_left = gl.convert_layout(p, gl.DotOperandLayout(0, dv_layout, 2))
        dv = warpgroup_mma(p_left, do_ring.block(step), dv, is_async=True)
        wait(ds_ring.full.index(0), step % 2)
        ds = ds_ring.blocks.index(0)
        first = warpgroup_mma(k.slice(0, 64, 1).permute((1, 0)), ds, zeros, use_acc=False, is_async=True)
        dv = warpgroup_mma_wait(1, deps=[dv])
        do_ring.release(step)
        second = warpgroup_mma(k.slice(128, 64, 1).permute((1, 0)), ds, zeros, use_acc=False, is_async=True)
        first = warpgroup_mma_wait(1, deps=[first])
        _hand_on(first, 4 * step, dq)
        second = warpgroup_mma_wait(0, deps=[second])
        arrive(ds_ring.empty.index(0))
        _hand_on(second, 4 * step + 2, dq)
    _meet()  # the other group is done with these values
    matrix(v_shared.index(0)).store(dv.to(dtype))
    fence_async_shared()
    tma.async_store(dv_desc, [b, kh, j * S.block_k, 0], v_shared.index(0))
    tma.store_wait(0)


@gluon.jit
def _gradients(
    dk_desc, q_ring, do_ring, k_shared, v_shared, stat_shared, p_ring, ds_ring, dq, kv_full, origin, S: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_shared.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, S.block_q, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, S.key_width, 16])
    j, b, kh = _place(S)
    start, _, _, stop = query_blocks(j, origin, S)
    k, v = matrix(k_shared.index(0)), matrix(v_shared.index(0))
    zeros = gl.zeros([64, S.block_q], gl.float32, s_layout)
    dk = gl.zeros([64, S.key_width], gl.float32, dk_layout)
    wait(kv_full, 0)
    for step in range(S.group * (stop - start)):
        do_ring.wait(step)
        dp = warpgroup_mma(v, do_ring.block(step).permute((1, 0)), zeros, use_acc=False)
        do_ring.release(step)
        q_ring.wait(step)
        stat = stat_shared.index(step % S.stages).reinterpret(
            gl.float32, [2, S.block_q], gl.SwizzledSharedLayout(1, 1, 1, [0])
        )
        difference = dp - stat.index(1).load(gl.SliceLayout(0, s_layout))[None, :]
        wait(p_ring.full.index(0), step % 2)
        p = p_ring.blocks.index(0).load(s_layout)
        arrive(p_ring.empty.index(0))
        ds = (p.to(gl.float32) * difference).to(dtype)
        wait(ds_ring.empty.index(0), step % 2 ^ 1)
        ds_shared = ds_ring.blocks.index(0)
        ds_shared.store(ds)
        fence_async_shared()
        arrive(ds_ring.full.index(0))
        wait(ds_ring.full.index(0), step % 2)
        first = warpgroup_mma(k.slice(64, 64, 1).permute((1, 0)), ds_shared, zeros, use_acc=False, is_async=True)
        ds_left = gl.convert_layout(ds, gl.DotOperandLayout(0, dk_layout, 2))
        dk = warpgroup_mma(ds_left, q_ring.block(step), dk, is_async=True)
        first = warpgroup_mma_wait(1, deps=[first])
        _hand_on(first, 4 * step + 1, dq)
        second = warpgroup_mma(k.slice(192, 64, 1).permute((1, 0)), ds_shared, zeros, use_acc=False, is_async=True)
        dk = warpgroup_mma_wait(1, deps=[dk])
        q_ring.release(step)
        second = warpgroup_mma_wait(0, deps=[second])
        _hand_on(second, 4 * step + 3, dq)
    _meet()  # the other group is done with these keys
    k.store((dk * S.scale).to(dtype))
    fence_async_shared()
    tma.async_store(dk_desc, [b, kh, j * S.block_k, 0], k_shared.index(0))
    tma.store_wait(0)


@gluon.jit
def attention_backward(
    q_desc, k_desc, v_desc, do_desc, stat_desc, origin_ptr, dq_desc, dk_desc, dv_desc, turns, S: gl.constexpr,
):  # fmt: skip
    origin = 0
    if origin_ptr is not None:
        origin = gl.load(origin_ptr)
    dtype: gl.constexpr = k_desc.dtype
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, S.block_q], dtype)
    q = ring(q_desc, S.stages, 2)
    do = ring(do_desc, 1, 2)
    dq = pieces(dq_desc.dtype, dq_desc.block_shape, dq_desc.layout, 3, 4, 1)
    p = pieces(dtype, [64, S.block_q], square, 1, 4, 4)
    ds = pieces(dtype, [64, S.block_q], square, 1, 4, 4)
    k_shared = gl.allocate_shared_memory(dtype, [1, 1, 1, 64, S.key_width], k_desc.layout)
    v_shared = gl.allocate_shared_memory(dtype, [1, 1, 1, 64, S.value_width], v_desc.layout)
    stat_shared = gl.allocate_shared_memory(gl.float32, [S.stages, 2, 1, 1, S.block_q], stat_desc.layout)
    kv_full = mbarrier.allocate_mbarrier()
    mbarrier.init(kv_full, count=1)
    fence_async_shared()
    # fmt: off
    gl.warp_specialize(
        [
            (_weights, (dv_desc, q, do, k_shared, v_shared, stat_shared, p, ds, dq, kv_full, origin, S)),
            (_gradients, (dk_desc, q, do, k_shared, v_shared, stat_shared, p, ds, dq, kv_full, origin, S)),
            (_load, (
                q_desc, k_desc, v_desc, do_desc, stat_desc, q, do, k_shared, v_shared, stat_shared, kv_full, origin, S,
            )),
            (_add_dquery, (dq_desc, turns, dq, origin, 0, S)),
            (_add_dquery, (dq_desc, turns, dq, origin, 1, S)),
            (_add_dquery, (dq_desc, turns, dq, origin, 2, S)),
        ],
        [4, 1, 1, 1, 1],
        [240, 24, 24, 24, 24],
    )
