"""Attention's schedule for Hopper: what it computes and how its warps work together, by NumPy; what it becomes,
compiled for an H200; and on one, what it computes."""

import functools
import re
import sys
import types

import jax
import jax.numpy as jnp
import jax_triton
import ml_dtypes
import numpy as np
import pytest

import jtile
from jtile.compiler.target import Target
from jtile.ops.attention import hopper, op, reference
from jtile.ops.attention.hopper import features as on_hopper
from jtile.ops.attention.hopper import functions
from jtile.ops.attention.variant import Variant
from tests.ops import gluon_on_cpu

BF16 = ml_dtypes.bfloat16


def operands(batch, queries, keys, heads, key_heads, head_dim, value_dim=None):
    """query, key, value and dout"""
    normal = np.random.default_rng(queries + keys).standard_normal
    value_dim = value_dim or head_dim
    shapes = [(queries, heads, head_dim), (keys, key_heads, head_dim), (keys, key_heads, value_dim)]
    return [normal((batch, *shape)).astype(BF16) for shape in (*shapes, (queries, heads, value_dim))]


def expected(query, key, value, dout, origin, low, high):
    """out, lse and the gradients, in float32; a query that sees no key has the output 0"""
    group = query.shape[2] // key.shape[2]
    query, key, value, dout = (np.moveaxis(x.astype(np.float32), 2, 1) for x in (query, key, value, dout))
    key, value = (np.repeat(x, group, 1) for x in (key, value))
    scale = query.shape[-1] ** -0.5
    positions, cols = np.arange(query.shape[2])[:, None] + origin, np.arange(key.shape[2])
    sees = (cols >= positions + (-np.inf if low is None else low)) & (
        cols <= positions + (np.inf if high is None else high)
    )
    scores = np.where(sees, scale * query @ np.swapaxes(key, 2, 3), -np.inf)
    lse = np.asarray(jax.nn.logsumexp(scores, axis=-1, keepdims=True))
    weights = np.exp(scores - np.where(np.isinf(lse), 0, lse))
    out = weights @ value
    dscores = scale * weights * (dout @ np.swapaxes(value, 2, 3) - (out * dout).sum(-1, keepdims=True))
    over_group = lambda x: x.reshape(x.shape[0], -1, group, *x.shape[2:]).sum(2)  # noqa: E731
    dkey, dvalue = (over_group(np.swapaxes(a, 2, 3) @ b) for a, b in ((dscores, query), (weights, dout)))
    return [np.moveaxis(x, 1, 2) for x in (out, lse[..., 0], dscores @ key, dkey, dvalue)]


def by_numpy(*args, kernel, out_shape, grid, zeroed_outputs=(), **constants):
    """In place of `triton_call`: runs the kernel by NumPy."""
    leaves, tree = jax.tree.flatten(out_shape)
    unknown = lambda dtype: np.nan if jnp.issubdtype(dtype, jnp.inexact) else -1  # noqa: E731
    results = [np.full(x.shape, 0 if i in zeroed_outputs else unknown(x.dtype), x.dtype) for i, x in enumerate(leaves)]
    unclaimed = iter(results)

    def argument(x):
        if isinstance(x, jax_triton.TensorDescriptor):
            base = next(unclaimed) if isinstance(x.base, jax.ShapeDtypeStruct) else np.array(x.base)
            return gluon_on_cpu.Descriptor(base.reshape(-1), x.shape, x.strides, x.block_shape)
        return x if x is None else gluon_on_cpu.Pointer(np.array(x).reshape(-1))

    given = [argument(x) for x in args]
    given += [gluon_on_cpu.Pointer(x.reshape(-1)) for x in unclaimed]
    function = gluon_on_cpu.load(sys.modules[kernel.fn.__module__])[kernel.fn.__name__]
    gluon_on_cpu.run(function, grid, *given, *constants.values())
    return jax.tree.unflatten(tree, map(jnp.asarray, results))


def close(got, wanted):
    """To what 16 bits of weights and results tell."""
    for a, b in zip(got, wanted, strict=True):
        largest = np.abs(b[np.isfinite(b)]).max(initial=1)
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=2e-2, atol=1e-2 * largest)


