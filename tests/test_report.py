import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton
import triton.language as tl
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jtile.compiler.pallas import retarget_pallas
from jtile.compiler.params import CompilerParams
from jtile.compiler.target import Target
from jtile.compiler.triton_call import triton_call
from jtile.report import KernelReport, inspect


@pytest.fixture(scope="module", autouse=True)
def cold_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JTILE_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        yield


def product_kernel(a_ref, b_ref, c_ref):
    def step(j, total):
        k = pl.ds(j * 64, 64)
        return total + jnp.dot(a_ref[:, k], b_ref[k, :], preferred_element_type=jnp.float32)

    c_ref[...] = jax.lax.fori_loop(0, a_ref.shape[1] // 64, step, jnp.zeros(c_ref.shape, jnp.float32))


def product(a, b, compiler_params=CompilerParams(num_warps=8, num_stages=3)):  # noqa: B008
    m, k, n = *a.shape, b.shape[1]
    return pl.pallas_call(
        product_kernel,
        out_shape=jax.ShapeDtypeStruct((m, n), jnp.float32),
        grid=(m // 128, n // 128),
        in_specs=[pl.BlockSpec((128, k), lambda i, j: (i, 0)), pl.BlockSpec((k, 128), lambda i, j: (0, j))],
        out_specs=pl.BlockSpec((128, 128), lambda i, j: (i, j)),
        compiler_params=compiler_params,
    )(a, b)


def double_kernel(x_ref, y_ref):
    y_ref[...] = x_ref[...] * 2


def double(x, **options):
    return pl.pallas_call(
        double_kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), compiler_params=CompilerParams(), **options
    )(x)


A = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16)
B = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16)
X = jax.ShapeDtypeStruct((64,), jnp.float32)


@pytest.mark.parametrize("target", ["NVIDIA A100", "NVIDIA H200", "NVIDIA B200"])
def test_matrix_product(target):
    [kernel] = inspect(product, A, B, target=target)
    assert kernel.name == "product_kernel"
    assert kernel.tensor_core_instructions > 0
    assert kernel.spill_bytes == 0
    assert 0 < kernel.registers <= 255
    assert kernel.shared_bytes >= 2 * 2 * 128 * 64  # a block of each matrix, at least
    assert kernel.threads == 256
    assert kernel.target == target
    columns = 128 if target == "NVIDIA B200" else 0  # of tensor memory, for the accumulator
    expected = Target.named(target).occupancy(kernel.registers, kernel.shared_bytes, 256, columns)
    assert kernel.occupancy == expected
    assert sum(n for name, n in kernel.instructions.items() if "mma" in name) == kernel.tensor_core_instructions
    assert "def product_kernel(" in kernel.source and "tl.dot" in kernel.source
    line = product_kernel.__code__.co_firstlineno
    assert f"    # test_report.py:{line + 5}: c_ref[...] = jax.lax.fori_loop(" in kernel.source
    assert ".visible .entry product_kernel(" in kernel.ptx


def test_fields():
    fields = (
        "name target source ptx instructions registers spill_bytes shared_bytes threads occupancy "
        "tensor_core_instructions tma_instructions"
    ).split()
    assert [f for f in KernelReport.__dataclass_fields__] == fields


def test_printed():
    kernels = inspect(lambda a, b, x: (product(a, b), double(x)), A, B, X)
    heading, first, second = str(kernels).splitlines()
    columns = (
        "name target registers spill_bytes shared_bytes threads occupancy tensor_core_instructions tma_instructions"
    )
    assert heading.split() == columns.split()
    assert first.split()[0] == "product_kernel" and second.split()[0] == "double_kernel"
    assert {len(line) for line in (heading, first, second)} == {len(heading)}
    assert f"{kernels[0].shared_bytes:,}" in first
    assert str(kernels[1]).splitlines()[1].split() == second.split()
    assert "def product_kernel" not in repr(kernels)
    assert str(inspect(jnp.sin, X)) == "no kernels"


@triton.jit
def negate_kernel(x, y):
    i = tl.arange(0, 64)
    tl.store(y + i, -tl.load(x + i))


def test_every_way_to_a_kernel():
    """In order of appearance, through transformations: Pallas, Pallas for another backend, Triton by hand."""

    def by_another_backend(x):
        def add_one(x_ref, y_ref):
            y_ref[...] = x_ref[...] + 1

        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(add_one, out_shape=shape, compiler_params=plgpu.CompilerParams(num_warps=2))(x)

    @jax.custom_vjp
    def f(x):
        return double(x)

    f.defvjp(lambda x: (f(x), None), lambda _, g: (triton_call(g, kernel=negate_kernel, out_shape=g, grid=1),))

    @jax.jit
    def loss(x):
        x = retarget_pallas(by_another_backend)(x)
        return jax.lax.scan(lambda x, _: (jax.checkpoint(f)(x), None), x, length=2)[0].sum()

    kernels = inspect(loss, X)
    assert [k.name for k in kernels] == ["add_one", "double_kernel"]
    assert kernels[0].threads == 64
    # Asked a second time: what JAX remembers of the first is not in the way.
    assert inspect(loss, X) == kernels
    assert {k.name for k in inspect(jax.vmap(f), jax.ShapeDtypeStruct((3, 64), jnp.float32))} == {"double_kernel"}
    both = inspect(jax.value_and_grad(lambda x: f(x).sum()), X)
    assert [k.name for k in both] == ["double_kernel", "negate_kernel"]


@pytest.mark.parametrize(
    "target, tma, copies",
    [
        ("NVIDIA A100", False, {"cp.async.cg.shared.global"}),
        (
            "NVIDIA H200",
            True,
            {"cp.async.bulk.tensor.2d.shared::cta.global", "cp.async.bulk.tensor.2d.global.shared::cta"},
        ),
    ],
)
def test_instructions(target, tma, copies):
    [kernel] = inspect(lambda a, b: product(a, b, CompilerParams(num_stages=3, tma=tma)), A, B, target=target)
    found = {name for name in kernel.instructions if name.startswith("cp.async")}
    assert found == copies
    assert (kernel.tma_instructions > 0) == tma


def test_a_kernel_launched_twice_is_listed_once():
    assert len(inspect(lambda x: double(double(x)), X)) == 1
    assert len(inspect(lambda x: (double(x), double(x[:32])), X)) == 2


def test_arguments_may_be_arrays_and_pytrees():
    def f(tree, scale, name):
        assert name == "tree"
        return double(tree["x"]) * scale + tree["y"][0]

    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    placed = jax.device_put(np.ones(64, np.float32), jax.NamedSharding(mesh, jax.P("x")))
    [kernel] = inspect(lambda tree, scale: f(tree, scale, "tree"), {"x": placed, "y": [np.float32(1)]}, 2.0)
    assert kernel.name == "double_kernel"


def test_inside_a_mesh():
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        assert [k.name for k in inspect(double, X)] == ["double_kernel"]


def test_unknown_target():
    with pytest.raises(ValueError, match="knows no chip named 'H2000'"):
        inspect(double, X, target="H2000")


def test_present_gpu():
    if any(d.platform == "gpu" for d in jax.devices()):
        assert len(inspect(double, X, target=None)) == 1
    else:
        with pytest.raises(RuntimeError, match="target='NVIDIA H200'"):
            inspect(double, X, target=None)
