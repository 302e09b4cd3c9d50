"""Softmax cross-entropy of integer labels: one pass over the logits forward, one more for their gradient.

With x the logits of a token after the soft cap, v of them, lse = log Σ exp(x) and ε the label smoothing:

    loss = (1 − ε) (lse − x[label]) + ε (lse − mean(x)) + z · lse²
    dloss/dx = (1 + 2 z · lse) exp(x − lse) − (1 − ε) onehot(label) − ε / v
"""

import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jtile.compiler.params import CompilerParams
from jtile.op import Implementation, TileOp

# Spec.

forward = TileOp("softmax_cross_entropy", "logits: ... v, labels: ... -> loss: ...; lse: ...", whole="v")
backward = TileOp(
    "softmax_cross_entropy_backward",
    "logits: ... v, labels: ..., lse: ..., dloss: ... -> dlogits: ... v",
    whole="v",
)


class Options(NamedTuple):
    ignore_index: int | None
    label_smoothing: float
    z_loss: float
    logits_soft_cap: float | None


# What reference and kernel share: a token's loss from its log-sum-exp, and the gradient of any of its logits.


def _capped(logits, cap):
    x = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return x if cap is None else cap * jnp.tanh(x / cap)


def _loss(logits, labels, lse, mean, options: Options):
    def cost(x):  # lse - x; a logit of -inf has probability 0, even beside nothing else
        return jnp.where(x == -jnp.inf, jnp.inf, lse - x)

    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1, mode="clip")[..., 0]
    loss = cost(_capped(picked, options.logits_soft_cap))
    if options.label_smoothing:
        loss = (1 - options.label_smoothing) * loss + options.label_smoothing * cost(mean)
    if options.z_loss:
        loss = loss + options.z_loss * jnp.square(lse)
    loss = jnp.where((labels >= 0) & (labels < logits.shape[-1]), loss, jnp.nan)
    return loss if options.ignore_index is None else jnp.where(labels == options.ignore_index, 0.0, loss)


def _gradient(logits, columns, labels, lse, dloss, v, options: Options):
    """Of the logits in some columns. Labels, lse and dloss have a last dimension of 1."""
    dloss = jnp.where((labels >= 0) & (labels < v), dloss, jnp.nan)
    if options.ignore_index is not None:
        dloss = jnp.where(labels == options.ignore_index, 0.0, dloss)
    lse = jnp.where(lse == -jnp.inf, 0.0, lse)  # without any probability exp(x - lse) is 0, and not 0 / 0
    x = _capped(logits, options.logits_soft_cap)
    dx = jnp.exp(x - lse)
    if options.z_loss:
        dx = dx * (1 + 2 * options.z_loss * lse)
    dx = dx - jnp.where(columns == labels, 1 - options.label_smoothing, 0.0)
    if options.label_smoothing:
        dx = dx - options.label_smoothing / v
    if options.logits_soft_cap is not None:
        dx = dx * (1 - jnp.square(x / options.logits_soft_cap))
    # A token that counts for nothing has no gradient, whatever its logits are.
    return jnp.where(dloss == 0, 0.0, dx * dloss).astype(logits.dtype)


# Reference.


@forward.reference
def forward_reference(logits, labels, *, options):
    x = _capped(logits, options.logits_soft_cap)
    lse = jax.nn.logsumexp(x, axis=-1)
    return _loss(logits, labels, lse, jnp.mean(x, axis=-1), options), lse


@backward.reference
def backward_reference(logits, labels, lse, dloss, *, options):
    v = logits.shape[-1]
    columns = jnp.arange(v, dtype=labels.dtype)
    return (_gradient(logits, columns, labels[..., None], lse[..., None], dloss[..., None], v, options),)


# Kernel. Blocks are read with several loads of 16 bytes a thread. Where tokens are fewer than a GPU has room for, the
# forward pass splits the vocabulary too, and the parts' log-sum-exps are put together at the end.

BLOCK = 4096  # logits that a program reads at a time
PROGRAMS = 1056  # enough to fill the largest chips, eight for each multiprocessor


