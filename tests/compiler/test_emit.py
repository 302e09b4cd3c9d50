"""The source that kernels become: what it computes, what it says, and that it is the same everywhere."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

import jtile
from jtile.compiler import launch
from jtile.compiler.interpret import interpret_pallas
from jtile.compiler.kernel import TileTooLarge, UnsupportedKernel
from jtile.compiler.pallas import retarget_pallas
from jtile.compiler.params import CompilerParams
from jtile.compiler.target import Target
from jtile.debugger import debug
from jtile.report import inspect
from tests.compiler.kernels import CASES, sources

ROOT = pathlib.Path(__file__).parent.parent.parent


def source(function, *operands, **params):
    (only,) = sources(function, *operands, **params)
    return only.text


def call(kernel, shape=(16,), dtype=jnp.float32, **options):
    """A function of one operand that runs `kernel` on it."""
    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(shape, dtype), **options)


@pytest.mark.parametrize("name", CASES)
def test_source_computes_what_pallas_does(name):
    function, operands = CASES[name]
    operands = [jnp.asarray(x) for x in operands]
    # The kernels are small: compiling is what takes time.
    by_pallas = jax.jit(interpret_pallas(function), compiler_options={"xla_backend_optimization_level": 0})
    found, expected = (jax.tree.leaves(f(*operands)) for f in (debug(function), by_pallas))
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape and f.dtype == e.dtype, (f.shape, f.dtype, e.shape, e.dtype)
        tolerance = 2e-3 if "half" in name else 1e-5  # of float16: two units in the last place
        np.testing.assert_allclose(np.asarray(f, np.float64), np.asarray(e, np.float64), tolerance, tolerance)


def test_source_is_the_same_in_every_process():
    program = (
        "import hashlib; from tests.compiler.kernels import sources, CASES;"
        "print([hashlib.sha256(s.text.encode()).hexdigest() for f, x in CASES.values() for s in sources(f, *x)])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"},
            check=True,
            capture_output=True,
            text=True,
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout


def test_source_reads_well():
    def softmax_kernel(x_ref, y_ref):
        x = x_ref[...]
        e = jnp.exp(x - jnp.max(x, axis=1, keepdims=True))
        y_ref[...] = e / jnp.sum(e, axis=1, keepdims=True)

    spec = pl.BlockSpec((4, 64), lambda i: (i, 0))
    (only,) = sources(call(softmax_kernel, (8, 64), grid=(2,), in_specs=[spec], out_specs=spec), np.ones((8, 64), "f"))
    line = softmax_kernel.__code__.co_firstlineno
    assert (
        only.annotated
        == f"""\
import triton
import triton.language as tl


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def softmax_kernel(x_ref, y_ref):
    lanes_4 = tl.arange(0, 4)
    lanes_64 = tl.arange(0, 64)
    offsets_1 = lanes_4[:, None] * 64 + lanes_64[None, :]
    pid_0 = tl.program_id(0)
    x_ref_block = x_ref + pid_0 * 256
    y_ref_block = y_ref + pid_0 * 256
    # test_emit.py:{line + 1}: x = x_ref[...]
    x_1 = tl.load(x_ref_block + offsets_1)
    # test_emit.py:{line + 2}: e = jnp.exp(x - jnp.max(x, axis=1, keepdims=True))
    max_1 = tl.reduce(x_1, axis=1, combine_fn=_maximum)
    spread_1 = max_1[:, None]
    sub_1 = x_1 - spread_1
    exp_1 = tl.exp(sub_1)
    # test_emit.py:{line + 3}: y_ref[...] = e / jnp.sum(e, axis=1, keepdims=True)
    sum_1 = tl.sum(exp_1, axis=1, dtype=tl.float32)
    spread_2 = sum_1[:, None]
    div_1 = exp_1 / spread_2
    tl.store(y_ref_block + offsets_1, div_1)
