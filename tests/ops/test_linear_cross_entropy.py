"""Cross-entropy without logits against its definition on all of them in float64, and what it keeps in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

import jtile
from jtile.compiler.target import Target
from jtile.ops import linear_cross_entropy as op
from jtile.testing.programs import binds

IMPLEMENTATIONS = ["interpret", "xla"]
EVERYTHING = dict(ignore_index=3, label_smoothing=0.1, z_loss=1e-2, logits_soft_cap=5.0)
GRADIENTS = ["again", "at once"]  # logits formed again in the backward pass; gradients formed in the forward pass


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Several slabs of the vocabulary and several lots of tokens, the last of each ragged."""
    monkeypatch.setattr(op, "SLAB", 256 * 40)
    monkeypatch.setattr(op, "TOKENS", 16)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def operands(tokens, d, v, dtype="float32"):
    """x, weight, bias, the weights of tokens, and labels; logits are up to about 8."""
    floating = normal(0, *tokens, d), 2 * normal(1, d, v) / max(d, 1) ** 0.5, normal(2, v)
    labels = jnp.asarray(np.random.default_rng(3).integers(0, v, tokens), jnp.int32)
    return *(a.astype(dtype) for a in floating), normal(4, *tokens), labels


def defined(x, weight, bias, token_weights, labels, ignore_index=None, label_smoothing=0.0, z_loss=0.0, cap=None):
    """The sum of the weighted losses, term by term as the docstrings have them."""
    logits = x @ weight + (0 if bias is None else bias)
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, labels[..., None] % logits.shape[-1], axis=-1)[..., 0]
    loss = lse - (1 - label_smoothing) * picked + z_loss * lse**2
    if label_smoothing:
        loss -= label_smoothing * logits.mean(axis=-1)
    return jnp.sum(jnp.where(labels == ignore_index, 0.0, token_weights * loss))


def summed(gradients, implementation, labels, **options):
    def function(x, weight, bias, token_weights):
        call = functools.partial(
            jtile.linear_cross_entropy, x, weight, labels, bias=bias, implementation=implementation, **options
        )
        return call(token_weights=token_weights) if gradients == "at once" else jnp.sum(token_weights * call())

    return function


@functools.partial(jax.jit, static_argnames=("gradients", "implementation", "options"))
def _with_gradients(floating, labels, gradients, implementation, options):
    present = tuple(i for i, a in enumerate(floating) if a is not None)
    return jax.value_and_grad(summed(gradients, implementation, labels, **dict(options)), present)(*floating)


def check(given, gradients, implementation, rtol=2e-6, **options):
    *floating, labels = given
    actual = _with_gradients(floating, labels, gradients, implementation, tuple(options.items()))
    with jax.enable_x64(True):
        wide = [None if a is None else jnp.asarray(np.asarray(a, np.float64)) for a in floating]
        present = tuple(i for i, a in enumerate(wide) if a is not None)
        renamed = {"cap" if name == "logits_soft_cap" else name: value for name, value in options.items()}
        expected = jax.value_and_grad(lambda *a: defined(*a, labels, **renamed), present)(*wide)
    for got, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        size = np.max(np.abs(np.asarray(wanted)), initial=1.0)
        np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=4 * rtol, atol=rtol * size)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("gradients", GRADIENTS)
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_options(options, gradients, implementation):
    """Over several slabs, lots of tokens and tiles."""
    check(operands((2, 20), 40, 700), gradients, implementation, **options)


@pytest.mark.parametrize("gradients", GRADIENTS)
@pytest.mark.parametrize(
    "tokens, d, v", [((), 3, 5), ((1,), 1, 1), ((3, 1, 5), 17, 33), ((17,), 100, 257), ((0,), 4, 9)]
)
def test_shapes(tokens, d, v, gradients):
    *floating, labels = operands(tokens, d, v)
    floating[2] = None
    check((*floating, labels), gradients, "interpret")