def _tile(rows: int, v: int) -> tuple[int, int]:
    lanes = min(BLOCK, pl.next_power_of_2(v))
    return min(BLOCK // lanes, pl.next_power_of_2(rows)), lanes


@forward.kernel
def forward_kernel(logits, labels, *, options):
    rows, v = logits.shape
    block, lanes = _tile(rows, v)
    across = min(lanes, 1024)
    steps = pl.cdiv(pl.cdiv(v, lanes), pl.cdiv(PROGRAMS, pl.cdiv(rows, block)))
    splits = pl.cdiv(v, steps * lanes)

    def softmax_cross_entropy_kernel(logits_ref, lse_ref, *sum_refs):
        first = pl.program_id(1) * (steps * lanes)
        columns = jax.lax.broadcasted_iota(jnp.int32, (1, lanes), 1)

        # Lanes keep a maximum and Σ exp(x - maximum) of their own, so that threads meet only at the end. The least
        # finite number in place of -inf keeps -inf - -inf from arising.
        def step(i, carry):
            top, total, *sums = carry
            x = _capped(logits_ref[:, pl.ds(i * lanes, lanes)], options.logits_soft_cap)
            inside = first + i * lanes + columns < v
            sums = [s + jnp.sum(x.reshape(block, -1, across), axis=1) for s in sums]  # lanes outside are 0
            x = jnp.where(inside, x, -jnp.inf).reshape(block, -1, across)
            new_top = jnp.maximum(top, jnp.max(x, axis=1))
            total = total * jnp.exp(top - new_top) + jnp.sum(jnp.exp(x - new_top[:, None, :]), axis=1)
            return new_top, total, *sums

        zeros = jnp.zeros((block, across), jnp.float32)
        start = zeros + jnp.finfo(jnp.float32).min, zeros, *[zeros for _ in sum_refs]
        top, total, *sums = jax.lax.fori_loop(0, steps, step, start)
        peak = jnp.max(top, axis=1)
        lse_ref[...] = peak + jnp.log(jnp.sum(total * jnp.exp(top - peak[:, None]), axis=1))
        for sum_ref, s in zip(sum_refs, sums, strict=True):
            sum_ref[...] = jnp.sum(s, axis=1)

    count = 2 if options.label_smoothing else 1
    lse, *sums = pl.pallas_call(
        softmax_cross_entropy_kernel,
        grid=(pl.cdiv(rows, block), splits),
        in_specs=[pl.BlockSpec((block, steps * lanes), lambda i, j: (i, j))],
        out_specs=[pl.BlockSpec((None, block), lambda i, j: (j, i))] * count,
        out_shape=[jax.ShapeDtypeStruct((splits, rows), jnp.float32)] * count,
        compiler_params=CompilerParams(num_warps=4, num_stages=1),
        name="softmax_cross_entropy",
    )(logits)
    lse = jax.nn.logsumexp(lse, axis=0)
    mean = jnp.sum(sums[0], axis=0) / v if sums else None
    return _loss(logits, labels, lse, mean, options), lse


@backward.kernel
def backward_kernel(logits, labels, lse, dloss, *, options):
    rows, v = logits.shape
    block, lanes = _tile(rows, v)

    def softmax_cross_entropy_backward_kernel(logits_ref, labels_ref, lse_ref, dloss_ref, dlogits_ref):
        columns = pl.program_id(0) * lanes + jax.lax.broadcasted_iota(jnp.int32, (1, lanes), 1)
        row = lambda ref: ref[...][:, None]  # noqa: E731
        dlogits_ref[...] = _gradient(
            logits_ref[...], columns, row(labels_ref), row(lse_ref), row(dloss_ref), v, options
        )

    tile = pl.BlockSpec((block, lanes), lambda j, i: (i, j))
    row = pl.BlockSpec((block,), lambda j, i: (i,))
    out = pl.pallas_call(
        softmax_cross_entropy_backward_kernel,
        grid=(pl.cdiv(v, lanes), pl.cdiv(rows, block)),  # neighbouring programs read neighbouring logits
        in_specs=[tile, row, row, row],
        out_specs=[tile],
        out_shape=[logits],
        compiler_params=CompilerParams(num_warps=4, num_stages=1),
        name="softmax_cross_entropy_backward",
    )(logits, labels, lse, dloss)
    return tuple(out)


# Derivative.


@forward.transpose
def forward_transpose(operands, results, cotangents, **options):
    (dlogits,) = backward(*operands, results[1], cotangents[0], **options)
    return dlogits, None


# Public name.


def softmax_cross_entropy(
    logits: Float[Array, "*tokens vocabulary"],
    labels: Int[Array, "*tokens"],
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logits_soft_cap: float | None = None,
    implementation: Implementation = None,
) -> Float[Array, "*tokens"]:
    """Cross-entropy in nats between the softmax of logits and integer labels, one number a token.

    With x the logits of a token after the soft cap, v of them, lse = log Σ exp(x) and ε the label smoothing:

        loss = (1 − ε) · (lse − x[label]) + ε · (lse − mean(x)) + z_loss · lse²

    Sums are taken in float32 (float64 for float64 logits). The forward pass reads the logits once and writes nothing of
    their size; the gradient reads them once more and has their dtype.

    A logit of −inf is an entry masked out of the vocabulary. Its probability is 0, and so is its gradient but for the
    label's and smoothing's share, which stays finite; the loss is +inf where it is the label, where ε > 0 averages over
    it, and where all entries are masked. The soft cap makes −inf a finite −`logits_soft_cap`.

    A token whose loss has a zero cotangent gets a zero gradient even where its logits are not finite.

    Args:
        logits: any leading shape, then the vocabulary, of any size from 1.
        labels: any integer dtype, from 0 to v − 1. Another label, but for `ignore_index`, makes the token's loss and
            gradient NaN.
        ignore_index: tokens with this label, which may lie outside of the vocabulary, have loss and gradient 0.
        label_smoothing: ε, the share of the target that is spread evenly over the vocabulary: 0 ≤ ε < 1.
        z_loss: weight of the squared log-sum-exp, which keeps the logits from drifting.
        logits_soft_cap: positive; logits become cap · tanh(logits / cap) first.
        implementation: `None`, `"triton"`, `"xla"` or `"interpret"`, see `jtile.TileOp`.

    Returns:
        The loss of each token, float32 (float64 for float64 logits), with the shape of `labels`.

    Raises:
        ValueError: shapes that do not match, logits that are not floating point, labels that are not integers, or an
            option out of its range.
        NotImplementedError: the named implementation cannot serve the call.

    Sources: label smoothing, Szegedy et al. 2016 (arXiv:1512.00567), section 7; z-loss, Chowdhery et al. 2022
    (arXiv:2204.02311), section 5; soft cap, Gemma 2, 2024 (arXiv:2408.00118), section 2; the running maximum,
    Milakov and Gimelshein 2018 (arXiv:1805.02867), section 3.

    Example:
        >>> import jax.numpy as jnp
        >>> import jtile
        >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
        >>> nats = jtile.softmax_cross_entropy(logits, jnp.array([1, -100]), ignore_index=-100)
        >>> print((nats / jnp.log(2.0)).round())
        [2. 0.]
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"softmax_cross_entropy: `logits` must be floating point, got {logits.dtype}; cast them")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"softmax_cross_entropy: `labels` must be integers, a class for each token, got {labels.dtype}; of one-hot "
            "labels pass the argmax"
        )
    if logits.shape[-1:] == (0,):
        raise ValueError(f"softmax_cross_entropy: the vocabulary must not be empty, but `logits` has {logits.shape}")
    options = Options(
        None if ignore_index is None else operator.index(ignore_index),
        _number("label_smoothing", label_smoothing, "at least 0 and less than 1", lambda x: 0 <= x < 1),
        _number("z_loss", z_loss, "at least 0 and finite", lambda x: 0 <= x < math.inf),
        logits_soft_cap
        if logits_soft_cap is None
        else _number("logits_soft_cap", logits_soft_cap, "positive and finite, or None", lambda x: 0 < x < math.inf),
    )
    loss, _ = forward(logits, labels.astype(jnp.int32), options=options, implementation=implementation)
    return loss


def _number(name: str, value: float, rule: str, holds: Callable[[float], bool]) -> float:
    if isinstance(value, jax.core.Tracer) or not holds(value):
        raise ValueError(f"softmax_cross_entropy: `{name}` must be {rule}, and known when tracing; got {value}")
    return float(value)
