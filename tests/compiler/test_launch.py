import dataclasses
import re
import zlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

import jtile
from jtile import borrowed
from jtile.compiler import launch
from jtile.compiler.build import build
from jtile.compiler.params import CompilerParams
from jtile.compiler.target import Target
from tests.compiler import sources
from tests.compiler.messages import fields, kernel_fields

H200 = Target.named("NVIDIA H200")


@pytest.fixture
def compiled():
    return build(sources.scratch, CompilerParams(), H200)


def buffers():
    return [p for argument in sources.scratch.arguments for p in argument.launch_parameters(iter(()))]


def payload(compiled, **kwargs):
    return launch.payload(compiled, (8, 1, 1), buffers(), **kwargs)


def test_message_carries_machine_code(compiled):
    assert borrowed.custom_call_takes_cubin()  # as of jaxlib 0.11.2 and 0.12.0.1
    kernel = kernel_fields(payload(compiled))
    assert kernel[1] == b"scratch"
    assert kernel[2] == 4
    assert kernel[6] == 90
    assert dict(fields(kernel[11])) == {1: compiled.cubin, 2: b"scratch", 3: compiled.shared_bytes}


def test_message_launches_the_true_number_of_warps(compiled):
    """A warp-specialised kernel asks for 4 warps and has more."""
    assert kernel_fields(payload(dataclasses.replace(compiled, num_warps=12)))[2] == 12


def test_message_carries_assembly_where_machine_code_has_no_field(compiled, monkeypatch):
    monkeypatch.setattr(borrowed, "custom_call_takes_cubin", lambda: False)
    kernel = kernel_fields(payload(compiled))
    assert kernel[4] == compiled.ptx.encode()
    assert 11 not in kernel


def test_a_library_without_the_field_is_recognised(tmp_path, monkeypatch):
    library = tmp_path / "_triton.so"
    library.write_bytes(b"\n\x0cmodule_image\x18\x0c \x01(\x0b")  # the name, but another number
    builders = type("module", (), {"_cuda_triton": type("module", (), {"__file__": str(library)})})
    monkeypatch.setattr(borrowed, "gpu_triton", lambda: builders)
    assert not borrowed.custom_call_takes_cubin.__wrapped__()


def test_no_plugin(monkeypatch):
    monkeypatch.setattr(borrowed, "_gpu_triton", object())
    with pytest.raises(ImportError, match="jtile\\[offline\\]"):
        borrowed.gpu_triton()


def test_notes_for_profilers(compiled):
    noted = zlib.decompress(payload(compiled, metadata={"b": "2", "a": "1"}))
    assert dict(fields(noted))[3] == b'{"a": "1", "b": "2"}'


def lower(function, *shapes):
    primitive = jax.extend.core.Primitive("launched")
    primitive.multiple_results = True
    primitive.def_abstract_eval(lambda *avals: [jax.core.ShapedArray(avals[0].shape, avals[0].dtype)])
    jax.interpreters.mlir.register_lowering(primitive, function, platform="cuda")
    with jax.sharding.use_abstract_mesh(H200.abstract_mesh):
        return jax.jit(primitive.bind).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def test_custom_call(compiled):
    launched = launch.Launch(compiled, (8, 1, 1))

    def rule(ctx, x):
        return launch.launch(ctx, [x], launched, sources.scratch.arguments, {0: 0})

    with launch.recording() as outer:
        with launch.recording() as recorded:
            text = lower(rule, jax.ShapeDtypeStruct((128, 128), jnp.float32))
        assert recorded == [launched]
    assert outer == []
    assert "@triton_kernel_call_ffi" in text
    assert "output_operand_alias" in text
    assert "dense<[1, 0]>" in text  # row-major
    assert compiled.scratch_bytes > 0
    assert f"tensor<{8 * compiled.scratch_bytes}xui8>" in text  # memory for descriptors is one more result


@pytest.mark.parametrize("aliases, expected", [({}, "stablehlo.constant dense<0.0"), ({0: 0}, "return %arg0")])
def test_no_programs(aliases, expected):
    text = lower(lambda ctx, x: launch.no_programs(ctx, [x], aliases), jax.ShapeDtypeStruct((0, 4), jnp.float32))
    assert "custom_call" not in text
    assert expected in text


def test_a_part_of_an_array_is_no_operand():
    """XLA hands `scale[1:]` over where it lies, 4 bytes after a multiple of 16, unless something stands between."""
    [device] = H200.topology().devices
    shapes = (((8, 128), jnp.bfloat16), ((129,), jnp.float32))
    x, scale = (jax.ShapeDtypeStruct(*s, sharding=SingleDeviceSharding(device)) for s in shapes)
    norm = jax.jit(lambda x, scale: jtile.rms_norm(x, scale[1:], implementation="triton"))
    program = norm.lower(x, scale).compile().as_text()
    [computation] = [c for c in re.split(r"\n(?=%|ENTRY)", program) if launch.CUSTOM_CALL in c]
    assert computation.startswith("ENTRY")  # and no fusion of the launch with a slice