"""
    )
    # What is compiled is the same wherever the kernel stands in its file.
    assert only.text == "".join(s for s in only.annotated.splitlines(keepends=True) if "test_emit.py" not in s)


# Masks


def copy(block, shape, index_map=lambda i: (i, 0), grid=None):
    spec = pl.BlockSpec(block, index_map)

    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...]

    grid = (pl.cdiv(shape[0], block[0]),) if grid is None else grid
    return source(call(kernel, shape, grid=grid, in_specs=[spec], out_specs=spec), np.zeros(shape, "f"))


def test_blocks_that_divide_need_no_mask():
    assert "mask" not in copy((8, 64), (32, 64))


def test_ragged_blocks_are_masked_on_that_axis_alone():
    text = copy((8, 64), (33, 64))
    assert text.count("mask=pid_0 * 8 + lanes_8[:, None] < 33") == 2


def test_padding_is_masked():
    assert copy((8, 48), (32, 48)).count("mask=lanes_64[None, :] < 48") == 2


def test_one_test_masks_padding_and_edge():
    # Lanes 48 to 63 pad the block, and 40 to 63 lie outside of the array.
    assert copy((8, 48), (32, 40)).count("mask=lanes_64[None, :] < 40") == 2


def test_blocks_before_the_array_are_masked():
    text = copy((8, 64), (32, 64), lambda i: (i - 1, 0), grid=(4,))
    assert ">= 0" in text and "< 32" not in text


def test_loop_counters_prove_bounds():
    def kernel(x_ref, y_ref):
        last = pl.cdiv((pl.program_id(0) + 1) * 32, 16)
        step = lambda j, total: total + x_ref[pl.ds(j * 16, 16)]  # noqa: E731
        y_ref[...] = lax.fori_loop(pl.program_id(0) * 32 // 16, last, step, jnp.zeros(16))

    options = dict(
        grid=(2,), in_specs=[pl.BlockSpec((64,), lambda i: (0,))], out_specs=pl.BlockSpec((16,), lambda i: (i,))
    )
    assert "mask" not in source(call(kernel, (32,), **options), np.zeros(64, "f"))


def test_indices_read_from_memory_are_masked():
    def kernel(x_ref, i_ref, y_ref):
        y_ref[...] = x_ref[pl.ds(i_ref[0], 16)]

    text = source(call(kernel), np.zeros(64, "f"), np.zeros(1, "i"))
    assert "mask=(i_1 + lanes_16 >= 0) & (i_1 + lanes_16 < 64)" in text


# Integers


def test_large_arrays_have_wide_offsets():
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...]

    spec = pl.BlockSpec((None, 1024), lambda i: (i, 0))
    function = call(kernel, (2**21, 1024), grid=(2**21,), in_specs=[spec], out_specs=spec)
    assert "x_ref_block = x_ref + tl.cast(pid_0, tl.int64) * 1024\n" in source(
        function, jax.ShapeDtypeStruct((2**21, 1024), "f")
    )
    function = call(kernel, (2**20, 1024), grid=(2**20,), in_specs=[spec], out_specs=spec)
    assert "int64" not in source(function, jax.ShapeDtypeStruct((2**20, 1024), "f"))


def test_python_numbers_do_not_widen_in_x64_mode():
    def kernel(x_ref, y_ref):
        step = lambda j, total: total + x_ref[pl.ds(j * 16, 16)] * 0.5 + j * 2  # noqa: E731
        y_ref[...] = lax.fori_loop(0, 4, step, jnp.zeros(16, y_ref.dtype))

    for dtype in (jnp.float32, jnp.bfloat16):
        with jax.enable_x64(True):
            text = source(call(kernel, dtype=dtype), jax.ShapeDtypeStruct((64,), dtype))
        assert "float64" not in text
        # Offsets are 32-bit however wide the loop's counter is.
        assert "x_ref + tl.cast(mul_1, tl.int32) + lanes_16" in text


# Grids


def test_axes_of_one_program_cost_nothing():
    spec = pl.BlockSpec((8, 64), lambda a, i, b: (i + a, b))

    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...] + pl.program_id(2)

    function = call(kernel, (32, 64), grid=(1, 4, 1), in_specs=[spec], out_specs=spec)
    (only,) = sources(function, np.zeros((32, 64), "f"))
    assert only.grid == (4, 1, 1)
    assert "pid_1 = tl.program_id(0)" in only.text and "pid_0" not in only.text and "pid_2" not in only.text


@pytest.mark.parametrize(
    "grid, launch",
    [
        ((2, 3, 4), (2, 3, 4)),
        ((2, 1, 3, 4), (2, 3, 4)),
        ((2, 3, 4, 5), (120, 1, 1)),
        ((2, 70_000), (140_000, 1, 1)),
        ((70_000, 2), (70_000, 2, 1)),
        ((), (1, 1, 1)),
    ],
)
def test_grids_fit_cuda(grid, launch):
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...]

    spec = pl.BlockSpec((16,), lambda *_: (0,))
    (only,) = sources(call(kernel, grid=grid, in_specs=[spec], out_specs=spec), np.zeros(16, "f"))
    assert only.grid == launch


def test_mapped_axes_run_slowest():
    spec = pl.BlockSpec((16,), lambda i: (i,))

    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...]

    (only,) = sources(jax.vmap(call(kernel, (64,), grid=(4,), in_specs=[spec], out_specs=spec)), np.zeros((3, 64), "f"))
    assert only.grid == (4, 3, 1)
    assert "x_ref + pid_0 * 64 + pid_1 * 16" in only.text


def test_grids_of_traced_size():
    """As many programs as the chip holds take all places in turn; the size is read from memory."""

    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...]

    spec = pl.BlockSpec((16,), lambda i, j: (i,))

    def function(n, x):
        return call(kernel, (64,), grid=(n, 2), in_specs=[spec], out_specs=spec)(x)

    (only,) = sources(function, np.int32(4), np.zeros(64, "f"))
    assert "def kernel(grid_0_ref, x_ref, y_ref):" in only.text and "size_0 = tl.load(grid_0_ref)" in only.text
    assert "for pid in tl.range(tl.program_id(0), size_0 * 2, tl.num_programs(0)):" in only.text
    assert "pid_0 = pid % size_0" in only.text and "< 64" in only.text

    chip = Target.named("NVIDIA H200")
    with jax.sharding.use_abstract_mesh(chip.abstract_mesh), launch.recording() as launches:
        jax.jit(retarget_pallas(function)).trace(np.int32(4), np.zeros(64, "f")).lower(lowering_platforms=("cuda",))
    assert launches[0].grid[0] % chip.sms == 0 and launches[0].grid[1:] == (1, 1)


# Products


def test_products_add_into_the_accumulator():
    function, operands = CASES["matmul_ragged"]
    text = source(function, *operands)
    assert 'tl.dot(a_1, b_1, acc=carry_1, input_precision="tf32")' in text


def test_head_dimensions_are_padded_without_masking_products():
    # Loads put zeros in the padding, so the product over it needs no mask of its own.
    function, operands = CASES["attention"]
    text = source(function, *operands)
    assert "trans_1 = tl.trans(k_1)" in text and "tl.dot(q_1, trans_1" in text


@pytest.mark.parametrize(
    "precision, expected",
    [
        (None, "tf32"),
        ("default", "tf32"),
        ("high", "tf32x3"),
        ("highest", "ieee"),
        (("default", "highest"), "ieee"),
        ("TF32_TF32_F32", "tf32"),
        ("F32_F32_F32", "ieee"),
        ("BF16_BF16_F32_X3", "bf16x3"),
    ],
)
def test_precision_of_products(precision, expected):
    def kernel(a_ref, b_ref, o_ref):
        o_ref[...] = jnp.dot(a_ref[...], b_ref[...], precision=precision)

    a = np.zeros((16, 16), "f")
    assert f'input_precision="{expected}"' in source(call(kernel, (16, 16)), a, a)


# Scratch, scans, names


def test_scratch_is_an_accumulator():
    """A variable of the function, which the product adds into; its first value is the kernel's own."""
    function, operands = CASES["scratch_matmul"]
    text = source(function, *operands)
    assert "    acc_ref = tl.full([16, 32], 0.0, tl.float32)\n    for i_1 in tl.range(0, 3):" in text
    assert 'dot_1 = tl.dot(a_1, b_1, acc=acc_1, input_precision="tf32")\n        acc_ref = dot_1' in text


