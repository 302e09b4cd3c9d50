"""Softmax cross-entropy of integer labels: one pass over the logits forward, one more for their gradient.

With x the logits of a token after the soft cap, v of them, lse = log Σ exp(x) and ε the label smoothing:

    loss = (1 − ε) (lse − x[label]) + ε (lse − Σ x / v) + z · lse²

The kernels compute the statistics lse, x[label] and Σ x, and from their cotangents the gradient of a logit:

    dx = dlse · exp(x − lse) + dpicked · onehot(label) + dtotal

Devices that share out the vocabulary so exchange a token's statistics, and for its gradient nothing.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jtile.compiler.params import CompilerParams
from jtile.compiler.primitives import approx_exp2
from jtile.op import Implementation, TileOp, check_known
from jtile.ops.unaligned import WIDEST_LOAD, Row, elementwise, unaligned

# Spec. `total` is a result only where it is asked for. A label outside of the vocabulary picks 0.

forward = TileOp(
    "softmax_cross_entropy", "logits: ... v, labels[v]: ... -> logsumexp lse: ..., picked: ..., total?: ..."
)
backward = TileOp(
    "softmax_cross_entropy_backward",
    "logits: ... v, labels[v]: ..., lse: ..., dlse: ..., dpicked?: ..., dtotal?: ... -> dlogits: ... v",
)


# What reference and kernel share: a token's logit at its label, and the gradient of any of its logits.


def _capped(logits, cap):
    x = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return x if cap is None else cap * jnp.tanh(x / cap)


def _inside(labels, v):
    return (labels >= 0) & (labels < v)


def _picked(logits, labels, cap):
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1, mode="clip")[..., 0]
    return jnp.where(_inside(labels, logits.shape[-1]), _capped(picked, cap), 0.0)


def _gradient(logits, columns, labels, lse, dlse, dpicked, dtotal, *, cap, exp=jnp.exp):
    """Of the logits in some columns. What there is one of for a token has a last dimension of 1."""
    x = _capped(logits, cap)
    lse = jnp.where(lse == -jnp.inf, 0.0, lse)  # without any probability exp(x - lse) is 0, and not 0 / 0
    counts = dlse != 0
    for cotangent in dpicked, dtotal:
        counts = counts if cotangent is None else counts | (cotangent != 0)
    # A token that counts for nothing has no gradient, whatever its logits are.
    dx = dlse * exp(jnp.where(counts, x - lse, -jnp.inf))
    if dpicked is not None:
        dx = dx + jnp.where(columns == labels, dpicked, 0.0)
    if dtotal is not None:
        dx = dx + dtotal
    if cap is not None:
        dx = jnp.where(counts, dx * (1 - jnp.square(x / cap)), 0.0)
    return dx.astype(logits.dtype)


# Reference.


@forward.reference
def forward_reference(logits, labels, *, logits_soft_cap, total):
    x = _capped(logits, logits_soft_cap)
    return jax.nn.logsumexp(x, axis=-1), _picked(logits, labels, logits_soft_cap), jnp.sum(x, -1) if total else None


@backward.reference
def backward_reference(logits, *of_token, logits_soft_cap):
    columns = jnp.arange(logits.shape[-1])
    return (_gradient(logits, columns, *(None if x is None else x[..., None] for x in of_token), cap=logits_soft_cap),)


# Kernel. Blocks are read with several loads of 16 bytes a thread. Where tokens are fewer than a GPU has room for, the
# forward pass splits the vocabulary too, and the parts' log-sum-exps are put together at the end.

PROGRAMS = 1056  # enough to fill the largest chips, eight for each multiprocessor
LOG2E = math.log2(math.e)


def _exp(x):
    return approx_exp2(x * LOG2E)


class Tile(NamedTuple):
    """The logits that a program reads at a time."""

    rows: int
    lanes: int
    num_warps: int


def _tiles(logits, sizes: Iterable[tuple[int, int]]) -> Iterator[Tile]:
    rows, v = logits.shape
    for size, num_warps in sizes:
        lanes = min(size, pl.next_power_of_2(v))
        yield Tile(min(size // lanes, pl.next_power_of_2(rows)), lanes, num_warps)


@forward.tiles
def forward_tiles(logits, *rest, **options):
    return _tiles(logits, ((8192, 8), (4096, 8), (4096, 4), (2048, 4), (8192, 4), (8192, 16), (16384, 16)))


@backward.tiles
def backward_tiles(logits, *rest, **options):
    return _tiles(logits, ((2048, 4), (4096, 4), (4096, 8), (2048, 2), (1024, 4)))


@forward.kernel
def forward_kernel(logits, labels, *, tile, logits_soft_cap, total):
    rows, v = logits.shape
    block, lanes, num_warps = tile
    shifted = block == 1 and unaligned(logits, lanes)
    near = WIDEST_LOAD // logits.dtype.itemsize
    parts = Row.parts(v, lanes, logits.dtype) if shifted else pl.cdiv(v, lanes)
    steps = pl.cdiv(parts, pl.cdiv(PROGRAMS, pl.cdiv(rows, block)))
    splits = pl.cdiv(parts, steps)
    # Each thread has a maximum and a sum of its own.
    threads = min(lanes, max(1, 32 * num_warps // block))
    of_threads = block, lanes // threads // min(near, lanes // threads), threads, min(near, lanes // threads)

    def softmax_cross_entropy_kernel(logits_ref, lse_ref, *sum_refs):
        first = pl.program_id(1) * steps
        columns = jax.lax.broadcasted_iota(jnp.int32, (1, lanes), 1)
        row = Row(pl.program_id(0), v, lanes, logits.dtype)

        # The least finite number in place of -inf keeps -inf - -inf from arising.
        def step(i, carry):
            top, scaled, *sums = carry
            if shifted:
                x, inside = row.read(logits_ref, first + i)
            else:
                x, inside = logits_ref[:, pl.ds(i * lanes, lanes)], (first + i) * lanes + columns < v
            x = _capped(x, logits_soft_cap)
            sums = [s + jnp.sum(jnp.where(inside, x, 0.0).reshape(of_threads), axis=(1, 3)) for s in sums]
            x = jnp.where(inside, x, -jnp.inf).reshape(of_threads)
            new_top = jnp.maximum(top, jnp.max(x, axis=(1, 3)))
            terms = approx_exp2((x - new_top[:, None, :, None]) * LOG2E)
            scaled = scaled * approx_exp2((top - new_top) * LOG2E) + jnp.sum(terms, axis=(1, 3))
            return new_top, scaled, *sums

        zeros = jnp.zeros((block, threads), jnp.float32)
        carry = zeros + jnp.finfo(jnp.float32).min, zeros, *[zeros for _ in sum_refs]
        # In steps inside of a row the compiler sees that nothing is to be masked.
        low, high = (int(shifted), v // lanes) if splits == 1 else (0, steps)
        for i in range(low):
            carry = step(i, carry)
        carry = jax.lax.fori_loop(low, high, step, carry)
        for i in range(max(low, high), steps):
            carry = step(i, carry)
        top, scaled, *sums = carry
        peak = jnp.max(top, axis=1)
        lse_ref[...] = peak + jnp.log(jnp.sum(scaled * jnp.exp(top - peak[:, None]), axis=1))
        for sum_ref, s in zip(sum_refs, sums, strict=True):
            sum_ref[...] = jnp.sum(s, axis=1)

    count = 2 if total else 1
    spec = pl.BlockSpec((block, steps * lanes), lambda i, j: (i, j))
    lse, *sums = pl.pallas_call(
        softmax_cross_entropy_kernel,
        grid=(pl.cdiv(rows, block), splits),
        in_specs=[Row.spec(logits, lanes) if shifted else spec],
        out_specs=[pl.BlockSpec((None, block), lambda i, j: (j, i))] * count,
        out_shape=[jax.ShapeDtypeStruct((splits, rows), jnp.float32)] * count,
        compiler_params=CompilerParams(num_warps=num_warps, num_stages=1),
        name="softmax_cross_entropy",
    )(logits.reshape(1, -1) if shifted else logits)
    lse = jax.nn.logsumexp(lse, axis=0)
    return lse, _picked(logits, labels, logits_soft_cap), jnp.sum(sums[0], axis=0) if total else None


backward.overwrites = "logits"


@backward.kernel
def backward_kernel(logits, labels, lse, dlse, dpicked, dtotal, *, tile, overwrite=False, logits_soft_cap):
    rows, v = logits.shape
    block, lanes, num_warps = tile
    of_token = [labels, lse, dlse, dpicked, dtotal]
    given = [x for x in of_token if x is not None]

    def gradient(columns, numbers, x):
        values = iter(numbers)
        of_row = [None if x is None else next(values) for x in of_token]
        return _gradient(x, columns, *of_row, cap=logits_soft_cap, exp=_exp)

    if unaligned(logits, lanes):
        name = "softmax_cross_entropy_backward"
        return (
            elementwise(gradient, [logits], given, lanes=lanes, num_warps=num_warps, name=name, overwrite=overwrite),
        )

    def softmax_cross_entropy_backward_kernel(logits_ref, *refs):
        *of_token_refs, dlogits_ref = refs
        columns = pl.program_id(0) * lanes + jax.lax.broadcasted_iota(jnp.int32, (1, lanes), 1)
        dlogits_ref[...] = gradient(columns, [ref[...][:, None] for ref in of_token_refs], logits_ref[...])

    tile = pl.BlockSpec((block, lanes), lambda j, i: (i, j))
    row = pl.BlockSpec((block,), lambda j, i: (i,))
    out = pl.pallas_call(
        softmax_cross_entropy_backward_kernel,
        grid=(pl.cdiv(v, lanes), pl.cdiv(rows, block)),  # neighbouring programs read neighbouring logits
        in_specs=[tile, *[row] * len(given)],
        out_specs=[tile],
        out_shape=[logits],
        input_output_aliases={0: 0} if overwrite else {},  # XLA copies logits that are needed afterwards
        compiler_params=CompilerParams(num_warps=num_warps, num_stages=1),
        name="softmax_cross_entropy_backward",
    )(logits, *given)
    return tuple(out)


# Derivative.


@forward.transpose
def forward_transpose(operands, results, cotangents, *, total, **options):
    del total  # it has a cotangent or not
    (dlogits,) = backward(*operands, results[0], *cotangents, **options)
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
    axis_name: str | tuple[str, ...] | None = None,
    implementation: Implementation = None,
) -> Float[Array, "*tokens"]:
    """Cross-entropy in nats between the softmax of logits and integer labels, one number a token.

    With x the logits of a token after the soft cap, v of them, lse = log Σ exp(x) and ε the label smoothing:

        loss = (1 − ε) · (lse − x[label]) + ε · (lse − mean(x)) + z_loss · lse²

    Sums are taken in float32 (float64 for float64 logits). The forward pass reads the logits once and writes nothing of
    their size; the gradient reads them once more, has their dtype, and takes their memory where nobody needs them
    afterwards: where they are computed in the same program, or donated to it. Logits that the caller keeps XLA copies
    first, which is one more pass.

    A logit of −inf is an entry masked out of the vocabulary. Its probability is 0, and so is its gradient but for the
    label's and smoothing's share, which stays finite; the loss is +inf where it is the label, where ε > 0 averages over
    it, and where all entries are masked. The soft cap makes −inf a finite −`logits_soft_cap`.

    A token whose loss has a zero cotangent gets a zero gradient even where its logits are not finite.

    Logits may be split over devices along the vocabulary, too: for each token devices then exchange two numbers, three
    with label smoothing, and none for the gradient. (As many again in `jax.shard_map(check_vma=False)`: there a
    cotangent is the sum of what devices have of it, since JAX does not know whether they use the loss alike.)

    Args:
        logits: any leading shape, then the vocabulary, of any size from 1.
        labels: any integer dtype, from 0 to v − 1. Another label, but for `ignore_index`, makes the token's loss and
            gradient NaN.
        ignore_index: tokens with this label, which may lie outside of the vocabulary, have loss and gradient 0.
        label_smoothing: ε, the share of the target that is spread evenly over the vocabulary: 0 ≤ ε < 1.
        z_loss: weight of the squared log-sum-exp, which keeps the logits from drifting.
        logits_soft_cap: positive; logits become cap · tanh(logits / cap) first.
        axis_name: inside `jax.shard_map`, the mesh axis or axes that split the vocabulary: `logits` is this device's
            part of it, `labels` count from the start of the whole. Elsewhere arrays know how they are split.
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
    if logits.shape[-1:] == (0,):
        raise ValueError(f"softmax_cross_entropy: the vocabulary must not be empty, but `logits` has {logits.shape}")
    options = Options.checked(
        "softmax_cross_entropy", labels, ignore_index, label_smoothing, z_loss, logits_soft_cap, axis_name
    )
    labels = labels.astype(jnp.int32)
    statistics = forward(logits, labels, **options.of_statistics, implementation=implementation)
    return options.loss(labels, options.vocabulary(logits.shape[-1]), *statistics)


