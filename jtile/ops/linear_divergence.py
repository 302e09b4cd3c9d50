"""Divergence of a student's distribution over a vocabulary from a teacher's, from the hidden states of both.

With a and b the logarithms of the student's and the teacher's probabilities of a class, every divergence here is a sum
Σ f(a, b) over the vocabulary. Its gradient by the student's logits is f' − exp(a) Σ f', f' being the derivative by a.
Both sides' logits are there for some tokens at a time, and formed again in the backward pass.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from jtile.op import TileOp, over_devices
from jtile.ops.linear_cross_entropy import added, all_logits, by_tokens, finished, of_operands

Kind = Literal["forward", "reverse", "jensen_shannon"]

# Spec. The teacher is fixed: it has no gradient.

_OPERANDS = "x: ... d, weight: d v, bias?: v, teacher_x: ... e, teacher_weight: e v, teacher_bias?: v"
forward = TileOp(
    "linear_divergence",
    f"{_OPERANDS} -> divergence: ...",
    whole="d e",
)
backward = TileOp(
    "linear_divergence_backward",
    f"{_OPERANDS}, ddivergence: ... -> dx: ... d, dweight: d v, dbias?: v",
    whole="d e",
)


# What is summed, and its derivative by the first argument.


def _times(probability, x):
    """What is improbable counts for nothing, even where the logarithm of its probability is −inf."""
    return jnp.where(probability == 0, 0.0, probability * x)


def _term(kind: Kind, beta: float) -> Callable:
    def forward(a, b):
        return _times(jnp.exp(b), b - a)

    def reverse(a, b):
        return _times(jnp.exp(a), a - b)

    def jensen_shannon(a, b):
        mixed = jnp.logaddexp(jnp.log1p(-beta) + a, jnp.log(beta) + b)
        return beta * _times(jnp.exp(b), b - mixed) + (1 - beta) * _times(jnp.exp(a), a - mixed)

    return {"forward": forward, "reverse": reverse, "jensen_shannon": jensen_shannon}[kind]


def _log_probs(logits, temperature):
    x = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature
    return x - over_devices(jax.nn.logsumexp(x, axis=-1), "v", "logsumexp")[..., None]


def _divergence(logits, teacher_logits, *, kind, beta, temperature):
    a, b = _log_probs(logits, temperature), _log_probs(teacher_logits, temperature)
    return jnp.sum(_term(kind, beta)(a, b), axis=-1)


def _gradient(logits, teacher_logits, ddivergence, *, kind, beta, temperature):
    """Of the student's logits."""
    a, b = _log_probs(logits, temperature), _log_probs(teacher_logits, temperature)
    _, slopes = jax.jvp(lambda a: _term(kind, beta)(a, b), [a], [jnp.ones_like(a)])
    slope = over_devices(jnp.sum(slopes, axis=-1), "v")
    scale = (ddivergence / temperature)[..., None]
    dlogits = scale * (slopes - jnp.exp(a) * slope[..., None])
    return jnp.where(scale == 0, 0.0, dlogits)  # a token that counts for nothing has no gradient


# Reference.


@forward.reference
def forward_reference(x, weight, bias, teacher_x, teacher_weight, teacher_bias, *, kind, beta, temperature):
    logits = all_logits(x, weight, bias), all_logits(teacher_x, teacher_weight, teacher_bias)
    return (_divergence(*logits, kind=kind, beta=beta, temperature=temperature),)


@backward.reference
def backward_reference(
    x, weight, bias, teacher_x, teacher_weight, teacher_bias, ddivergence, *, kind, beta, temperature
):
    logits = all_logits(x, weight, bias), all_logits(teacher_x, teacher_weight, teacher_bias)
    dlogits = _gradient(*logits, ddivergence, kind=kind, beta=beta, temperature=temperature)
    return of_operands(dlogits, x, weight, bias, x.dtype)


# Kernel: the same some tokens at a time. XLA fuses what is done to logits as well as can be.


@forward.kernel
def forward_kernel(x, weight, bias, teacher_x, teacher_weight, teacher_bias, **options):
    def some(_, x, teacher_x):
        return forward_reference(x, weight, bias, teacher_x, teacher_weight, teacher_bias, **options), None

    return by_tokens(some, x, teacher_x)[0]


@backward.kernel
def backward_kernel(x, weight, bias, teacher_x, teacher_weight, teacher_bias, ddivergence, **options):
    def some(sums, x, teacher_x, ddivergence):
        logits = all_logits(x, weight, bias), all_logits(teacher_x, teacher_weight, teacher_bias)
        return added(sums, _gradient(*logits, ddivergence, **options).astype(x.dtype), x, weight, bias)

    dx, sums = by_tokens(some, x, teacher_x, ddivergence)
    return dx, *finished(sums, weight)


# Derivative.


@forward.transpose
def forward_transpose(operands, results, cotangents, **options):
    del results
    return *backward(*operands, *cotangents, **options), None, None, None
