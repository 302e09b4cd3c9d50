"""Attention forward in Gluon: FlashAttention-3's schedule (Shah et al., 2024, arXiv:2407.08608, section 3).

A program has one warp that loads, by the Tensor Memory Accelerator, and two or three groups of four warps that compute,
each on 64 queries. While the tensor cores multiply for a group, it works on the softmax of another block of keys: the
product of queries and keys of block j + 1 is under way, and that of weights and values of block j, while the weights
of j + 1 are made. Groups take turns in sending products off, so that one's softmax runs beside another's products.
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

# Barriers of the hardware have numbers. Triton takes the first few for itself.
_FIRST_TURN = gl.constexpr(8)


@gluon.constexpr_function
def _turn_text(kind, group, groups):
    """PTX: wait for one's turn, or end it by letting the next group go. Two groups of 128 threads meet at a barrier."""
    return f"barrier.cta.{kind} {8 + group % groups}, 256;"


@gluon.jit
def _wait_turn(group: gl.constexpr, groups: gl.constexpr):
    gl.inline_asm(_turn_text("sync", group, groups))


@gluon.jit
def _pass_turn(group: gl.constexpr, groups: gl.constexpr):
    gl.inline_asm(_turn_text("arrive", group + 1, groups))


@gluon.jit
def _arrive(barrier):
    """One arrival for each warp, made without bringing the warps of a group together."""
    gl.inline_asm(
        "{ .reg .pred p; elect.sync _|p, 0xffffffff; @p mbarrier.arrive.shared::cta.b64 _, [$0]; }", "r", [barrier]
    )


@gluon.jit
def _wait(barrier, phase):
    """As `mbarrier.wait`, before which Triton may bring the warps of a group together."""
    gl.inline_asm(
        "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1; @!done bra.uni again; }",
        "r,r",
        [barrier, phase],
    )


@gluon.jit
def _exp2(x, POLYNOMIAL: gl.constexpr):
    """2^x for x <= 0. Of four elements `POLYNOMIAL` are computed on the multipliers, which have time to spare, and the
    others by the special function units: 2^x = 2^n p(x - n), n the nearest integer, p of degree 3, which is as exact
    as 16 bits need. Adding 1.5 * 2^23 leaves n in the low bits."""
    if POLYNOMIAL == 0:
        return gl.exp2(x)
    return gl.inline_asm_elementwise(
        _exp2_text(POLYNOMIAL), "=r,=r,=r,=r,r,r,r,r", [x], dtype=gl.float32, is_pure=True, pack=4
    )


@gluon.constexpr_function
def _exp2_text(polynomial):
    lines = ["{ .reg .f32 x, t, f, p; .reg .b32 n;"]
    for i in range(4):
        out, x = f"${i}", f"${4 + i}"
        if i < 4 - polynomial:
            lines += [f"ex2.approx.ftz.f32 {out}, {x};"]
            continue
        lines += [
            f"max.f32 x, {x}, 0fC2FA0000;",  # -125: the exponent stays above zero
            "add.rn.f32 t, x, 0f4B400000;",
            "sub.rn.f32 f, t, 0f4B400000;",
            "sub.rn.f32 f, x, f;",
            "fma.rn.f32 p, f, 0f3D61FBB0, 0f3E786F0D;",
            "fma.rn.f32 p, p, f, 0f3F31798D;",
            "fma.rn.f32 p, p, f, 0f3F7FFB49;",
            "mov.b32 n, t;",
            "shl.b32 n, n, 23;",
            f"mov.b32 {out}, p;",
            f"add.s32 {out}, {out}, n;",
        ]
    return "\n".join([*lines, "}"])


@gluon.jit
def _tile(index, blocks, heads, section, CAUSAL: gl.constexpr):
    """The block of queries, the head and the batch of a place in the order of work. Some heads at a time, as many as
    have their keys and values in the cache together; of these the longest blocks go first."""
    before = index // (section * blocks) * section
    together = gl.minimum(section, heads - before)
    index -= before * blocks
    block = index // together
    head = before + index % together
    if CAUSAL:
        block = blocks - 1 - block
    return block, head


@gluon.jit
def _nth_tile(n, SNAKE: gl.constexpr):
    """The n-th place in the order of work that a program takes. Programs take places in turn, back and forth."""
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    if SNAKE:
        place = gl.where(n % 2 == 0, place, programs - 1 - place)
    return n * programs + place


