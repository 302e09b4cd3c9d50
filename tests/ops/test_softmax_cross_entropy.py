"""Cross-entropy against its definition in float64, and against optax."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jtile
from jtile.compiler.interpret import interpret_pallas
from jtile.compiler.rewrite import equations
from jtile.compiler.target import Target
from jtile.ops import softmax_cross_entropy as op
from jtile.ops.unaligned import unaligned
from jtile.testing.programs import collectives, exchanged

IMPLEMENTATIONS = ["interpret", "xla"]
EVERYTHING = dict(ignore_index=3, label_smoothing=0.1, z_loss=1e-2, logits_soft_cap=5.0)


def defined(logits, labels, dloss, *, ignore_index=None, label_smoothing=0.0, z_loss=0.0, logits_soft_cap=None):
    """The loss and its gradient, term by term as the docstring has them."""
    logits, dloss = np.asarray(logits, np.float64), np.asarray(dloss, np.float64)
    labels = np.asarray(labels)
    v = logits.shape[-1]
    x, slope = logits, 1.0
    if logits_soft_cap is not None:
        x = logits_soft_cap * np.tanh(logits / logits_soft_cap)
        slope = 1 - np.tanh(logits / logits_soft_cap) ** 2
    top = x.max(axis=-1, keepdims=True)
    lse = top + np.log(np.exp(x - top).sum(axis=-1, keepdims=True))
    target = (1 - label_smoothing) * (np.arange(v) == labels[..., None]) + label_smoothing / v
    loss = (target * (lse - x)).sum(axis=-1) + z_loss * lse[..., 0] ** 2
    dlogits = ((1 + 2 * z_loss * lse) * np.exp(x - lse) - target) * slope
    counts = np.ones(labels.shape) if ignore_index is None else (labels != ignore_index)
    return loss * counts, dlogits * (dloss * counts)[..., None]


@functools.cache
def operands(shape, dtype="float32"):
    random = np.random.default_rng(0)
    logits = jnp.asarray(4 * random.standard_normal(shape), dtype)
    labels = jnp.asarray(random.integers(0, shape[-1], shape[:-1]), jnp.int32)
    return logits, labels, jnp.asarray(random.standard_normal(shape[:-1]), jnp.float32)


@functools.partial(jax.jit, static_argnames=("implementation", "options"))
def _with_gradient(logits, labels, dloss, implementation, options):
    call = functools.partial(jtile.softmax_cross_entropy, labels=labels, implementation=implementation, **dict(options))
    loss, pullback = jax.vjp(call, logits)
    return loss, *pullback(dloss)


def with_gradient(logits, labels, dloss, implementation, **options):
    return _with_gradient(logits, labels, dloss, implementation, tuple(options.items()))


def check(shape, dtype, implementation, **options):
    logits, labels, dloss = operands(shape, dtype)
    loss, dlogits = with_gradient(logits, labels, dloss, implementation, **options)
    assert loss.dtype == jnp.float32 and loss.shape == labels.shape
    assert dlogits.dtype == logits.dtype and dlogits.shape == logits.shape
    expected = defined(logits, labels, dloss, **options)
    # Logits, and so the terms of the loss, are up to 20: some units of float32 of that; and of exp(x - lse) the same.
    np.testing.assert_allclose(loss, expected[0], rtol=1e-6, atol=1e-5)
    unit = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(np.asarray(dlogits, np.float64), expected[1], rtol=unit + 5e-6, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1), (17, 1), (5, 17), (3, 1, 100), (), (33, 257), (2, 1000), (3, 5000)])
def test_shapes(shape, dtype, implementation):
    """Vocabularies of one block and of several, ragged and not."""
    check(shape or (4096,), dtype, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{k: EVERYTHING[k]} for k in EVERYTHING] + [EVERYTHING], ids=" ".join)
def test_options(options, dtype, implementation):
    check((9, 4100), dtype, implementation, **options)


@pytest.mark.parametrize(
    "names", [*itertools.combinations(EVERYTHING, 2), *itertools.combinations(EVERYTHING, 3)], ids=" ".join
)
def test_options_combined(names):
    check((21, 11), "float32", "interpret", **{name: EVERYTHING[name] for name in names})


@pytest.mark.parametrize("programs", [1, 7, 1056])
@pytest.mark.parametrize("rows, v", [(1, 20_000), (3, 16_384), (5, 40_001)])
def test_any_division_of_the_vocabulary(monkeypatch, rows, v, programs):
    """One program reading all blocks in turn, one for each block, and between."""
    monkeypatch.setattr(op, "PROGRAMS", programs)
    logits, labels, _ = operands((rows, v))
    logits = logits - 50  # beside which a zero from past the edge would be everything
    tile = next(op.forward_tiles(logits))
    statistics = interpret_pallas(functools.partial(op.forward_kernel, tile=tile, logits_soft_cap=None, total=True))
    lse, picked, total = statistics(logits, labels)
    loss = lse - 0.9 * picked - 0.1 * total / v
    np.testing.assert_allclose(loss, defined(logits, labels, 0.0, label_smoothing=0.1)[0], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("programs", [1, 1056])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_at_odd_addresses(monkeypatch, dtype, programs):
    """Read from aligned addresses; the gradient in blocks that have parts of two rows."""
    monkeypatch.setattr(op, "PROGRAMS", programs)
    assert unaligned(operands((8, 9001), dtype)[0], 4096)
    check((8, 9001), dtype, "interpret", **EVERYTHING)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_means_what_optax_does(implementation):
    logits, labels, dloss = operands((7, 300))
    loss, dlogits = with_gradient(logits, labels, dloss, implementation)
    expected, pullback = jax.vjp(lambda x: optax.softmax_cross_entropy_with_integer_labels(x, labels), logits)
    np.testing.assert_allclose(loss, expected, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(dlogits, pullback(dloss)[0], rtol=5e-6, atol=2e-6)
    smooth = optax.smooth_labels(jax.nn.one_hot(labels, 300), 0.2)
    np.testing.assert_allclose(
        jtile.softmax_cross_entropy(logits, labels, label_smoothing=0.2, implementation=implementation),
        optax.softmax_cross_entropy(logits, smooth),
        rtol=1e-6,
        atol=1e-5,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, dict(z_loss=1e-3)], ids=["plain", "z_loss"])
def test_masked_vocabulary(options, implementation):
    """Entries of -inf are as good as absent."""
    logits, labels, dloss = operands((6, 5000))
    kept = np.random.default_rng(1).permutation(5000)[:3000]
    labels = jnp.asarray(kept)[labels % 3000]
    masked = jnp.full_like(logits, -jnp.inf).at[:, kept].set(logits[:, kept])
    loss, dlogits = with_gradient(masked, labels, dloss, implementation, **options)
    place = np.argsort(kept)[np.searchsorted(np.sort(kept), labels)]
    expected, gradient = defined(logits[:, kept], place, dloss, **options)
    np.testing.assert_allclose(loss, expected, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(dlogits[:, kept], gradient, rtol=5e-6, atol=2e-6)
    assert not np.delete(np.asarray(dlogits), kept, axis=1).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, dict(z_loss=1e-3), dict(label_smoothing=0.1)], ids=["plain", "z", "smooth"])
def test_labels_without_probability(options, implementation):
    """The label masked; everything masked, in blocks and rows of its own; smoothing over a masked entry."""
    logits, labels, dloss = operands((4, 9000))
    logits = logits.at[1, labels[1]].set(-jnp.inf).at[2].set(-jnp.inf).at[3, :4096].set(-jnp.inf)
    labels = labels.at[3].set(5000)
    loss, dlogits = with_gradient(logits, labels, dloss, implementation, **options)
    smooth = "label_smoothing" in options
    np.testing.assert_array_equal(np.isposinf(loss), [False, True, True, smooth])
    assert np.isfinite(dlogits).all()
    share = 0.1 / 9000 if smooth else 0.0
    expected = np.full(9000, -share) - (1 - (0.1 if smooth else 0.0)) * (np.arange(9000) == labels[2])
    np.testing.assert_allclose(dlogits[2], expected * dloss[2], rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_logits(implementation):
    """Far beyond where exp overflows float32; the least finite number, which some use to mask, included."""
    logits, labels, dloss = operands((5, 5000))
    least = float(jnp.finfo(jnp.float32).min)
    logits = logits * jnp.array([[1e4], [1e-30], [1.0], [1.0], [1.0]])
    logits = logits.at[2, :4500].set(least).at[3].set(least).at[4].set(1e38)
    labels = labels.at[2].set(4600)
    loss, dlogits = with_gradient(logits, labels, dloss, implementation)
    expected, gradient = defined(logits, labels, dloss)
    np.testing.assert_allclose(loss[:3], expected[:3], rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(dlogits[:3], gradient[:3], rtol=2e-3, atol=2e-6)  # exp of 4e4 off by 2⁻⁸ at most
    assert np.isfinite(loss).all() and np.isfinite(dlogits).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [dict(ignore_index=-100), EVERYTHING | dict(ignore_index=-1)], ids=["alone", "all"])
def test_ignored_tokens(options, implementation):
    """Zeros, whatever their logits are; the others as if alone. The index may be a class, too."""
    logits, labels, dloss = operands((5, 300))
    clean = with_gradient(logits, labels, dloss, implementation, **options)
    labels = labels.at[jnp.array([1, 3])].set(options["ignore_index"])
    logits = logits.at[1].set(jnp.nan).at[3, 7].set(jnp.inf)
    loss, dlogits = with_gradient(logits, labels, dloss.at[3].set(jnp.nan), implementation, **options)
    others = np.array([0, 2, 4])
    np.testing.assert_array_equal(loss[others], clean[0][others])
    np.testing.assert_array_equal(dlogits[others], clean[1][others])
    assert not loss[jnp.array([1, 3])].any() and not dlogits[jnp.array([1, 3])].any()
    loss, _ = with_gradient(*operands((5, 300)), implementation, ignore_index=int(labels[0]))
    assert loss[0] == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_labels_out_of_range(implementation):
    """NaN for that token, and for no other."""
    logits, labels, dloss = operands((5, 300))
    clean = with_gradient(logits, labels, dloss, implementation)
    wrong = jnp.array([-1, 300, 2**31 - 1, -(2**31)], jnp.int32)
    loss, dlogits = with_gradient(logits, labels.at[:4].set(wrong), dloss, implementation, ignore_index=-100)
    assert jnp.isnan(loss[:4]).all() and jnp.isnan(dlogits[:4]).all()
    np.testing.assert_array_equal(loss[4], clean[0][4])
    np.testing.assert_array_equal(dlogits[4], clean[1][4])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_token_that_does_not_count(implementation):
    logits, labels, dloss = operands((3, 300))
    logits = logits.at[1].set(jnp.nan)
    _, dlogits = with_gradient(logits, labels, dloss.at[1].set(0.0), implementation)
    assert not dlogits[1].any() and jnp.isfinite(dlogits).all()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
def test_dtypes_of_labels(dtype):
    logits, labels, _ = operands((5, 100))
    expected = jtile.softmax_cross_entropy(logits, labels)
    np.testing.assert_array_equal(jtile.softmax_cross_entropy(logits, labels.astype(dtype)), expected)


def test_float64_by_the_reference():
    with jax.enable_x64(True):
        logits, labels, dloss = (jnp.asarray(np.asarray(x)) for x in operands((5, 300)))
        logits, dloss = logits.astype(jnp.float64), dloss.astype(jnp.float64)
        loss, dlogits = with_gradient(logits, labels.astype(jnp.int64), dloss, None, **EVERYTHING)
        assert loss.dtype == dlogits.dtype == jnp.float64
        expected = defined(logits, labels, dloss, **EVERYTHING)
        np.testing.assert_allclose(loss, expected[0], rtol=1e-13)
        np.testing.assert_allclose(dlogits, expected[1], rtol=1e-12, atol=1e-15)
        with pytest.raises(NotImplementedError, match="float64"):
            jtile.softmax_cross_entropy(logits, labels, implementation="interpret")


def test_no_tokens():
    loss, dlogits = with_gradient(jnp.zeros((2, 0, 7)), jnp.zeros((2, 0), int), jnp.zeros((2, 0)), None)
    assert loss.shape == (2, 0) and dlogits.shape == (2, 0, 7)


@pytest.mark.parametrize("tokens", [8, 8192])
def test_forward_makes_no_second_array_of_logits(tokens):
    """Beside blocks, nothing comes near their size, and the kernel reads them once."""
    logits, labels = jax.ShapeDtypeStruct((tokens, 128_256), jnp.bfloat16), jax.ShapeDtypeStruct((tokens,), jnp.int32)
    forward = functools.partial(op.forward_kernel, tile=next(op.forward_tiles(logits)), logits_soft_cap=5.0, total=True)
    found = list(equations(jax.make_jaxpr(forward)(logits, labels).jaxpr))
    sizes = [math.prod(v.aval.shape) for e in found for v in e.outvars if hasattr(v.aval, "shape")]
    assert max(sizes) <= max(8192, 32 * tokens)
    reads = sum(e.primitive.name == "get" and math.prod(e.outvars[0].aval.shape) > 1 for e in found)
    assert reads <= 2  # in the loop, and at the end of a row


@pytest.mark.parametrize("logits_are", ["donated", "dead", "dead after jit", "dead after checkpoint", "kept"])
def test_gradient_takes_the_memory_of_logits(logits_are):
    """Of those that the program computes or the caller gives away; what the caller keeps is copied first."""
    tokens, width, v = 256, 16, 8192
    sharding = NamedSharding(Target.named("NVIDIA H200").make_mesh((1,), ("x",), (AxisType.Auto,)), P())
    shape = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)  # noqa: E731
    x, weight, logits = shape(tokens, width), shape(width, v), shape(tokens, v)

    def mean(logits, labels):
        return jtile.softmax_cross_entropy(logits, labels).mean()

    def of_product(weight, x, labels):
        return (jax.jit(mean) if logits_are == "dead after jit" else mean)(x @ weight, labels)

    if logits_are in ("donated", "kept"):
        function, operands = mean, (logits,)
    else:
        function, operands = of_product, (weight, x)
    function = jax.checkpoint(function) if logits_are == "dead after checkpoint" else function
    given = [0] if logits_are == "donated" else []
    program = jax.jit(jax.value_and_grad(function), donate_argnums=given).lower(
        *operands, shape(tokens, dtype=jnp.int32)
    )
    compiled, size = program.compile(), tokens * v * 2
    copies = sum(" copy(" in line and f"bf16[{tokens},{v}]" in line for line in compiled.as_text().splitlines())
    memory = compiled.memory_analysis()
    assert copies == (logits_are == "kept")
    assert memory.temp_size_in_bytes < size * (1.1 if "dead" in logits_are else 0.1)
    assert memory.alias_size_in_bytes == (size if logits_are == "donated" else 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_devices_that_share_the_vocabulary_exchange_two_numbers_a_token(smoothing):
    """Three with label smoothing, and none for the gradient, which needs no logit of another device."""
    tokens, v = 6, 4096
    mesh = Target.named("NVIDIA H200").make_mesh((4,), ("model",), (AxisType.Auto,))
    shape = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))  # noqa: E731
    logits, labels = shape((tokens, v), jnp.bfloat16, None, "model"), shape((tokens,), jnp.int32)

    def loss(logits, labels):
        return jtile.softmax_cross_entropy(logits, labels, label_smoothing=smoothing, z_loss=1e-4)

    lowered = jax.jit(lambda x, i: jax.vjp(lambda x: loss(x, i), x)).lower(logits, labels)
    forward = lowered.compile()
    out, pull = jax.tree.map(lambda x, s: x.update(sharding=s), lowered.out_info, forward.output_shardings)
    backward = jax.jit(lambda pull, dloss: pull(dloss)).lower(pull, out).compile()
    assert exchanged(forward) == (3 if smoothing else 2) * tokens
    assert not collectives(backward)


def test_axis_name_under_shard_map():
    """The same loss and gradient, with tokens and vocabulary split; ignored and masked entries included."""
    logits, labels, dloss = operands((6, 400))
    logits, labels = logits.at[1, :100].set(-jnp.inf), labels.at[1].set(250).at[4].set(-100)
    options = EVERYTHING | dict(ignore_index=-100, label_smoothing=0.0)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    mapped = jax.shard_map(
        functools.partial(jtile.softmax_cross_entropy, axis_name="model", **options),
        mesh=mesh,
        in_specs=(P("data", "model"), P("data")),
        out_specs=P("data"),
    )
    loss, pullback = jax.vjp(jax.jit(lambda x: mapped(x, labels)), logits)
    expected, gradient = defined(logits, labels, dloss, **options)
    np.testing.assert_allclose(loss, expected, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(pullback(dloss)[0], gradient, rtol=5e-6, atol=2e-6)


@pytest.mark.parametrize(
    "logits, labels, options, message",
    [
        ((3, 4), (4,), {}, r"leading dimensions must agree: they are \(3,\) in `logits` and \(4,\) in `labels`"),
        ((3, 4), (3, 4), {}, "leading dimensions must agree"),
        ((), (), {}, "`logits` has dimensions"),
        ((3, 0), (3,), {}, r"the vocabulary must not be empty, but `logits` has \(3, 0\)"),
        ((3, 4), (3,), dict(label_smoothing=1.0), "`label_smoothing` must be at least 0 and less than 1, .* got 1.0"),
        ((3, 4), (3,), dict(label_smoothing=-0.1), "`label_smoothing` must be .* got -0.1"),
        ((3, 4), (3,), dict(z_loss=-1.0), "`z_loss` must be at least 0 and finite, .* got -1.0"),
        ((3, 4), (3,), dict(z_loss=math.nan), "`z_loss` must be .* got nan"),
        ((3, 4), (3,), dict(logits_soft_cap=0.0), "`logits_soft_cap` must be positive and finite, or None, .* got 0.0"),
        ((3, 4), (3,), dict(implementation="cuda"), "`implementation` must be one of"),
    ],
)
def test_what_is_refused(logits, labels, options, message):
    with pytest.raises(ValueError, match=f"^softmax_cross_entropy: {message}"):
        jtile.softmax_cross_entropy(jnp.zeros(logits), jnp.zeros(labels, int), **options)


def test_types_that_are_refused():
    logits, labels, _ = operands((3, 4))
    with pytest.raises(ValueError, match="`labels` must be integers, a class for each token, got float32"):
        jtile.softmax_cross_entropy(logits, logits)
    with pytest.raises(ValueError, match="`logits` must be floating point, got int32"):
        jtile.softmax_cross_entropy(logits.astype(int), labels)
    with pytest.raises(ValueError, match="`z_loss` must be .* known when tracing"):
        jax.jit(lambda z: jtile.softmax_cross_entropy(logits, labels, z_loss=z))(0.1)
    with pytest.raises(TypeError, match="integer"):
        jtile.softmax_cross_entropy(logits, labels, ignore_index=1.5)
