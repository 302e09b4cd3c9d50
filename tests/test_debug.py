"""`jtile.debug`: the generated source, run on the CPU."""

import functools
import os
import sys

import jax
import jax.numpy as jnp
import jax_triton
import numpy as np
import pytest
import triton
import triton.language as tl
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from triton.experimental import gluon

import jtile
from jtile.compiler.triton_on_cpu import OutOfBounds


def normal(*shape, dtype=jnp.float32, seed=0):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def same(found, expected, tolerance=0.0):
    """Equal, or within the tolerance: relative to the largest number of each array."""
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert f.shape == e.shape and f.dtype == e.dtype
        f, e = np.asarray(f, np.float64), np.asarray(e, np.float64)
        np.testing.assert_allclose(f, e, rtol=0, atol=tolerance * np.abs(e).max())


def rows(kernel, x, block=4, kind=None, **options):
    """`kernel` on blocks of rows of `x`."""
    spec = pl.BlockSpec((block, x.shape[1]), lambda i: (i, 0))
    shape = kind or jax.ShapeDtypeStruct(x.shape, x.dtype)
    grid = (pl.cdiv(x.shape[0], block),)
    return pl.pallas_call(kernel, grid=grid, in_specs=[spec], out_specs=spec, out_shape=shape, **options)(x)


def softmax_kernel(x_ref, y_ref):
    x = x_ref[...].astype(jnp.float32)
    e = jnp.exp(x - jnp.max(x, axis=1, keepdims=True))
    y_ref[...] = (e / jnp.sum(e, axis=1, keepdims=True)).astype(y_ref.dtype)


def softmax(x):
    return rows(softmax_kernel, x)