def test_scratch_has_a_value_before_branches():
    def kernel(x_ref, y_ref, scratch_ref):
        @pl.when(pl.program_id(0) > 0)
        def _():
            scratch_ref[...] = x_ref[...]

        y_ref[...] = scratch_ref[...]

    text = source(call(kernel, grid=(2,), scratch_shapes=[pl.ANY((16,), jnp.float32)]), np.zeros(16, "f"))
    assert text.index("scratch_ref = tl.full([16], 0.0, tl.float32)") < text.index("if ")


def test_named_axes_of_the_grid():
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...] + lax.axis_index("columns")

    spec = pl.BlockSpec((None, 8), lambda i, j: (i, j))
    function = call(kernel, (4, 16), grid=(("rows", 4), ("columns", 2)), in_specs=[spec], out_specs=spec)
    text = source(jax.vmap(function), np.zeros((3, 4, 16), "f"))
    assert "pid_2 = tl.program_id(0)" not in text and "float32_1 = tl.cast(pid_2, tl.float32)" in text


# Barriers: what a program's threads store, others of its threads read


def body(kernel, rows=64, **params):
    """The accesses, barriers, and heads of loops and branches of a kernel on tiles of 64 rows, or fewer."""
    text = source(call(kernel, (rows, 16), grid=(4,)), np.zeros((rows, 16), "f"), **params)
    kinds = {"tl.load": "load", "tl.store": "store", "tl.atomic": "atomic", "tl.debug_barrier": "barrier"}
    lines = text.splitlines()
    found = [next((kind for key, kind in kinds.items() if key in line), line.strip()) for line in lines]
    return " ".join(f for f in found if f in kinds.values() or f.startswith(("for", "if", "else")))