@pytest.mark.parametrize("gradients", GRADIENTS)
def test_bfloat16(gradients):
    """Sums over 700 classes and 40 tokens, rounded once: the gradients are off by half a unit in the last place, and
    by what the probabilities are that come of rounded logits."""
    *floating, labels = operands((40,), 40, 700)
    floating = [a.astype(jnp.bfloat16) for a in floating[:3]] + floating[3:]
    check((*floating, labels), gradients, "interpret", rtol=2**-8)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("gradients", GRADIENTS)
def test_tokens_that_do_not_count(gradients, implementation):
    """One ignored, one of weight 0, both with logits that are not numbers: the others as if alone."""
    x, weight, bias, token_weights, labels = operands((20,), 8, 300)
    kept = np.delete(np.arange(20), [1, 17])
    run = lambda floating, labels: _with_gradients(  # noqa: E731
        floating, labels, gradients, implementation, (("ignore_index", -100),)
    )
    x, labels, token_weights = x.at[1].set(3e38).at[17].set(3e38), labels.at[1].set(-100), token_weights.at[17].set(0)
    total, (dx, dweight, dbias, _) = run((x, weight, bias, token_weights), labels)
    expected, wanted = run((x[kept], weight, bias, token_weights[kept]), labels[kept])
    if gradients == "at once":
        np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert not dx[1].any() and not dx[17].any()
    for got, alone in zip((dx[kept], dweight, dbias), wanted[:3], strict=True):
        np.testing.assert_allclose(got, alone, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("gradients", GRADIENTS)
def test_masked_vocabulary(gradients, implementation):
    """Classes of bias −inf are as good as absent, whole tiles of them, too."""
    x, weight, bias, token_weights, labels = operands((20,), 8, 300)
    masked = bias.at[:64].set(-jnp.inf).at[100].set(-jnp.inf)
    kept = np.isfinite(masked)
    labels = jnp.asarray(np.flatnonzero(kept))[labels % kept.sum()]
    run = lambda *floating, labels: _with_gradients(floating, labels, gradients, implementation, ())  # noqa: E731
    total, (dx, dweight, dbias, _) = run(x, weight, masked, token_weights, labels=labels)
    places = jnp.asarray(np.cumsum(kept) - 1)[labels]
    expected, wanted = run(x, weight[:, kept], bias[kept], token_weights, labels=places)
    np.testing.assert_allclose(total, expected, rtol=2e-6)
    assert not dweight[:, ~kept].any() and not dbias[~kept].any()
    for got, alone in zip((dx, dweight[:, kept], dbias[kept]), wanted[:3], strict=True):
        np.testing.assert_allclose(got, alone, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("gradients", GRADIENTS)
def test_labels_out_of_range(gradients):
    x, weight, _, token_weights, labels = operands((5,), 8, 300)
    wrong = labels.at[:4].set(jnp.array([-1, 300, 2**31 - 1, -(2**31)], jnp.int32))
    options = dict(ignore_index=-100, implementation="interpret")
    losses = jtile.linear_cross_entropy(x, weight, wrong, **options)
    assert jnp.isnan(losses[:4]).all() and jnp.isfinite(losses[4])
    total, dx = jax.value_and_grad(summed(gradients, labels=wrong, **options))(x, weight, None, token_weights)
    assert jnp.isnan(total) and jnp.isnan(dx[:4]).all() and jnp.isfinite(dx[4]).all()


def test_gradients_are_formed_in_the_forward_pass_only_when_differentiated():
    *floating, labels = operands((5,), 8, 300)
    total = summed("at once", None, labels)
    assert binds(total, *floating) == {"linear_cross_entropy": 1}
    assert binds(jax.grad(total), *floating) == {"linear_cross_entropy_gradients": 1}
    assert binds(lambda *a: jax.vjp(total, *a)[0], *floating) == {"linear_cross_entropy_gradients": 1}


def test_float64_by_the_reference():
    with jax.enable_x64(True):
        *floating, labels = operands((5,), 8, 30, "float64")
        for gradients in GRADIENTS:
            actual, expected = (
                jax.value_and_grad(f)(*floating)
                for f in (summed(gradients, None, labels), lambda *a: defined(*a, labels))
            )
            assert actual[0].dtype == jnp.float64
            np.testing.assert_allclose(actual[0], expected[0], rtol=1e-13)
            np.testing.assert_allclose(actual[1], expected[1], rtol=1e-12, atol=1e-15)


# What is kept in memory, as XLA plans it for an H200: 8192 tokens, 2048 wide, 65,536 classes, whose logits take 1 GiB
# in bfloat16, and in float32 the gradient of the weight.

T, D, V = 8192, 2048, 65_536
GIB = 2**30


def temporary(function, monkeypatch) -> float:
    """GiB beside operands and results."""
    monkeypatch.undo()
    [device] = Target.named("NVIDIA H200").topology().devices
    place = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))  # noqa: E731
    given = place((T, D), jnp.bfloat16), place((D, V), jnp.bfloat16), place((T,), jnp.int32)
    return jax.jit(function).lower(*given).compile().memory_analysis().temp_size_in_bytes / GIB


