"""cuDNN's attention as a tile: what is asked of it, when it may be, and on a GPU what it gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtile
from jtile.compiler.target import Target
from jtile.ops.attention.cudnn import Cudnn
from jtile.tuning import search
from jtile.tuning.table import Tuning, recording
from tests.ops.test_attention import operands, plain_attention

H200 = Target.named("NVIDIA H200")


def gradients(query, key, value, *, attend=jtile.dot_product_attention, dlse=False, **options):
    """The output and the gradients of query, key and value, of their sum with random weights."""

    def loss(*inputs):
        out, lse = attend(*inputs, return_lse=True, **options)
        weights = jax.random.normal(jax.random.key(1), out.shape)
        return jnp.sum(weights * out.astype(jnp.float32)) + (lse.sum() if dlse else 0), out

    found, out = jax.grad(loss, (0, 1, 2), has_aux=True)(query, key, value)
    return out, *found


def calls(*inputs, target=H200, **options):
    """What a gradient calls, forward and backward."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs]
    with jax.sharding.use_abstract_mesh(target.abstract_mesh), recording() as found:
        function = functools.partial(gradients, implementation="triton", **options)
        jax.jit(lambda *inputs: function(*inputs)).trace(*shapes).lower(lowering_platforms=("cuda",))
    return found


def offered(*inputs, **options):
    return [Cudnn() in search.candidates(call) for call in calls(*inputs, **options)]


def tuned(found) -> Tuning:
    return Tuning(call.entry(Cudnn(), 1e-3, 1e-3) for call in found)


@functools.cache
def small(queries=64, keys=64, head_dim=64, dtype="bfloat16"):
    return tuple(operands((2,), queries, keys, 4, 2, head_dim, dtype=dtype))


def test_it_is_one_more_tile_of_plain_calls():
    for is_causal in (False, True):
        assert offered(*small(), is_causal=is_causal) == [True, True]
    assert offered(*small(keys=96)) == [True, True]
    assert offered(*small(keys=96), is_causal=True) == [
        False,
        False,
    ]  # of a part of the queries it would not know which
    assert offered(*small(), dlse=True) == [True, False]
    assert offered(*small(), is_causal=True, query_offset=3) == [False, False]
    assert offered(*small(), local_window_size=(9, 0)) == [False, False]
    assert offered(*small(), logits_soft_cap=30.0) == [False, False]
    assert offered(*small(dtype="float32")) == [False, False]
    assert offered(*small(head_dim=256)) == [True, True]
    assert offered(*small(head_dim=256), target=Target.named("NVIDIA A100")) == [False, False]


def test_a_split_sequence_has_no_causal_mask_of_its():
    """A device's queries may be as many as the keys, and still not begin with the first."""
    with jax.sharding.use_abstract_mesh(H200.abstract_mesh):
        found = calls(*small(queries=128, keys=64), is_causal=True)
    for call in found:
        half = tuple(
            None if x is None else jax.ShapeDtypeStruct(tuple(64 if n == 128 else n for n in x.shape), x.dtype)
            for x in call.operands
        )
        assert Cudnn() not in search.candidates(call._replace(operands=half))


def test_gradients_are_deterministic_and_explained():
    found = calls(*small(), is_causal=True)
    with tuned(found), jax.sharding.use_abstract_mesh(H200.abstract_mesh):
        function = functools.partial(gradients, implementation="triton", is_causal=True)
        text = jax.jit(lambda *inputs: function(*inputs)).trace(*small()).lower(lowering_platforms=("cuda",)).as_text()
        reports = jtile.explain(functools.partial(gradients, is_causal=True), *small(), target="NVIDIA H200")
    [backward] = [line for line in text.splitlines() if "__cudnn$fmhaSoftmaxBackward" in line]
    assert r"\22force_deterministic\22: true" in backward and r"\22mask_type\22: \22CAUSAL\22" in backward
    assert [(r.why.partition(", ")[2], r.tile) for r in reports] == [
        ("by cuDNN, which tuning found faster", "Cudnn(library='cuDNN') (tuned)")
    ] * 2


def test_it_can_be_exported():
    """The checks that jtile names are those of all that its ops launch."""
    with tuned(calls(*small())), jax.sharding.use_abstract_mesh(H200.abstract_mesh):
        program = jax.jit(functools.partial(gradients, implementation="triton"))
        exported = jax.export.export(program, platforms=("cuda",), disabled_checks=jtile.EXPORT_CHECKS)(*small())
    assert "__cudnn$fmhaSoftmaxBackward" in exported.mlir_module()


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("length, head_dim", [(257, 64), (1024, 128)])
def test_on_a_gpu(length, head_dim, dtype, is_causal):
    """What the definition gives, the same bits every time; and NaN that a mask hides stays hidden."""
    inputs = small(length, length, head_dim, dtype)
    options = dict(is_causal=is_causal, implementation="triton")
    with tuned(calls(*inputs, target=Target.current(), is_causal=is_causal)):
        run = jax.jit(lambda *inputs: gradients(*inputs, **options))
        assert "__cudnn$fmhaSoftmaxBackward" in run.lower(*inputs).as_text()
        got = run(*inputs)
        for _ in range(4):
            assert all(bool(jnp.all(a == b)) for a, b in zip(run(*inputs), got, strict=True))
        dirty = [inputs[0], *(x.at[:, length // 2 :].set(jnp.nan) for x in inputs[1:])]
        out = run(*dirty)[0]

    def attend(*inputs, return_lse):
        return plain_attention(*inputs, is_causal=is_causal)

    expected = gradients(*(x.astype(jnp.float32) for x in inputs), attend=attend)
    tolerance = 4 * 2**-8 if dtype == "bfloat16" else 4 * 2**-11
    for a, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), e, rtol=0, atol=tolerance * float(jnp.abs(e).max()))
    if is_causal:
        assert bool(jnp.isfinite(out[:, : length // 2]).all() & jnp.isnan(out[:, length // 2 :]).all())
