"""Losses over hidden states and a vocabulary matrix, distillation and preferences, with no array of tokens × classes.

Those of preferences are a few lines on log-probabilities of given tokens, which are −`linear_cross_entropy`.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jtile.op import Implementation
from jtile.ops import linear_divergence
from jtile.ops.linear_cross_entropy import linear_cross_entropy

# Distillation.


def kl_divergence(
    x: Float[Array, "*tokens d"],
    weight: Float[Array, "d vocabulary"],
    teacher_x: Float[Array, "*tokens e"],
    teacher_weight: Float[Array, "e vocabulary"],
    *,
    bias: Float[Array, " vocabulary"] | None = None,
    teacher_bias: Float[Array, " vocabulary"] | None = None,
    direction: Literal["forward", "reverse"] = "forward",
    temperature: float = 1.0,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: Implementation = None,
) -> Float[Array, "*tokens"]:
    """Kullback-Leibler divergence between a teacher's and a student's distribution over the vocabulary.

    Logits of some thousand tokens are there at a time, and formed again in the backward pass. No gradient flows to the
    teacher. An entry of the vocabulary that the teacher gives no probability counts for nothing.

    Args:
        x: hidden states of the student, any leading shape, then d.
        weight: its vocabulary matrix, of the dtype of `x`.
        teacher_x: hidden states of the teacher, which may be of another width and dtype.
        teacher_weight: its vocabulary matrix, of the dtype of `teacher_x`.
        bias: added to the student's logits.
        teacher_bias: added to the teacher's logits.
        direction: `"forward"` is KL(teacher ‖ student), whose gradient is that of the cross-entropy to the teacher's
            distribution; `"reverse"` is KL(student ‖ teacher).
        temperature: positive; divides both logits. Gradients shrink by its square, which Hinton et al. make up for.
        axis_name: inside `jax.shard_map`, the mesh axis or axes that split the vocabulary.
        implementation: `None`, `"triton"`, `"xla"` or `"interpret"`, see `jtile.TileOp`; `"xla"` keeps all logits.

    Returns:
        The divergence of each token in nats, float32 (float64 for float64).

    Raises:
        ValueError: shapes or dtypes that do not match, or an option out of its range.

    Sources: Hinton, Vinyals and Dean 2015 (arXiv:1503.02531), section 2; the reverse direction, Gu et al., MiniLLM,
    2023 (arXiv:2306.08543), section 2.1.

    Example:
        >>> import jax.numpy as jnp
        >>> import jtile
        >>> x, weight = jnp.ones((4, 8)), jnp.ones((8, 100))
        >>> print(jtile.losses.kl_divergence(x, weight, x[:, :3], weight[:3]))
        [0. 0. 0. 0.]
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"kl_divergence: `direction` must be 'forward' or 'reverse', got {direction!r}")
    return _divergence(
        "kl_divergence",
        direction,
        1.0,
        (x, weight, teacher_x, teacher_weight),
        bias=bias,
        teacher_bias=teacher_bias,
        temperature=temperature,
        axis_name=axis_name,
        implementation=implementation,
    )


def jensen_shannon_divergence(
    x: Float[Array, "*tokens d"],
    weight: Float[Array, "d vocabulary"],
    teacher_x: Float[Array, "*tokens e"],
    teacher_weight: Float[Array, "e vocabulary"],
    *,
    beta: float = 0.5,
    **options,
) -> Float[Array, "*tokens"]:
    """Generalised Jensen-Shannon divergence between a teacher's distribution P and a student's Q over the vocabulary:

        JSD(P ‖ Q) = β KL(P ‖ M) + (1 − β) KL(Q ‖ M),  M = β P + (1 − β) Q

    Divided by β it tends to KL(P ‖ Q) as β goes to 0, and divided by 1 − β to KL(Q ‖ P) as β goes to 1: those are
    `kl_divergence`.

    Args:
        x, weight, teacher_x, teacher_weight: as of `kl_divergence`.
        beta: the teacher's share of the mixture, 0 < β < 1. At ½ the divergence is symmetric.
        options: `bias`, `teacher_bias`, `temperature`, `axis_name` and `implementation` of `kl_divergence`.

    Returns:
        The divergence of each token in nats, float32 (float64 for float64).

    Raises:
        ValueError: shapes or dtypes that do not match, or an option out of its range.

    Source: Agarwal et al., On-Policy Distillation of Language Models, 2023 (arXiv:2306.13649), section 2.

    Example:
        >>> import jax.numpy as jnp
        >>> import jtile
        >>> sure = jnp.array([[100.0, 0.0]])  # of the first class or the second
        >>> nats = jtile.losses.jensen_shannon_divergence(sure, jnp.eye(2), -sure, jnp.eye(2))
        >>> print(jnp.exp(nats).round())  # half of it each: log 2
        [2.]
    """
    if isinstance(beta, jax.core.Tracer) or not 0 < beta < 1:
        raise ValueError(
            "jensen_shannon_divergence: `beta` must be between 0 and 1, both excluded, and known when tracing, got "
            f"{beta}; the limits are kl_divergence's two directions"
        )
    return _divergence(
        "jensen_shannon_divergence", "jensen_shannon", float(beta), (x, weight, teacher_x, teacher_weight), **options
    )


