"""Losses over hidden states against their formulas in float64, on all logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jtile import losses
from jtile.ops import linear_cross_entropy as op
from jtile.testing import Case, check_op

IMPLEMENTATIONS = ["interpret", "xla"]
V = 70


@pytest.fixture(autouse=True)
def few_tokens_at_a_time(monkeypatch):
    monkeypatch.setattr(op, "TOKENS", 8)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def integers(seed, high, *shape):
    return jnp.asarray(np.random.default_rng(seed).integers(0, high, shape), jnp.int32)


def check(loss, formula, *operands):
    """Values and gradients, the formula's in float64."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in operands]
        expected, pull = jax.vjp(jax.jit(formula), *wide)
        cotangent = jnp.asarray(np.random.default_rng(9).standard_normal(expected.shape))
        gradients = pull(cotangent)
    actual, pull = jax.vjp(jax.jit(loss), *operands)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=2e-6)
    for got, wanted in zip(pull(jnp.asarray(cotangent, jnp.float32)), gradients, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=3e-6)


# Distillation.


def kl(p, q):
    return jnp.sum(p * (jnp.log(p) - jnp.log(q)), axis=-1)


def jsd(beta):
    return lambda p, q: beta * kl(p, beta * p + (1 - beta) * q) + (1 - beta) * kl(q, beta * p + (1 - beta) * q)


