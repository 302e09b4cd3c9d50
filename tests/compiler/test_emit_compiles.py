"""Triton's compiler takes the generated source, for three generations of chips that need not be there."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jtile.compiler.build import build
from jtile.compiler.params import CompilerParams
from jtile.compiler.target import Target
from tests.compiler.kernels import CASES, NATIVE, sources
from tests.compiler.kernels.elementwise import BINARY, UNARY

CHIPS = ("NVIDIA A100", "NVIDIA H200", "NVIDIA B200")


def compiled(function, *operands, chip="NVIDIA H200", **params):
    [source] = sources(function, *operands, **params)
    return build(source, CompilerParams(**params), Target.named(chip))


# What asks most of the compiler, of each family of rules.
DEMANDING = """
    shift_by_anything bytes bools argmax_of_padded reduce_everything cummax_reversed cross_entropy
    shape_slice_unevenly shape_interleave shape_slice_quarter shape_one_element dot_padded dot_batched dot_vector
    dot_highest dot_one_row dot_of_bytes matmul_ragged attention ref_strided_store ref_masked ref_gather_ragged
    ref_outside_of_the_array grid_of_four_axes loop_with_several_carries while_loop branches
    scan_of_several scan_nested branches_in_loops scratch_in_loops_and_branches scratch_for_a_while prefetched_operands
    index_set_rows index_take_flat sort_values_by_key reduce_by_a_function dot_of_unsigned_bytes einsum_two_terms
""".split()
OTHERS = [chip for chip in CHIPS if chip != "NVIDIA H200"]


@pytest.mark.parametrize(
    "name, chip", [(name, "NVIDIA H200") for name in CASES] + [(name, chip) for name in DEMANDING for chip in OTHERS]
)
def test_kernels_compile(name, chip):
    function, operands = CASES[name]
    kernel = compiled(function, *operands, chip=chip)
    assert kernel.spill_bytes == 0
    assert not fused_exchanges(kernel.ptx)


def fused_exchanges(ptx: str) -> list[str]:
    """Where a thread adds a product of its own to another's number and rounds once: the two threads of such an exchange
    end up with different sums, and where both write theirs to one place, it is left to chance which stays there."""
    exchanged = set(re.findall(r"shfl\.sync\.bfly\.b32\s+(%r\d+)", ptx))
    return [text for text, addend in re.findall(r"(fma\.rn\S* .*, (%r\d+);)", ptx) if addend in exchanged]


@pytest.mark.parametrize("turns", [1, 2])
def test_sums_after_loops_do_not_fuse_exchanges(turns):
    def kernel(x_ref, y_ref):
        add = lambda i, total: total + x_ref[pl.ds(16 * i, 16)] ** 2  # noqa: E731
        y_ref[...] = jnp.sum(jax.lax.fori_loop(0, turns, add, jnp.zeros((16, 16))), axis=0)

    out = jax.ShapeDtypeStruct((16,), jnp.float32)
    kernel = compiled(pl.pallas_call(kernel, out_shape=out), jax.ShapeDtypeStruct((16 * turns, 16), jnp.float32))
    assert "shfl" in kernel.ptx
    assert not fused_exchanges(kernel.ptx)


FLOAT32_ONLY = {"bits", "to_integer_and_back", "to_bool_and_back", "to_half_and_back", "constants_only", "nextafter"}


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_functions_compile_in_every_float(dtype, chip):
    unary = [f for name, (f, _) in UNARY.items() if name not in FLOAT32_ONLY]
    binary = [f for name, (f, _, _) in BINARY.items() if name not in FLOAT32_ONLY]

    def kernel(x_ref, y_ref, out_ref):
        results = [f(x_ref[...]) for f in unary] + [f(x_ref[...], y_ref[...]) for f in binary]
        for i, result in enumerate(results):
            out_ref[i] = result.astype(out_ref.dtype)

    x = jax.ShapeDtypeStruct((64,), dtype)
    with jax.enable_x64(dtype == "float64"):
        out = jax.ShapeDtypeStruct((len(unary) + len(binary), 64), dtype)
        compiled(pl.pallas_call(kernel, out_shape=out), x, x, chip=chip)


@pytest.mark.parametrize("params", [{}, {"tma": True}, {"tma": True, "warp_specialize": True}])
def test_products_use_hopper(params):
    function, _ = CASES["matmul_ragged"]
    a = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
    kernel = compiled(lambda a, b: function(a, b, 128, 128, 64), a, a, num_stages=3, **params)
    assert "wgmma.mma_async" in kernel.ptx and kernel.spill_bytes == 0
    assert ("cp.async.bulk.tensor" in kernel.ptx) == bool(params)
    assert kernel.num_warps == (12 if "warp_specialize" in params else 4)


def test_float8_products_sum_in_float32_when_asked():
    def additions(precision):
        def kernel(a_ref, b_ref, o_ref):
            product = jnp.dot(a_ref[...], b_ref[...].T, precision=precision, preferred_element_type=jnp.float32)
            o_ref[...] = product

        a = jax.ShapeDtypeStruct((128, 64), jnp.float8_e4m3fn)
        ptx = compiled(pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((128, 128), jnp.float32)), a, a).ptx
        assert "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3" in ptx
        return ptx.count("add.f32") + ptx.count("add.rn.f32")

    assert additions(None) == 0
    assert additions("highest") == 128  # a thread's share of the tile, once between two sums of 32 terms


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_attention_uses_hopper(head_dim):
    function, _ = CASES["attention"]
    q = jax.ShapeDtypeStruct((2, 500, head_dim), jnp.bfloat16)
    kernel = compiled(lambda q, k, v: function(q, k, v, 128, 64), q, q, q, num_warps=8)
    assert "wgmma.mma_async" in kernel.ptx and kernel.spill_bytes == 0


def test_what_only_a_gpu_has():
    function, operands = NATIVE["ref_as_only_a_gpu_can"]
    ptx = compiled(function, *operands).ptx
    assert "tanh.approx.f32" in ptx and "atom.global" in ptx and "cas.b32" in ptx and "L1::evict_last" in ptx
    assert "ld.volatile" in ptx


def test_x64_mode():
    function, operands = CASES["attention"]
    with jax.enable_x64(True):
        compiled(function, *(np.asarray(x, jnp.bfloat16) for x in operands))
