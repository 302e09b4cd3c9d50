"""Attention backward: one kernel, five products, and the same bits on every run.

A program owns a block of keys, whose dkey and dvalue two groups of four warps keep in registers, and walks over the
blocks of queries that see it. Scores are made transposed, keys by queries, so that weights and their gradients are left
operands of the next products as they stand.

dquery is a sum over programs. Each adds its part to a float32 array, by the Tensor Memory Accelerator, when its turn
has come: turns go by the number of the key block, so every sum is made in the same order each time. A program waits
only for programs of smaller numbers, which the hardware starts earlier. That a sum has arrived takes as long to know as
a block of queries takes to work on, so two warps add, and each takes every other turn. Two kernels without such a sum,
one by queries and one by keys, would take seven products.

While a group's part of dquery leaves, the tensor cores are at its dkey.

The rest is FlashAttention-3's method (Shah et al., 2024, arXiv:2407.08608).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from jtile.ops.attention.hopper.band import banded_by_keys, place, query_block, step_back, turn, visiting
from jtile.ops.attention.hopper.pipeline import barriers, flag, hand_on, matrix, meet, ring, room
from jtile.ops.attention.hopper.wide_backward_kernel import compute as wide_compute


@gluon.jit
def _wait_turn(turns, turn):
    gl.inline_asm(
        "{ .reg .pred other; .reg .b32 now; again: ld.acquire.gpu.global.b32 now, [$0]; setp.ne.s32 other, now, $1;"
        " @other bra again; fence.proxy.async; }",
        "l,r",
        [turns, turn],
    )


@gluon.jit
def _set_turn(turns, turn):
    gl.inline_asm(
        "{ .reg .pred one; bar.warp.sync 0xffffffff; elect.sync _|one, 0xffffffff; @one fence.proxy.async;"
        " @one st.release.gpu.global.b32 [$0], $1; }",
        "l,r",
        [turns, turn],
    )


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, do_desc, stat_desc, q, do, kv, v_shared, stat_shared, origin, visits, S: gl.constexpr
):  # fmt: skip
    parts: gl.constexpr = S.block_k // 64
    j, b, kh = place(S)
    start, whole_start, whole_stop, stop, blocks = visiting(j, b, kh, origin, visits, S)
    kv.acquire(0, parts * (k_desc.nbytes_per_cta + v_desc.nbytes_per_cta))
    for part in gl.static_range(parts):
        at = [b, kh, j * S.block_k + part * 64, 0]
        tma.async_load(k_desc, at, kv.barrier(0), kv.blocks.index(part))
        tma.async_load(v_desc, at, kv.barrier(0), v_shared.index(part))
    step = 0
    for h in range(kh * S.group, (kh + 1) * S.group):
        for i in range(start, stop):
            i, _ = query_block(start + stop - 1 - i, whole_start, whole_stop, blocks, S)
            row = i * S.block_q
            q.acquire(step, q_desc.nbytes_per_cta + stat_desc.nbytes_per_cta)
            tma.async_load(q_desc, [b, h, row, 0], q.barrier(step), q.slot(step))
            tma.async_load(stat_desc, [0, b, h, row], q.barrier(step), stat_shared.index(step % S.stages))
            do.load(step, do_desc, [b, h, row, 0])
            step += 1


@gluon.jit
def _add_dquery(dq_desc, turns, dq, origin, visits, first: gl.constexpr, S: gl.constexpr):
    """One of two warps that add parts of dquery, each every other turn, two parts in a turn. A slot of `dq` belongs to
    one of them and to one group: barriers tell only odd phases from even ones, so each waits for every phase."""
    j, b, kh = place(S)
    start, whole_start, whole_stop, stop, blocks = visiting(j, b, kh, origin, visits, S)
    for number in range(first, S.turns * S.group * (stop - start), 2):
        step = number // S.turns
        h = kh * S.group + step // (stop - start)
        i, _ = query_block(stop - 1 - step % (stop - start), whole_start, whole_stop, blocks, S)
        before = turn(i, j, b, kh, origin, visits[2], S)
        own_turns = turns + ((b * S.heads + h) * S.query_blocks + i) * S.turns + number % S.turns
        for k in gl.static_range(2):
            part = k * S.turns + number % S.turns
            n = step * 2 * S.turns + part
            dq.wait(n)
            if k == 0:
                _wait_turn(own_turns, before)
            at = [b, h, i * S.block_q + (part * 64 if S.by_rows else 0), 0 if S.by_rows else part * 64]
            if before == 0:
                tma.async_store(dq_desc, at, dq.slot(n))
            else:
                tma.async_atomic_add(dq_desc, at, dq.slot(n))
            if S.turns == 2 or k == 1:
                tma.store_wait(0)
                dq.release(n)
                if S.turns == 1:
                    dq.release(n - 1)
        tma.store_wait(0, read_only=False)
        _set_turn(own_turns, before + 1)


@gluon.jit
def without_weight(ds, p):
    """The gradients of weights, and 0 where weights are, whatever is in a masked value. As in `band`, it stays in a
    branch."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred none; setp.eq.f32 none, $2, 0f00000000; selp.f32 $0, 0f00000000, $1, none; }",
        "=f,f,f",
        [ds, p],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _step(
    i, h, step, k, v, q_ring, do_ring, k_shared, stat_shared, ds_shared, dq, origin, queries, cols, rows, arrays,
    dk, dv, masked, group: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k.dtype
    s_layout: gl.constexpr = queries.type.layout.parent
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    q, do = q_ring.block(step), do_ring.block(step)
    stat = stat_shared.index(step % S.stages).reinterpret(
        gl.float32, [2, S.block_q], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    zeros = gl.zeros([64, S.block_q], gl.float32, s_layout)
    row = i * S.block_q + queries
    columns = None
    if S.functions is not None:
        if S.functions.reads and S.functions.modifies:
            columns = S.functions.columns(h, row, row + origin, rows, arrays)
    q_ring.wait(step)
    s = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    do_ring.wait(step)
    dp = warpgroup_mma(v, do.permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    factor = 1.0
    if S.functions is not None:
        if S.functions.modifies:
            s, factor = S.functions.score(s, h, row, row + origin, rows, columns, arrays)
    x = s * S.slope - stat.index(0).load(gl.SliceLayout(0, s_layout))[None, :]
    if S.masked:
        if masked:
            if S.functions is not None:
                if S.functions.masks:
                    known = columns
                    if S.functions.reads and not S.functions.modifies:  # sooner they would take registers for longer
                        known = S.functions.columns(h, row, row + origin, rows, arrays)
                    x = gl.where(S.functions.visible(h, row, row + origin, rows, known, arrays), x, -float("inf"))
            x = banded_by_keys(x, (row + origin)[None, :], cols[:, None], S)
    p = gl.exp2(x)
    p_left = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, dv.type.layout, 2))
    dv = warpgroup_mma(p_left, do, dv, is_async=True)
    p = p * factor
    dp = warpgroup_mma_wait(1, deps=[dp])
    ds = p * (dp - stat.index(1).load(gl.SliceLayout(0, s_layout))[None, :])
    if S.functions is not None:
        if S.functions.masks:
            if masked:
                ds = without_weight(ds, p)
    ds = ds.to(dtype)

    # Two buffers: the other group may still read what this one wrote in the step before.
    ds_shared.index(step % 2 * 2 + group).store(ds)
    fence_async_shared()
    meet()
    part = gl.zeros([64, 64], gl.float32, square)
    for half in gl.static_range(2):
        ds_half, k_half = ds_shared.index(step % 2 * 2 + half), matrix(k_shared.index(half))
        if S.by_rows:
            ds_half = ds_half.slice(group * 64, 64, 1)
        else:
            k_half = k_half.slice(group * 64, 64, 1)
        part = warpgroup_mma(k_half.permute((1, 0)), ds_half, part, use_acc=half == 1, is_async=True)
    ds_left = gl.convert_layout(ds, gl.DotOperandLayout(0, dk.type.layout, 2))
    dk = warpgroup_mma(ds_left, q, dk, is_async=True)
    dv, part = warpgroup_mma_wait(1, deps=[dv, part])
    do_ring.release(step)
    hand_on(part, 2 * step + group, dq)
    dk = warpgroup_mma_wait(0, deps=[dk])
    q_ring.release(step)
    return dk, dv


@gluon.jit
def _compute(
    dk_desc, dv_desc, q, do, kv, v_shared, stat_shared, dq, own, found, origin, visits, arrays, group: gl.constexpr,
    S: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = v_shared.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, S.block_q, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, S.key_width, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, S.value_width, 16])
    queries = gl.arange(0, S.block_q, gl.SliceLayout(0, s_layout))
    k_shared = kv.blocks
    k, v = matrix(k_shared.index(group)), matrix(v_shared.index(group))
    j, b, kh = place(S)
    start, whole_start, whole_stop, stop, blocks = visiting(j, b, kh, origin, visits, S)
    col = j * S.block_k + group * 64
    cols = col + gl.arange(0, 64, gl.SliceLayout(1, s_layout))
    rows = None
    if S.functions is not None:
        rows = S.functions.rows(b, cols, arrays)
    dk = gl.zeros([64, S.key_width], gl.float32, dk_layout)
    dv = gl.zeros([64, S.value_width], gl.float32, dv_layout)
    kv.wait(0)
    at = stop
    h = kh * S.group
    for step in range(S.group * (stop - start)):
        at, h = step_back(at, h, start, stop)
        i, masked = query_block(at, whole_start, whole_stop, blocks, S)
        # fmt: off
        dk, dv = _step(
            i, h, step, k, v, q, do, k_shared, stat_shared, own[0], dq, origin, queries, cols, rows, arrays, dk, dv,
            masked, group, S,
        )
        # fmt: on
    if S.flags:
        own_keys = k.load(dk_layout).to(gl.float32)
        flag(found, gl.sum(own_keys * 0.0 + dk * 0.0 + dv * 0.0, 1), S)
    meet()  # the other group reads this group's keys, which make room for dkey
    k.store((dk * S.scale).to(dtype))
    v.store(dv.to(dtype))
    fence_async_shared()
    tma.async_store(dk_desc, [b, kh, col, 0], k_shared.index(group))
    tma.async_store(dv_desc, [b, kh, col, 0], v_shared.index(group))
    tma.store_wait(0)


