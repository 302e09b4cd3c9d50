import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jtile.compiler import launch
from jtile.compiler.kernel import UnsupportedKernel
from jtile.compiler.pallas import retarget_pallas
from jtile.compiler.params import CompilerParams
from jtile.compiler.target import Target

H200 = Target.named("NVIDIA H200")
X = jax.ShapeDtypeStruct((1024, 64), jnp.float32)
TARGET_NAME = 'custom_call_target="triton_kernel_call_ffi"'


def triple(x_ref, y_ref):
    y_ref[...] = x_ref[...] * 3


def call(x, kernel=triple, compiler_params=CompilerParams(), **options):  # noqa: B008
    block = pl.BlockSpec((128, 64), lambda i: (i, 0))
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(pl.cdiv(x.shape[0], 128),),
        in_specs=[block],
        out_specs=block,
        compiler_params=compiler_params,
        **options,
    )(x)


def lower(function, *shapes):
    """The kernels that a function launches on an H200, and its program."""
    with jax.sharding.use_abstract_mesh(H200.abstract_mesh), launch.recording() as launches:
        program = jax.jit(lambda *args: function(*args)).trace(*shapes).lower(lowering_platforms=("cuda",))
    return [one.compiled for one in launches], program.as_text()


@pytest.fixture(scope="module")
def mesh():
    return H200.make_mesh((4,), ("x",), (AxisType.Auto,))


def test_lowering_for_an_abstract_device():
    [kernel], program = lower(call, X)
    assert (kernel.name, kernel.compute_capability, kernel.spill_bytes) == ("triple", 90, 0)
    assert program.count("@triton_kernel_call_ffi") == 1


def test_numbers_of_four_bits_are_unpacked():
    """XLA packs two into a byte; the kernel has a byte for each."""

    def negative(x_ref, y_ref):
        y_ref[...] = (-x_ref[...].astype(jnp.int32)).astype(y_ref.dtype)

    for dtype, byte in ((jnp.int4, "i8"), (jnp.uint4, "ui8")):
        _, program = lower(functools.partial(call, kernel=negative), jax.ShapeDtypeStruct(X.shape, dtype))
        [launched] = [line for line in program.splitlines() if "@triton_kernel_call_ffi" in line]
        assert f": (tensor<1024x64x{byte}>) -> tensor<1024x64x{byte}>" in launched
        assert program.count("stablehlo.convert") == 2


def test_parameters_reach_the_compiler():
    [kernel], _ = lower(functools.partial(call, compiler_params=CompilerParams(num_warps=8, max_registers=32)), X)
    assert kernel.threads == 256
    assert ".maxnreg 32" in kernel.ptx


@pytest.mark.parametrize("spec", [P(), P("x")])
def test_executable_for_absent_gpus(mesh, spec):
    """Under plain `jit` only the operands' shardings tell what to compile for."""
    operand = jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=NamedSharding(mesh, spec))
    text = jax.jit(call).lower(operand).compile().as_text()
    assert text.count(TARGET_NAME) == 1
    assert text.count(" all-gather") == (spec == P("x"))  # a bare kernel is whole


@pytest.mark.parametrize("check_vma", [False, True])
def test_shard_map_over_absent_gpus(mesh, check_vma):
    operand = jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=NamedSharding(mesh, P("x")))

    def body(x):
        if not check_vma:
            return call(x)
        varying = jax.typeof(x).update(shape=x.shape)
        block = pl.BlockSpec((128, 64), lambda i: (i, 0))
        return pl.pallas_call(
            triple, out_shape=varying, grid=2, in_specs=[block], out_specs=block, compiler_params=CompilerParams()
        )(x)

    split = jax.shard_map(body, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=check_vma)
    compiled = jax.jit(split).lower(operand).compile()
    assert compiled.as_text().count(TARGET_NAME) == 1
    assert " all-gather" not in compiled.as_text()
    assert compiled.memory_analysis().argument_size_in_bytes == 256 * 64 * 4


def test_set_mesh(mesh):
    with jax.set_mesh(mesh):
        text = jax.jit(lambda: call(jnp.ones(X.shape))).lower().compile().as_text()
    assert text.count(TARGET_NAME) == 1


def test_exported_program():
    """A kernel's machine code travels with the exported program, which says which chip it was made for."""
    allowed = jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")
    with jax.sharding.use_abstract_mesh(H200.abstract_mesh):
        exported = jax.export.export(jax.jit(call), platforms=["cuda"], disabled_checks=[allowed])(X)
    assert exported.platforms == ("cuda",)
    assert "triton_kernel_call_ffi" in exported.mlir_module()