# From a token's statistics to its loss, for every op that computes them.


@dataclasses.dataclass(frozen=True)
class Options:
    """What `softmax_cross_entropy` takes beside arrays, checked."""

    ignore_index: int | None
    label_smoothing: float
    z_loss: float
    logits_soft_cap: float | None
    axis_name: str | tuple[str, ...] | None

    @classmethod
    def checked(cls, op: str, labels, ignore_index, label_smoothing, z_loss, logits_soft_cap, axis_name) -> "Options":
        check_known(op, ignore_index=ignore_index, axis_name=axis_name)
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(
                f"{op}: `labels` must be integers, a class for each token, got {labels.dtype}; of one-hot labels pass "
                "the argmax"
            )

        def number(name: str, value: float, rule: str, holds: Callable[[float], bool]) -> float:
            if isinstance(value, jax.core.Tracer) or not holds(value):
                raise ValueError(f"{op}: `{name}` must be {rule}, and known when tracing; got {value}")
            return float(value)

        cap = logits_soft_cap
        return cls(
            None if ignore_index is None else operator.index(ignore_index),
            number("label_smoothing", label_smoothing, "at least 0 and less than 1", lambda x: 0 <= x < 1),
            number("z_loss", z_loss, "at least 0 and finite", lambda x: 0 <= x < math.inf),
            None
            if cap is None
            else number("logits_soft_cap", cap, "positive and finite, or None", lambda x: 0 < x < math.inf),
            axis_name,
        )

    @property
    def split(self) -> dict[str, str | tuple[str, ...]]:
        return {} if self.axis_name is None else {"v": self.axis_name}

    @property
    def of_statistics(self) -> dict[str, Any]:
        """What `forward` needs to know of them."""
        return {
            "logits_soft_cap": self.logits_soft_cap,
            "total": self.label_smoothing > 0,
            "split": self.split,
        }

    def vocabulary(self, part: int) -> int:
        """The size of the whole vocabulary, from that of a device's part."""
        return part * (1 if self.axis_name is None else jax.lax.axis_size(self.axis_name))

    def ignored(self, labels):
        return jnp.zeros(labels.shape, bool) if self.ignore_index is None else labels == self.ignore_index

    def counts(self, labels, v: int):
        """What a token's loss is multiplied by. A factor rather than `where`: the gradient, too, is not a number."""
        return jnp.where(_inside(labels, v) | self.ignored(labels), 1.0, jnp.nan)

    def nats(self, v: int, lse, picked, total):
        # A logit of -inf costs infinitely much, also where there is no other, and where -inf - -inf would be no number.
        top = jnp.where(lse == -jnp.inf, 0.0, lse)
        loss = top - picked
        if total is not None:
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * (top - total / v)
        if self.z_loss:
            loss = loss + self.z_loss * jnp.square(jnp.where(jnp.isfinite(lse), lse, 0.0))
        return loss

    def loss(self, labels, v: int, lse, picked, total):
        loss = self.nats(v, lse, picked, total) * self.counts(labels, v)
        return jnp.where(self.ignored(labels), 0.0, loss)