# What it computes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_values(dtype):
    x = normal(10, 24, dtype=dtype)
    # A unit in the last place of the result, which may be rounded to either side.
    same(jtile.debug(softmax)(x), jax.nn.softmax(x.astype(jnp.float32)).astype(dtype), float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_narrow_floats_are_rounded_once_an_operation(dtype):
    def kernel(x_ref, y_ref):
        x = x_ref[...]
        y_ref[...] = -jnp.where(x > 0.5, x * x + 3, jnp.abs(x) - 1)

    x = normal(8, 64, dtype=dtype)
    same(jtile.debug(lambda x: rows(kernel, x))(x), -jnp.where(x > 0.5, x * x + 3, jnp.abs(x) - 1))


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_float8(dtype):
    def kernel(x_ref, y_ref):
        y_ref[...] = (x_ref[...].astype(jnp.float32) * 3).astype(dtype)

    x = normal(8, 64, dtype=dtype)
    same(jtile.debug(lambda x: rows(kernel, x))(x), (x.astype(jnp.float32) * 3).astype(dtype))


OPS = {
    "rms_norm": (
        lambda x, s, **o: jtile.rms_norm(x, s, **o),
        lambda dtype: (normal(3, 5, 96, dtype=dtype), normal(96)),
    ),
    "attention": (
        lambda q, k, v, **o: jtile.dot_product_attention(q, k, v, is_causal=True, **o),
        lambda dtype: [normal(1, 40, h, 16, dtype=dtype, seed=h) for h in (2, 1, 1)],
    ),
    "cross_entropy": (
        lambda x, **o: jtile.softmax_cross_entropy(x, jnp.arange(6) % 5, **o),
        lambda dtype: [normal(6, 100, dtype=dtype)],
    ),
}


@pytest.mark.parametrize("name, dtype", [("rms_norm", jnp.float32), *((name, jnp.bfloat16) for name in OPS)])
def test_ops_run_their_kernels(name, dtype):
    """Forward and backward, as Pallas' interpreter computes them."""
    op, operands = OPS[name]
    operands = operands(dtype)

    def gradient(f):
        loss = lambda *x: jnp.sum(jnp.square(f(*x).astype(jnp.float32)))  # noqa: E731
        return jax.value_and_grad(loss, argnums=tuple(range(len(operands))))

    found = jtile.debug(gradient(op))(*operands)
    expected = gradient(lambda *x: op(*x, implementation="interpret"))(*operands)
    # Both do the same operations and take sums in another order: float32 throughout, rounded to the dtype at the end.
    same(found, expected, 16 * float(jnp.finfo(jnp.float32).eps) + (dtype != jnp.float32) * float(jnp.finfo(dtype).eps))


def test_an_op_asked_for_its_reference_runs_that(monkeypatch):
    x = normal(4, 8)
    monkeypatch.setattr("jtile.debugger._run_pallas", None)
    f = lambda x: jtile.rms_norm(x, jnp.ones(8), implementation="xla")  # noqa: E731
    same(jtile.debug(f)(x), f(x), 4e-7)


@pytest.mark.parametrize(
    "around",
    [
        jax.jit,
        lambda f: jax.vmap(f),
        lambda f: lambda x: jax.lax.scan(lambda c, y: (c, f(y)), 0, x)[1],
        lambda f: lambda x: jax.lax.map(jax.jit(jax.checkpoint(f)), x),
    ],
)
def test_inside_and_outside_of_transformations(around):
    x = normal(3, 8, 16)
    expected = jax.nn.softmax(x)
    function = softmax if around is not jax.jit else jax.vmap(softmax)
    for f in (jtile.debug(around(function)), around(jtile.debug(function))):
        same(f(x), expected, 4e-7)  # float32: a few units in the last place


@pytest.mark.parametrize("check_vma", [False, True])
def test_under_shard_map(check_vma):
    """Devices run their programs on threads of their own; a replicated weight's gradient is summed over them."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    x, scale = normal(16, 16), normal(16, seed=1)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("x"), P()), out_specs=P(), check_vma=check_vma)
    def split(x, scale):
        y = rows(softmax_kernel, x, kind=jax.typeof(x))
        return jax.lax.psum(jnp.sum(jtile.rms_norm(y, scale) ** 2 * x), "x")

    expected = jnp.sum(jtile.rms_norm(jax.nn.softmax(x), scale) ** 2 * x)
    for f in (jtile.debug(split), jax.jit(jtile.debug(split)), jtile.debug(jax.jit(split))):
        same(f(x, scale), expected, 1e-6)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("x"), P()), out_specs=P(), check_vma=check_vma)
    def split(x, scale):
        return jax.lax.psum(jnp.sum(jtile.rms_norm(x, scale) ** 2 * x), "x")

    expected = jax.grad(lambda x, s: jnp.sum(jtile.rms_norm(x, s) ** 2 * x), argnums=(0, 1))(x, scale)
    same(jtile.debug(jax.grad(split, argnums=(0, 1)))(x, scale), expected, 1e-6)


def test_other_backends_kernels_and_interpreted_calls():
    x = normal(8, 16)
    kernels = [dict(compiler_params=plgpu.CompilerParams(num_warps=2)), dict(interpret=True)]
    for options in kernels:
        same(jtile.debug(lambda x, o=options: rows(softmax_kernel, x, **o))(x), jax.nn.softmax(x), 4e-7)


def test_results_that_are_not_written_show():
    def kernel(x_ref, y_ref):
        y_ref[0, :] = x_ref[0, :]

    y = jtile.debug(lambda x: rows(kernel, x))(jnp.ones((4, 8)))
    assert np.array_equal(y[0], np.ones(8)) and np.isnan(y[1:]).all()


def test_empty_grids():
    x = jnp.ones((0, 8))
    assert jtile.debug(lambda x: rows(softmax_kernel, x))(x).shape == (0, 8)


def test_atomics_and_aliases():
    def kernel(x_ref, total_ref, out_ref):
        plgpu.atomic_add(out_ref, (0,), jnp.sum(x_ref[...]))

    def total(x):
        return pl.pallas_call(
            kernel, grid=(5,), in_specs=[pl.BlockSpec((8,), lambda i: (i,)), pl.BlockSpec((1,), lambda i: (0,))],
            out_specs=pl.BlockSpec((1,), lambda i: (0,)), out_shape=jax.ShapeDtypeStruct((1,), x.dtype),
            input_output_aliases={1: 0},
        )(x, jnp.full(1, 1000, x.dtype))  # fmt: skip

    same(jtile.debug(total)(jnp.arange(40)), jnp.array([1780]))


def test_out_of_range_conversions_are_the_hardware_s():
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...].astype(jnp.int32)

    call = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((4,), jnp.int32))
    same(jtile.debug(call)(jnp.array([1.9, -1.9, 1e20, -jnp.inf])), jnp.array([1, -1, 2**31 - 1, -(2**31)]))


# Hand-written kernels


@triton.jit
def helper(x):
    return tl.sum(x, axis=0) * 2


@triton.jit
def sums_kernel(x, n, y, block: tl.constexpr):
    lanes = tl.arange(0, block)
    row = tl.program_id(0)
    tl.store(y + row, helper(tl.load(x + row * n + lanes, mask=lanes < n, other=0)))


def sums(x, block=32):
    shape = jax.ShapeDtypeStruct(x.shape[:1], x.dtype)
    return jtile.triton_call(x, x.shape[1], kernel=sums_kernel, out_shape=shape, grid=x.shape[0], block=block)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_hand_written_kernels(dtype):
    x = jnp.arange(60).reshape(3, 20).astype(dtype)  # sums up to 990 · 2: exact in bfloat16 up to 256 steps of 8
    same(jtile.debug(sums)(x), 2 * x.sum(axis=1, dtype=dtype), 2 * 2.0**-8 if dtype == jnp.bfloat16 else 0)


@triton.jit
def tile_kernel(x, n, y, total):
    tile = x.load([8, 16 * tl.program_id(0)])
    columns = 16 * tl.program_id(0) + tl.arange(0, 16)
    tl.store(y + tl.arange(0, 8)[:, None] * n + columns[None, :], tile, mask=columns[None, :] < n)
    tl.atomic_add(total, tl.sum(tl.sum(tile, axis=0), axis=0))


def test_descriptors_and_results_that_start_at_zero():
    """The tiles hang over the edge of a matrix of 12 x 20, which reads 0 there."""

    def call(x):
        shapes = jax.ShapeDtypeStruct((8, 20), x.dtype), jax.ShapeDtypeStruct((1,), x.dtype)
        x = jax_triton.TensorDescriptor.from_array(x, [8, 16])
        return jtile.triton_call(x, 20, kernel=tile_kernel, out_shape=shapes, grid=2, zeroed_outputs=(1,))

    x = jnp.arange(240.0).reshape(12, 20)
    y, total = jtile.debug(call)(x)
    same(y, jnp.pad(x[8:], ((0, 4), (0, 0))))
    same(total, jnp.sum(x[8:])[None])


def test_gluon_is_refused():
    @gluon.jit
    def kernel(x, y):
        pass

    call = lambda x: jtile.triton_call(x, kernel=kernel, out_shape=x, grid=1)  # noqa: E731
    with pytest.raises(NotImplementedError, match="kernel is written in Gluon"):
        jtile.debug(call)(jnp.ones(4))


# Seeing inside


def test_a_file_for_each_source(tmp_path):
    x = normal(8, 16)
    for _ in range(2):
        same(jtile.debug(softmax, folder=tmp_path / "kernels")(x), jax.nn.softmax(x), 4e-7)
    [file] = (tmp_path / "kernels").iterdir()
    assert file.name.startswith("softmax_kernel_") and file.suffix == ".py"
    jtile.debug(softmax, folder=tmp_path / "kernels")(x[:, :8])  # another shape, another source
    assert len(list((tmp_path / "kernels").iterdir())) == 2


def edited(folder, old, new):
    [file] = folder.iterdir()
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


def test_print_and_changes(tmp_path, capsys):
    f, x = jtile.debug(softmax, folder=tmp_path), normal(8, 16)
    f(x)
    edited(tmp_path, "    sum_1 = ", "    print(pid_0, exp_1)\n    sum_1 = 2 * ")
    same(f(x), jax.nn.softmax(x) / 2, 4e-7)
    printed = capsys.readouterr().out
    first = np.exp(x[:4] - x[:4].max(axis=1, keepdims=True))
    assert printed.startswith(f"0 [[{first[0, 0]:.5f}"[:-1]) and "\n1 [[" in printed


def test_breakpoint(tmp_path, monkeypatch):
    """The debugger stops at the line in the file, and sees the tiles by name."""
    f, x = jtile.debug(softmax, folder=tmp_path), normal(8, 16)
    f(x)
    edited(tmp_path, "    sum_1 = ", "    breakpoint()\n    sum_1 = ")
    seen = []

    def hook():
        frame = sys._getframe(1)
        seen.append((frame.f_code.co_filename, frame.f_lineno, frame.f_locals["max_1"].handle.data))

    monkeypatch.setattr(sys, "breakpointhook", hook)
    f(x)
    [file] = tmp_path.iterdir()
    line = file.read_text().splitlines().index("    breakpoint()") + 1
    assert [(name, number) for name, number, _ in seen] == [(str(file), line)] * 2  # programs
    np.testing.assert_array_equal(seen[1][2], x[4:].max(axis=1))


def test_an_access_outside_of_an_array_raises(tmp_path):
    f, x = jtile.debug(softmax, folder=tmp_path), normal(8, 16)
    f(x)
    edited(tmp_path, "tl.load(x_ref_block + ", "tl.load(x_ref_block + 60 + ")
    match = r"Program \(1, 0, 0\) of kernel softmax_kernel reads element 128 of x_ref, which has 128"
    with pytest.raises(OutOfBounds, match=match):
        f(x)


def test_errors_show_the_line(tmp_path):
    f, x = jtile.debug(softmax, folder=tmp_path), normal(8, 16)
    f(x)
    edited(tmp_path, "    sum_1 = ", "    raise KeyError('here')\n    sum_1 = ")
    with pytest.raises(KeyError) as caught:
        f(x)
    [file] = tmp_path.iterdir()
    assert caught.traceback[-1].path == file


def test_tritons_own_variable_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        jtile.debug(softmax)(jnp.ones((4, 8)))


def test_nothing_is_left_behind(monkeypatch):
    """The compiler works as before: neither Triton nor the environment has changed, even after an error."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def fail(*_):
        raise RuntimeError("from a print")

    def kernel(x_ref, y_ref):
        y_ref[...] = jnp.tanh(x_ref[...])

    x = jnp.ones((4, 8))
    before = tl.load, tl.sum, tl.tensor.__str__, type(sums_kernel).__call__
    jtile.debug(lambda x: rows(kernel, x))(x)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr("jtile.compiler.triton_on_cpu.Memory.store", fail)
        jtile.debug(softmax)(x)
    assert before == (tl.load, tl.sum, tl.tensor.__str__, type(sums_kernel).__call__)
    assert "TRITON_INTERPRET" not in os.environ and not triton.knobs.runtime.interpret
    call = lambda x: rows(kernel, x, compiler_params=jtile.CompilerParams())  # noqa: E731
    assert jtile.inspect(call, jax.ShapeDtypeStruct((64, 8), jnp.float32))[0].registers > 0
    with pytest.raises(RuntimeError, match="outside of the scope of a kernel"):
        tl.sum(1)