def test_transformations():
    def loss(x):
        return jax.lax.scan(lambda x, _: (jax.checkpoint(call)(x), None), x, length=3)[0]

    kernels, program = lower(jax.vmap(loss), jax.ShapeDtypeStruct((2, *X.shape), X.dtype))
    assert len(kernels) == 1
    assert "stablehlo.while" in program


def test_which_gpu():
    if any(d.platform == "gpu" for d in jax.devices()):
        assert jax.jit(call).trace(X).lower(lowering_platforms=("cuda",))
    else:
        with pytest.raises(RuntimeError, match="JAX finds no GPU here. To compile for one that is not here, name it"):
            jax.jit(call).trace(X).lower(lowering_platforms=("cuda",))


def test_aliased_results_keep_what_no_program_writes():
    empty = jax.ShapeDtypeStruct((0, 64), jnp.float32)
    kernels, program = lower(call, empty)
    assert kernels == [] and "stablehlo.constant dense<0.0" in program
    kernels, program = lower(functools.partial(call, input_output_aliases={0: 0}), empty)
    assert kernels == [] and "stablehlo.constant" not in program


def test_aliased_operand():
    _, program = lower(functools.partial(call, input_output_aliases={0: 0}), X)
    assert "output_operand_alias" in program


def test_debug_prints_the_source(capsys):
    lower(functools.partial(call, debug=True), X)
    assert "@triton.jit\ndef triple(" in capsys.readouterr().out


def test_notes_for_profilers():
    _, noted = lower(functools.partial(call, metadata={"layer": "7"}), X)
    _, plain = lower(call, X)
    assert noted != plain


@pytest.mark.parametrize("platform", ["rocm"])
def test_other_gpus(platform):
    with pytest.raises(UnsupportedKernel, match=f"triple .*is lowered for {platform}"):
        jax.jit(call).trace(X).lower(lowering_platforms=(platform,))


class TestRetarget:
    def test_kernels_for_the_deprecated_backend(self):
        def f(tree, times: str):
            y = call(tree["x"], compiler_params=plgpu.CompilerParams(num_warps=8))
            z = jax.lax.fori_loop(0, 2, lambda _, z: call(z, compiler_params=None), tree["x"])
            return {"y": y, "z": z, "times": times}

        with jax.sharding.use_abstract_mesh(H200.abstract_mesh), launch.recording() as launches:
            lowered = jax.jit(lambda tree: retarget_pallas(f)(tree, "3")["y"] + retarget_pallas(f)(tree, "3")["z"])
            lowered.trace({"x": X}).lower(lowering_platforms=("cuda",))
        assert {one.compiled.threads for one in launches} == {256, 128}
        assert all("@triton.jit" in one.compiled.source for one in launches)

    def test_stages_are_kept(self):
        def stages(compiler_params):
            traced = jax.make_jaxpr(retarget_pallas(functools.partial(call, compiler_params=compiler_params)))(X)
            return traced.eqns[0].params["compiler_params"]

        assert stages(plgpu.CompilerParams(num_stages=4)) == CompilerParams(num_stages=4)
        assert stages(None) == CompilerParams()
        assert stages(CompilerParams(num_warps=2)) == CompilerParams(num_warps=2)

    def test_interpreted_kernels_stay_interpreted(self):
        x = np.ones((128, 64), np.float32)
        np.testing.assert_array_equal(retarget_pallas(functools.partial(call, interpret=True))(x), 3 * x)

    def test_kernels_for_other_machines(self):
        from jax.experimental.pallas import tpu as pltpu

        with pytest.raises(TypeError, match=r"triple \(.*test_pallas.py:\d+\) has compiler_params=.*, not Triton's"):
            retarget_pallas(functools.partial(call, compiler_params=pltpu.CompilerParams()))(X)


def test_import_is_light():
    """No GPU, CUDA plugin or Triton is needed to import jtile, and Triton waits until something is compiled."""
    script = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.startswith(('triton', 'jax_triton', 'jax_cuda', 'jax_plugins')):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "import jtile\n"
        "import jtile.compiler.pallas, jtile.compiler.triton_call, jtile.report\n"
        "from jtile.compiler.params import CompilerParams\n"
        "CompilerParams()\n"
        "assert 'triton' not in sys.modules\n"
        "import jax, jax.numpy as jnp\n"
        "from jtile.compiler.target import Target\n"
        "try: jtile.report.inspect(lambda x: x, 1.0); Target.named('NVIDIA H200').topology()\n"
        "except Exception as error: print(type(error).__name__, *error.__notes__)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert "pip install 'jtile[offline]'" in run.stdout