@gluon.jit
def _key_blocks(row, keys, BM: gl.constexpr, BN: gl.constexpr, CAUSAL: gl.constexpr):
    """Of the rows from `row` on: the blocks of keys that some row sees, [first, last), and those that all rows see
    whole, [whole_first, whole_last)."""
    last = gl.cdiv(keys, BN)
    whole_last = keys // BN
    if CAUSAL:
        last = gl.minimum(last, gl.cdiv(row + BM, BN))
        whole_last = gl.minimum(whole_last, (row + 1) // BN)
    return 0, 0, whole_last, last


@gluon.jit
def _masked(s, rows, cols, keys, CAUSAL: gl.constexpr):
    visible = cols[None, :] < keys
    if CAUSAL:
        visible = visible & (cols[None, :] <= rows[:, None])
    return gl.where(visible, s, -float("inf"))


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, q_shared, k_shared, v_shared, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    keys, blocks, heads, key_heads, batch, section,
    GROUPS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, SNAKE: gl.constexpr,
):  # fmt: skip
    tiles = blocks * heads * batch
    n = 0
    step = 0
    index = _nth_tile(n, SNAKE)
    while index < tiles:
        block, head = _tile(index, blocks, heads * batch, section, CAUSAL)
        b = head // heads
        h = head % heads
        kh = h // (heads // key_heads)
        row = block * (GROUPS * 64)
        first, _, _, last = _key_blocks(row, keys, GROUPS * 64, BN, CAUSAL)
        for i in gl.static_range(GROUPS):
            mbarrier.wait(q_empty.index(i), (n & 1) ^ 1)
            mbarrier.expect(q_full.index(i), q_desc.nbytes_per_cta)
            tma.async_load(q_desc, [b, h, row + i * 64, 0], q_full.index(i), q_shared.index(i))
        for j in range(first, last):
            col = (first + last - 1 - j) * BN
            slot = step % STAGES
            phase = (step // STAGES) & 1
            mbarrier.wait(k_empty.index(slot), phase ^ 1)
            mbarrier.expect(k_full.index(slot), k_desc.nbytes_per_cta)
            tma.async_load(k_desc, [b, kh, col, 0], k_full.index(slot), k_shared.index(slot))
            mbarrier.wait(v_empty.index(slot), phase ^ 1)
            mbarrier.expect(v_full.index(slot), v_desc.nbytes_per_cta)
            tma.async_load(v_desc, [b, kh, col, 0], v_full.index(slot), v_shared.index(slot))
            step += 1
        n += 1
        index = _nth_tile(n, SNAKE)


@gluon.jit
def _weights(s, peak, slope, MASKED: gl.constexpr, POLYNOMIAL: gl.constexpr):
    """Of a block of scores: the weights relative to the rows' new maxima, those, and what old sums shrink by."""
    new_peak = gl.maximum(peak, gl.max(s, 1) * slope)
    base = new_peak
    if MASKED:  # a row that has seen no key yet: its weights are 2^-inf
        base = gl.where(new_peak == -float("inf"), 0.0, new_peak)
    x = s * slope - base[:, None]
    if MASKED:
        p = gl.exp2(x)
    else:
        p = _exp2(x, POLYNOMIAL)
    return p, new_peak, gl.exp2(peak - base)


@gluon.jit
def _step(
    j, step, q, k_shared, v_shared, k_full, k_empty, v_full, v_empty, rows, cols, keys, slope, peak, total, weights, o,
    MASKED: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, TURNS: gl.constexpr, POLYNOMIAL: gl.constexpr,
):  # fmt: skip
    """Sends off the scores of block j and the output of the block before, and makes the weights of j."""
    slot = step % STAGES
    before = (step - 1) % STAGES
    _wait(k_full.index(slot), (step // STAGES) & 1)
    if TURNS:
        _wait_turn(GROUP, GROUPS)
    zero = gl.zeros([64, BN], gl.float32, rows.type.layout.parent)
    s_token = warpgroup_mma(q, k_shared.index(slot).reshape([BN, q.shape[1]]).permute((1, 0)), zero, use_acc=False, is_async=True)
    _wait(v_full.index(before), ((step - 1) // STAGES) & 1)
    o_token = warpgroup_mma(weights, v_shared.index(before).reshape([BN, o.shape[1]]), o, is_async=True)
    if TURNS:
        _pass_turn(GROUP, GROUPS)
    s = warpgroup_mma_wait(1, deps=[s_token])
    _arrive(k_empty.index(slot))
    if MASKED:
        s = _masked(s, rows, j * BN + cols, keys, CAUSAL)
    p, peak, shrink = _weights(s, peak, slope, MASKED, POLYNOMIAL)
    total = total * shrink + gl.sum(p, 1)
    # Has completed before. The branch in it keeps the assembler from moving the next wait up, before the softmax.
    _wait(v_full.index(before), ((step - 1) // STAGES) & 1)
    o = warpgroup_mma_wait(0, deps=[o_token])
    _arrive(v_empty.index(before))
    o = o * gl.convert_layout(shrink, gl.SliceLayout(1, o.type.layout))[:, None]
    weights = gl.convert_layout(p.to(weights.dtype), weights.type.layout)
    return peak, total, weights, o


@gluon.jit
def _consume(
    o_desc, lse_ptr, q_shared, k_shared, v_shared, o_shared, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    queries, keys, blocks, heads, batch, section, slope,
    GROUP: gl.constexpr, GROUPS: gl.constexpr, BN: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, SNAKE: gl.constexpr, TURNS: gl.constexpr, POLYNOMIAL: gl.constexpr,
    SHARED_O: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_shared.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    cols = gl.arange(0, BN, gl.SliceLayout(0, s_layout))
    tiles = blocks * heads * batch
    if TURNS and GROUP == GROUPS - 1:
        _pass_turn(GROUP, GROUPS)
    n = 0
    step = 0
    index = _nth_tile(n, SNAKE)
    while index < tiles:
        block, head = _tile(index, blocks, heads * batch, section, CAUSAL)
        b = head // heads
        h = head % heads
        start = block * (GROUPS * 64)
        first, whole_first, whole_last, last = _key_blocks(start, keys, GROUPS * 64, BN, CAUSAL)
        row = start + GROUP * 64
        rows = row + gl.arange(0, 64, row_layout)
        q = q_shared.index(GROUP).reshape([64, DK])

        # The first block has no products of another to run beside.
        _wait(q_full.index(GROUP), n & 1)
        slot = step % STAGES
        _wait(k_full.index(slot), (step // STAGES) & 1)
        zero = gl.zeros([64, BN], gl.float32, s_layout)
        s = warpgroup_mma(q, k_shared.index(slot).reshape([BN, DK]).permute((1, 0)), zero, use_acc=False)
        _arrive(k_empty.index(slot))
        s = _masked(s, rows, (last - 1) * BN + cols, keys, CAUSAL)
        peak = gl.full([64], -float("inf"), gl.float32, row_layout)
        p, peak, _ = _weights(s, peak, slope, True, 0)
        total = gl.sum(p, 1)
        weights = gl.convert_layout(p.to(dtype), weights_layout)
        o = gl.zeros([64, DV], gl.float32, o_layout)
        step += 1

        for i in range(gl.minimum(whole_last, last - 1), last - 1):
            peak, total, weights, o = _step(
                gl.minimum(whole_last, last - 1) + last - 2 - i, step, q, k_shared, v_shared, k_full, k_empty, v_full, v_empty, rows, cols, keys,
                slope, peak, total, weights, o, True, GROUP, GROUPS, BN, STAGES, CAUSAL, TURNS, POLYNOMIAL,
            )  # fmt: skip
            step += 1
        for i in range(whole_first, gl.minimum(whole_last, last - 1)):
            peak, total, weights, o = _step(
                0, step, q, k_shared, v_shared, k_full, k_empty, v_full, v_empty, rows, cols, keys,
                slope, peak, total, weights, o, False, GROUP, GROUPS, BN, STAGES, CAUSAL, TURNS, POLYNOMIAL,
            )  # fmt: skip
            step += 1

        if not SHARED_O:
            _arrive(q_empty.index(GROUP))
        before = (step - 1) % STAGES
        _wait(v_full.index(before), ((step - 1) // STAGES) & 1)
        o = warpgroup_mma(weights, v_shared.index(before).reshape([BN, DV]), o)
        _arrive(v_empty.index(before))

        gl.store(
            lse_ptr + (b * queries + rows) * heads + h, 0.6931471805599453 * (peak + gl.log2(total)), rows < queries
        )
        over = gl.where(total == 0.0, 0.0, 1.0 / total)
        o = o * gl.convert_layout(over, gl.SliceLayout(1, o_layout))[:, None]
        tma.store_wait(0)
        o_shared.index(GROUP).reshape([64, DV]).store(o.to(dtype))
        fence_async_shared()
        tma.async_store(o_desc, [b, h, row, 0], o_shared.index(GROUP))
        if SHARED_O:
            tma.store_wait(0)
            _arrive(q_empty.index(GROUP))
        n += 1
        index = _nth_tile(n, SNAKE)
    tma.store_wait(0)
    if TURNS and GROUP == 0:
        _wait_turn(GROUP, GROUPS)


@gluon.jit(
    do_not_specialize=["queries", "keys", "blocks", "heads", "key_heads", "batch", "section", "slope"],
)
def attention(
    q_desc, k_desc, v_desc, queries, keys, blocks, heads, key_heads, batch, section, slope, o_desc, lse_ptr,
    GROUPS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, SNAKE: gl.constexpr,
    TURNS: gl.constexpr, POLYNOMIAL: gl.constexpr, SHARED_O: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    DK: gl.constexpr = q_desc.block_shape[3]
    DV: gl.constexpr = v_desc.block_shape[3]
    q_shared = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, 64, DK], q_desc.layout)
    k_shared = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, DK], k_desc.layout)
    v_shared = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, DV], v_desc.layout)
    if SHARED_O:
        o_shared = q_shared
    else:
        o_shared = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, 64, DV], o_desc.layout)
    q_full = mbarrier.allocate_mbarrier(GROUPS)
    q_empty = mbarrier.allocate_mbarrier(GROUPS)
    k_full = mbarrier.allocate_mbarrier(STAGES)
    k_empty = mbarrier.allocate_mbarrier(STAGES)
    v_full = mbarrier.allocate_mbarrier(STAGES)
    v_empty = mbarrier.allocate_mbarrier(STAGES)
    for i in gl.static_range(GROUPS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=4)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=4 * GROUPS)
        mbarrier.init(v_empty.index(i), count=4 * GROUPS)
    fence_async_shared()
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (o_desc, lse_ptr, q_shared, k_shared, v_shared, o_shared, q_full, q_empty, k_full, k_empty, v_full, v_empty, queries, keys, blocks, heads, batch, section, slope, 0, GROUPS, BN, DK, DV, STAGES, CAUSAL, SNAKE, TURNS, POLYNOMIAL, SHARED_O)),
                (_consume, (o_desc, lse_ptr, q_shared, k_shared, v_shared, o_shared, q_full, q_empty, k_full, k_empty, v_full, v_empty, queries, keys, blocks, heads, batch, section, slope, 1, GROUPS, BN, DK, DV, STAGES, CAUSAL, SNAKE, TURNS, POLYNOMIAL, SHARED_O)),
                (_produce, (q_desc, k_desc, v_desc, q_shared, k_shared, v_shared, q_full, q_empty, k_full, k_empty, v_full, v_empty, keys, blocks, heads, key_heads, batch, section, GROUPS, BN, STAGES, CAUSAL, SNAKE)),
            ],
            [4, 1],
            [REGISTERS, 504 - 2 * REGISTERS],
        )
    if GROUPS == 3:
        gl.warp_specialize(
            [
                (_consume, (o_desc, lse_ptr, q_shared, k_shared, v_shared, o_shared, q_full, q_empty, k_full, k_empty, v_full, v_empty, queries, keys, blocks, heads, batch, section, slope, 0, GROUPS, BN, DK, DV, STAGES, CAUSAL, SNAKE, TURNS, POLYNOMIAL, SHARED_O)),
                (_consume, (o_desc, lse_ptr, q_shared, k_shared, v_shared, o_shared, q_full, q_empty, k_full, k_empty, v_full, v_empty, queries, keys, blocks, heads, batch, section, slope, 1, GROUPS, BN, DK, DV, STAGES, CAUSAL, SNAKE, TURNS, POLYNOMIAL, SHARED_O)),
                (_consume, (o_desc, lse_ptr, q_shared, k_shared, v_shared, o_shared, q_full, q_empty, k_full, k_empty, v_full, v_empty, queries, keys, blocks, heads, batch, section, slope, 2, GROUPS, BN, DK, DV, STAGES, CAUSAL, SNAKE, TURNS, POLYNOMIAL, SHARED_O)),
                (_produce, (q_desc, k_desc, v_desc, q_shared, k_shared, v_shared, q_full, q_empty, k_full, k_empty, v_full, v_empty, keys, blocks, heads, key_heads, batch, section, GROUPS, BN, STAGES, CAUSAL, SNAKE)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 512 - 3 * REGISTERS],
        )