def _divergence(
    name: str,
    kind: linear_divergence.Kind,
    beta: float,
    operands,
    *,
    bias=None,
    teacher_bias=None,
    temperature=1.0,
    axis_name=None,
    implementation=None,
):
    student_x, student_weight, teacher_x, teacher_weight = map(jnp.asarray, operands)
    given = student_x, student_weight, bias, teacher_x, teacher_weight, teacher_bias
    linear_divergence.forward.signature.check(name, [None if a is None else jnp.shape(a) for a in given])
    for side, x, weight in ("", student_x, student_weight), ("teacher_", teacher_x, teacher_weight):
        if not jnp.issubdtype(x.dtype, jnp.floating) or weight.dtype != x.dtype:
            raise ValueError(
                f"{name}: `{side}x` and `{side}weight` must have one floating-point dtype, in which they are "
                f"multiplied, got {x.dtype} and {weight.dtype}; cast them"
            )
    if isinstance(temperature, jax.core.Tracer) or not 0 < temperature < float("inf"):
        raise ValueError(
            f"{name}: `temperature` must be positive and finite, and known when tracing; got {temperature}"
        )
    teacher = jax.lax.stop_gradient((teacher_x, teacher_weight, teacher_bias))
    (divergence,) = linear_divergence.forward(
        student_x,
        student_weight,
        bias,
        *teacher,
        kind=kind,
        beta=beta,
        temperature=float(temperature),
        split={} if axis_name is None else {"v": axis_name},
        implementation=implementation,
    )
    return divergence


# Preferences.


def token_log_probs(
    x: Float[Array, "*tokens d"],
    weight: Float[Array, "d vocabulary"],
    labels: Int[Array, "*tokens"],
    *,
    mask: Bool[Array, "*tokens"] | None = None,
    bias: Float[Array, " vocabulary"] | None = None,
    logits_soft_cap: float | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: Implementation = None,
) -> Float[Array, "*tokens"]:
    """The logarithm of the probability that the model gives each label; 0, and no gradient, where a mask is False.

    The arguments beside `mask` are `linear_cross_entropy`'s. What is masked out may hold anything: padding, NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> import jtile
        >>> log_probs = jtile.losses.token_log_probs(jnp.ones((3, 8)), jnp.zeros((8, 100)), jnp.arange(3))
        >>> print(jnp.exp(-log_probs).round())
        [100. 100. 100.]
    """
    labels = jnp.asarray(labels)
    _check_shapes("token_log_probs", labels.shape, mask=mask)
    if mask is not None:
        labels = jnp.where(mask, labels.astype(jnp.int32), _MASKED)
        x = jnp.where(mask[..., None], x, 0)  # the gradient of weight multiplies them by 0, which NaN survives
    return -linear_cross_entropy(
        x,
        weight,
        labels,
        bias=bias,
        ignore_index=None if mask is None else _MASKED,
        logits_soft_cap=logits_soft_cap,
        axis_name=axis_name,
        implementation=implementation,
    )


_MASKED = -(2**31)  # no label


