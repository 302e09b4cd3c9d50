"""What only a GPU can tell: that the launches do what the messages say."""

import functools
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton
import triton.language as tl
from jax.experimental import pallas as pl

import jtile
from jtile.compiler.interpret import interpret_pallas
from jtile.compiler.pallas import retarget_pallas
from jtile.compiler.params import CompilerParams
from jtile.compiler.target import Target
from jtile.compiler.triton_call import triton_call
from jtile.report import inspect
from tests.compiler import test_emit, test_pallas, test_triton_call
from tests.compiler.kernels import CASES

pytestmark = pytest.mark.gpu


hopper = pytest.mark.gpu(compute_capability=90)


def random(*shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


def test_the_chip_is_what_the_table_says():
    chip = Target.current()
    assert chip.compute_capability >= 80 and chip.sms > 0
    if chip.memory_bandwidth is not None and "MIG" not in chip.name:
        known = Target.named(chip.name)
        assert (chip.sms, chip.shared_bytes_per_block) == (known.sms, known.shared_bytes_per_block)


@pytest.mark.parametrize("rows", [1024, 1000])
@pytest.mark.parametrize("num_warps", [1, 8])
def test_pallas_kernel(rows, num_warps):
    call = functools.partial(test_pallas.call, compiler_params=CompilerParams(num_warps=num_warps))
    x = random(rows, 64)
    for _ in range(3):  # the tenth run is no other than the first
        np.testing.assert_array_equal(jax.jit(call)(x), 3 * x)


def test_aliased_operand():
    x = random(1024, 64)
    call = functools.partial(test_pallas.call, input_output_aliases={0: 0})
    y, kept = jax.jit(lambda x: (call(x), x + 0))(x)
    np.testing.assert_array_equal(y, 3 * x)
    np.testing.assert_array_equal(kept, x)


def test_triton_kernel_and_vmap():
    # The kernel rounds once, in a fused multiply-add; 2.5 y, of size up to 10, is rounded on its own here.
    close = functools.partial(np.testing.assert_allclose, rtol=2**-23, atol=10 * 2**-24)
    x, y = random(1000), random(1000)
    close(test_triton_call.scaled_sum(x, y), x + 2.5 * y)
    xs = random(3, 1000)
    close(jax.vmap(test_triton_call.scaled_sum, (0, None))(xs, y), xs + 2.5 * y)


def test_scalars_aliases_and_zeroed_results():
    """Every time anew: `counts` starts at its operand's contents zeroed, `total` at zero."""

    @jax.jit
    def call(counts, x):
        scalar = jax.ShapeDtypeStruct((), jnp.int32)
        return triton_call(
            counts,
            x,
            1,
            True,
            2**33 + 5,
            None,
            N=64,
            kernel=test_triton_call.shift,
            out_shape=(scalar, scalar, jax.ShapeDtypeStruct((64,), jnp.int32)),
            grid=1,
            input_output_aliases={0: 0},
            zeroed_outputs=(0, 1),
        )

    x = jnp.arange(64, dtype=jnp.int32)
    for _ in range(2):
        counted, total, y = call(jnp.int32(41), x)
        assert (int(counted), int(total)) == (1, int(jnp.sum(x + 6)))
        np.testing.assert_array_equal(y, x + 6)


@triton.jit
def copy_by_descriptors(x, y):
    source = tl.make_tensor_descriptor(x, (128, 128), (128, 1), (64, 64))
    target = tl.make_tensor_descriptor(y, (128, 128), (128, 1), (64, 64))
    i, j = tl.program_id(0) * 64, tl.program_id(1) * 64
    target.store((i, j), source.load((i, j)) * 2)


@hopper
def test_descriptors_made_on_the_device():
    call = functools.partial(triton_call, kernel=copy_by_descriptors, grid=(2, 2))
    x = random(128, 128)
    np.testing.assert_array_equal(jax.jit(lambda x: call(x, out_shape=x))(x), 2 * x)


@hopper
def test_gluon_with_a_descriptor_made_by_the_host():
    a, b = random(64, 64, dtype=jnp.bfloat16), random(64, 64, dtype=jnp.bfloat16)
    expected = np.asarray(a, np.float32) @ np.asarray(b, np.float32)
    # Products of bfloat16 are exact in float32; the tensor core sums 64 of them, of size about 1.
    np.testing.assert_allclose(jax.jit(test_triton_call.call_product)(a, b), expected, atol=64 * 2**-20)


@hopper
def test_warp_specialised_kernel():
    x = random(256)
    np.testing.assert_array_equal(jax.jit(test_triton_call.call_two_roles)(x), x)


@hopper
def test_cluster():
    x = random(1024, 64)
    call = functools.partial(test_pallas.call, compiler_params=CompilerParams(num_ctas=2))
    np.testing.assert_array_equal(jax.jit(call)(x), 3 * x)


def test_operands_may_be_parts_of_arrays_that_begin_anywhere():
    x, scale = random(8, 128), random(129)
    norms = {
        implementation: jax.jit(lambda x, s, i=implementation: jtile.rms_norm(x, s[1:], implementation=i))(x, scale)
        for implementation in ("triton", "xla")
    }
    assert jnp.allclose(norms["triton"], norms["xla"], rtol=1e-5, atol=1e-5)


def test_inspect_for_the_present_gpu():
    [kernel] = inspect(test_pallas.call, random(1024, 64), target=None)
    assert (kernel.name, kernel.spill_bytes) == ("triple", 0)


def test_exported_program_runs():
    allowed = jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")
    exported = jax.export.export(jax.jit(test_pallas.call), platforms=["cuda"], disabled_checks=[allowed])
    x = random(1024, 64)
    again = jax.export.deserialize(exported(x).serialize())
    np.testing.assert_array_equal(again.call(x), 3 * x)


# Every kernel of tests/compiler/kernels, compiled and run.


@pytest.mark.parametrize("name", CASES)
def test_kernels_compute_what_pallas_does(name):
    function, operands = CASES[name]
    with jax.default_matmul_precision("highest"):  # the CPU has no TF32
        found = jax.jit(retarget_pallas(function))(*operands)
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            expected = jax.jit(interpret_pallas(function))(*operands)
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert f.shape == e.shape and f.dtype == e.dtype
        tolerance = 2e-3 if "half" in name else 3e-5  # of float16: two units in the last place
        np.testing.assert_allclose(np.asarray(f, np.float64), np.asarray(e, np.float64), tolerance, tolerance)


# Sizes at which 32 bits, or CUDA's limits, are not enough.


def double_by_rows(x, rows, **params):
    """2 x, in blocks of so many rows."""

    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...] * 2

    spec = pl.BlockSpec((rows, *x.shape[1:]), lambda i: (i,) + (0,) * (x.ndim - 1))
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(x.shape[0], rows),),
        in_specs=[spec],
        out_specs=spec,
        out_shape=x,
        compiler_params=CompilerParams(**params),
    )(x)


