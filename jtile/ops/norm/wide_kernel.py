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


@gluon.jit
def _copy(rows, slot, ptr, inside, S: gl.constexpr):
    parts: gl.constexpr = S.parts
    for j in gl.static_range(parts):
        async_copy.async_load(rows.index(slot * parts + j), ptr + j * S.lanes, mask=inside[j])


@gluon.jit
def _fetch(turn, x_ptr, dy_ptr, xs, dys, lanes, inside, S: gl.constexpr):
    row = gl.program_id(0) + turn * gl.num_programs(0)
    if row < S.rows:
        slot = turn % S.slots
        start = gl.cast(row, gl.int64) * S.width
        _copy(xs, slot, x_ptr + start + lanes, inside, S)
        _copy(dys, slot, dy_ptr + start + lanes, inside, S)
    async_copy.commit_group()


@gluon.jit
def _read(xs, dys, scale, slot, j: gl.constexpr, mean, rstd, inside, layout: gl.constexpr, S: gl.constexpr):
    """n, ȳ and its product with the scale, of a part of a row; 0 past its end."""
    n = (xs.index(slot * S.parts + j).load(layout).to(gl.float32) - mean) * rstd
    dy = dys.index(slot * S.parts + j).load(layout).to(gl.float32)
    if S.ragged:
        n = gl.where(inside[j], n, 0.0)
        dy = gl.where(inside[j], dy, 0.0)
    return n, dy, dy * scale


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
    for k in gl.static_range(ahead):
        _fetch(k, x_ptr, dy_ptr, xs, dys, lanes, inside, S)
    # All programs are at neighbouring rows, which lie in few pages of memory.
    for turn in range(gl.cdiv(S.rows - gl.program_id(0), gl.num_programs(0))):
        row = gl.program_id(0) + turn * gl.num_programs(0)
        start = gl.cast(row, gl.int64) * S.width
        slot = turn % S.slots
        if S.residual:
            _copy(dhs, 0, dh_ptr + start + lanes, inside, S)
            async_copy.commit_group()
        _fetch(turn + ahead, x_ptr, dy_ptr, xs, dys, lanes, inside, S)
        rstd = gl.load(rstd_ptr + row)
        mean = 0.0
        if S.centred:
            mean = gl.load(mean_ptr + row)

        async_copy.wait_group(ahead + 1 if S.residual else ahead)
        gn = zeros
        sum_g = zeros
        dscale_before = dscale
        dbias_before = dbias
        dscale = ()
        dbias = ()
        for j in gl.static_range(parts):
            n, dy, g = _read(xs, dys, scale[j], slot, j, mean, rstd, inside, layout, S)
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
        mean_gn = mean_gn / S.width

        # This wait, which is over at once where there is no dh, also keeps the compiler from reading a row only once.
        async_copy.wait_group(1 if S.residual else ahead)
        for j in gl.static_range(parts):
            n, _, g = _read(xs, dys, scale[j], slot, j, mean, rstd, inside, layout, S)
            dx = rstd * (g - n * mean_gn - mean_g)
            if S.residual:
                dx += dhs.index(j).load(layout).to(gl.float32)
            gl.store(dx_ptr + start + lanes + j * S.lanes, dx.to(dtype), mask=inside[j])
    async_copy.wait_group(0)
    for j in gl.static_range(parts):
        at = gl.program_id(0) * S.width + j * S.lanes + lanes
        gl.store(dscale_ptr + at, dscale[j], mask=inside[j])
        if S.biased:
            gl.store(dbias_ptr + at, dbias[j], mask=inside[j])