def loss(x, weight, labels, token_weights=None):
    losses = jtile.linear_cross_entropy(x, weight, labels, token_weights=token_weights, implementation="triton")
    return jnp.mean(losses)


def weighted_loss(x, weight, labels):
    return loss(x, weight, labels, jnp.full(labels.shape, 1 / T))


def test_memory_of_the_forward_pass(monkeypatch):
    """A log-sum-exp for each token and 256 classes."""
    assert temporary(loss, monkeypatch) < 1.1 * 4 * T * V / 256 / GIB
    assert temporary(weighted_loss, monkeypatch) < 1.1 * 4 * T * V / 256 / GIB


def test_memory_with_logits_formed_again(monkeypatch):
    """The gradients of a slab of logits, the slab of the weight, and dx in float32, once more where XLA adds to it."""
    slab = 33 * 2**21
    kept = 2 * slab + 2 * D * slab / T + 2 * 4 * T * D
    assert temporary(jax.value_and_grad(loss, (0, 1)), monkeypatch) < 1.1 * kept / GIB


def test_memory_with_gradients_in_the_forward_pass(monkeypatch):
    """The logits of 4096 tokens, and the sum for the weight in float32."""
    kept = 2 * 4096 * V + 4 * D * V
    assert temporary(jax.value_and_grad(weighted_loss, (0, 1)), monkeypatch) < 1.1 * kept / GIB


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(weight=(5, 7)), "dimension `d` must agree: it is 4 in `x` and 5 in `weight`"),
        (dict(labels=(2,)), r"leading dimensions must agree: they are \(3,\) in `x` and \(2,\) in `labels`"),
        (dict(bias=(8,)), "dimension `v` must agree"),
        (dict(token_weights=(3, 1)), r"`token_weights` must have the shape of `labels`, \(3,\), got \(3, 1\)"),
        (dict(weight=(4, 0)), r"the vocabulary must not be empty, but `weight` has \(4, 0\)"),
        (dict(label_smoothing=1.0), "`label_smoothing` must be at least 0 and less than 1"),
        (dict(z_loss=-1.0), "`z_loss` must be at least 0"),
        (dict(logits_soft_cap=0.0), "`logits_soft_cap` must be positive"),
        (dict(implementation="cuda"), "`implementation` must be one of"),
    ],
)
def test_what_is_refused(change, message):
    given = {"x": (3, 4), "weight": (4, 7), "labels": (3,)} | change
    arrays = {n: jnp.zeros(s, int if n == "labels" else float) if isinstance(s, tuple) else s for n, s in given.items()}
    with pytest.raises(ValueError, match=f"^linear_cross_entropy.*: .*{message}"):
        jtile.linear_cross_entropy(**arrays)


def test_types_that_are_refused():
    x, weight, _, _, labels = operands((3,), 4, 7)
    with pytest.raises(ValueError, match="`x` and `weight` must have one floating-point dtype.*bfloat16 and float32"):
        jtile.linear_cross_entropy(x.astype(jnp.bfloat16), weight, labels)
    with pytest.raises(ValueError, match="`labels` must be integers"):
        jtile.linear_cross_entropy(x, weight, x[:, 0])