GRIDS = [(70_000,), (2, 70_000), (2, 3, 70_000), (70_000, 3, 2), (300, 70_000), (3, 5, 4, 2), (2, 3, 2, 2, 3, 70_000)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_grids(grid):
    """Past 65,535 along any axis and past three axes, every program runs once, and knows its place."""

    def kernel(x_ref, y_ref):
        place = 0
        for axis, size in enumerate(grid):
            place = place * size + pl.program_id(axis)
        y_ref[0] = x_ref[0] + place

    spec = pl.BlockSpec((*(None for _ in grid[1:]), 1), lambda *ids: (*ids[1:], ids[0]))
    x = jnp.ones((*grid[1:], grid[0]), jnp.int32)
    call = pl.pallas_call(
        kernel, grid=grid, in_specs=[spec], out_specs=spec, out_shape=x, compiler_params=CompilerParams(num_warps=1)
    )
    expected = np.moveaxis(1 + np.arange(math.prod(grid), dtype=np.int32).reshape(grid), 0, -1)
    np.testing.assert_array_equal(jax.jit(call)(x), expected)


@hopper
@pytest.mark.parametrize("tma", [None, True])
@pytest.mark.parametrize("shape, rows", [((2**23 + 3, 256), 128), ((2**31 + 77,), 8192)], ids=["matrix", "vector"])
def test_past_two_to_the_31_elements(shape, rows, tma):
    """Blocks beyond, the last of them ragged, are read and written where they are."""
    x = jax.lax.broadcasted_iota(jnp.int8, shape, 0)  # wraps around
    if len(shape) == 2:
        x += jax.lax.broadcasted_iota(jnp.int8, shape, 1) * 3
    y = jax.jit(functools.partial(double_by_rows, rows=rows, tma=tma))(x)
    assert bool(jax.jit(lambda x, y: jnp.all(y == x * 2))(x, y))


def test_rows_picked_past_two_to_the_31_elements():
    """By indices from memory, loaded and stored."""
    n = 2**21 + 3
    rows = np.asarray([0, 5, 2**20, 2**21 - 1, 2**21, n - 1, 7, 2**21 + 1], np.int32)

    def kernel(x_ref, rows_ref, picked_ref, y_ref):
        picked_ref[...] = x_ref[rows_ref[...]]
        y_ref[rows_ref[...]] = x_ref[rows_ref[...]] + 1

    x = jax.lax.broadcasted_iota(jnp.int32, (n, 1024), 0).astype(jnp.int8)
    call = pl.pallas_call(
        kernel,
        out_shape=(jax.ShapeDtypeStruct((len(rows), 1024), x.dtype), x),
        input_output_aliases={0: 1},
        compiler_params=CompilerParams(),
    )
    picked, y = jax.jit(call, donate_argnums=0)(x, rows)
    before = rows.astype(np.int8)
    np.testing.assert_array_equal(picked, np.broadcast_to(before[:, None], picked.shape))
    np.testing.assert_array_equal(y[rows], np.broadcast_to(before[:, None] + np.int8(1), picked.shape))
    assert int(jnp.sum(y[:, 0] != jax.lax.iota(jnp.int32, n).astype(jnp.int8))) == len(rows)  # and nowhere else


@pytest.mark.parametrize("tma", [None, True])
def test_no_elements_and_no_programs(tma):
    """An empty operand reads as 0; a launch of no programs leaves an aliased operand as it was."""
    function, operands = CASES["ref_of_no_elements"]
    retargeted = retarget_pallas(function)
    np.testing.assert_array_equal(jax.jit(retargeted)(*operands), np.ones((7, 8)))
    for shape in ((0, 64), (0,)):
        empty = jnp.zeros(shape)
        assert jax.jit(functools.partial(double_by_rows, rows=8, tma=tma))(empty).shape == shape
    x = random(8, 64)
    call = functools.partial(test_pallas.call, compiler_params=CompilerParams(tma=tma))
    np.testing.assert_array_equal(jax.jit(call)(x[:0]), x[:0])


# Another process finds the program in JAX's persistent cache.


def test_another_process_finds_the_compiled_program(tmp_path):
    script = """
import sys, jax
from tests.compiler import test_on_gpu, test_pallas

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
x = test_on_gpu.random(1024, 64)
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
y = jax.jit(test_pallas.call)(x)
print(bool((y == 3 * x).all()), events.count("/jax/compilation_cache/cache_hits") > 0)
"""
    outputs = []
    for seed in "12":
        environment = os.environ | {"PYTHONHASHSEED": seed, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        run = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        outputs.append(run.stdout.split())
    assert outputs == [["True", "False"], ["True", "True"]]


def rows_of_heads(x, **params):
    """Twice (batch, sequence, heads, head_dim), by blocks of 64 rows of a head; the last ones are ragged."""

    def kernel(x_ref, y_ref):
        y_ref[...] = 2 * x_ref[...]

    spec = pl.BlockSpec((None, 64, None, x.shape[-1]), lambda b, h, i: (b, i, h, 0))
    grid = x.shape[0], x.shape[2], pl.cdiv(x.shape[1], 64)
    params = CompilerParams(**params)
    return pl.pallas_call(kernel, out_shape=x, grid=grid, in_specs=[spec], out_specs=spec, compiler_params=params)(x)


@hopper
@pytest.mark.parametrize("params", [{"tma": True}, {"tma": True, "persistent": True}, {"persistent": True}], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96])
def test_blocks_of_heads(params, head_dim):
    x = random(3, 200, 5, head_dim, dtype=jnp.bfloat16)
    for _ in range(2):
        np.testing.assert_array_equal(jax.jit(functools.partial(rows_of_heads, **params))(x), 2 * x)


@hopper
@pytest.mark.parametrize("shape", test_emit.RANKS, ids=len)
def test_tma_in_any_number_of_dimensions(shape):
    x = random(*shape)
    np.testing.assert_array_equal(jax.jit(test_emit.rows_doubled(shape))(x), 2 * x)


def scores_times_values(q, k, v, mask, **params):
    """exp2(q k') v for 128 queries at a time, where the query's index is no less than the key's if masked."""

    def kernel(q_ref, k_ref, v_ref, o_ref):
        first = pl.program_id(0) * 128

        def step(i, acc):
            here = pl.ds(i * 128, 128)
            scores = jnp.dot(q_ref[...], k_ref[here, :].T, preferred_element_type=jnp.float32)
            if mask:
                rows = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
                columns = i * 128 + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
                scores = jnp.where(rows >= columns, scores, -jnp.inf)
            return acc + jnp.dot(jnp.exp2(scores).astype(q.dtype), v_ref[here, :], preferred_element_type=jnp.float32)

        o_ref[...] = jax.lax.fori_loop(0, len(k) // 128, step, jnp.zeros((128, v.shape[1]), jnp.float32)).astype(
            q.dtype
        )

    rows = pl.BlockSpec((128, q.shape[1]), lambda i: (i, 0))
    whole = pl.BlockSpec(k.shape, lambda i: (0, 0))
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((len(q), v.shape[1]), q.dtype),
        grid=(len(q) // 128,),
        in_specs=[rows, whole, whole],
        out_specs=rows,
        compiler_params=CompilerParams(num_warps=8, **params),
    )(q, k, v)


@hopper
@pytest.mark.parametrize("mask", [False, True])
def test_two_groups_of_warps(mask):
    """Each has half of a block's rows, and masks them by their own numbers; ten times over, in one CUDA graph too."""
    q, k, v = (random(1024, 128, dtype=jnp.bfloat16) / 8 for _ in range(3))
    call = functools.partial(scores_times_values, mask=mask)
    [kernel] = inspect(call, q, k, v, target=None)
    assert kernel.threads == 384

    program = jax.jit(lambda q, k, v: call(jnp.sort(q, axis=0), k, v) * 2)
    q = jnp.sort(q, axis=0)
    expected = 2 * jax.jit(functools.partial(call, warp_specialize=False, tma=False))(q, k, v).astype(jnp.float32)
    for _ in range(10):
        # The same products of the same numbers, summed in an order that may differ: one unit in the last place.
        np.testing.assert_allclose(program(q, k, v).astype(jnp.float32), expected, rtol=2**-7, atol=2**-9)