# With the groups of a forward program, and the queries of a backward program's block.
SHAPES = {
    "grouped": ((1, 300, 300, 2, 1, 64), 3, 128),
    "fewer keys": ((1, 200, 90, 1, 1, 64), 2, 128),
    "one block": ((2, 17, 17, 1, 1, 64), 3, 128),
    "padded": ((1, 150, 260, 1, 1, 80), 2, 64),
    "wide": ((1, 90, 150, 2, 1, 192, 256), 2, 64),
}
BANDS = {"full": (0, None, None), "causal": (0, None, 0), "offset": (-40, None, 0), "window": (7, -70, 30)}


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_by_numpy(monkeypatch, shape, band):
    monkeypatch.setattr(hopper, "triton_call", by_numpy)
    sizes, groups, _ = SHAPES[shape]
    query, key, value, dout = operands(*sizes)
    origin, low, high = BANDS[band]
    tile = hopper.ForwardTile(groups, block_k=64 if groups == 2 else 128, stages=2, together=1, programs=groups)
    scale = query.shape[-1] ** -0.5
    got = hopper.forward(query, key, value, np.int32(origin), tile=tile, scale=scale, low=low, high=high)
    close(got, expected(query, key, value, dout, origin, low, high)[:2])


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_by_numpy(monkeypatch, shape, band):
    sizes, _, block_q = SHAPES[shape]
    query, key, value, dout = operands(*sizes)
    monkeypatch.setattr(hopper, "triton_call", by_numpy)
    origin, low, high = BANDS[band]
    out, lse, *gradients = expected(query, key, value, dout, origin, low, high)
    got = hopper.backward(
        *(jnp.asarray(x) for x in (query, key, value, out.astype(BF16), lse, dout)),
        None,
        origin=jnp.int32(origin),
        tile=hopper.BackwardTile(block_q, stages=2, together=1),
        scale=query.shape[-1] ** -0.5,
        low=low,
        high=high,
    )
    close(got, gradients)


@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("dirty", ["query", "key", "unseen key", "value", "dout"])
def test_what_may_leak_is_told(monkeypatch, dirty, head_dim):
    """Of what is not finite, and masked for some queries of its block, the passes that it may reach these in tell."""
    monkeypatch.setattr(hopper, "triton_call", by_numpy)
    arrays = dict(zip(("query", "key", "value", "dout"), operands(2, 90, 150, 1, 1, head_dim), strict=True))
    arrays[dirty.split()[-1]][1, 100 if dirty == "unseen key" else 40] = np.inf if dirty == "value" else np.nan
    query, key, value, dout = map(jnp.asarray, arrays.values())
    variant = Variant(scale=head_dim**-0.5, window=(None, 0))
    target = Target.named("NVIDIA H200")
    tile = next(iter(on_hopper.forward_tiles(query, key, value, variant=variant, target=target)))
    out, lse, found = on_hopper.forward(query, key, value, tile=tile, variant=variant)
    assert found == 2 or dirty in ("unseen key", "dout")
    tile = next(iter(on_hopper.backward_tiles(query, key, value, variant=variant)))
    given = dict(out=out, lse=lse, dout=dout, dlse=None)
    *_, found = on_hopper.backward(query, key, value, **given, tile=tile, variant=variant)
    assert found == 2


def slopes(heads):
    return 2.0 ** -np.arange(1, heads + 1, dtype=np.float32)


def documents(*lengths):
    return jnp.asarray(np.repeat(np.arange(len(lengths)), lengths)[None])


def flex(score_mod=None, mask_mod=None, block_size=None):
    """A call of flex_attention, with lists of blocks if they have a size."""

    def call(query, key, value, **options):
        sizes = query.shape[1], key.shape[1]
        mask = block_size and jtile.create_block_mask(mask_mod, None, None, *sizes, block_size=block_size)
        given = dict(block_mask=mask) if block_size else dict(mask_mod=mask_mod)
        return jtile.flex_attention(query, key, value, score_mod=score_mod, **given, **options)

    return call


def alibi(heads):
    return lambda score, b, h, q, k: score + jnp.asarray(slopes(heads))[h] * (k - q)


def attend(**options):
    return functools.partial(jtile.dot_product_attention, **options)


# Of 300 queries and keys in two heads.
TABLE = jnp.asarray(np.random.default_rng(3).standard_normal((2, 601)), jnp.float32)
FEATURES = {
    "window": attend(is_causal=True, local_window_size=(70, 0)),
    "offset window": attend(local_window_size=(50, 30), query_offset=7),
    "offsets": attend(is_causal=True, query_offset=jnp.array([-40])),
    "cap": attend(is_causal=True, logits_soft_cap=2.0),
    "segments": attend(is_causal=True, query_segment_ids=documents(100, 37, 140, 23)),
    "shared segments": attend(query_segment_ids=documents(200, 100)[0], logits_soft_cap=5.0),
    "lengths": attend(query_seq_lengths=jnp.array([170]), key_value_seq_lengths=jnp.array([33])),
    "sinks": attend(is_causal=True, sinks=jnp.array([0.5, 3.0])),
    "alibi": flex(alibi(2), lambda b, h, q, k: q >= k, 128),
    "prefix": flex(None, lambda b, h, q, k: (q >= k) | (k < 130), 128),
    "empty lists": flex(None, lambda b, h, q, k: (k < 130) & (q > 128), 128),
    "no lists": flex(None, lambda b, h, q, k: (q + k) % 3 == 0),
    "table": flex(lambda score, b, h, q, k: score * 0.5 + TABLE[h, q - k + 300]),
    "of keys": flex(lambda score, b, h, q, k: TABLE[h, k], lambda b, h, q, k: q != 7),
}
WIDE = "cap", "segments", "prefix"  # at the widest head dim, too


