"""Attention forward: FlashAttention-3's schedule (Shah et al., 2024, arXiv:2407.08608, section 3).

One warp loads. Two or three groups of four warps compute, each on 64 queries. While the tensor cores multiply for a
group, it works on the softmax of another block of keys: the scores of a block and the output of the block before are
under way together, and the weights are made while the latter still is. Groups take turns in sending products off, so
that the softmax of one runs beside the products of another.

As many programs as the chip has multiprocessors go through all blocks of queries, so that one block's first keys are
loaded while the block before is finished.
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

from jtile.ops.attention.hopper.band import key_blocks, visible
from jtile.ops.attention.hopper.pipeline import matrix, ring

# The groups' turns: barriers of the hardware, by numbers that Triton does not use.


@gluon.constexpr_function
def _turn(kind, group, groups):
    return f"barrier.cta.{kind} {8 + group % groups}, 256;"


@gluon.jit
def _wait_turn(group: gl.constexpr, groups: gl.constexpr):
    gl.inline_asm(_turn("sync", group, groups))


@gluon.jit
def _pass_turn(group: gl.constexpr, groups: gl.constexpr):
    gl.inline_asm(_turn("arrive", group + 1, groups))


@gluon.constexpr_function
def _exp2_text(by_polynomial):
    lines = ["{ .reg .f32 x, t, f, p; .reg .b32 n;"]
    for i in range(4):
        y, x = f"${i}", f"${4 + i}"
        if i < 4 - by_polynomial:
            lines.append(f"ex2.approx.ftz.f32 {y}, {x};")
        else:
            lines += [
                f"max.f32 x, {x}, 0fC2FA0000;",  # at least -125: the exponent stays positive
                "add.rn.f32 t, x, 0f4B400000;",  # 1.5 * 2^23, which leaves the nearest integer in the low bits
                "sub.rn.f32 f, t, 0f4B400000;",
                "sub.rn.f32 f, x, f;",
                "fma.rn.f32 p, f, 0f3D61FBB0, 0f3E786F0D;",
                "fma.rn.f32 p, p, f, 0f3F31798D;",
                "fma.rn.f32 p, p, f, 0f3F7FFB49;",
                "mov.b32 n, t;",
                "shl.b32 n, n, 23;",
                f"mov.b32 {y}, p;",
                f"add.s32 {y}, {y}, n;",
            ]
    return "\n".join([*lines, "}"])


@gluon.jit
def exp2(x, by_polynomial: gl.constexpr):
    """2^x for x <= 0, of every four elements so many on the multipliers, which have time to spare, the others on the
    special function units. 2^x = 2^n p(x - n) with n the integer nearest to x and p of degree 3, to 7.5e-5: less than
    what 16 bits round off. Below -125 it is 2^-125."""
    if by_polynomial == 0:
        return gl.exp2(x)
    return gl.inline_asm_elementwise(
        _exp2_text(by_polynomial), "=r,=r,=r,=r,r,r,r,r", [x], dtype=gl.float32, is_pure=True, pack=4
    )


@gluon.jit
def _tile(number, S: gl.constexpr):
    """The block of queries, the batch and the head of a place in the order of work. So many heads are worked on
    together as have room for their keys and values in the cache; of these the longest blocks go first."""
    before = number // (S.together * S.query_blocks) * S.together
    together = gl.minimum(S.together, S.batch * S.heads - before)
    number -= before * S.query_blocks
    block = number // together
    head = before + number % together
    if S.high is not None:
        block = S.query_blocks - 1 - block
    return block, head // S.heads, head % S.heads


@gluon.jit
def _number(n):
    """The n-th place that a program takes: programs take places in turn, back and forth, and so share long and short
    blocks evenly."""
    programs = gl.num_programs(0)
    i = gl.program_id(0)
    return n * programs + gl.where(n % 2 == 0, i, programs - 1 - i)


@gluon.jit
def _load(q_desc, k_desc, v_desc, q, k, v, S: gl.constexpr):
    groups: gl.constexpr = S.groups
    n = 0
    step = 0
    number = _number(n)
    while number < S.tiles:
        block, b, h = _tile(number, S)
        start, _, _, stop = key_blocks(block, S)
        for group in gl.static_range(groups):
            q.load(n * groups + group, q_desc, [b, h, block * S.block_q + group * 64, 0])
        for i in range(start, stop):
            place = [b, h // S.group, (start + stop - 1 - i) * S.block_k, 0]
            k.load(step, k_desc, place)
            v.load(step, v_desc, place)
            step += 1
        n += 1
        number = _number(n)


@gluon.jit
def _softmax(s, peak, total, masked: gl.constexpr, S: gl.constexpr):
    """Of a block of scores the weights, relative to the rows' largest scores so far; these and the sums of weights so
    far; and the factor by which what was summed before shrinks."""
    new_peak = gl.maximum(peak, gl.max(s, 1) * S.slope)
    zero = new_peak
    if masked:  # the weights of a row that has seen no key are 0
        zero = gl.where(new_peak == -float("inf"), 0.0, new_peak)
    x = s * S.slope - zero[:, None]
    p = exp2(x, 0 if masked else S.by_polynomial)
    shrink = gl.exp2(peak - zero)
    return p, new_peak, total * shrink + gl.sum(p, 1), shrink


@gluon.jit
def _step(j, step, q, k, v, rows, cols, peak, total, p, o, masked: gl.constexpr, group: gl.constexpr, S: gl.constexpr):
    """Sends off the scores of block j and the output of the block before, and makes the weights of j meanwhile."""
    k.wait(step)
    if S.turns:
        _wait_turn(group, S.groups)
    zeros = gl.zeros([64, S.block_k], gl.float32, rows.type.layout.parent)
    s = warpgroup_mma(q, k.block(step).permute((1, 0)), zeros, use_acc=False, is_async=True)
    v.wait(step - 1)
    o = warpgroup_mma(p, v.block(step - 1), o, is_async=True)
    if S.turns:
        _pass_turn(group, S.groups)
    s = warpgroup_mma_wait(1, deps=[s])
    k.release(step)
    if masked:
        s = gl.where(visible(rows[:, None], (j * S.block_k + cols)[None, :], S), s, -float("inf"))
    weights, peak, total, shrink = _softmax(s, peak, total, masked, S)
    v.wait(step - 1)  # it is there: the branch in this keeps the assembler from moving the next wait before the softmax
    o = warpgroup_mma_wait(0, deps=[o])
    v.release(step - 1)
    o = o * gl.convert_layout(shrink, gl.SliceLayout(1, o.type.layout))[:, None]
    return peak, total, gl.convert_layout(weights.to(p.dtype), p.type.layout), o


@gluon.jit
def _compute(o_desc, lse_ptr, q_ring, k, v, o_shared, group: gl.constexpr, S: gl.constexpr):
    dtype: gl.constexpr = o_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, S.block_k, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, S.value_width, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    cols = gl.arange(0, S.block_k, gl.SliceLayout(0, s_layout))
    if S.turns and group == S.groups - 1:
        _pass_turn(group, S.groups)
    n = 0
    step = 0
    number = _number(n)
    while number < S.tiles:
        block, b, h = _tile(number, S)
        start, whole_start, whole_stop, stop = key_blocks(block, S)
        row = block * S.block_q + group * 64
        rows = row + gl.arange(0, 64, row_layout)

        # The last block, which has no other's products to run beside.
        q_ring.wait(n * S.groups + group)
        q = q_ring.block(n * S.groups + group)
        k.wait(step)
        s = warpgroup_mma(q, k.block(step).permute((1, 0)), gl.zeros([64, S.block_k], gl.float32, s_layout), use_acc=False)
        k.release(step)
        s = gl.where(visible(rows[:, None], ((stop - 1) * S.block_k + cols)[None, :], S), s, -float("inf"))
        peak = gl.full([64], -float("inf"), gl.float32, row_layout)
        p, peak, total, _ = _softmax(s, peak, gl.zeros([64], gl.float32, row_layout), True, S)
        p = gl.convert_layout(p.to(dtype), p_layout)
        o = gl.zeros([64, S.value_width], gl.float32, o_layout)
        step += 1

        whole_stop = gl.minimum(whole_stop, stop - 1)
        whole_start = gl.minimum(whole_start, whole_stop)
        for i in range(whole_stop, stop - 1):
            j = whole_stop + stop - 2 - i
            peak, total, p, o = _step(j, step, q, k, v, rows, cols, peak, total, p, o, True, group, S)
            step += 1
        for i in range(whole_start, whole_stop):
            peak, total, p, o = _step(0, step, q, k, v, rows, cols, peak, total, p, o, False, group, S)
            step += 1
        for i in range(start, whole_start):
            j = start + whole_start - 1 - i
            peak, total, p, o = _step(j, step, q, k, v, rows, cols, peak, total, p, o, True, group, S)
            step += 1

        if not S.out_in_query:
            q_ring.release(n * S.groups + group)
        v.wait(step - 1)
        o = warpgroup_mma(p, v.block(step - 1), o)
        v.release(step - 1)
        lse = 0.6931471805599453 * (peak + gl.log2(total))
        gl.store(lse_ptr + (b * S.queries + rows) * S.heads + h, lse, rows < S.queries)
        over_total = gl.where(total == 0.0, 0.0, 1.0 / total)
        o = o * gl.convert_layout(over_total, gl.SliceLayout(1, o_layout))[:, None]
        tma.store_wait(0)
        matrix(o_shared.index(group)).store(o.to(dtype))
        fence_async_shared()
        tma.async_store(o_desc, [b, h, row, 0], o_shared.index(group))
        if S.out_in_query:
            tma.store_wait(0)
            q_ring.release(n * S.groups + group)
        n += 1
        number = _number(n)
    tma.store_wait(0)
    if S.turns and group == 0:
        _wait_turn(group, S.groups)


@gluon.jit
def attention(q_desc, k_desc, v_desc, o_desc, lse_ptr, S: gl.constexpr):
    q = ring(q_desc, S.groups, 1)
    k = ring(k_desc, S.stages, S.groups)
    v = ring(v_desc, S.stages, S.groups)
    o_shared = q.blocks
    if not S.out_in_query:
        o_shared = gl.allocate_shared_memory(o_desc.dtype, [S.groups, 1, 1, 64, S.value_width], o_desc.layout)
    fence_async_shared()
    if S.groups == 2:
        gl.warp_specialize(
            [
                (_compute, (o_desc, lse_ptr, q, k, v, o_shared, 0, S)),
                (_compute, (o_desc, lse_ptr, q, k, v, o_shared, 1, S)),
                (_load, (q_desc, k_desc, v_desc, q, k, v, S)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_compute, (o_desc, lse_ptr, q, k, v, o_shared, 0, S)),
                (_compute, (o_desc, lse_ptr, q, k, v, o_shared, 1, S)),
                (_compute, (o_desc, lse_ptr, q, k, v, o_shared, 2, S)),
                (_load, (q_desc, k_desc, v_desc, q, k, v, S)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )
