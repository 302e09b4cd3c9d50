"""Attention with users' functions, against the same functions on the whole score matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jtile
from jtile.ops.attention.flex import create_block_mask, flex_attention
from tests.ops.test_attention_features import HEADS, KEYS, ON_GPU, QUERIES, assert_same, normal, operands, run

SLOPES, TABLE = 2.0 ** -jnp.arange(1.0, HEADS + 1), normal(4, HEADS, QUERIES + KEYS)


def alibi(slopes, score, batch, head, query, key):
    return score - slopes[head] * jnp.abs(query - key)


def relative(table, score, batch, head, query, key):
    return jnp.tanh(score + table[head, query - key + KEYS]) * (1 + batch)


def outside(slopes, score, batch, head, query, key):
    """What is computed of the array alone, a `take`, a number of its own, and two reads."""
    return score * jnp.exp(slopes)[head] + jnp.take(slopes, key // 30, mode="clip") + slopes.sum()


def windowed(batch, head, query, key):
    return (key <= query) & (query - key < 12 * (head + 1))


def oracle(query, key, value, *, score_mod=None, mask_mod=None):
    key, value = (jnp.repeat(x, query.shape[2] // key.shape[2], axis=2) for x in (key, value))
    scores = jnp.einsum("bshd,bthd->bhst", query, key, precision="highest") * query.shape[-1] ** -0.5
    places = jnp.meshgrid(*map(jnp.arange, scores.shape), indexing="ij")
    for mod, base in ((score_mod, scores), (mask_mod, None)):
        for _ in range(4 if mod else 0):
            mod = jax.vmap(mod)
        if mod is not None:
            flat = [x.reshape(scores.shape) for x in places]
            result = mod(*([] if base is None else [base]), *flat)
            scores = jnp.where(result, scores, -jnp.inf) if base is None else result
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(
        jnp.isfinite(lse)[..., None], jnp.exp(scores - jnp.where(jnp.isfinite(lse), lse, 0)[..., None]), 0
    )
    return jnp.einsum("bhst,bthe->bshe", weights, value, precision="highest"), jnp.swapaxes(lse, 1, 2)


def check(function, array, mask_mod, block_mask, implementation="interpret", dtype="float32", tolerance=2e-5):
    def call(query, key, value, array, **options):
        score_mod = None if function is None else functools.partial(function, array)
        return flex_attention(query, key, value, score_mod=score_mod, return_lse=True, **options)

    def expected(query, key, value, array):
        score_mod = None if function is None else functools.partial(function, array)
        return oracle(query, key, value, score_mod=score_mod, mask_mod=mask_mod)

    options = dict(arrays=dict(array=array))
    given = options | dict(implementation=implementation, mask_mod=mask_mod, block_mask=block_mask)
    assert_same(run(call, given, operands()), run(expected, options, operands()), tolerance)


BLOCKS = functools.cache(lambda: create_block_mask(windowed, None, HEADS, QUERIES, KEYS, block_size=(32, 16)))
CASES = {
    "alibi in blocks": (alibi, SLOPES, windowed, True),
    "relative positions": (relative, TABLE, None, False),
    "computed outside": (outside, SLOPES, windowed, False),
    "blocks": (None, SLOPES, windowed, True),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_and_gradients(name):
    function, array, mask_mod, in_blocks = CASES[name]
    check(function, array, mask_mod, BLOCKS() if in_blocks else None)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_kernels_and_gradients_on_gpu(name):
    function, array, mask_mod, in_blocks = CASES[name]
    check(function, array, mask_mod, BLOCKS() if in_blocks else None, "triton")


def test_block_masks():
    ids = jnp.repeat(jnp.arange(3), 40)
    made = jax.jit(
        lambda: create_block_mask(lambda b, h, q, k: (ids[q] == ids[k]) & (q >= k), 2, None, 120, 120, block_size=16)
    )()
    seen = np.asarray((ids[:, None] == ids) & np.tri(120, dtype=bool))
    padded = np.zeros((128, 128), bool)
    padded[:120, :120] = seen
    blocks = padded.reshape(8, 16, 8, 16)
    kinds = blocks.any(axis=(1, 3)).astype(int) + blocks.all(axis=(1, 3))
    for batch in range(2):
        np.testing.assert_array_equal(made.kinds[batch, 0], kinds)
    for i in range(8):
        whole, count = made.key_counts[0, 0, i]
        assert made.key_blocks[0, 0, i, :whole].tolist() == np.flatnonzero(kinds[i] == 2).tolist()
        assert made.key_blocks[0, 0, i, whole:count].tolist() == np.flatnonzero(kinds[i] == 1).tolist()
        assert made.query_counts[0, 0, i, 1] == (kinds[:, i] > 0).sum()
    np.testing.assert_allclose(made.sparsity, (kinds == 0).mean())


def test_places_are_those_of_the_whole_under_vmap():
    """A mapped call numbers batches as it does alone."""
    inputs = operands()
    mod = lambda score, batch, head, query, key: score * (1 + batch + head)  # noqa: E731
    call = functools.partial(flex_attention, score_mod=mod)
    stacked = {name: jnp.stack([x, 2 * x]) for name, x in inputs.items()}
    mapped = jax.vmap(lambda x: call(**x))(stacked)
    np.testing.assert_allclose(mapped[0], call(**inputs), rtol=0, atol=4e-6)


def test_a_function_made_anew_is_traced_and_compiled_once():
    inputs, traces = operands(), []

    @jax.jit
    def step(slopes):
        traces.append(1)
        return flex_attention(**inputs, score_mod=functools.partial(alibi, slopes))

    first, second = step(SLOPES), step(2 * SLOPES)
    assert len(traces) == 1 and not np.allclose(first, second)

    def program():
        return str(jax.make_jaxpr(lambda s: flex_attention(**inputs, score_mod=functools.partial(alibi, s)))(SLOPES))

    assert program() == program()


def layers(attend):
    """The gradients of a few layers, each with its slopes and its window, of which blocks are made inside."""

    def loss(slopes, inputs):
        @jax.checkpoint
        def layer(query, given):
            own, size = given
            seen = lambda b, h, q, k: (k <= q) & (q - k < size)  # noqa: E731
            return query + attend(own, seen, **inputs | {"query": query}), None

        sizes = jnp.arange(10, 10 * (1 + len(slopes)), 10)
        return jnp.sum(jax.lax.scan(layer, inputs["query"], (slopes, sizes))[0] ** 2)

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


def by_kernels(slopes, seen, *, axis_name=None, **inputs):
    mods = dict(score_mod=functools.partial(alibi, slopes), mask_mod=seen)
    if axis_name is None:
        mods["block_mask"] = create_block_mask(seen, None, HEADS, QUERIES, KEYS, block_size=16)
    return flex_attention(**inputs, **mods, axis_name=axis_name, implementation="interpret")


def by_oracle(slopes, seen, **inputs):
    return oracle(**inputs, score_mod=functools.partial(alibi, slopes), mask_mod=seen)[0]


def test_under_transformations():
    """`scan`, `checkpoint` and block masks made under `jit`; `vmap` of gradients of arrays that are closed over."""
    stacked = jnp.stack([SLOPES, 2 * SLOPES])
    got, wanted = (layers(attend)(stacked, operands()) for attend in (by_kernels, by_oracle))
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=2e-5 * float(jnp.abs(e).max())), got, wanted
    )

    def gradient(attend, slopes):
        return jax.grad(lambda s, x: jnp.sum(attend(s, windowed, **x) ** 2), argnums=(0, 1))(slopes, operands())

    got, wanted = (jax.vmap(functools.partial(gradient, attend))(stacked) for attend in (by_kernels, by_oracle))
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=2e-5 * float(jnp.abs(e).max())), got, wanted
    )


def test_a_part_of_the_queries_in_shard_map():
    """Gradients of slopes that every device has are sums over devices."""
    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,))
    rows = P(None, "i")

    def attend(slopes, seen, *, query, key, value):
        own = lambda s, q, k, v: by_kernels(s, seen, query=q, key=k, value=v, axis_name="i")  # noqa: E731
        specs = dict(in_specs=(P(), rows, P(), P()), out_specs=rows)
        return jax.shard_map(own, mesh=mesh, **specs)(slopes, query, key, value)

    def gradient(attend):
        return jax.grad(lambda s, x: jnp.sum(attend(s, windowed, **x) ** 2), argnums=(0, 1))(SLOPES, operands())

    got, wanted = gradient(attend), gradient(by_oracle)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=2e-5 * float(jnp.abs(e).max())), got, wanted
    )


@pytest.mark.parametrize("implementation", ["interpret", "xla", ON_GPU])
def test_float8(implementation):
    inputs = {name: x.astype("float8_e4m3fn") for name, x in operands().items()}
    mods = dict(score_mod=functools.partial(alibi, SLOPES), mask_mod=windowed)
    out = flex_attention(**inputs, **mods, implementation=implementation)
    expected, _ = oracle(**{name: x.astype(jnp.float32) for name, x in inputs.items()}, **mods)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(score_mod=lambda s, b, h, q, k: TABLE[h] + s), "`score_mod` must return one number"),
        (dict(score_mod=lambda s, b, h, q, k: s + (TABLE * s).sum()), "read the arrays that it closes over element by"),
        (dict(score_mod=lambda s, b, h, q, k: q), "`score_mod` must return a score, and returns int32"),
        (dict(mask_mod=lambda b, h, q, k: q - k), "`mask_mod` must return a truth value, and returns int32"),
        (
            dict(block_mask=create_block_mask(windowed, None, 2, 8, 8)),
            "made for batch 1, 2 heads, 8 queries and 8",
        ),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        flex_attention(**operands(), **options)
    with pytest.raises(ValueError, match="powers of two from 16, got 24"):
        jtile.create_block_mask(windowed, None, HEADS, 8, 8, block_size=24)
    with pytest.raises(ValueError, match="`mask_mod` depends on the head, and `heads` is None"):
        jtile.create_block_mask(windowed, None, None, 8, 8)
    with pytest.raises(ValueError, match="`mask_mod` depends on the batch, and `batch` is None"):
        jtile.create_block_mask(lambda b, h, q, k: jnp.arange(2)[b] < k, None, None, 8, 8)


def test_functions_with_branches_on_a_partly_manual_mesh():
    """Types in a function that is traced there name the mesh; kernels and references must not."""
    mesh = jax.make_mesh((2, 2), ("manual", "other"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 9, 2, 16)), jnp.float32)

    def attend(x, slopes):
        def score_mod(score, batch, head, query, key):
            return jnp.where(query > key + 3, score + slopes[head], jnp.clip(score, -1, 1))

        return jtile.flex_attention(x, x, x, score_mod=score_mod, implementation="interpret")

    parts = dict(in_specs=(P("manual"), P()), out_specs=P("manual"))
    split = jax.jit(jax.shard_map(attend, mesh=mesh, axis_names={"manual"}, **parts))
    slopes = jnp.array([0.5, -0.25])
    np.testing.assert_allclose(split(x, slopes), attend(x, slopes), rtol=1e-6, atol=1e-6)