def test_barriers_between_patterns():
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...]
        y_ref[0] = y_ref[1]
        y_ref[2] = x_ref[2]

    # The rows are apart from each other.
    assert body(kernel) == "load store barrier load store load store"


def test_one_pattern_needs_no_barrier():
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...]
        y_ref[...] += x_ref[...]

    assert body(kernel) == "load store load load store"
    # Here there are more threads than elements: several hold the same one, and one of them stores it.
    assert body(kernel, rows=4) == "load store barrier load load barrier store"
    assert body(kernel, rows=64, num_warps=32) == "load store load load store"


def test_parts_that_are_apart_need_no_barrier():
    def kernel(x_ref, y_ref):
        here = y_ref.at[pl.ds(pl.program_id(0) * 16, 16)]
        here[:2] = x_ref[:2]
        here[2:4] = here[8:10]

    def overlapping(x_ref, y_ref):
        i = pl.program_id(0) * 4
        y_ref[pl.ds(i, 2)] = x_ref[:2]
        y_ref[pl.ds(2, 2)] = x_ref[:2]

    assert body(kernel) == "load store load store"
    assert body(overlapping) == "load store load barrier store"


def test_barriers_around_atomics():
    def kernel(x_ref, y_ref):
        y_ref[...] = jnp.zeros(y_ref.shape)
        jtile.atomic_add(y_ref, 0, x_ref[0])
        jtile.atomic_add(y_ref, 1, x_ref[1])
        y_ref[2] = y_ref[1]

    assert body(kernel) == "store load barrier atomic load atomic barrier load store"


def test_barriers_between_turns():
    def running(x_ref, y_ref):
        @pl.loop(1, 64)
        def _(i):
            y_ref[i] = y_ref[i - 1] + x_ref[i]

    def by_rows(x_ref, y_ref):
        @pl.loop(0, 64)
        def _(i):
            y_ref[i] = x_ref[i]

    def whole(x_ref, y_ref):
        y_ref[...] = jnp.zeros(y_ref.shape)

        @pl.loop(0, 64)
        def _(i):
            y_ref[...] += x_ref[i]

    # A turn must not begin to load, either, before the one before it has stored.
    assert body(running) == "for i_1 in tl.range(0, 63, num_stages=1): load load barrier store barrier"
    assert body(by_rows) == "for i_1 in tl.range(0, 64): load store"
    assert body(whole) == "store for i_1 in tl.range(0, 64): load load store"