@gluon.jit
def _group(
    compute: gl.constexpr, dk_desc, dv_desc, q, do, kv, v_shared, stat_shared, dq, own, found, origin, visits, arrays,
    group: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """Partitions of warps do not take functions that are constants; functions do."""
    compute(dk_desc, dv_desc, q, do, kv, v_shared, stat_shared, dq, own, found, origin, visits, arrays, group, S)


@gluon.jit
def _launch(
    compute: gl.constexpr, own, do_stages: gl.constexpr, dq_slots: gl.constexpr, q_desc, k_desc, v_desc, do_desc,
    stat_desc, origin_ptr, visits, arrays, dq_desc, dk_desc, dv_desc, turns, S: gl.constexpr,
):  # fmt: skip
    """Divides the work among warps. Two groups `compute`, by shared memory of their own, too."""
    origin = 0
    if origin_ptr is not None:
        origin = gl.load(origin_ptr)
    dtype: gl.constexpr = k_desc.dtype
    parts: gl.constexpr = S.block_k // 64
    q = ring(q_desc, S.stages, 2)
    do = ring(do_desc, do_stages, 2)
    dq = room(dq_desc.dtype, dq_desc.block_shape, dq_desc.layout, dq_slots, 4, 1)
    # Keys and values come and go together.
    k_shared = gl.allocate_shared_memory(dtype, [parts, 1, 1, 64, S.key_width], k_desc.layout)
    v_shared = gl.allocate_shared_memory(dtype, [parts, 1, 1, 64, S.value_width], v_desc.layout)
    kv = barriers(k_shared, 1, 1, 8)
    stat_shared = gl.allocate_shared_memory(gl.float32, [S.stages, 2, 1, 1, S.block_q], stat_desc.layout)
    fence_async_shared()
    found = turns + S.batch * S.heads * S.query_blocks * S.turns
    # fmt: off
    gl.warp_specialize(
        [
            (_group, (
                compute, dk_desc, dv_desc, q, do, kv, v_shared, stat_shared, dq, own, found, origin, visits, arrays,
                0, S,
            )),
            (_group, (
                compute, dk_desc, dv_desc, q, do, kv, v_shared, stat_shared, dq, own, found, origin, visits, arrays,
                1, S,
            )),
            (_load, (q_desc, k_desc, v_desc, do_desc, stat_desc, q, do, kv, v_shared, stat_shared, origin, visits, S)),
            (_add_dquery, (dq_desc, turns, dq, origin, visits, 0, S)),
            (_add_dquery, (dq_desc, turns, dq, origin, visits, 1, S)),
        ],
        [4, 1, 1, 1],
        [240, 24, 24, 24],
    )
    # fmt: on


@gluon.jit
def attention_backward(
    q_desc, k_desc, v_desc, do_desc, stat_desc, origin_ptr, visits, lists, numbers,
    array_0, array_1, array_2, array_3, array_4, array_5, array_6, array_7,
    dq_desc, dk_desc, dv_desc, turns, S: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_desc.dtype
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, S.block_q], dtype)
    visits = (visits, lists, numbers)
    arrays = (array_0, array_1, array_2, array_3, array_4, array_5, array_6, array_7)
    # fmt: off
    if S.key_width == 256:
        rooms = (room(dtype, [64, S.block_q], ds_layout, 1, 4, 4), room(dtype, [64, S.block_q], ds_layout, 1, 4, 4))
        _launch(
            wide_compute, rooms, 1, 2, q_desc, k_desc, v_desc, do_desc, stat_desc, origin_ptr, visits, arrays,
            dq_desc, dk_desc, dv_desc, turns, S,
        )
    else:
        own = (gl.allocate_shared_memory(dtype, [4, 64, S.block_q], ds_layout),)
        _launch(
            _compute, own, S.stages, 4, q_desc, k_desc, v_desc, do_desc, stat_desc, origin_ptr, visits, arrays,
            dq_desc, dk_desc, dv_desc, turns, S,
        )
    # fmt: on
