"""Attention backward in Gluon: one kernel, five products, the same bits on every run.

A program owns a block of keys, whose dkey and dvalue two groups of four warps keep in registers, and walks over the
blocks of queries that see it. Scores are made transposed, keys by queries, so that weights and their gradients are left
operands of the next products as they stand. dquery is a sum over programs: each adds its part to a float32 array, by
the Tensor Memory Accelerator, when its turn has come. Turns go by the number of the key block, which makes the order of
every sum the same each time. A program waits for programs of smaller numbers only, which the hardware starts earlier.

It costs five products where two kernels without such a sum, one by queries and one by keys, take seven. The method but
for the turns is FlashAttention-3's (Shah et al., 2024, arXiv:2407.08608).
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

from jtile.ops.attention.hopper.forward import _arrive, _wait


@gluon.jit
def _both_groups():
    gl.inline_asm("barrier.cta.sync 8, 256;")


@gluon.jit
def _arrive_after_warp(barrier):
    """One arrival for each warp, after what all of its threads have written."""
    gl.inline_asm(
        "{ .reg .pred p; bar.warp.sync 0xffffffff; elect.sync _|p, 0xffffffff;"
        " @p mbarrier.arrive.shared::cta.b64 _, [$0]; }",
        "r",
        [barrier],
    )


@gluon.jit
def _wait_turn(pointer, turn):
    gl.inline_asm(
        "{ .reg .pred other; .reg .b32 now; again: ld.acquire.gpu.global.b32 now, [$0]; setp.ne.s32 other, now, $1;"
        " @other bra again; fence.proxy.async; }",
        "l,r",
        [pointer, turn],
    )


@gluon.jit
def _pass_turn(pointer, turn):
    gl.inline_asm(
        "{ .reg .pred p; bar.warp.sync 0xffffffff; elect.sync _|p, 0xffffffff;"
        " @p fence.proxy.async; @p st.release.gpu.global.b32 [$0], $1; }",
        "l,r",
        [pointer, turn + 1],
    )


@gluon.jit
def _place(blocks, heads, section):
    """The block of keys and the head of a program. Heads come some at a time; of these the first blocks go first."""
    index = gl.program_id(0)
    before = index // (section * blocks) * section
    together = gl.minimum(section, heads - before)
    index -= before * blocks
    return index // together, before + index % together


@gluon.jit
def _query_blocks(col, queries, keys, BM: gl.constexpr, BN: gl.constexpr, CAUSAL: gl.constexpr):
    """Of the keys from `col` on: the blocks of queries that see some, [first, last), and from where on they see all."""
    last = gl.cdiv(queries, BM)
    first = 0
    whole = 0
    if CAUSAL:
        first = gl.minimum(col // BM, last)
        whole = gl.minimum(gl.cdiv(col + BN - 1, BM), last)
    if col + BN > keys:
        whole = last
    return first, whole, last


@gluon.jit
def _load(
    q_desc, do_desc, k_desc, v_desc, stat_desc, q_shared, do_shared, k_shared, v_shared, stat_shared,
    q_full, q_empty, do_full, do_empty, kv_full, queries, keys, key_blocks, key_heads, batch, group, section,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    j, head = _place(key_blocks, key_heads * batch, section)
    b = head // key_heads
    kh = head % key_heads
    col = j * BN
    mbarrier.expect(kv_full, 2 * (k_desc.nbytes_per_cta + v_desc.nbytes_per_cta))
    for half in gl.static_range(2):
        tma.async_load(k_desc, [b, kh, col + half * 64, 0], kv_full, k_shared.index(half))
        tma.async_load(v_desc, [b, kh, col + half * 64, 0], kv_full, v_shared.index(half))
    first, _, last = _query_blocks(col, queries, keys, BM, BN, CAUSAL)
    step = 0
    for h in range(kh * group, (kh + 1) * group):
        for n in range(first, last):
            row = (first + last - 1 - n) * BM
            slot = step % STAGES
            phase = (step // STAGES) & 1
            mbarrier.wait(q_empty.index(slot), phase ^ 1)
            mbarrier.expect(q_full.index(slot), q_desc.nbytes_per_cta + stat_desc.nbytes_per_cta)
            tma.async_load(q_desc, [b, h, row, 0], q_full.index(slot), q_shared.index(slot))
            tma.async_load(stat_desc, [0, b, h, row], q_full.index(slot), stat_shared.index(slot))
            mbarrier.wait(do_empty.index(slot), phase ^ 1)
            mbarrier.expect(do_full.index(slot), do_desc.nbytes_per_cta)
            tma.async_load(do_desc, [b, h, row, 0], do_full.index(slot), do_shared.index(slot))
            step += 1


@gluon.jit
def _add_dquery(
    dq_desc, turns, dq_shared, dq_full, dq_empty, queries, keys, key_blocks, key_heads, batch, group, section,
    BM: gl.constexpr, BN: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    j, head = _place(key_blocks, key_heads * batch, section)
    b = head // key_heads
    kh = head % key_heads
    first, _, last = _query_blocks(j * BN, queries, keys, BM, BN, CAUSAL)
    query_blocks = gl.cdiv(queries, BM)
    step = 0
    for h in range(kh * group, (kh + 1) * group):
        for n in range(first, last):
            i = first + last - 1 - n
            turn = turns + (b * key_heads * group + h) * query_blocks + i
            mbarrier.wait(dq_full, step & 1)
            _wait_turn(turn, j)
            for part in gl.static_range(2):
                row = i * BM + (part * 64 if BM == 128 else 0)
                col = 0 if BM == 128 else part * dq_desc.block_shape[3]
                if j == 0:
                    tma.async_store(dq_desc, [b, h, row, col], dq_shared.index(part))
                else:
                    tma.async_atomic_add(dq_desc, [b, h, row, col], dq_shared.index(part))
            tma.store_wait(0)
            _arrive_after_warp(dq_empty)
            tma.store_wait(0, read_only=False)
            _pass_turn(turn, j)
            step += 1


@gluon.jit
def _step(
    i, step, k, v, q_shared, do_shared, k_shared, stat_shared, ds_shared, dq_shared,
    q_full, q_empty, do_full, do_empty, dq_full, dq_empty, rows, cols, keys, slope, dk, dv,
    MASKED: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_shared.dtype
    s_layout: gl.constexpr = rows.type.layout.parent
    DQ: gl.constexpr = DK if BM == 128 else DK // 2
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DQ, 16])
    slot = step % STAGES
    phase = (step // STAGES) & 1
    q = q_shared.index(slot).reshape([BM, DK])
    do = do_shared.index(slot).reshape([BM, DV])
    zero = gl.zeros([64, BM], gl.float32, s_layout)
    _wait(q_full.index(slot), phase)
    s_token = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
    _wait(do_full.index(slot), phase)
    dp_token = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
    stat = stat_shared.index(slot).reinterpret(gl.float32, [2, BM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    s = warpgroup_mma_wait(1, deps=[s_token])
    lse = stat.index(0).load(gl.SliceLayout(0, s_layout))
    x = s * slope - lse[None, :]
    if MASKED:
        visible = cols[:, None] < keys
        if CAUSAL:
            visible = visible & (cols[:, None] <= (i * BM + rows)[None, :])
        x = gl.where(visible, x, -float("inf"))
    p = gl.exp2(x)
    p_left = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, dv.type.layout, 2))
    dv_token = warpgroup_mma(p_left, do, dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=[dp_token])
    delta = stat.index(1).load(gl.SliceLayout(0, s_layout))
    ds = (p * (dp - delta[None, :])).to(dtype)
    ds_left = gl.convert_layout(ds, gl.DotOperandLayout(0, dk.type.layout, 2))
    dk_token = warpgroup_mma(ds_left, q, dk, is_async=True)
    ds_shared.index(step % 2 * 2 + GROUP).store(ds)
    fence_async_shared()
    _both_groups()
    dq_token = gl.zeros([64, DQ], gl.float32, dq_layout)
    for half in gl.static_range(2):
        left = ds_shared.index(step % 2 * 2 + half)
        right = k_shared.index(half).reshape([64, DK])
        if BM == 128:
            left = left.slice(GROUP * 64, 64, 1)
        else:
            right = right.slice(GROUP * DQ, DQ, 1)
        dq_token = warpgroup_mma(left.permute((1, 0)), right, dq_token, use_acc=half == 1, is_async=True)
    dv, dk = warpgroup_mma_wait(2, deps=[dv_token, dk_token])
    _arrive(do_empty.index(slot))
    _arrive(q_empty.index(slot))
    _wait(dq_empty, (step & 1) ^ 1)
    dq = warpgroup_mma_wait(0, deps=[dq_token])
    dq_shared.index(GROUP).reshape([64, DQ]).store(dq)
    fence_async_shared()
    _arrive_after_warp(dq_full)
    return dk, dv


@gluon.jit
def _compute(
    dk_desc, dv_desc, q_shared, do_shared, k_shared, v_shared, stat_shared, ds_shared, dq_shared,
    q_full, q_empty, do_full, do_empty, kv_full, dq_full, dq_empty,
    queries, keys, key_blocks, key_heads, batch, group, section, slope, scale,
    GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_shared.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DK, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    j, head = _place(key_blocks, key_heads * batch, section)
    b = head // key_heads
    kh = head % key_heads
    col = j * BN
    first, whole, last = _query_blocks(col, queries, keys, BM, BN, CAUSAL)
    rows = gl.arange(0, BM, gl.SliceLayout(0, s_layout))
    cols = col + GROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, s_layout))
    k = k_shared.index(GROUP).reshape([64, DK])
    v = v_shared.index(GROUP).reshape([64, DV])
    dk = gl.zeros([64, DK], gl.float32, dk_layout)
    dv = gl.zeros([64, DV], gl.float32, dv_layout)
    _wait(kv_full, 0)
    step = 0
    for h in range(kh * group, (kh + 1) * group):
        for n in range(whole, last):
            dk, dv = _step(
                0, step, k, v, q_shared, do_shared, k_shared, stat_shared, ds_shared, dq_shared,
                q_full, q_empty, do_full, do_empty, dq_full, dq_empty, rows, cols, keys, slope, dk, dv,
                False, GROUP, BM, BN, DK, DV, STAGES, CAUSAL,
            )  # fmt: skip
            step += 1
        for n in range(first, whole):
            dk, dv = _step(
                first + whole - 1 - n, step, k, v, q_shared, do_shared, k_shared, stat_shared, ds_shared, dq_shared,
                q_full, q_empty, do_full, do_empty, dq_full, dq_empty, rows, cols, keys, slope, dk, dv,
                True, GROUP, BM, BN, DK, DV, STAGES, CAUSAL,
            )  # fmt: skip
            step += 1
    # The other group may be reading this group's keys.
    _both_groups()
    k.store((dk * scale).to(dtype))
    v.store(dv.to(dtype))
    fence_async_shared()
    tma.async_store(dk_desc, [b, kh, col + GROUP * 64, 0], k_shared.index(GROUP))
    tma.async_store(dv_desc, [b, kh, col + GROUP * 64, 0], v_shared.index(GROUP))
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "queries", "keys", "key_blocks", "key_heads", "batch", "group", "section", "slope", "scale",
    ],
)  # fmt: skip
def attention_backward(
    q_desc, k_desc, v_desc, do_desc, stat_desc, queries, keys, key_blocks, key_heads, batch, group, section,
    slope, scale, dq_desc, dk_desc, dv_desc, turns,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    DK: gl.constexpr = q_desc.block_shape[3]
    DV: gl.constexpr = v_desc.block_shape[3]
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BM], dtype)
    k_shared = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, DK], k_desc.layout)
    v_shared = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, DV], v_desc.layout)
    q_shared = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BM, DK], q_desc.layout)
    do_shared = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BM, DV], do_desc.layout)
    stat_shared = gl.allocate_shared_memory(gl.float32, [STAGES, 2, 1, 1, BM], stat_desc.layout)
    ds_shared = gl.allocate_shared_memory(dtype, [4, 64, BM], ds_layout)
    dq_shared = gl.allocate_shared_memory(gl.float32, [2, 1, 1, 64, dq_desc.block_shape[3]], dq_desc.layout)
    q_full = mbarrier.allocate_mbarrier(STAGES)
    q_empty = mbarrier.allocate_mbarrier(STAGES)
    do_full = mbarrier.allocate_mbarrier(STAGES)
    do_empty = mbarrier.allocate_mbarrier(STAGES)
    kv_full = mbarrier.allocate_mbarrier()
    dq_full = mbarrier.allocate_mbarrier()
    dq_empty = mbarrier.allocate_mbarrier()
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=8)
        mbarrier.init(do_empty.index(i), count=8)
    mbarrier.init(kv_full, count=1)
    mbarrier.init(dq_full, count=8)
    mbarrier.init(dq_empty, count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_compute, (dk_desc, dv_desc, q_shared, do_shared, k_shared, v_shared, stat_shared, ds_shared, dq_shared, q_full, q_empty, do_full, do_empty, kv_full, dq_full, dq_empty, queries, keys, key_blocks, key_heads, batch, group, section, slope, scale, 0, BM, BN, DK, DV, STAGES, CAUSAL)),
            (_compute, (dk_desc, dv_desc, q_shared, do_shared, k_shared, v_shared, stat_shared, ds_shared, dq_shared, q_full, q_empty, do_full, do_empty, kv_full, dq_full, dq_empty, queries, keys, key_blocks, key_heads, batch, group, section, slope, scale, 1, BM, BN, DK, DV, STAGES, CAUSAL)),
            (_load, (q_desc, do_desc, k_desc, v_desc, stat_desc, q_shared, do_shared, k_shared, v_shared, stat_shared, q_full, q_empty, do_full, do_empty, kv_full, queries, keys, key_blocks, key_heads, batch, group, section, BM, BN, STAGES, CAUSAL)),
            (_add_dquery, (dq_desc, turns, dq_shared, dq_full, dq_empty, queries, keys, key_blocks, key_heads, batch, group, section, BM, BN, CAUSAL)),
        ],
        [4, 1, 1],
        [REGISTERS, 24, 24],
    )  # fmt: skip
