"""The backward pass over rows that fill a multiprocessor: of up to 16,384 elements, in Gluon.

Sums over rows of a row's width take a quarter of the registers each, so registers hold little else. Shared memory has
the scale, the row that is computed and the next one, which is on its way. A row is read from there twice, in parts: for
its means, and for what follows from them. Each thread reads what it has copied itself.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy


@gluon.jit
def _copy(shared, slot, ptr, mask, PARTS: gl.constexpr, LANES: gl.constexpr):
    for j in gl.static_range(PARTS):
        async_copy.async_load(shared.index(slot * PARTS + j), ptr + j * LANES, mask=mask[j])


@gluon.jit
def _fetch(
    row, slot, stop, x_ptr, dy_ptr, xs, dys, inside, lanes,
    WIDTH: gl.constexpr, PARTS: gl.constexpr, LANES: gl.constexpr,
):  # fmt: skip
    if row < stop:
        at = row.to(gl.int64) * WIDTH + lanes
        _copy(xs, slot, x_ptr + at, inside, PARTS, LANES)
        _copy(dys, slot, dy_ptr + at, inside, PARTS, LANES)
    async_copy.commit_group()


@gluon.jit
def _add(a, b, c, d):
    return a + c, b + d


@gluon.jit
def wide_backward(
    x_ptr, scale_ptr, rstd_ptr, mean_ptr, dy_ptr, dh_ptr, dx_ptr, dscale_ptr, dbias_ptr, rows, steps,
    WIDTH: gl.constexpr, PARTS: gl.constexpr, LANES: gl.constexpr, CENTRED: gl.constexpr, RESIDUAL: gl.constexpr,
    BIASED: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [gl.num_warps()], [0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lanes = gl.arange(0, LANES, layout)
    scales = gl.allocate_shared_memory(gl.float32, [PARTS, LANES], plain)
    xs = gl.allocate_shared_memory(dtype, [SLOTS * PARTS, LANES], plain)
    dys = gl.allocate_shared_memory(dtype, [SLOTS * PARTS, LANES], plain)
    dhs = gl.allocate_shared_memory(dtype, [PARTS, LANES], plain)
    inside = ()
    dscale = ()
    dbias = ()
    for j in gl.static_range(PARTS):
        inside += (lanes < WIDTH - j * LANES,)
        scales.index(j).store(gl.load(scale_ptr + j * LANES + lanes, mask=inside[j], other=0.0))
        dscale += (gl.zeros([LANES], gl.float32, layout),)
        dbias += (gl.zeros([LANES], gl.float32, layout),)
    first = gl.program_id(0) * steps
    stop = gl.minimum(first + steps, rows)
    for k in gl.static_range(SLOTS - 1):
        _fetch(first + k, k, stop, x_ptr, dy_ptr, xs, dys, inside, lanes, WIDTH, PARTS, LANES)
    for row in range(first, stop):
        at = row.to(gl.int64) * WIDTH + lanes
        slot = (row - first) % SLOTS
        if RESIDUAL:
            _copy(dhs, 0, dh_ptr + at, inside, PARTS, LANES)
            async_copy.commit_group()
        ahead = row + (SLOTS - 1)
        _fetch(ahead, (ahead - first) % SLOTS, stop, x_ptr, dy_ptr, xs, dys, inside, lanes, WIDTH, PARTS, LANES)
        rstd = gl.load(rstd_ptr + row)
        mean = 0.0
        if CENTRED:
            mean = gl.load(mean_ptr + row)
        async_copy.wait_group((SLOTS - 1) * (2 if RESIDUAL else 1))
        gn = gl.zeros([LANES], gl.float32, layout)
        g_sum = gl.zeros([LANES], gl.float32, layout)
        added = ()
        added_bias = ()
        for j in gl.static_range(PARTS):
            n = (xs.index(slot * PARTS + j).load(layout).to(gl.float32) - mean) * rstd
            dy = dys.index(slot * PARTS + j).load(layout).to(gl.float32)
            g = dy * scales.index(j).load(layout)
            gn += g * n
            g_sum += g
            added += (dscale[j] + dy * n,)
            added_bias += (dbias[j] + dy,)
        dscale = added
        if BIASED:
            dbias = added_bias
        if CENTRED:
            mean_gn, mean_g = gl.reduce((gn, g_sum), 0, _add)
            mean_g /= WIDTH
        else:
            mean_gn = gl.sum(gn, 0)
        mean_gn /= WIDTH
        async_copy.wait_group(1 if RESIDUAL else SLOTS - 1)
        for j in gl.static_range(PARTS):
            n = (xs.index(slot * PARTS + j).load(layout).to(gl.float32) - mean) * rstd
            dx = dys.index(slot * PARTS + j).load(layout).to(gl.float32) * scales.index(j).load(layout) - n * mean_gn
            if CENTRED:
                dx -= mean_g
            dx *= rstd
            if RESIDUAL:
                dx += dhs.index(j).load(layout).to(gl.float32)
            gl.store(dx_ptr + at + j * LANES, dx.to(dtype), mask=inside[j])
    async_copy.wait_group(0)
    for j in gl.static_range(PARTS):
        part = gl.program_id(0) * WIDTH + j * LANES + lanes
        gl.store(dscale_ptr + part, dscale[j], mask=inside[j])
        if BIASED:
            gl.store(dbias_ptr + part, dbias[j], mask=inside[j])
