"""What the compiler chooses by itself, and that it is right to."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from jtile.compiler.emit import CannotSpecialize, emit
from jtile.compiler.kernel import kernel_of
from jtile.compiler.params import CompilerParams
from jtile.compiler.rewrite import map_pallas_calls
from jtile.compiler.schedule import compile_kernel, schedules
from jtile.compiler.target import Target
from tests.compiler.kernels import CASES

H200, B200, A100 = map(Target.named, ("NVIDIA H200", "NVIDIA B200", "NVIDIA A100"))
BF16 = jnp.bfloat16


def kernel(function, *operands):
    found = []

    def keep(call, *_):
        found.append(kernel_of(call))
        return [jnp.zeros(a.shape, a.dtype) for a in call["out_avals"]]

    jax.eval_shape(map_pallas_calls(function, keep), *operands)
    [only] = found
    return only


def attention(keys=1024, block=128, mask=False):
    """The scores of 128 queries with `block` keys at a time, times the values."""

    def body(q_ref, k_ref, v_ref, m_ref, o_ref):
        def step(i, acc):
            here = pl.ds(i * block, block)
            scores = jnp.dot(q_ref[...], k_ref[here, :].T, preferred_element_type=jnp.float32)
            if mask:
                scores += m_ref[here][None, :]
            return acc + jnp.dot(jnp.exp2(scores).astype(BF16), v_ref[here, :], preferred_element_type=jnp.float32)

        o_ref[...] = jax.lax.fori_loop(0, keys // block, step, jnp.zeros((128, 128), jnp.float32)).astype(BF16)

    rows = pl.BlockSpec((128, 128), lambda i: (i, 0))
    whole = pl.BlockSpec((keys, 128), lambda i: (0, 0))
    vector = pl.BlockSpec((keys,), lambda i: (0,))
    q, k = (jax.ShapeDtypeStruct((n, 128), BF16) for n in (512, keys))
    call = pl.pallas_call(body, out_shape=q, grid=(4,), in_specs=[rows, whole, whole, vector], out_specs=rows)
    return kernel(call, q, k, k, jax.ShapeDtypeStruct((keys,), jnp.float32))


def small_tiles():
    """Products of 32 x 32 in a loop: too small for wgmma."""

    def body(q_ref, k_ref, o_ref):
        def step(i, carry):
            a, b = carry
            k = k_ref[pl.ds(i * 32, 32), :]
            p = jnp.dot(q_ref[...], k.T, preferred_element_type=jnp.float32)
            a += jnp.dot(jnp.exp2(p).astype(BF16), k, preferred_element_type=jnp.float32)
            b += jnp.dot(p.astype(BF16).T, q_ref[...], preferred_element_type=jnp.float32)
            return a, b

        zeros = jnp.zeros((32, 128), jnp.float32)
        a, b = jax.lax.fori_loop(0, 32, step, (zeros, zeros))
        o_ref[...] = (a * b).astype(BF16)

    rows = pl.BlockSpec((32, 128), lambda i: (i, 0))
    whole = pl.BlockSpec((1024, 128), lambda i: (0, 0))
    q, k = (jax.ShapeDtypeStruct((n, 128), BF16) for n in (512, 1024))
    return kernel(pl.pallas_call(body, out_shape=q, grid=(16,), in_specs=[rows, whole], out_specs=rows), q, k)


def test_products_that_wait_for_each_other_get_two_groups_of_warps():
    source, compiled = compile_kernel(attention(), CompilerParams(num_warps=8), H200)
    assert "warp_specialize=True" in source.text and compiled.num_warps == 12
    assert compiled.spill_bytes == 0 and compiled.tma_instructions > 0


@pytest.mark.parametrize(
    "params, target, changes",
    [
        (CompilerParams(num_warps=4), H200, {}),  # one group has no other to give way to
        (CompilerParams(num_warps=8, warp_specialize=False), H200, {}),
        (CompilerParams(num_warps=8), B200, {}),
        (CompilerParams(num_warps=8), H200, {"mask": True}),  # a load that is no block
        (CompilerParams(num_warps=8, num_stages=3), H200, {"block": 256}),  # too large, specialised
    ],
    ids=str,
)
def test_otherwise_the_warps_stay_together(params, target, changes):
    if changes.get("block"):
        with pytest.raises(Exception, match="shared memory"):
            compile_kernel(attention(**changes), params, target)
        return
    source, compiled = compile_kernel(attention(**changes), params, target)
    assert "warp_specialize" not in source.text and compiled.num_warps == params.num_warps
    assert compiled.tma_instructions > 0


def test_tma_where_tensor_cores_multiply():
    def tma(kernel, target=H200, **params):
        *_, plain = schedules(kernel, CompilerParams(**params), target)
        return plain.tma

    assert tma(attention()) and not tma(attention(), tma=False)
    assert not tma(attention(), A100)
    for name in ("matmul_ragged", "softmax"):  # float32, whose products may be exact; nothing multiplied
        function, operands = CASES[name]
        assert not tma(kernel(function, *operands))


@pytest.mark.parametrize("field", ["tma", "warp_specialize"])
def test_what_a_chip_lacks_is_refused(field):
    with pytest.raises(NotImplementedError, match=rf"{field}=True needs compute capability 9.0 .* NVIDIA A100 has 8.0"):
        compile_kernel(attention(), CompilerParams(**{field: True}), A100)


def test_a_block_more_for_fewer_registers():
    """Asking for the registers that it takes by itself leaves fewer blocks on a multiprocessor."""

    def blocks(params):
        _, compiled = compile_kernel(small_tiles(), params, H200)
        assert compiled.spill_bytes <= 256
        return H200.occupancy(compiled.registers, compiled.shared_bytes, compiled.threads).blocks

    assert blocks(CompilerParams()) > blocks(CompilerParams(max_registers=255))


def test_persistent_kernels_fill_the_chip():
    source, compiled = compile_kernel(attention(), CompilerParams(num_warps=8, persistent=True), H200)
    assert source.grid == (4, 1, 1)  # no more programs than there are
    few = Target.named("NVIDIA H200").__class__(**{**vars(H200), "sms": 2})
    source, compiled = compile_kernel(attention(), CompilerParams(num_warps=8, persistent=True), few)
    assert source.grid == (2 * H200.occupancy(compiled.registers, compiled.shared_bytes, compiled.threads).blocks, 1, 1)


def test_specialised_warps_load_by_tma():
    with pytest.raises(CannotSpecialize, match=r"loads by pointers at .*test_schedule.py:\d+.*Set tma=True"):
        emit(attention(mask=True), CompilerParams(tma=True, warp_specialize=True))


def test_specialised_warps_do_not_wait_for_each_other():
    def body(x_ref, o_ref):
        @pl.loop(0, 4)
        def _(i):
            o_ref[...] = jnp.zeros(o_ref.shape)
            o_ref[i] = jnp.ones(64)

    zeros = jnp.zeros((64, 64))
    with pytest.raises(CannotSpecialize, match="wait for each other in it. Write to one part"):
        emit(kernel(pl.pallas_call(body, out_shape=zeros), zeros), CompilerParams(tma=False, warp_specialize=True))