def test_loads_ahead_in_loops_without_products():
    """From three stages on, and never of what the loop may have stored in the meantime."""

    def by_rows(x_ref, y_ref):
        @pl.loop(0, 64)
        def _(i):
            y_ref[i] = x_ref[i]

    def in_place(x_ref, y_ref):
        @pl.loop(0, 64)
        def _(i):
            y_ref[...] += x_ref[i]

    def nested(x_ref, y_ref):
        @pl.loop(0, 8)
        def _(_):
            by_rows(x_ref, y_ref)

    assert body(by_rows, num_stages=2) == "for i_1 in tl.range(0, 64): load store"
    assert body(by_rows, num_stages=3) == "for i_1 in tl.range(0, 64, num_stages=3): load store"
    assert body(in_place, num_stages=3) == "for i_1 in tl.range(0, 64): load load store"
    heads = "for i_1 in tl.range(0, 8): for i_2 in tl.range(0, 64, num_stages=3):"
    assert body(nested, num_stages=3) == f"{heads} load store"


def test_barriers_around_branches():
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...]

        @pl.when(x_ref[0, 0] > 0)
        def _():
            y_ref[0] = x_ref[1]

        y_ref[1] = y_ref[0]

    # What was stored before the branch may be pending after it, as the branch may not be taken.
    assert (
        re.sub("int32_1", "c", body(kernel)) == "load store load if c <= 0: else: load barrier store barrier load store"
    )


def test_barriers_of_buffers_that_are_shared():
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...]
        y_ref[0] = x_ref[1]

    function = call(kernel, (64, 16), input_output_aliases={0: 0})
    text = source(function, np.zeros((64, 16), "f"))
    assert re.findall("tl.(load|store|debug_barrier)", text) == ["load", "store", "debug_barrier", "load", "store"]


# Tensor Memory Accelerator, warp specialisation


def test_tma_where_a_block_allows():
    function, operands = CASES["matmul_ragged"]
    text = source(function, *operands, tma=True)
    assert "def kernel(a_ref_16x16, b_ref_16x32, o_ref_16x32):" in text
    assert "a_1 = a_ref_16x16.load([pid_0 * 16, mul_1])" in text
    assert "o_ref_16x32.store([pid_0 * 16, pid_1 * 32], carry_1)" in text
    assert "tl.load" not in text and "tl.store" not in text and "lanes" not in text


def heads(shape=(2, 40, 3, 64), block=(None, 16, None, 64), **options):
    """Rows of one head of (batch, sequence, heads, head_dim), doubled."""

    def kernel(x_ref, y_ref):
        y_ref[...] = 2 * x_ref[...]

    batch, sequence, count, _ = shape
    spec = pl.BlockSpec(block, lambda b, h, i: (b, i, h, 0))
    grid = (batch, count, pl.cdiv(sequence, 16))
    return call(kernel, shape, grid=grid, in_specs=[spec], out_specs=spec, **options)


def test_tma_in_four_dimensions():
    """The dimensions of single elements come first, so that the others are the matrix that is moved."""
    x = np.zeros((2, 40, 3, 64), "f")
    [kernel] = sources(heads(), x, tma=True)
    assert "x_ref_16x64.load([pid_0, pid_1, pid_2 * 16, 0]), [16, 64])" in kernel.text
    descriptor = kernel.arguments[0]
    assert (descriptor.shape, descriptor.strides) == ((2, 3, 40, 64), (7680, 64, 192, 1))
    assert descriptor.block_shape == (1, 1, 16, 64)


