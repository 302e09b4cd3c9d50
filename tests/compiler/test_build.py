import dataclasses
import os
import re
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import triton
from jax.experimental import pallas as pl

from jtile import borrowed
from jtile.compiler import cache
from jtile.compiler.arguments import triton_type
from jtile.compiler.build import TileTooLarge, build
from jtile.compiler.params import CompilerParams
from jtile.compiler.target import Target
from tests.compiler import sources
from tests.compiler.kernels import sources as kernel_sources

H200, A100, B200 = map(Target.named, ("NVIDIA H200", "NVIDIA A100", "NVIDIA B200"))


@pytest.mark.parametrize("target, architecture", [(A100, "sm_80"), (H200, "sm_90a"), (B200, "sm_100a")])
def test_product_on_each_architecture(target, architecture):
    kernel = build(sources.product, CompilerParams(num_warps=8), target)
    assert f".target {architecture}" in kernel.ptx
    assert kernel.cubin.startswith(b"\x7fELF")
    assert (kernel.name, kernel.threads, kernel.spill_bytes) == ("product", 256, 0)
    assert kernel.tensor_core_instructions > 0
    assert 0 < kernel.shared_bytes <= target.shared_bytes_per_block


@pytest.mark.parametrize("target, limit", [(A100, None), (A100, 64), (H200, None), (B200, 64)])
def test_registers_and_spills_are_those_that_cuobjdump_reads(target, limit, tmp_path):
    kernel = build(sources.product, CompilerParams(max_registers=limit), target)
    (tmp_path / "kernel.cubin").write_bytes(kernel.cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [tool, "--dump-resource-usage", tmp_path / "kernel.cubin"]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    assert (kernel.registers, kernel.spill_bytes) == (int(registers), int(stack))
    assert (kernel.spill_bytes > 0) == (limit is not None)


def test_no_tensor_cores_in_a_copy():
    kernel = build(sources.double, CompilerParams(), H200)
    assert kernel.tensor_core_instructions == 0
    assert kernel.source == sources.DOUBLE


def test_descriptors_made_on_the_device_need_scratch():
    kernel = build(sources.scratch, CompilerParams(), H200)
    assert kernel.scratch_bytes == 2 * 128
    assert kernel.scratch_align >= 64


def test_cluster():
    assert build(sources.product, CompilerParams(num_ctas=2), H200).num_ctas == 2
    with pytest.raises(NotImplementedError, match="num_ctas=2.*Use num_ctas=1"):
        build(sources.product, CompilerParams(num_ctas=2), A100)


def test_tile_too_large():
    with pytest.raises(TileTooLarge) as refused:
        build(sources.product, CompilerParams(num_stages=8), H200)
    assert str(refused.value) == (  # 8 stages of two blocks of 128 x 64 bfloat16
        "Kernel product needs 262,144 bytes of shared memory; a thread block on NVIDIA H200 has 232,448. "
        "Shrink its blocks, or num_stages (now 8)."
    )


def test_tile_too_large_is_not_assembled(monkeypatch):
    """The assembler alone can take minutes over a tile that is far too large."""
    made = []
    monkeypatch.setattr(cache, "fetch", lambda _, make, *__: made.append(make()) or made[0])
    with pytest.raises(TileTooLarge, match="needs 262,144 bytes of shared memory"):
        build(sources.product, CompilerParams(num_stages=8), H200)
    assert (made[0].shared_bytes, made[0].cubin, made[0].ptx) == (262_144, b"", "")


def test_fewer_stages_are_no_cure_without_a_loop():
    def product_kernel(x_ref, y_ref, o_ref):
        o_ref[...] = jnp.dot(x_ref[...], y_ref[...])

    x = jax.ShapeDtypeStruct((64, 1024), jnp.float32)
    y = jax.ShapeDtypeStruct((1024, 16), jnp.float32)
    out = jax.ShapeDtypeStruct((64, 16), jnp.float32)
    [source] = kernel_sources(pl.pallas_call(product_kernel, out_shape=out), x, y)
    with pytest.raises(TileTooLarge, match="has 232,448. Shrink its blocks.$"):
        build(source, CompilerParams(), H200)


def test_more_registers_than_a_block_has():
    with pytest.raises(TileTooLarge) as refused:
        build(sources.product, CompilerParams(num_warps=32, max_registers=255), A100)
    assert re.fullmatch(
        r"Kernel product needs \d+ registers for each of 1,024 threads; a thread block has 65,536. "
        "Lower max_registers to 64, or num_warps.",
        str(refused.value),
    )
    assert build(sources.product, CompilerParams(num_warps=32, max_registers=64), A100).registers <= 64


def test_more_tensor_memory_than_a_multiprocessor_has(monkeypatch):
    compiled = build(sources.double, CompilerParams(), B200)
    monkeypatch.setattr(cache, "fetch", lambda *_: dataclasses.replace(compiled, tensor_memory_columns=1024))
    with pytest.raises(TileTooLarge, match="double needs 1024 columns of tensor memory; .* NVIDIA B200 has 512."):
        build(sources.double, CompilerParams(), B200)


def test_errors_name_the_line_of_the_kernel():
    """A kernel that does not fit is refused where it is defined, and what Triton refuses where it was written."""

    def exponential_kernel(x_ref, y_ref):
        y_ref[...] = jnp.exp(x_ref[...]) / jnp.sum(x_ref[...])  # a sum over warps needs shared memory

    x = jax.ShapeDtypeStruct((1024,), jnp.float32)
    [source] = kernel_sources(pl.pallas_call(exponential_kernel, out_shape=x), x)
    here = rf"{re.escape(__file__)}:{exponential_kernel.__code__.co_firstlineno}"
    with pytest.raises(TileTooLarge, match=rf"Kernel exponential_kernel \({here}\) needs .* shared memory"):
        build(source, CompilerParams(), dataclasses.replace(H200, shared_bytes_per_block=8))
    broken = dataclasses.replace(source, text=source.text.replace("tl.exp(", "tl.no_such_function("))
    with pytest.raises(triton.CompilationError) as error:
        build(broken, CompilerParams(), H200)
    compiling, origin = error.value.__notes__
    assert re.search(rf"compiling kernel exponential_kernel \({here}\) for NVIDIA H200", compiling)
    line = exponential_kernel.__code__.co_firstlineno + 1
    assert re.fullmatch(
        r"The line of the generated source is \d+: exp_1 = tl.no_such_function\(x_1\)\n"
        rf"It came from {re.escape(__file__)}:{line}: y_ref\[...\] = jnp.exp.*",
        origin,
    )


def test_the_same_kernel_fits_one_chip_and_not_another():
    params = CompilerParams(num_warps=8, num_stages=4)
    small = dataclasses.replace(H200, name="a smaller H200", shared_bytes_per_block=64_000)
    assert build(sources.product, params, H200).shared_bytes > 64_000
    with pytest.raises(TileTooLarge, match="a smaller H200 has 64,000"):
        build(sources.product, params, small)


def test_chips_that_triton_left_behind():
    turing = Target("Tesla T4", 75, 40, 65_536)
    with pytest.raises(NotImplementedError, match="Tesla T4 has 7.5"):
        build(sources.double, CompilerParams(), turing)


def test_types_that_a_chip_lacks():
    def widen(x_ref, y_ref):
        y_ref[...] = x_ref[...].astype(jnp.float32)

    x, y = (jax.ShapeDtypeStruct((16,), dtype) for dtype in (jnp.float8_e4m3fn, jnp.float32))
    [source] = kernel_sources(pl.pallas_call(widen, out_shape=y), x)
    build(source, CompilerParams(), Target.named("NVIDIA L4"))
    with pytest.raises(NotImplementedError, match=r"needs compute capability 8.9.* A100 has 8.0, and kernel widen \("):
        build(source, CompilerParams(), A100)


def test_errors_of_the_compiler_name_the_kernel_and_the_chip():
    broken = dataclasses.replace(sources.double, text=sources.DOUBLE.replace("tl.load(x + i)", "undefined"))
    with pytest.raises(triton.CompilationError, match="undefined") as error:
        build(broken, CompilerParams(), H200)
    assert any("kernel double for NVIDIA H200" in note for note in error.value.__notes__)


def test_no_assembler(monkeypatch):
    def missing(*_):
        raise RuntimeError("Cannot find ptxas")

    cache.clear_memory()
    monkeypatch.setattr(type(triton.knobs.nvidia).__dict__["ptxas"], "transform", missing)
    monkeypatch.setattr(type(triton.knobs.nvidia).__dict__["ptxas_blackwell"], "transform", missing)
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/nowhere")
    with pytest.raises(RuntimeError, match="Cannot find ptxas") as error:
        build(sources.double, CompilerParams(), H200)
    assert any("TRITON_PTXAS_PATH" in note for note in error.value.__notes__)


def test_assembly_that_jax_can_assemble_where_it_takes_no_machine_code(monkeypatch):
    monkeypatch.setattr(borrowed, "custom_call_takes_cubin", lambda: False)
    major, minor = re.search(r"\.version (\d+)\.(\d+)\n", build(sources.double, CompilerParams(), H200).ptx).groups()
    assert (int(major), int(minor)) <= (9, 0)


def test_kernels_of_one_name_are_kept_apart():
    tripled = dataclasses.replace(sources.double, text=sources.DOUBLE.replace("* 2", "* 3"))
    params = CompilerParams(num_warps=1)
    assert build(sources.double, params, H200).cubin != build(tripled, params, H200).cubin


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    """Triton's own cache stays empty, and no temporary files remain."""
    monkeypatch.setenv("JTILE_CACHE_DIR", str(tmp_path / "jtile"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    cache.clear_memory()
    build(sources.double, CompilerParams(num_warps=2), H200)
    assert os.listdir(tmp_path) == ["jtile"]
    assert len(os.listdir(tmp_path / "jtile")) == 1


def test_element_types():
    assert [triton_type(d) for d in ("bool", "uint8", "bfloat16", "float8_e5m2")] == ["i1", "u8", "bf16", "fp8e5"]


def test_element_type_without_a_counterpart():
    with pytest.raises(NotImplementedError, match="complex64"):
        triton_type("complex64")


def test_machine_code_is_kept_apart_for_each_place_where_triton_is(monkeypatch, tmp_path):
    """It names files of Triton, so that programs lowered with another's would differ."""
    monkeypatch.setenv("JTILE_CACHE_DIR", str(tmp_path / "cache"))
    for count, place in enumerate(("/here/triton", "/here/triton", "/there/triton")):
        monkeypatch.setattr("jtile.compiler.build._triton_file", lambda place=place: place)
        cache.clear_memory()
        build(sources.product, CompilerParams(), H200)
        assert len(list((tmp_path / "cache").iterdir())) == 1 + (count == 2)