@pytest.fixture
def on_cpu(monkeypatch):
    """Calls of attention give what the schedule computes, and what its meaning is."""

    target = Target.named("NVIDIA H200")

    def forward(query, key, value, *arrays, variant, **_):
        named = variant.named(arrays)
        if "origin" in named:  # a device's part of the queries, from the twentieth on
            arrays = [*(named | {"origin": jnp.int32(-20)}).values()]
        obstacle = on_hopper.obstacle(query, key, value, *arrays, variant=variant, target=target)
        assert obstacle is None
        tile = next(iter(on_hopper.forward_tiles(query, key, value, variant=variant, target=target)))
        tile = tile._replace(programs=3)
        out, lse, *found = on_hopper.forward(query, key, value, *arrays, tile=tile, variant=variant)
        got = out, lse
        wanted = reference.forward(query, key, value, *arrays, variant=variant)
        out, lse = wanted
        dout, dlse = jnp.flip(query, 1), jnp.where(jnp.isfinite(lse), jnp.sin(lse), 0.0)
        tile = next(iter(on_hopper.backward_tiles(query, key, value, variant=variant)))
        results = dict(out=out, lse=lse, dout=dout, dlse=dlse)
        more = on_hopper.backward(query, key, value, *arrays, **results, tile=tile, variant=variant)
        assert [*found, *more[3:]] == [0, 0] * variant.masks  # all is finite
        got += (*more[:3],)
        return got, wanted + reference.backward(query, key, value, *arrays, out, lse, dout, dlse, variant=variant)

    monkeypatch.setattr(hopper, "triton_call", by_numpy)
    monkeypatch.setattr(functions, "_load", gluon_on_cpu.written)
    monkeypatch.setattr(op, "ops", lambda *_: types.SimpleNamespace(forward=forward))


@pytest.mark.parametrize("feature, head_dim", [*((f, 64) for f in FEATURES), *((f, 256) for f in WIDE)])
def test_features_by_numpy(on_cpu, feature, head_dim):
    """The output, the log-sum-exp, and the gradients of query, key and value."""
    query, key, value, _ = map(jnp.asarray, operands(1, 300, 300, 2, 1, head_dim))
    got, wanted = FEATURES[feature](query, key, value, return_lse=True)
    close(got, [np.asarray(x, np.float32) for x in wanted])


def gradients(query, key, value, dout, **options):
    out, vjp = jax.vjp(functools.partial(jtile.dot_product_attention, **options), query, key, value)
    return out, *vjp(dout)


def waits(kernel) -> list[int]:
    """How many products each of its waits leaves under way; in the assembly, blocks of code come in any order."""
    return sorted(int(n) for n in re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", kernel.ptx))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_compiled(head_dim, is_causal):
    """Products are under way while weights are made: a step waits for all but the last of them first."""
    query, key, value, dout = (jax.ShapeDtypeStruct((2, 4096, heads, head_dim), jnp.bfloat16) for heads in (8, 4, 4, 8))
    kernels = jtile.inspect(functools.partial(gradients, is_causal=is_causal), query, key, value, dout)
    # Those for what a mask hides and is not finite come after them.
    forward, backward = (next(k for k in kernels if k.name == name) for name in ("attention", "attention_backward"))
    assert len(kernels) == (5 if is_causal else 2)
    groups = 3 if head_dim == 64 and not is_causal else 2
    loops = 2 if is_causal else 1  # over blocks where some queries do not see some keys, and over the others
    assert waits(forward).count(1) == groups * loops
    assert len(waits(forward)) <= groups * (1 + 2 * loops + 1)  # groups may share the last one's code
    # In the loop the two groups leave one product under way each time; at head dim 256 each first waits for its scores.
    assert waits(backward) == sorted(2 * [1, 1, 1, 0] if head_dim <= 128 else 2 * [0, 1, 1, 0])
    for kernel in forward, backward:
        assert kernel.instructions["wgmma.mma_async"] == kernel.tensor_core_instructions > 0
        assert kernel.shared_bytes <= Target.named("NVIDIA H200").shared_bytes_per_block
        # A few addresses that are used once for each block have no register.
        assert kernel.spill_bytes <= {64: 64, 128: 64 if is_causal else 0, 256: 96}[head_dim]


@pytest.mark.parametrize(
    "target, dtype, head_dim, runs",
    [
        ("NVIDIA H200", jnp.bfloat16, 64, {"attention", "attention_backward"}),
        ("NVIDIA H200", jnp.float16, 256, {"attention", "attention_backward"}),
        ("NVIDIA A100", jnp.bfloat16, 64, {"attention", "attention_dquery", "attention_dkey_dvalue"}),
        ("NVIDIA H200", jnp.float32, 64, {"attention", "attention_dquery", "attention_dkey_dvalue"}),
    ],
)
def test_where_it_serves(target, dtype, head_dim, runs):
    x = jax.ShapeDtypeStruct((1, 128, 1, head_dim), dtype)
    kernels = jtile.inspect(gradients, x, x, x, x, target=target)
    assert {kernel.name for kernel in kernels} == runs


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 257, 257, 4, 2, 64),
        (1, 1, 1, 2, 1, 128),
        (1, 4092, 4092, 2, 2, 128),
        (1, 1000, 300, 4, 1, 96),
        (1, 300, 1000, 2, 2, 256),
    ],
)
def test_on_a_gpu(shape, is_causal):
    arrays = [jnp.asarray(x) for x in operands(*shape)]
    run = jax.jit(functools.partial(gradients, is_causal=is_causal, implementation="triton"))
    got = run(*arrays)
    out, _, *gradients_ = expected(*map(np.asarray, arrays), 0, None, 0 if is_causal else None)
    close(got, [out, *gradients_])
    assert all(bool(jnp.all(a == b)) for a, b in zip(run(*arrays), got, strict=True))