def rows_doubled(shape):
    """16 rows of one matrix of an array of any rank at a time; the others' indices are the grid's."""

    def kernel(x_ref, y_ref):
        y_ref[...] = 2 * x_ref[...]

    *lead, rows, columns = shape
    spec = pl.BlockSpec((*(None for _ in lead), 16, columns), lambda i, *at: (*at, i, 0))
    grid = (pl.cdiv(rows, 16), *lead)
    params = CompilerParams(tma=True)
    return call(kernel, shape, grid=grid, in_specs=[spec], out_specs=spec, compiler_params=params)


RANKS = (40, 64), (3, 40, 64), (2, 3, 40, 64), (2, 2, 3, 40, 64), (2, 1, 2, 3, 40, 64)  # the last less an axis of 1


@pytest.mark.parametrize("shape", RANKS, ids=len)
def test_tma_in_any_number_of_dimensions(shape):
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    np.testing.assert_array_equal(debug(rows_doubled(shape))(x), 2 * x)
    [kernel] = inspect(rows_doubled(shape), x)
    assert {i[: i.index("d.") + 1] for i in kernel.instructions} == {f"cp.async.bulk.tensor.{min(len(shape), 5)}d"}


def test_tma_for_specialised_warps_is_made_by_the_program():
    def kernel(x_ref, w_ref, y_ref):
        def body(i, acc):
            return acc + jnp.dot(x_ref[...], w_ref[pl.ds(i * 64, 64), :])

        y_ref[...] = jax.lax.fori_loop(0, 2, body, jnp.zeros((16, 64)))

    spec = pl.BlockSpec((None, 16, None, 64), lambda b, h, i: (b, i, h, 0))
    whole = pl.BlockSpec((128, 64), lambda b, h, i: (0, 0))
    function = call(kernel, (2, 40, 3, 64), grid=(2, 3, 3), in_specs=[spec, whole], out_specs=spec)
    text = source(function, np.zeros((2, 40, 3, 64), "f"), np.zeros((128, 64), "f"), tma=True, warp_specialize=True)
    assert (
        "x_ref_16x64_1 = tl.make_tensor_descriptor(x_ref + pid_0 * 7680 + pid_1 * 64, shape=[40, 64], "
        "strides=[192, 1], block_shape=[16, 64])"
    ) in text


@pytest.mark.parametrize(
    "shape, block",
    [
        ((2, 40, 3, 96), (None, 16, None, 64)),  # lanes that pad nothing
        ((2, 40, 3, 66), (None, 16, None, 66)),  # rows 264 bytes apart
        ((2, 40, 3, 512), (None, 16, None, 512)),  # longer than what is moved at once
        ((2, 40, 3, 96), (None, 12, None, 96)),  # lanes that pad the block hold the next rows
    ],
)
def test_pointers_where_the_hardware_cannot(shape, block):
    text = source(heads(shape, block), np.zeros(shape, "f"), tma=True)
    found = "x_ref_" in text and "tl.load(" not in text
    assert found == (shape[-1] == 96 and block[1] == 16)


def test_an_output_written_in_two_ways_has_a_pointer():
    def kernel(x_ref, y_ref):
        y_ref[:16, :] = x_ref[:16, :]
        y_ref[pl.ds(16, 32), :] = x_ref[pl.ds(16, 32), :]

    text = source(call(kernel, (48, 64)), np.zeros((48, 64), "f"), tma=True)
    assert "def kernel(x_ref_16x64, x_ref_32x64, y_ref):" in text


@pytest.mark.parametrize("params", [{"tma": True}, {"tma": True, "persistent": True}, {"persistent": True}], ids=str)
def test_descriptors_and_persistent_kernels_compute_the_same(params):
    x = np.random.default_rng(0).standard_normal((2, 40, 3, 64), np.float32)
    np.testing.assert_array_equal(debug(heads(compiler_params=CompilerParams(**params)))(x), 2 * x)
    for name in ("matmul_ragged", "loop_nested", "scratch_matmul"):
        function, operands = CASES[name]
        expected = interpret_pallas(function)(*operands)
        found = debug(retarget_pallas(function, **params))(*operands)
        np.testing.assert_allclose(found, expected, 1e-5, 1e-5)