DIVERGENCES = {
    "forward": (losses.kl_divergence, kl),
    "reverse": (functools.partial(losses.kl_divergence, direction="reverse"), lambda p, q: kl(q, p)),
    "symmetric": (losses.jensen_shannon_divergence, jsd(0.5)),
    "skew": (functools.partial(losses.jensen_shannon_divergence, beta=0.1), jsd(0.1)),
}
TEACHER = normal(4, 3, 7, 12), normal(5, 12, V), normal(6, V)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences(name, implementation):
    function, formula = DIVERGENCES[name]
    x, weight, bias = normal(1, 3, 7, 20), normal(2, 20, V) / 4, normal(3, V)

    def loss(x, weight, bias):
        options = dict(teacher_bias=TEACHER[2], temperature=2.0, implementation=implementation)
        return function(x, weight, *TEACHER[:2], bias=bias, **options)

    def defined(x, weight, bias):
        teacher = jax.nn.softmax((TEACHER[0] @ TEACHER[1] + TEACHER[2]).astype(x.dtype) / 2)
        return formula(teacher, jax.nn.softmax((x @ weight + bias) / 2))

    check(loss, defined, x, weight, bias)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_entries_without_probability(name):
    """Masked out of both vocabularies they are as good as absent."""
    function, _ = DIVERGENCES[name]
    x, weight = normal(1, 3, 7, 20), normal(2, 20, V) / 4
    masked = jnp.zeros(V).at[::3].set(-jnp.inf)
    kept = np.isfinite(masked)
    with_mask = lambda x, w: function(x, w, *TEACHER[:2], bias=masked, teacher_bias=masked)  # noqa: E731
    without = lambda x, w: function(x, w[:, kept], TEACHER[0], TEACHER[1][:, kept])  # noqa: E731
    (actual, pull), (expected, pull_expected) = (jax.vjp(f, x, weight) for f in (with_mask, without))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(pull(jnp.ones((3, 7))), pull_expected(jnp.ones((3, 7))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["forward", "skew"])
def test_divergences_of_a_split_vocabulary(name):
    function, _ = DIVERGENCES[name]
    x, weight = normal(1, 4, 20), normal(2, 20, 72) / 4
    teacher = normal(4, 4, 12), normal(5, 12, 72)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    split = jax.shard_map(
        functools.partial(function, axis_name="model"),
        mesh=mesh,
        in_specs=(P("data"), P(None, "model"), P("data"), P(None, "model")),
        out_specs=P("data"),
    )
    actual, pull = jax.vjp(jax.jit(lambda x, w: split(x, w, *teacher)), x, weight)
    expected, pull_expected = jax.vjp(lambda x, w: function(x, w, *teacher), x, weight)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(pull(jnp.ones(4)), pull_expected(jnp.ones(4)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_no_gradient_flows_to_the_teacher():
    x, weight = normal(1, 3, 20), normal(2, 20, V)
    gradients = jax.grad(lambda *teacher: losses.kl_divergence(x, weight, *teacher).sum(), (0, 1))(x + 1, weight)
    assert not any(g.any() for g in gradients)


# Preferences.

X, WEIGHT = normal(1, 2, 3, 5, 20), normal(2, 20, V) / 4
LABELS, MASK = integers(3, V, 2, 3, 5), jnp.asarray(np.arange(5) >= np.array([[1], [0], [3]]))[None].repeat(2, 0)
REFERENCE = -20 + normal(4, 2, 3)


def log_probs(x, weight):
    """Of each token, in float64."""
    return jnp.take_along_axis(jax.nn.log_softmax(x @ weight), LABELS.reshape(x.shape[:-1])[..., None], -1)[..., 0]


def sums(x, weight):
    return jnp.sum(jnp.where(MASK.reshape(x.shape[:-1]), log_probs(x, weight), 0.0), axis=-1)


def log_sigmoid(x):
    return -jnp.log1p(jnp.exp(-x))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo(smoothing, implementation):
    def defined(x, weight):
        ratios = sums(x, weight) - REFERENCE
        h = 0.3 * (ratios[0] - ratios[1])
        return -(1 - smoothing) * log_sigmoid(h) - smoothing * log_sigmoid(-h)

    def loss(x, weight):
        options = dict(mask=MASK, beta=0.3, label_smoothing=smoothing, implementation=implementation)
        return losses.dpo(x, weight, LABELS, REFERENCE, **options)

    check(loss, defined, X, WEIGHT)


def test_orpo():
    def defined(x, weight):
        mean = sums(x, weight) / MASK.sum(-1)
        log_odds = mean - jnp.log(1 - jnp.exp(mean))
        return -mean[0] - 0.3 * log_sigmoid(log_odds[0] - log_odds[1])

    check(lambda x, weight: losses.orpo(x, weight, LABELS, mask=MASK, beta=0.3), defined, X, WEIGHT)


def test_kto():
    desirable = jnp.array([True, False, True, True, False, False])
    x, labels, mask, reference = X.reshape(6, 5, 20), LABELS.reshape(6, 5), MASK.reshape(6, 5), REFERENCE.reshape(6)

    def defined(x, weight):
        h = 0.3 * (sums(x, weight) - reference - 0.7)
        sigmoid = lambda x: 1 / (1 + jnp.exp(-x))  # noqa: E731
        return jnp.where(desirable, 1.5 * (1 - sigmoid(h)), 0.8 * (1 - sigmoid(-h)))

    def loss(x, weight):
        weights = dict(desirable_weight=1.5, undesirable_weight=0.8)
        return losses.kto(x, weight, labels, reference, desirable, reference_point=0.7, mask=mask, beta=0.3, **weights)

    check(loss, defined, x, WEIGHT)


@pytest.mark.parametrize("on_policy", [True, False])
def test_grpo(on_policy):
    x, labels, mask, advantages = X.reshape(6, 5, 20), LABELS.reshape(6, 5), MASK.reshape(6, 5), normal(7, 6)
    now = log_probs(x, WEIGHT)
    old, reference = now + normal(5, 6, 5) / 3, now + normal(6, 6, 5) / 2
    given = {} if on_policy else dict(old_log_probs=old)

    def defined(x, weight):
        log_p = log_probs(x, weight)
        rho = jnp.exp(log_p - (jax.lax.stop_gradient(log_p) if on_policy else old))
        a = advantages[:, None]
        gain = jnp.minimum(rho * a, jnp.clip(rho, 0.9, 1.2) * a)
        gain -= 0.3 * (jnp.exp(reference - log_p) - (reference - log_p) - 1)
        return -jnp.sum(jnp.where(mask, gain, 0.0), -1) / mask.sum(-1)

    def loss(x, weight):
        options = dict(reference_log_probs=reference, mask=mask, beta=0.3, clip_low=0.1, clip_high=0.2)
        return losses.grpo(x, weight, labels, advantages, **options, **given)

    check(loss, defined, x, WEIGHT)


def test_what_is_masked_out_may_hold_anything():
    """The same losses and gradients, and none from a sequence of nothing."""
    broken = jnp.where(MASK[..., None], X, jnp.nan)
    old = jnp.where(MASK, log_probs(X, WEIGHT), jnp.inf)
    mask = MASK.at[1, 2].set(False)
    for loss in (
        lambda x: losses.dpo(x, WEIGHT, LABELS, REFERENCE, mask=mask),
        lambda x: losses.orpo(x, WEIGHT, LABELS, mask=mask),
        lambda x: losses.grpo(x, WEIGHT, LABELS, REFERENCE, old_log_probs=old, reference_log_probs=old, mask=mask),
    ):
        (actual, pull), (expected, pull_expected) = (
            jax.vjp(loss, broken),
            jax.vjp(loss, jnp.where(MASK[..., None], X, 0)),
        )
        np.testing.assert_array_equal(actual, expected)
        (dx,) = pull(jnp.ones_like(actual))
        np.testing.assert_array_equal(dx, *pull_expected(jnp.ones_like(actual)))
        assert jnp.isfinite(dx).all() and not dx[~mask].any()


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: losses.kl_divergence(X, WEIGHT, X, WEIGHT, direction="up"),
            "`direction` must be 'forward' or 'reverse'",
        ),
        (lambda: losses.kl_divergence(X, WEIGHT, X, WEIGHT, temperature=0), "`temperature` must be positive"),
        (
            lambda: losses.kl_divergence(X, WEIGHT, X.astype(int), WEIGHT),
            "`teacher_x` and `teacher_weight` must have one",
        ),
        (lambda: losses.kl_divergence(X, WEIGHT, X, WEIGHT[:, 1:]), "^kl_divergence: dimension `v` must agree"),
        (lambda: losses.jensen_shannon_divergence(X, WEIGHT, X, WEIGHT, beta=1.0), "`beta` must be between 0 and 1"),
        (lambda: losses.dpo(X[0], WEIGHT, LABELS[0], REFERENCE[0]), "the first axis must hold chosen and rejected"),
        (lambda: losses.dpo(X, WEIGHT, LABELS, REFERENCE[0]), r"`reference_log_probs` must have the shape \(2, 3\)"),
        (lambda: losses.dpo(X, WEIGHT, LABELS, REFERENCE, label_smoothing=0.5), "`label_smoothing` must be at least 0"),
        (lambda: losses.orpo(X, WEIGHT, LABELS, mask=MASK[0]), r"`mask` must have the shape \(2, 3, 5\), got \(3, 5\)"),
        (lambda: losses.grpo(X, WEIGHT, LABELS, X), r"`advantages` must have the shape \(2, 3\)"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("law", ["gradient", "second_order", "explicit_sharding", "shard_map"])
def test_laws(law):
    case = Case(
        "x: b s d, weight: d v, teacher_x: b s e, teacher_weight: e v -> divergence: b s",
        {"b": 4, "s": 8, "d": 6, "e": 4, "v": 40},
        options={"beta": 0.3, "temperature": 2.0},
        split="b s v",
        axis_names={"v": "axis_name"},
    )
    check_op(losses.jensen_shannon_divergence, [case], laws=[law])
