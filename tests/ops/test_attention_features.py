"""Attention's features, alone and together, against the same thing written with the whole score matrix in float32."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jtile
from jtile.ops.attention import dot_product_attention
from jtile.ops.random_bits import key_words, random_bits

BATCH, QUERIES, KEYS, HEADS, KEY_HEADS, DIM = 2, 40, 70, 4, 2, 16
# Of sums of some hundred terms in float32, in another order; and of bfloat16's roundings of weights and of results.
TOLERANCE = {"float32": 6e-6, "bfloat16": 6 * 2**-8}
ON_GPU = pytest.param("triton", marks=pytest.mark.gpu)
IMPLEMENTATIONS = ["interpret", "xla", ON_GPU]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def features(queries=QUERIES, keys=KEYS):
    """Every feature: its arguments, of which those under `arrays` have gradients."""
    lengths = jnp.array([queries - 7, queries]), jnp.array([keys - 20, 5])
    documents = lambda n: jnp.sort(jnp.asarray(np.random.default_rng(n).integers(0, 4, (BATCH, n))), axis=1)  # noqa: E731
    return {
        "causal": dict(is_causal=True),
        "offset": dict(is_causal=True, query_offset=jnp.array([keys - queries, -5])),
        "window": dict(local_window_size=(9, 5)),
        "lengths": dict(query_seq_lengths=lengths[0], key_value_seq_lengths=lengths[1]),
        "segments": dict(query_segment_ids=documents(queries), key_value_segment_ids=documents(keys)),
        "mask": dict(mask=jnp.asarray(np.random.default_rng(5).random((BATCH, 1, queries, keys)) < 0.6)),
        "bias": dict(arrays=dict(bias=normal(6, 1, HEADS, queries, keys))),
        "cap": dict(logits_soft_cap=1.5),
        "sinks": dict(arrays=dict(sinks=normal(7, HEADS))),
        "dropout": dict(dropout_rate=0.25, dropout_key=jax.random.key(8)),
    }


def oracle(
    query, key, value, bias=None, mask=None, *, sinks=None, is_causal=False, query_offset=0, local_window_size=None,
    query_seq_lengths=None, key_value_seq_lengths=None, query_segment_ids=None, key_value_segment_ids=None,
    logits_soft_cap=None, dropout_rate=0.0, dropout_key=None,
):  # fmt: skip
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    group = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
    scores = jnp.einsum("bshd,bthd->bhst", query, key, precision="highest") * query.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias
    scores = scores if logits_soft_cap is None else logits_soft_cap * jnp.tanh(scores / logits_soft_cap)
    i, j = jnp.arange(scores.shape[2])[:, None], jnp.arange(scores.shape[3])
    own = i + jnp.broadcast_to(query_offset, scores.shape[0])[:, None, None, None]
    visible = jnp.ones_like(scores, bool) if mask is None else jnp.broadcast_to(mask, scores.shape)
    if is_causal:
        visible &= j <= own
    if local_window_size is not None:
        visible &= (j >= own - local_window_size[0]) & (j <= own + local_window_size[1])
    if query_seq_lengths is not None:
        visible &= i < query_seq_lengths[:, None, None, None]
    if key_value_seq_lengths is not None:
        visible &= j < key_value_seq_lengths[:, None, None, None]
    if query_segment_ids is not None:
        visible &= (query_segment_ids[:, :, None] == key_value_segment_ids[:, None])[:, None]
    sums = jnp.where(visible, jnp.exp(scores), 0).sum(-1)
    sums = sums if sinks is None else sums + jnp.exp(sinks)[:, None]
    weights = jnp.where(visible, jnp.exp(scores), 0) / jnp.where(sums == 0, 1, sums)[..., None]
    if dropout_rate:
        words, columns = key_words(dropout_key), -(-scores.shape[3] // 8)
        planes = [
            random_bits((words[0], words[1]), i, jnp.arange(columns)[None], plane)[:, : scores.shape[3]]
            for plane in range(scores.shape[0] * scores.shape[1])
        ]
        keep = jnp.stack(planes).reshape(scores.shape) >= round(dropout_rate * 2**16)
        weights = jnp.where(keep, weights, 0) / (1 - dropout_rate)
    lse = jnp.where(sums == 0, -jnp.inf, jnp.log(jnp.where(sums == 0, 1, sums)))
    return jnp.einsum("bhst,bthe->bshe", weights, value, precision="highest"), jnp.swapaxes(lse, 1, 2)


def run(function, options, inputs):
    """Results and gradients, by name."""
    options = dict(options)
    arrays = options.pop("arrays", {})

    def call(inputs, arrays):
        return dict(zip(("out", "lse"), function(**inputs, **arrays, **options), strict=True))

    @jax.jit
    def both(inputs, arrays):
        results, pull = jax.vjp(call, inputs, arrays)
        cotangents = {n: normal(9, *x.shape).astype(x.dtype) for n, x in results.items()}
        # Where a row sees nothing there is no slope.
        cotangents["lse"] = jnp.where(jnp.isfinite(results["lse"]), cotangents["lse"], 0)
        gradients = pull(cotangents)
        return results | gradients[0] | gradients[1]

    return both(inputs, arrays)


def operands(dtype="float32", queries=QUERIES, keys=KEYS, dim=DIM):
    shapes = dict(query=(queries, HEADS, dim), key=(keys, KEY_HEADS, dim), value=(keys, KEY_HEADS, dim))
    return {name: normal(i, BATCH, *shape).astype(dtype) for i, (name, shape) in enumerate(shapes.items())}


def together(names, known=None):
    known = known or features()
    arrays = {}
    options: dict = {}
    for name in names:
        options |= {k: v for k, v in known[name].items() if k != "arrays"}
        arrays |= known[name].get("arrays", {})
    return options | {"arrays": arrays}


def assert_same(actual, expected, tolerance):
    assert set(actual) == set(expected)
    for name, e in expected.items():
        a, e = np.asarray(actual[name], np.float32), np.asarray(e, np.float32)
        size = np.abs(e[np.isfinite(e)]).max(initial=1)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * size, err_msg=name)


def check(names, implementation, dtype="float32", **sizes):
    known = features(sizes.get("queries", QUERIES), sizes.get("keys", KEYS))
    options, inputs = together(names, known), operands(dtype, **sizes)
    call = functools.partial(dot_product_attention, return_lse=True, implementation=implementation)
    wide = {n: x.astype(jnp.float32) for n, x in inputs.items()}
    assert_same(run(call, options, inputs), run(oracle, options, wide), TOLERANCE[dtype])


# Every pair of features is in one of these.
COVER = [
    ("causal", "window", "lengths", "bias", "dropout"),
    ("offset", "segments", "mask", "cap", "sinks"),
    ("causal", "window", "segments", "cap", "sinks", "bias"),
    ("offset", "lengths", "mask", "dropout", "window", "bias"),
    ("causal", "lengths", "mask", "cap", "sinks", "dropout"),
    ("causal", "offset", "segments", "bias", "dropout", "lengths"),
    ("window", "mask", "segments", "dropout", "causal"),
    ("offset", "cap", "lengths", "segments", "bias", "mask", "sinks", "window", "dropout"),
]
PAIRS = list(itertools.combinations(features(), 2))


def test_the_cover_has_every_pair():
    covered = {frozenset(pair) for names in COVER for pair in itertools.combinations(names, 2)}
    assert covered >= {frozenset(pair) for pair in PAIRS}


@pytest.mark.parametrize("names", [COVER[0], COVER[1], COVER[7]], ids="-".join)
def test_features_together(names):
    check(names, "interpret")


@pytest.mark.parametrize("names", COVER, ids="-".join)
def test_the_reference_of_features_together(names):
    check(names, "xla")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_pairs_on_gpu(names, dtype):
    check(names, "triton", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("names", [*PAIRS, ("offset", "window", "lengths", "segments", "cap", "sinks")], ids="-".join)
def test_pairs_in_several_blocks_on_gpu(names):
    """On Hopper most of them by its own schedule."""
    check(names, "triton", "bfloat16", queries=300, keys=330, dim=64)


@pytest.mark.parametrize("implementation", ["interpret", ON_GPU])
@pytest.mark.parametrize("axes", [(), (0,), (1, 2), (0, 1, 3), (0, 1, 2, 3)])
def test_bias_gradients_of_broadcast_shapes(axes, implementation):
    """Gradients are sums over broadcast axes, for a bias and for no row more than another."""
    shape = [1 if i in axes else n for i, n in enumerate((BATCH, HEADS, QUERIES, KEYS))]
    options = dict(is_causal=True, logits_soft_cap=2.0, arrays=dict(bias=normal(3, *shape), sinks=normal(7, HEADS)))
    call = functools.partial(dot_product_attention, return_lse=True, implementation=implementation)
    expected = run(oracle, options, operands())
    assert expected["bias"].shape == tuple(shape)
    assert_same(run(call, options, operands()), expected, 2e-5)  # sums of up to 22,400 terms


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_masks_of_every_broadcast_shape(implementation):
    """Each is the mask that it is broadcast to."""
    full = jnp.asarray(np.random.default_rng(5).random((BATCH, HEADS, QUERIES, KEYS)) < 0.6)
    inputs = operands()

    @jax.jit
    def attend(mask):
        return dot_product_attention(**inputs, mask=mask, implementation=implementation)

    shapes = [lacking for n in range(1, 5) for lacking in itertools.combinations(range(4), n)]
    for lacking in shapes if implementation == "triton" else shapes[::4]:
        mask = full[tuple(slice(1) if i in lacking else slice(None) for i in range(4))]
        expected, _ = oracle(**inputs, mask=mask)
        np.testing.assert_allclose(attend(mask), expected, rtol=0, atol=6e-6, err_msg=str(mask.shape))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("what", ["causal", "window", "lengths", "mask", "segments"])
def test_masked_keys_may_hold_anything(what, implementation):
    """NaN and infinity in masked keys and values reach no result and no gradient, also of queries in the same block."""
    seen = 19
    options = {
        "causal": dict(is_causal=True, query_offset=seen - QUERIES),
        "window": dict(local_window_size=(30, 2), query_offset=seen - QUERIES - 2),
        "lengths": dict(key_value_seq_lengths=jnp.array([seen, seen])),
        "mask": dict(mask=jnp.arange(KEYS)[None, None, None] < seen),
        "segments": dict(
            query_segment_ids=jnp.zeros(QUERIES, int), key_value_segment_ids=jnp.where(jnp.arange(KEYS) < seen, 0, -1)
        ),
    }[what]
    call = functools.partial(dot_product_attention, return_lse=True, implementation=implementation)
    clean = operands()
    dirty = clean | {
        "key": clean["key"].at[:, seen:].set(jnp.nan),
        "value": clean["value"].at[:, seen::2].set(jnp.inf).at[:, seen + 1 :: 2].set(jnp.nan),
    }
    expected, actual = run(call, options, clean), run(call, options, dirty)
    assert_same(actual, expected, 1e-6)
    assert not expected["key"][:, seen:].any() and not expected["value"][:, seen:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("what", [dict(is_causal=True), dict(local_window_size=(90, 0))])
def test_keys_beyond_a_band_may_hold_anything_on_gpu(what, head_dim):
    """By each schedule for 16 bits, also where a block has keys that some of its queries see."""
    seen, length = 300, 700
    shapes = dict(query=(seen, 4), key=(length, 2), value=(length, 2))
    clean = {n: normal(i, 1, *s, head_dim).astype(jnp.bfloat16) for i, (n, s) in enumerate(shapes.items())}
    dirty = clean | {n: clean[n].at[:, seen:].set(what) for n, what in (("key", jnp.inf), ("value", jnp.nan))}
    call = functools.partial(dot_product_attention, return_lse=True, implementation="triton")
    expected, actual = run(call, what, clean), run(call, what, dirty)
    assert_same(actual, expected, TOLERANCE["bfloat16"])
    assert not expected["key"][:, seen:].any() and not expected["value"][:, seen:].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_not_a_number_is_so_to_those_that_see_it(implementation):
    """In one block of queries and keys."""
    inputs, call = operands(), functools.partial(dot_product_attention, implementation=implementation)
    for name in "key", "value":
        dirty = inputs | {name: inputs[name].at[:, 30].set(jnp.nan)}
        mask = (jnp.arange(QUERIES)[:, None] >= 20) | (jnp.arange(KEYS) != 30)
        for first, options in (20, dict(mask=mask)), (30, dict(is_causal=True)):
            out = call(**dirty, **options)
            np.testing.assert_array_equal(out[:, :first], call(**inputs, **options)[:, :first])
            assert jnp.isnan(out[:, first:]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_that_see_nothing(implementation):
    """Zeros, a log-sum-exp of -inf, finite gradients; with a sink its score."""
    inputs = operands()
    for options in dict(mask=jnp.zeros((1, 1, 1, 1), bool)), dict(is_causal=True, query_offset=-QUERIES):
        call = functools.partial(dot_product_attention, return_lse=True, implementation=implementation)
        found = run(call, options, inputs)
        assert (found["lse"] == -jnp.inf).all()
        assert not any(found[name].any() for name in ("out", "query", "key", "value"))
    found = run(call, options | {"arrays": {"sinks": jnp.arange(4.0)}}, inputs)
    np.testing.assert_allclose(found["lse"], jnp.broadcast_to(jnp.arange(4.0), found["lse"].shape), rtol=1e-6)
    assert not found["out"].any() and jnp.isfinite(found["sinks"]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_documents_are_separate_calls(implementation):
    """Three documents and padding in one sequence give what each gives alone, to the order of sums."""
    sizes, padding = (1, 17, 40), 6
    ids = jnp.asarray(np.repeat([1, 2, 3, 0], (*sizes, padding)))
    inputs = operands(queries=ids.size, keys=ids.size)
    call = functools.partial(dot_product_attention, is_causal=True, implementation=implementation)
    packed = call(**inputs, query_segment_ids=ids)
    for start, size in zip(np.cumsum((0, *sizes)), sizes, strict=False):
        alone = call(**{name: x[:, start : start + size] for name, x in inputs.items()})
        np.testing.assert_allclose(packed[:, start : start + size], alone, rtol=0, atol=4e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [16, 128])
def test_packed_documents_on_gpu(head_dim, dtype):
    """Results and gradients, of a sequence of 4092."""
    sizes, padding = (1, 17, 257, 2048, 1500), 269
    ids = jnp.asarray(np.repeat([*range(1, len(sizes) + 1), 0], (*sizes, padding)))
    shapes = dict(query=4, key=2, value=2)
    inputs = {n: normal(i, 1, ids.size, heads, head_dim).astype(dtype) for i, (n, heads) in enumerate(shapes.items())}
    dout = normal(5, 1, ids.size, 4, head_dim).astype(dtype)

    @functools.partial(jax.jit, static_argnames="packed")
    def attend(inputs, dout, packed):
        segments = dict(query_segment_ids=ids) if packed else {}
        call = functools.partial(dot_product_attention, is_causal=True, implementation="triton", **segments)
        out, pull = jax.vjp(lambda inputs: call(**inputs), inputs)
        return dict(out=out, **pull(dout)[0])

    packed = attend(inputs, dout, True)
    for start, size in zip(np.cumsum((0, *sizes)), sizes, strict=False):
        part = slice(start, start + size)
        alone = attend({name: x[:, part] for name, x in inputs.items()}, dout[:, part], False)
        assert_same({name: x[:, part] for name, x in packed.items()}, alone, TOLERANCE[dtype])


@pytest.mark.parametrize("queries, keys", [(1, 257), (257, 17)])
def test_lengths(queries, keys):
    known = features(queries, keys)
    known["lengths"] = dict(key_value_seq_lengths=jnp.array([keys, 3]))
    options = together(("causal", "bias", "lengths"), known)
    call = functools.partial(dot_product_attention, return_lse=True, implementation="interpret")
    inputs = operands(queries=queries, keys=keys)
    assert_same(run(call, options, inputs), run(oracle, options, inputs), TOLERANCE["float32"])


def test_means_what_jax_nn_does():
    inputs, known = operands(queries=24, keys=24), features(24, 24)
    known["mask"]["mask"] |= jnp.arange(24) == 0  # of rows that see nothing jax.nn makes something else
    for names in ("causal", "window", "bias"), ("mask", "lengths"), ("causal", "mask"):
        options = together(names, known)
        options |= options.pop("arrays")
        actual = dot_product_attention(**inputs, **options)
        np.testing.assert_allclose(
            actual[:, :5], jax.nn.dot_product_attention(**inputs, **options)[:, :5], rtol=0, atol=4e-6
        )
    three = {name: x[0] for name, x in inputs.items()}
    bias = normal(1, 1, HEADS, 24, 24)
    np.testing.assert_allclose(
        dot_product_attention(**three, bias=bias), jax.nn.dot_product_attention(**three, bias=bias), rtol=0, atol=4e-6
    )


def test_blocks_that_nothing_sees_are_not_visited():
    """The ranges of blocks of eight documents, of a window, and of both passes."""
    from jtile.ops.attention import kernels, visits
    from jtile.ops.attention.variant import Operand, Variant

    sizes = kernels.Sizes(512, 512, 64, 64)
    ids = jnp.repeat(jnp.array([3, 4, 7, 0]), 128)[None]
    x = dict(query_segments=ids, key_segments=ids)
    variant = Variant(1.0, (Operand("query_segments", "bq"), Operand("key_segments", "bk")), window=(None, 0))
    of_keys = visits.ranges(variant, x, 512, 512, sizes, of_keys=True)[0]
    assert of_keys[:, 0].tolist() == [0, 0, 2, 2, 4, 4, 6, 6]
    assert of_keys[:, 3].tolist() == list(range(1, 9))
    assert of_keys[:, 2].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]  # all but the last is visible as a whole
    of_queries = visits.ranges(variant, x, 512, 512, sizes, of_keys=False)[0]
    assert of_queries[:, 3].tolist() == [2, 2, 4, 4, 6, 6, 8, 8]
    windowed = visits.static_range(Variant(1.0, window=(100, 0)), 0, 256, 512, 64, 64, of_keys=True)
    assert [int(n) for n in windowed] == [2, 4, 4, 5]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_kernels_fit_cards_with_little_shared_memory(head_dim):
    """With what needs the most of it: blocks of a bias and of a mask beside those of keys and values."""
    shapes = dict(query=(1, 1024, 4, head_dim), key=(1, 1024, 2, head_dim), value=(1, 1024, 2, head_dim))
    shapes |= dict(bias=(4, 1024, 1024), mask=(1, 1, 1024, 1024))
    inputs = {n: jax.ShapeDtypeStruct(s, bool if n == "mask" else jnp.bfloat16) for n, s in shapes.items()}

    def gradients(inputs):
        floating = {n: x for n, x in inputs.items() if n != "mask"}
        loss = lambda floating: dot_product_attention(**floating, mask=inputs["mask"]).astype(jnp.float32).sum()  # noqa: E731
        return jax.grad(loss)(floating)

    assert len(jtile.inspect(gradients, inputs, target="NVIDIA L4")) == 4


def test_dropout_is_a_function_of_key_and_place():
    """The share that is dropped, and the same weights whatever is split off."""
    inputs = operands(queries=64, keys=64)
    inputs["value"] = jnp.broadcast_to(jnp.eye(64)[None, :, None], (BATCH, 64, KEY_HEADS, 64))
    options = dict(dropout_rate=0.25, dropout_key=jax.random.key(1))
    weights = dot_product_attention(**inputs, **options)
    assert abs((weights == 0).mean() - 0.25) < 0.01
    again = dot_product_attention(**inputs, **options, implementation="interpret")
    np.testing.assert_array_equal(again == 0, weights == 0)
    none = dot_product_attention(**inputs, dropout_rate=1.0, dropout_key=jax.random.key(1))
    assert not none.any()


MESH = {"batch": 2, "queries": 2, "heads": 2}


def split(inputs, mesh):
    """Batches, heads and queries shared out among devices, keys whole."""
    specs = dict(query=P("batch", "queries", "heads"), key=P("batch", None, "heads"), value=P("batch", None, "heads"))
    return {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in inputs.items()}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_what_depends_on_the_place_is_the_same_on_devices(kind):
    """Positions, lengths and what dropout leaves are those of the whole."""
    mesh = jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(kind,) * 3)
    options = together(("causal", "window", "lengths", "segments", "dropout"))
    call = functools.partial(dot_product_attention, return_lse=True, implementation="interpret")
    expected = run(call, options, operands())
    with jax.set_mesh(mesh):
        assert_same(run(call, options, split(operands(), mesh)), expected, 2e-6)


def test_a_part_of_the_queries_in_shard_map():
    """Lengths, positions and what dropout leaves are those of the whole; the rows of a mask this device's."""
    mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,))
    options = together(("causal", "window", "lengths", "mask", "dropout"))
    expected = run(functools.partial(dot_product_attention, return_lse=True, implementation="xla"), options, operands())

    def call(query, key, value, mask, **rest):
        own = functools.partial(dot_product_attention, **rest, axis_name="i", return_lse=True)
        rows, whole = P(None, "i"), P()
        split = jax.shard_map(
            functools.partial(own, implementation="interpret"),
            mesh=mesh,
            in_specs=(rows, whole, whole, None, P(None, None, "i")),
            out_specs=rows,
        )
        return split(query, key, value, None, mask)

    assert_same(run(call, options, operands()), expected, TOLERANCE["float32"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8(dtype, implementation):
    inputs = {name: x.astype(dtype) for name, x in operands().items()}
    expected, _ = oracle(**inputs, is_causal=True)
    out = dot_product_attention(**inputs, is_causal=True, implementation=implementation)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=0, atol=2e-2)
    with pytest.raises(NotImplementedError, match="float8.* has no gradient; cast"):
        jax.grad(lambda q: dot_product_attention(q, inputs["key"], inputs["value"]).astype(jnp.float32).sum())(
            inputs["query"]
        )


@pytest.mark.parametrize(
    "implementation, dtype",
    [("interpret", "float32"), *(pytest.param("triton", d, marks=pytest.mark.gpu) for d in TOLERANCE)],
)
def test_head_dims_of_latent_attention(implementation, dtype):
    shapes = dict(query=(1, 20, 2, 576), key=(1, 20, 1, 576), value=(1, 20, 1, 512))
    inputs = {name: normal(i, *shape).astype(dtype) for i, (name, shape) in enumerate(shapes.items())}
    call = functools.partial(dot_product_attention, return_lse=True, implementation=implementation)
    options, wide = dict(is_causal=True), {name: x.astype(jnp.float32) for name, x in inputs.items()}
    assert_same(run(call, options, inputs), run(oracle, options, wide), TOLERANCE[dtype])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(mask=jnp.zeros((1, 1, 8, 8))), "`mask` must be bool, got float32; True lets"),
        (dict(bias=jnp.zeros((8, 7))), r"`bias` has shape \(8, 7\); .* is \(2, 4, 8, 8\)"),
        (dict(query_seq_lengths=jnp.zeros(3, int)), r"`query_seq_lengths` must be integers of shape \(2,\)"),
        (dict(key_value_seq_lengths=jnp.zeros(2)), r"`key_value_seq_lengths` must be integers .* got float32"),
        (dict(key_value_segment_ids=jnp.zeros(8, int)), "are needed together"),
        (
            dict(query_segment_ids=jnp.zeros(7, int)),
            r"`query_segment_ids` must be integers of shape \(2, 8\), or \(8,\)",
        ),
        (dict(local_window_size=(-1, 2)), r"none of them negative; got \(-1, 2\)"),
        (dict(logits_soft_cap=0.0), "`logits_soft_cap` must be positive and finite, or None, got 0.0"),
        (
            dict(sinks=jnp.zeros(2)),
            r"`sinks` must be floating point, one for each of 4 heads, got float32 of shape \(2,\)",
        ),
        (dict(dropout_rate=0.1), "dropout_rate=0.1 needs a `dropout_key`"),
        (dict(dropout_rate=1.1), "`dropout_rate` must be from 0 to 1, got 1.1"),
        (dict(dropout_rate=0.1, dropout_key=jax.random.split(jax.random.key(0))), "must be one key"),
    ],
)
def test_what_is_refused(options, message):
    x = jnp.zeros((2, 8, 4, 16))
    with pytest.raises(ValueError, match=f"^dot_product_attention: .*{message}"):
        dot_product_attention(x, x, x, **options)