def test_persistent_programs_take_turns():
    function, operands = CASES["matmul_ragged"]
    [kernel] = sources(function, *operands, persistent=True)
    assert "    for pid in tl.range(tl.program_id(0), 6, tl.num_programs(0), flatten=True):\n" in kernel.text
    assert "        pid_0 = pid % 3\n" in kernel.text


def test_index_arithmetic_is_written_once():
    def kernel(x_ref, y_ref):
        def body(i, total):
            rows = pl.program_id(0) * 16 + jax.lax.broadcasted_iota(jnp.int32, (16, 64), 0)
            columns = i * 64 + jax.lax.broadcasted_iota(jnp.int32, (16, 64), 1)
            return total + jnp.where(rows >= columns, x_ref[:, pl.ds(i * 64, 64)], 0)

        y_ref[...] = jax.lax.fori_loop(0, 2, body, jnp.zeros((16, 64)))

    spec = pl.BlockSpec((16, 128), lambda i: (i, 0))
    out = pl.BlockSpec((16, 64), lambda i: (i, 0))
    text = source(call(kernel, (32, 64), grid=(2,), in_specs=[spec], out_specs=out), np.zeros((32, 128), "f"))
    before, loop = text.split("    for ")
    assert "pid_0 * 16" in before and "pid_0" not in loop  # what no turn changes
    assert loop.count("* 64") == 1  # the slice's start is the columns' start
    assert "<" not in loop  # all is inside of the arrays


def test_pointers_to_arrays_of_no_elements():
    function, operands = CASES["ref_of_no_elements"]
    text = source(function, *operands, tma=True)
    assert "y_ref_4x8" not in text and "x_ref_4x8" not in text


def test_what_is_written_and_read_back_needs_pointers():
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...]
        y_ref[...] = y_ref[...] * 2

    text = source(call(kernel, (16, 64)), np.zeros((16, 64), "f"), tma=True)
    assert "y_ref_16x64" not in text and "x_ref_16x64" in text


def test_warp_specialization_needs_one_loop():
    function, operands = CASES["matmul_ragged"]
    assert "tl.range(0, 3, warp_specialize=True)" in source(function, *operands, tma=True, warp_specialize=True)
    with pytest.raises(ValueError, match="exactly one loop, and not persistent; kernel .* has 2"):
        source(*[CASES["loop_nested"][0], *CASES["loop_nested"][1]], tma=True, warp_specialize=True)


# What cannot be compiled


def refuse(kernel, *operands, match, **options):
    with pytest.raises(UnsupportedKernel, match=match):
        source(call(kernel, **options), *operands)


def test_unknown_primitives_are_named_with_the_line_and_a_cure():
    def kernel(x_ref, y_ref):
        y_ref[...] = jnp.linalg.cholesky(x_ref[...])

    line = kernel.__code__.co_firstlineno + 1
    refuse(
        kernel,
        np.zeros((16, 16), "f"),
        shape=(16, 16),
        match=rf"kernel kernel, at .*test_emit.py:{line}:.*`cholesky` .*",
    )


def test_ops_are_called_outside_of_kernels():
    def kernel(x_ref, y_ref):
        y_ref[...] = jtile.softmax(x_ref[...])

    x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    line = kernel.__code__.co_firstlineno
    with pytest.raises(UnsupportedKernel, match=rf"at .*test_emit.py:{line}: it calls the op softmax, .* outside of"):
        sources(pl.pallas_call(kernel, out_shape=x), x)


def test_tiles_of_more_elements_than_triton_takes():
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...] * 2

    x = jax.ShapeDtypeStruct((1100, 1024), jnp.float32)
    line = kernel.__code__.co_firstlineno + 1
    with pytest.raises(
        TileTooLarge,
        match=rf"Kernel kernel, at .*test_emit.py:{line}\b.*: a tile of shape \(2048, 1024\) has 2,097,152 "
        "elements; Triton takes at most 1,048,576. Shrink the kernel's blocks",
    ):
        sources(pl.pallas_call(kernel, out_shape=x), x)