def with_gradients(feature, implementation):
    """The output, the log-sum-exp and the gradients of a call with a feature."""

    def run(query, key, value, dout):
        call = functools.partial(FEATURES[feature], return_lse=True, implementation=implementation)
        (out, lse), pull = jax.vjp(call, query, key, value)
        return out, lse, *pull((dout, jnp.where(jnp.isfinite(lse), 1.0, 0.0)))

    return jax.jit(run)


@pytest.mark.parametrize("feature", FEATURES)
def test_features_are_served(feature):
    """Forward and backward, so that both passes agree on what is approximate."""
    given = [jax.ShapeDtypeStruct((1, 300, heads, 64), jnp.bfloat16) for heads in (2, 1, 1, 2)]
    tiles = [r.tile for r in jtile.explain(with_gradients(feature, None), *given, target="NVIDIA H200")]
    assert [tile.partition("(")[0] for tile in tiles[:2]] == ["ForwardTile", "BackwardTile"]


@pytest.mark.parametrize("feature", ["no lists", "of keys"])
def test_what_nan_is_mended_with_compiles(feature):
    """With loops that have branches in them, which Triton cannot always flatten."""
    given = [jax.ShapeDtypeStruct((1, 300, heads, 64), jnp.bfloat16) for heads in (2, 1, 1, 2)]
    names = [k.name for k in jtile.inspect(with_gradients(feature, "triton"), *given, target="NVIDIA H200")]
    assert {"attention", "attention_dquery", "attention_dkey_dvalue"} <= set(names)


@pytest.mark.gpu
@pytest.mark.parametrize("feature, head_dim", [*((f, 64) for f in FEATURES), ("cap", 128), *((f, 256) for f in WIDE)])
def test_features_on_a_gpu(feature, head_dim):
    """The schedule's output and the gradients that the backward pass makes of it."""
    query, key, value, dout = (jnp.asarray(x) for x in operands(1, 300, 300, 2, 1, head_dim))

    run = with_gradients(feature, "triton")
    got = run(query, key, value, dout)
    close(got, [np.asarray(x, np.float32) for x in with_gradients(feature, "xla")(query, key, value, dout)])
    assert all(bool(jnp.all(a == b)) for a, b in zip(run(query, key, value, dout), got, strict=True))


@pytest.mark.gpu
def test_nan_of_another_document_on_a_gpu():
    """What is in one document reaches no result of another, though they share blocks."""
    first, length = 100, 300
    query, key, value, dout = (jnp.asarray(x) for x in operands(1, length, length, 2, 1, 64))
    dirty = [x.at[:, first + 7].set(jnp.nan).at[:, first + 8].set(jnp.inf) for x in (query, key, value)]
    run = jax.jit(
        functools.partial(
            gradients, is_causal=True, query_segment_ids=documents(first, length - first), implementation="triton"
        )
    )
    for got, wanted in zip(run(*dirty, dout), run(query, key, value, dout), strict=True):
        assert jnp.isnan(got[:, first:]).any()
        close([got[:, :first]], [np.asarray(wanted[:, :first], np.float32)])
