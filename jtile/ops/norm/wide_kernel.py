"""The backward pass over rows that fill a multiprocessor, of up to 16,384 elements, in Gluon.

Registers hold the scale and the sums over rows, of which each takes a quarter of them, and little else. Shared memory
has the row that is computed and the next one, which is on its way. A row is read from there twice, in parts: for its
means, and for what follows from them. Each thread reads what it has copied itself.
"""

# Tuples grow here, which mypy has no type for.
# mypy: disable-error-code="assignment"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

UNPACK = gl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")


@gluon.jit
def _copy(rows, slot, ptr, inside, S: gl.constexpr):
    parts: gl.constexpr = S.parts
    for j in gl.static_range(parts):
        async_copy.async_load(rows.index(slot * parts + j), ptr + j * S.lanes, mask=inside[j])


@gluon.jit
def _fetch(turn, first, apart, stop, x_ptr, dy_ptr, xs, dys, lanes, inside, S: gl.constexpr):
    row = first + turn * apart
    if row < stop:
        slot = turn % S.slots
        start = gl.cast(row, gl.int64) * S.width
        _copy(xs, slot, x_ptr + start + lanes, inside, S)
        _copy(dys, slot, dy_ptr + start + lanes, inside, S)
    async_copy.commit_group()


@gluon.jit
def _wide(x):
    """In float32. Of two bfloat16 in a register each takes one instruction; Triton's conversion takes three."""
    if x.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(UNPACK, "=r,=r,r", [x], dtype=gl.float32, is_pure=True, pack=2)
    else:
        return x.to(gl.float32)


@gluon.jit
def _read(xs, dys, slot, j: gl.constexpr, inside, layout: gl.constexpr, S: gl.constexpr):
    """x and ȳ of a part of a row; 0 past its end."""
    x = _wide(xs.index(slot * S.parts + j).load(layout))
    dy = _wide(dys.index(slot * S.parts + j).load(layout))
    if S.ragged:
        x = gl.where(inside[j], x, 0.0)
        dy = gl.where(inside[j], dy, 0.0)
    return x, dy


@gluon.jit
def _add(a, b, c, d):
    return a + c, b + d


@gluon.jit
def wide_backward(
    x_ptr, scale_ptr, rstd_ptr, mean_ptr, dy_ptr, dh_ptr, dx_ptr, dscale_ptr, dbias_ptr, S: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    parts: gl.constexpr = S.parts
    ahead: gl.constexpr = S.slots - 1
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [gl.num_warps()], [0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    xs = gl.allocate_shared_memory(dtype, [S.slots * S.parts, S.lanes], plain)
    dys = gl.allocate_shared_memory(dtype, [S.slots * S.parts, S.lanes], plain)
    dhs = gl.allocate_shared_memory(dtype, [S.parts, S.lanes], plain)
    lanes = gl.arange(0, S.lanes, layout)
    zeros = gl.zeros([S.lanes], gl.float32, layout)
    inside = ()
    scale = ()
    dscale = ()
    dbias = ()
    for j in gl.static_range(parts):
        inside += (lanes < S.width - j * S.lanes,)
        scale += (gl.load(scale_ptr + j * S.lanes + lanes, mask=inside[j], other=0.0),)
        dscale += (zeros,)
        dbias += (zeros,)
    # Sixteen warps are faster where all programs are at neighbouring rows, and eight where each has a share of its own.
    first = gl.program_id(0)
    apart = gl.num_programs(0)
    stop = S.rows
    if S.biased:
        first = gl.program_id(0) * S.steps
        apart = 1
        stop = gl.minimum(first + S.steps, S.rows)
    for k in gl.static_range(ahead):
        _fetch(k, first, apart, stop, x_ptr, dy_ptr, xs, dys, lanes, inside, S)
    for turn in range(gl.cdiv(stop - first, apart)):
        row = first + turn * apart
        start = gl.cast(row, gl.int64) * S.width
        slot = turn % S.slots
        if S.residual:
            _copy(dhs, 0, dh_ptr + start + lanes, inside, S)
            async_copy.commit_group()
        _fetch(turn + ahead, first, apart, stop, x_ptr, dy_ptr, xs, dys, lanes, inside, S)
        rstd = gl.load(rstd_ptr + row)
        offset = 0.0  # n = x · rstd + offset, but past the end of a row, where x̄ is not kept and ȳ is 0
        if S.centred:
            offset = -gl.load(mean_ptr + row) * rstd

        async_copy.wait_group(ahead + 1 if S.residual else ahead)
        gn = zeros
        sum_g = zeros
        dscale_before = dscale
        dbias_before = dbias
        dscale = ()
        dbias = ()
        for j in gl.static_range(parts):
            x, dy = _read(xs, dys, slot, j, inside, layout, S)
            n, g = x * rstd + offset, dy * scale[j]
            gn = gn + g * n
            sum_g = sum_g + g
            dscale += (dscale_before[j] + dy * n,)
            dbias += ((dbias_before[j] + dy) if S.biased else zeros,)
        if S.centred:
            mean_gn, mean_g = gl.reduce((gn, sum_g), 0, _add)
            mean_g = mean_g / S.width
        else:
            mean_gn = gl.sum(gn, 0)
            mean_g = 0.0
        # x̄ = rstd (g − n · mean_gn − mean_g), with as few operations for each element.
        mean_gn = rstd * mean_gn / S.width
        slope = -rstd * mean_gn
        level = -offset * mean_gn - rstd * mean_g

        # This wait, which is over at once where there is no dh, also keeps the compiler from reading a row only once.
        async_copy.wait_group(1 if S.residual else ahead)
        for j in gl.static_range(parts):
            x, dy = _read(xs, dys, slot, j, inside, layout, S)
            dx = dy * rstd * scale[j] + (x * slope + level)
            if S.residual:
                dx += _wide(dhs.index(j).load(layout))
            gl.store(dx_ptr + start + lanes + j * S.lanes, dx.to(dtype), mask=inside[j])
    async_copy.wait_group(0)
    for j in gl.static_range(parts):
        at = gl.program_id(0) * S.width + j * S.lanes + lanes
        gl.store(dscale_ptr + at, dscale[j], mask=inside[j])
        if S.biased:
            gl.store(dbias_ptr + at, dbias[j], mask=inside[j])