def _sequence_log_probs(name: str, x, weight, labels, mask, head, *, pairs: bool, **of_sequence):
    """Sums over each sequence, and how many tokens they are of."""
    labels = jnp.asarray(labels)
    if pairs and labels.shape[:1] != (2,):
        raise ValueError(
            f"{name}: the first axis must hold chosen and rejected completions, two, but `labels` has {labels.shape}"
        )
    _check_shapes(name, labels.shape[:-1], **of_sequence)
    log_probs = token_log_probs(x, weight, labels, mask=mask, **head)
    return jnp.sum(log_probs, axis=-1), _count(log_probs, mask)


def _check_shapes(name: str, expected: tuple[int, ...], **arrays) -> None:
    for argument, array in arrays.items():
        if array is not None and jnp.shape(array) != expected:
            raise ValueError(f"{name}: `{argument}` must have the shape {expected}, got {jnp.shape(array)}")


def _count(log_probs, mask):
    """Of the tokens of each sequence that count; 1 where there is none, whose sum 0 is divided by it."""
    counted = jnp.ones(log_probs.shape, bool) if mask is None else mask
    return jnp.maximum(jnp.sum(counted, axis=-1), 1).astype(log_probs.dtype)


def dpo(
    x: Float[Array, "pair=2 *batch tokens d"],
    weight: Float[Array, "d vocabulary"],
    labels: Int[Array, "pair=2 *batch tokens"],
    reference_log_probs: Float[Array, "pair=2 *batch"],
    *,
    mask: Bool[Array, "pair=2 *batch tokens"] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    **head,
) -> Float[Array, "*batch"]:
    """Direct preference optimisation. With h = β (log π(chosen) / π_ref(chosen) − log π(rejected) / π_ref(rejected)):

        loss = −(1 − ε) log σ(h) − ε log σ(−h)

    Args:
        x: hidden states of pairs of completions, the chosen ones first: index 0 along the first axis.
        weight: the vocabulary matrix.
        labels: the token that comes next at each place.
        reference_log_probs: of each completion under the reference policy, summed over its tokens: what
            `token_log_probs(...).sum(-1)` is for the reference model.
        mask: True for the tokens of completions; False for prompts and padding.
        beta: how strongly the policy is held to the reference.
        label_smoothing: ε, the probability that a preference is labelled the wrong way round.
        head: `bias`, `logits_soft_cap`, `axis_name` and `implementation` of `token_log_probs`.

    Returns:
        The loss of each pair.

    Raises:
        ValueError: shapes that do not match, or `label_smoothing` out of its range.

    Sources: Rafailov et al. 2023 (arXiv:2305.18290), equation 7; smoothing, Mitchell, A note on DPO with noisy
    preferences, 2023, equation 3.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"dpo: `label_smoothing` must be at least 0 and less than 1/2, got {label_smoothing}")
    log_probs, _ = _sequence_log_probs(
        "dpo", x, weight, labels, mask, head, pairs=True, reference_log_probs=reference_log_probs
    )
    chosen, rejected = log_probs - reference_log_probs
    h = beta * (chosen - rejected)
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(h) - label_smoothing * jax.nn.log_sigmoid(-h)


def orpo(
    x: Float[Array, "pair=2 *batch tokens d"],
    weight: Float[Array, "d vocabulary"],
    labels: Int[Array, "pair=2 *batch tokens"],
    *,
    mask: Bool[Array, "pair=2 *batch tokens"] | None = None,
    beta: float = 0.1,
    **head,
) -> Float[Array, "*batch"]:
    """Odds ratio preference optimisation. With p the geometric mean of the probabilities of a completion's tokens and
    odds = p / (1 − p):

        loss = −log p(chosen) − β log σ(log odds(chosen) / odds(rejected))

    Args:
        x, weight, labels, mask, head: as of `dpo`.
        beta: the weight of the odds ratio, λ in the paper.

    Returns:
        The loss of each pair.

    Source: Hong, Lee and Thorne 2024 (arXiv:2403.07691), equations 4 to 7.
    """
    log_probs, count = _sequence_log_probs("orpo", x, weight, labels, mask, head, pairs=True)
    mean = log_probs / count
    log_odds = mean - jnp.log(-jnp.expm1(jnp.minimum(mean, -jnp.finfo(mean.dtype).tiny)))
    return -mean[0] - beta * jax.nn.log_sigmoid(log_odds[0] - log_odds[1])


def kto(
    x: Float[Array, "*batch tokens d"],
    weight: Float[Array, "d vocabulary"],
    labels: Int[Array, "*batch tokens"],
    reference_log_probs: Float[Array, "*batch"],
    desirable: Bool[Array, "*batch"],
    *,
    reference_point: Float[Array, "*#batch"] | float,
    mask: Bool[Array, "*batch tokens"] | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    **head,
) -> Float[Array, "*batch"]:
    """Kahneman-Tversky optimisation. With r = log π(y) / π_ref(y) of a completion and z the reference point:

        loss = λ_D (1 − σ(β (r − z))) if the completion is desirable, λ_U (1 − σ(β (z − r))) if not

    Args:
        x, weight, labels, mask, head: as of `dpo`, of completions that are no pairs.
        reference_log_probs: of each completion under the reference policy, summed over its tokens.
        desirable: which completions are.
        reference_point: z, an estimate of KL(π ‖ π_ref): max(0, mean of r) over completions of other prompts in the
            batch. No gradient flows to it.
        beta: how strongly the policy is held to the reference.
        desirable_weight: λ_D.
        undesirable_weight: λ_U.

    Returns:
        The loss of each completion.

    Source: Ethayarajh et al. 2024 (arXiv:2402.01306), equation 8.
    """
    given = {"reference_log_probs": reference_log_probs, "desirable": desirable}
    log_probs, _ = _sequence_log_probs("kto", x, weight, labels, mask, head, pairs=False, **given)
    gain = beta * (log_probs - reference_log_probs - jax.lax.stop_gradient(reference_point))
    return jnp.where(desirable, desirable_weight * jax.nn.sigmoid(-gain), undesirable_weight * jax.nn.sigmoid(gain))


def grpo(
    x: Float[Array, "*batch tokens d"],
    weight: Float[Array, "d vocabulary"],
    labels: Int[Array, "*batch tokens"],
    advantages: Float[Array, "*batch"],
    *,
    old_log_probs: Float[Array, "*batch tokens"] | None = None,
    reference_log_probs: Float[Array, "*batch tokens"] | None = None,
    mask: Bool[Array, "*batch tokens"] | None = None,
    beta: float = 0.04,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    **head,
) -> Float[Array, "*batch"]:
    """Group relative policy optimisation. With ρ = π / π_old of a token and A its completion's advantage:

        loss = −mean over tokens of min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A) − β (π_ref / π − log π_ref / π − 1)

    Args:
        x, weight, labels, mask, head: as of `dpo`, of completions of any number of prompts.
        advantages: of each completion, such as (reward − mean) / standard deviation within those of its prompt.
        old_log_probs: of each token, when the completions were drawn. Default: they were drawn by this very policy, and
            ρ is 1 with the gradient of log π.
        reference_log_probs: of each token under the reference policy; None leaves the divergence from it out.
        beta: the weight of the divergence from the reference policy.
        clip_low: ε_low.
        clip_high: ε_high.

    Returns:
        The loss of each completion, 0 for one of no tokens.

    Sources: Shao et al., DeepSeekMath, 2024 (arXiv:2402.03300), equations 3 and 4; two sides clipped apart, Yu et al.,
    DAPO, 2025 (arXiv:2503.14476), equation 8.
    """
    labels = jnp.asarray(labels)
    _check_shapes("grpo", labels.shape[:-1], advantages=advantages)
    _check_shapes("grpo", labels.shape, old_log_probs=old_log_probs, reference_log_probs=reference_log_probs)
    log_probs = token_log_probs(x, weight, labels, mask=mask, **head)

    def counted(log_ratio):
        return log_ratio if mask is None else jnp.where(mask, log_ratio, 0.0)

    old = jax.lax.stop_gradient(log_probs if old_log_probs is None else old_log_probs)
    ratio = jnp.exp(counted(log_probs - old))
    advantages = advantages[..., None]
    gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages)
    if reference_log_probs is not None:
        log_ratio = counted(reference_log_probs - log_probs)
        gain = gain - beta * (jnp.expm1(log_ratio) - log_ratio)
    return -jnp.sum(counted(gain), axis=-1) / _count(log_probs, mask)