def test_captured_arrays():
    table = np.arange(16.0, dtype="f")

    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...] + lax.optimization_barrier(table)

    with pytest.raises(ValueError, match="captures constants"):  # Pallas itself says so
        source(call(kernel), table)

    def calling_kernel(x_ref, y_ref):
        y_ref[...] = jax.jit(lambda x: x + table)(x_ref[...])

    assert source(call(calling_kernel), table).count("tl.where") == 15
    table = np.arange(256.0, dtype="f") ** 2
    refuse(calling_kernel, table, shape=(256,), match=r"array of shape \(256,\) that is not an operand. Pass the array")


def test_scratch_that_is_no_array():
    def kernel(x_ref, y_ref, semaphore_ref):
        y_ref[...] = x_ref[...]

    refuse(
        kernel,
        np.zeros(16, "f"),
        scratch_shapes=[pltpu.SemaphoreType.REGULAR],
        match="semaphore_ref is allocated as .*sem.* ask for `pl.ANY",
    )


def test_atomics_on_what_is_not_shared():
    def kernel(x_ref, y_ref, scratch_ref):
        plgpu.atomic_add(scratch_ref, (...,), x_ref[...])

    scratch = [pl.ANY((16,), jnp.float32)]
    refuse(kernel, np.zeros(16, "f"), scratch_shapes=scratch, match="scratch_ref is changed atomically.*alone")


def test_parts_of_reshaped_refs():
    def kernel(x_ref, y_ref):
        y_ref.reshape(4, 4)[1] = x_ref[:4]

    refuse(kernel, np.zeros(16, "f"), match="a part of y_ref is stored through ReshapeTransform. Index the ref once")


def test_types_that_triton_lacks():
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...]

    refuse(
        kernel,
        jax.ShapeDtypeStruct((16,), "complex64"),
        dtype="complex64",
        match="Triton has no complex64. It has bool",
    )


def test_types_are_refused_where_they_appear():
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...] + 1
        y_ref[...] = jnp.real(x_ref[...].astype(jnp.complex64))

    line = kernel.__code__.co_firstlineno + 2
    refuse(kernel, np.zeros(16, "f"), match=rf"at .*test_emit.py:{line}:.*Triton has no complex64")


def test_keys_are_passed_as_data():
    def kernel(key_ref, y_ref):
        y_ref[...] = jax.random.bits(key_ref[...], (16,))

    refuse(kernel, jax.random.key(0), dtype=jnp.uint32, match="key_ref is an array of key<fry>. .*jax.random.key_data")


def test_products_of_four_bits():  # which XLA cannot compile for a CPU, and so Pallas' interpreter cannot run
    a, b = (np.random.default_rng(seed).integers(-8, 8, (16, 32)) for seed in (0, 1))

    def kernel(a_ref, b_ref, y_ref):
        y_ref[...] = jnp.dot(a_ref[...], b_ref[...].T, preferred_element_type=jnp.int32)

    found = debug(call(kernel, (16, 16), jnp.int32))(jnp.asarray(a, jnp.int4), jnp.asarray(b, jnp.int4))
    np.testing.assert_array_equal(found, a @ b.T)


def test_arithmetic_of_four_bits():
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...] + 1

    x = jax.ShapeDtypeStruct((16,), jnp.int4)
    refuse(kernel, x, dtype=jnp.int4, match="`add` of int4 has no form in Triton. Convert to int8 first")


def test_accuracies():
    def kernel(x_ref, y_ref):
        y_ref[...] = lax.exp(x_ref[...], accuracy=lax.AccuracyMode.HIGHEST)

    refuse(kernel, np.zeros(16, "f"), match="`exp` with accuracy=.* Leave the argument out")


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_warps", 3),
        ("num_warps", True),
        ("num_stages", 0),
        ("num_ctas", 3),
        ("warp_specialize", 1),
        ("max_registers", 100),
        ("tma", "yes"),
    ],
)
def test_params_are_checked(field, value):
    with pytest.raises(ValueError, match=rf"CompilerParams: {field} must be one of .*; got {value!r}"):
        CompilerParams(**{field: value})
