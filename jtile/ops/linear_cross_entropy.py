"""Cross-entropy of logits x W + b that are never all there: T tokens, d wide, v classes.

Logits in bfloat16 would take 2 T v bytes, and XLA keeps them thrice: for 8192 × 4096 × 128256 it adds 5.9 GiB to the
2.1 GiB of operands and gradients. There an H200 takes 12.5 ms for a product of T × d × v; value and gradients need
three.

Forward. The kernel multiplies a tile of logits and reduces it while it is in registers; what leaves the chip is a
log-sum-exp for each token and 256 classes, 4 T v / 256 bytes: 16 MiB.

Logits formed again in the backward pass: four products. A slab of s classes at a time, the kernel forms its logits and
writes their gradient G, 2 T s bytes, from which dW[:, slab] = xᵀ G is final, and dx += G W[:, slab]ᵀ is summed in
float32, read and written 8 T d bytes for each slab. s is 8,448 classes there, 132 MiB: tiles of G and dW fill the 132
multiprocessors a whole number of times.

Gradients formed in the forward pass: three products. That needs whole rows of logits, so c tokens at a time: logits, G
in their place, 2 c v bytes, dx = G Wᵀ final, and dW += xᵀ G summed in float32, 4 d v bytes, read and written for each c
tokens but the first. c is 4096: 1 GiB, and 2 GiB for the sum, which so few tokens do without. The cotangent of each
token's loss must be known by then, which is why the reduction is part of the op.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct, lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jtile.compiler.primitives import store
from jtile.op import Implementation, TileOp, over_devices
from jtile.ops import softmax_cross_entropy as of_logits
from jtile.ops.products import Part, Tile, dot, on_tiles, tiles
from jtile.ops.softmax_cross_entropy import Options

# Spec. `forward` and `backward` are those of softmax_cross_entropy with the product inside; `gradients` is both, where
# the weight of each token's loss in a sum is known.

forward = TileOp(
    "linear_cross_entropy",
    "x: ... d, weight: d v, labels[v]: ..., bias?: v -> logsumexp lse: ..., picked: ..., total?: ...",
    whole="d",
)
backward = TileOp(
    "linear_cross_entropy_backward",
    "x: ... d, weight: d v, labels[v]: ..., bias?: v, lse: ..., dlse: ..., dpicked?: ..., dtotal?: ... "
    "-> dx: ... d, dweight: d v, dbias?: v",
    whole="d",
)
gradients = TileOp(
    "linear_cross_entropy_gradients",
    "x: ... d, weight: d v, labels[v]: ..., bias?: v, token_weights: ... "
    "-> logsumexp lse: ..., picked: ..., total?: ..., dx: ... d, dweight: d v, dbias?: v",
    whole="d",
)


# Reference: all logits at once.


def all_logits(x, weight, bias):
    logits = dot(x, weight, ((x.ndim - 1,), (0,)), x.dtype)
    return logits if bias is None else logits + bias.astype(jnp.promote_types(bias.dtype, jnp.float32))


def of_operands(dlogits, x, weight, bias, dtype):
    """The gradients of x, in this dtype, of weight and bias."""
    tokens = tuple(range(x.ndim - 1))
    dbias = None if bias is None else jnp.sum(dlogits, tokens, dtype=jnp.promote_types(bias.dtype, jnp.float32))
    dlogits = dlogits.astype(x.dtype)
    dx = dot(dlogits, weight, ((x.ndim - 1,), (1,)), dtype)
    return dx, dot(x, dlogits, (tokens, tokens), weight.dtype), dbias


@forward.reference
def forward_reference(x, weight, labels, bias, *, logits_soft_cap, total):
    logits = all_logits(x, weight, bias)
    return of_logits.forward_reference(logits, labels, logits_soft_cap=logits_soft_cap, total=total)


@backward.reference
def backward_reference(x, weight, labels, bias, lse, *cotangents, logits_soft_cap):
    logits = all_logits(x, weight, bias)
    (dlogits,) = of_logits.backward_reference(logits, labels, lse, *cotangents, logits_soft_cap=logits_soft_cap)
    return of_operands(dlogits, x, weight, bias, jnp.promote_types(x.dtype, jnp.float32))


def _cotangents(options: Options, vocabulary: int, token_weights, lse, picked, total):
    """Of a token's statistics, where the cotangent of its loss is its weight. They depend on the log-sum-exp alone."""
    given = (lse, picked) if total is None else (lse, picked, total)
    _, pull = jax.vjp(lambda lse, picked, total=None: options.nats(vocabulary, lse, picked, total), *given)
    return (*pull(token_weights), None)[:3]


@gradients.reference
def gradients_reference(x, weight, labels, bias, token_weights, *, options, vocabulary):
    cap, total = options.logits_soft_cap, options.label_smoothing > 0
    logits = all_logits(x, weight, bias)
    statistics = of_logits.forward_reference(logits, labels, logits_soft_cap=cap, total=total)
    lse = over_devices(statistics[0], "v", "logsumexp")
    cotangents = _cotangents(options, vocabulary, token_weights, lse, *statistics[1:])
    (dlogits,) = of_logits.backward_reference(logits, labels, lse, *cotangents, logits_soft_cap=cap)
    return (*statistics, *of_operands(dlogits, x, weight, bias, x.dtype))


# Kernels.

SLAB = 33 * 2**21  # logits whose gradients are there at once, when they are formed again
TOKENS = 4096  # whose logits are there at once, when gradients are formed in the forward pass


class BackwardTiles(NamedTuple):
    logits: Tile
    dweight: Tile


@forward.tiles
@gradients.tiles
def forward_tiles(x, weight, *_, **options) -> Iterator[Tile]:
    yield from tiles(len(x), weight.shape[1], x.shape[1], x.dtype)


@backward.tiles
def backward_tiles(x, weight, *_, **options) -> Iterator[BackwardTiles]:
    """One product's tile at a time differs from the untuned one; the tuner puts the best of both together."""
    (rows, d), v = x.shape, weight.shape[1]
    logits, dweight = list(tiles(rows, v, d, x.dtype)), list(tiles(d, v, rows, x.dtype))
    yield from (BackwardTiles(tile, dweight[0]) for tile in logits)
    yield from (BackwardTiles(logits[0], tile) for tile in dweight)


def _whole(n: int, step: int) -> int:
    return pl.cdiv(n, step) * step


def _on_logits(
    name: str, finish: Callable, tile: Tile, x, weight, bias, of_token: list, outputs: list, size: int, start=None
):
    """`finish(logits, columns, of_token, outputs)` on every tile of logits of `size` classes from `start` on, a whole
    number of tiles. `outputs` are pairs of a kind, as below, and a dtype."""
    rows, d = x.shape
    block, lanes, step, *_ = tile
    across = pl.cdiv(size, lanes)
    given = [value for value in of_token if value is not None]

    def of_class(row, column, first):
        return first + column

    def with_bias(logits, place, inputs, outputs):
        columns = of_class(*place) * lanes + lax.broadcasted_iota(jnp.int32, (1, lanes), 1)
        values = iter([ref[...] for ref in inputs])
        of_tokens = [None if value is None else next(values)[:, None] for value in of_token]
        if bias is not None:
            logits = logits + next(values)[None, :].astype(jnp.float32)
        finish(logits, columns, of_tokens, outputs)

    kinds = {  # shape, block and index
        "tile": ((rows, size), (block, lanes), lambda row, column, first: (row, column)),
        "row": ((rows,), (block,), lambda row, column, first: (row,)),
        "part of row": ((across, rows), (None, block), lambda row, column, first: (column, row)),
    }
    return on_tiles(
        name,
        with_bias,
        (rows, size, d),
        tile,
        Part(x, (block, _whole(d, step)), lambda row, column, first: (row, 0)),
        Part(weight, (_whole(d, step), lanes), lambda *place: (0, of_class(*place))),
        (1, 0),
        [
            *(Part(value, *kinds["row"][1:]) for value in given),
            *([] if bias is None else [Part(bias, (lanes,), lambda *place: (of_class(*place),))]),
        ],
        [Part(ShapeDtypeStruct(kinds[kind][0], dtype), *kinds[kind][1:]) for kind, dtype in outputs],
        part=None if start is None else start // lanes,
    )


def _statistics(tile: Tile, x, weight, labels, bias, cap, total: bool, keep: bool):
    """Of each token, as `forward` has them; and its logits, if they are to be kept."""
    v = weight.shape[1]

    def finish(logits, columns, of_token, refs):
        lse_ref, picked_ref, *more = refs
        (label,) = of_token
        if keep:
            more.pop()[...] = logits.astype(x.dtype)
        logits = of_logits._capped(logits, cap)
        here = (label[:, 0] >= columns[0, 0]) & (label[:, 0] < columns[0, 0] + columns.shape[1])
        # Of all programs with this token only the one that has its label writes.
        store(picked_ref, jnp.sum(jnp.where(columns == label, logits, 0.0), axis=1), mask=here)
        inside = columns < v
        for total_ref in more:
            total_ref[...] = jnp.sum(jnp.where(inside, logits, 0.0), axis=1)
        logits = jnp.where(inside, logits, -jnp.inf)
        top = jnp.maximum(jnp.max(logits, axis=1), jnp.finfo(jnp.float32).min)  # keeps -inf - -inf from arising
        lse_ref[...] = top + jnp.log(jnp.sum(jnp.exp(logits - top[:, None]), axis=1))

    part = ("part of row", jnp.float32)
    outputs = [part, ("row", jnp.float32), *[part] * total, *[("tile", x.dtype)] * keep]
    lse, picked, *more = _on_logits("linear_cross_entropy", finish, tile, x, weight, bias, [labels], outputs, v)
    picked = jnp.where(of_logits._inside(labels, v), picked, 0.0)
    sums = jnp.sum(more[0], axis=0) if total else None
    return (jax.nn.logsumexp(lse, axis=0), picked, sums), more[-1] if keep else None


@forward.kernel
def forward_kernel(x, weight, labels, bias, *, tile, logits_soft_cap, total):
    return _statistics(tile, x, weight, labels, bias, logits_soft_cap, total, keep=False)[0]


@backward.kernel
def backward_kernel(x, weight, labels, bias, *of_token, tile, logits_soft_cap):
    (rows, d), v = x.shape, weight.shape[1]
    size = min(v, max(SLAB // rows // 256, 1) * 256)

    def gradient(logits, columns, of_token, outputs):
        dlogits = of_logits._gradient(logits, columns, *of_token, cap=logits_soft_cap)
        outputs[0][...] = dlogits.astype(x.dtype)

    def write(product, place, inputs, outputs):
        outputs[0][...] = product.astype(weight.dtype)

    def add(product, place, inputs, outputs):
        outputs[0][...] = inputs[0][...] + product

    def in_place(dx, dlogits, start, size):
        """dx with a slab's part. Of a slab that begins at a multiple of its size the weight is read where it is."""
        block, lanes, step, *_ = tile.dweight
        whole = Part(dx, (block, lanes), lambda row, column, first: (row, column))
        (dx,) = on_tiles(
            "linear_cross_entropy_dx",
            add,
            (rows, d, size),
            tile.dweight,
            Part(dlogits, (block, _whole(size, step)), lambda row, column, first: (row, 0)),
            Part(weight, (lanes, _whole(size, step)), lambda row, column, first: (column, first)),
            (1, 1),
            [whole],
            [whole],
            part=start // size,
            aliases={0: 0},
            persistent=False,
        )
        return dx

    def by_cublas(dx, dlogits, start, size):
        return dx + dot(dlogits, lax.dynamic_slice_in_dim(weight, start, size, axis=1), ((1,), (1,)), jnp.float32)

    def slab(start, size, sums, add_to):
        dx, dweight, dbias = sums
        (dlogits,) = _on_logits(
            "linear_cross_entropy_dlogits",
            gradient,
            tile.logits,
            x,
            weight,
            bias,
            [labels, *of_token],
            [("tile", x.dtype)],
            size,
            start,
        )
        dx = add_to(dx, dlogits, start, size)
        block, lanes, step, *_ = tile.dweight
        (dweight,) = on_tiles(
            "linear_cross_entropy_dweight",
            write,
            (d, size, rows),
            tile.dweight,
            Part(x, (_whole(rows, step), block), lambda row, column, first: (0, row)),
            Part(dlogits, (_whole(rows, step), lanes), lambda row, column, first: (0, column)),
            (0, 0),
            [Part(dweight, (8, 8), lambda row, column, first: (0, 0))],  # for its memory
            [Part(dweight, (block, lanes), lambda row, column, first: (row, first + column))],
            part=start // lanes,
            aliases={0: 0},
        )
        if bias is not None:
            part = jnp.sum(dlogits, axis=0, dtype=jnp.float32)
            dbias = lax.dynamic_update_slice_in_dim(dbias, part, start, axis=0)
        return dx, dweight, dbias

    dbias = None if bias is None else lax.empty((v,), jnp.float32)
    sums = jnp.zeros(x.shape, jnp.float32), lax.empty(weight.shape, weight.dtype), dbias
    count, rest = divmod(v, size)
    sums = lax.fori_loop(0, count, lambda i, sums: slab(i * size, size, sums, in_place), sums)
    if rest:
        # Not before the others are done: XLA would copy this part of the weight first, and keep it all along.
        start, _ = lax.optimization_barrier((jnp.int32(count * size), sums[1][0, 0]))
        sums = slab(start, rest, sums, by_cublas)
    return sums


@gradients.kernel
def gradients_kernel(x, weight, labels, bias, token_weights, *, tile, options, vocabulary):
    cap, total = options.logits_soft_cap, options.label_smoothing > 0

    def some(sums, x, labels, token_weights):
        statistics, logits = _statistics(tile, x, weight, labels, bias, cap, total, keep=True)
        lse = over_devices(statistics[0], "v", "logsumexp")
        cotangents = _cotangents(options, vocabulary, token_weights, lse, *statistics[1:])
        untuned = next(of_logits.backward_tiles(logits))
        (dlogits,) = of_logits.backward_kernel(
            logits, labels, lse, *cotangents, tile=untuned, overwrite=True, logits_soft_cap=cap
        )
        dx, sums = added(sums, dlogits, x, weight, bias)
        return (*statistics, dx), sums

    results, sums = by_tokens(some, x, labels, token_weights)
    return *results, *finished(sums, weight)


def added(sums, dlogits, x, weight, bias):
    """The gradient of x for some tokens, from that of their logits; and with these tokens' part added the gradients of
    weight and bias, `sums`, which are None before the first."""
    dweight = dot(x, dlogits, ((0,), (0,)), jnp.float32)
    dbias = None if bias is None else jnp.sum(dlogits, axis=0, dtype=jnp.float32)
    sums = (dweight, dbias) if sums is None else jax.tree.map(jnp.add, sums, (dweight, dbias))
    return dot(dlogits, weight, ((1,), (1,)), x.dtype), sums


def finished(sums, weight):
    dweight, dbias = sums
    return dweight.astype(weight.dtype), dbias


def by_tokens(function: Callable, *of_token):
    """`function(sums, *of_token)`, which returns results of each token and new sums, some tokens at a time.

    The first get None for the sums. The last may be zeros that are no tokens.
    """
    rows = len(of_token[0])
    count = pl.cdiv(rows, TOKENS)
    size = rows if count == 1 else _whole(pl.cdiv(rows, count), 8)
    pad = lambda value: jnp.pad(value, [(0, count * size - rows), *[(0, 0)] * (value.ndim - 1)])  # noqa: E731
    values = [value if count * size == rows else pad(value) for value in of_token]

    def some(i, sums):
        return function(sums, *(lax.dynamic_slice_in_dim(value, i * size, size) for value in values))

    def put(results, found, i):
        return jax.tree.map(lambda a, b: lax.dynamic_update_slice_in_dim(a, b, i * size, axis=0), results, found)

    def step(i, carry):
        results, sums = carry
        found, sums = some(i, sums)
        return put(results, found, i), sums

    first, sums = some(0, None)
    if count == 1:
        return first, sums
    results = jax.tree.map(lambda a: lax.empty((count * size, *a.shape[1:]), a.dtype), first)
    # XLA would take a loop of one step apart, and keep the sums twice.
    bound = lax.optimization_barrier(jnp.int32(count))
    results, sums = lax.fori_loop(1, bound, step, (put(results, first, 0), sums))
    return jax.tree.map(lambda a: a[:rows], results), sums


# Derivative.


@forward.transpose
def forward_transpose(operands, results, cotangents, *, total, **options):
    del total  # it has a cotangent or not
    dx, dweight, dbias = backward(*operands, results[0], *cotangents, **options)
    return dx, dweight, None, dbias


def _losses(options: Options, implementation: Implementation, x, weight, labels, bias):
    """Of each token. Its derivative forms the logits again."""
    statistics = forward(x, weight, labels, bias, **options.of_statistics, implementation=implementation)
    return options.loss(labels, options.vocabulary(weight.shape[1]), *statistics)


def _weighted(losses, token_weights):
    return jnp.sum(jnp.where(token_weights == 0, 0.0, token_weights * losses))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _sum_of_losses(options: Options, implementation: Implementation, x, weight, labels, bias, token_weights):
    return _weighted(_losses(options, implementation, x, weight, labels, bias), token_weights)


@functools.partial(_sum_of_losses.defjvp, symbolic_zeros=True)
def _sum_of_losses_jvp(options: Options, implementation: Implementation, primals, tangents):
    """The products of tangents and gradients. Reverse mode multiplies the gradients, which are there, by one number."""
    x, weight, labels, bias, token_weights = primals
    vocabulary = options.vocabulary(weight.shape[1])
    counted = jnp.where(options.ignored(labels), 0.0, token_weights * options.counts(labels, vocabulary))
    *statistics, dx, dweight, dbias = gradients(
        x,
        weight,
        labels,
        bias,
        counted,
        options=options,
        vocabulary=vocabulary,
        split=options.split,
        implementation=implementation,
    )
    losses = options.loss(labels, vocabulary, *statistics)
    dtype = losses.dtype
    losses, dx, dweight, dbias = (
        g if g is None else checkpoint_name(g, f"linear_cross_entropy_{name}")
        for name, g in {"losses": losses, "dx": dx, "dweight": dweight, "dbias": dbias}.items()
    )
    x_dot, weight_dot, _, bias_dot, token_weights_dot = tangents

    def along(*pairs):
        moving = [(g, t) for g, t in pairs if g is not None and not isinstance(t, SymbolicZero)]
        return sum((jnp.sum(g.astype(dtype) * t.astype(dtype)) for g, t in moving), jnp.zeros((), dtype))

    shared = along((dweight, weight_dot), (dbias, bias_dot))
    if options.axis_name is not None:
        shared = lax.psum(shared, options.axis_name)
    return _weighted(losses, token_weights), shared + along((dx, x_dot), (losses, token_weights_dot))


# Public name.


def linear_cross_entropy(
    x: Float[Array, "*tokens d"],
    weight: Float[Array, "d vocabulary"],
    labels: Int[Array, "*tokens"],
    *,
    bias: Float[Array, " vocabulary"] | None = None,
    token_weights: Float[Array, "*tokens"] | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logits_soft_cap: float | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: Implementation = None,
) -> Float[Array, "*tokens"] | Float[Array, ""]:
    """`softmax_cross_entropy(x @ weight + bias, labels)`, with no array of tokens × vocabulary.

    Products and sums are taken in float32 (float64 of float64). Options and loss are those of `softmax_cross_entropy`.

    `token_weights` chooses between two ways to the gradient, since the cotangent of every token's loss must be known to
    form it in the forward pass:

    * without them the result is the loss of each token, and the backward pass forms the logits again, a part of the
      vocabulary at a time. Leanest: beside the gradients it takes one array like `x` in float32 and some 10⁸ logits.
    * with them the result is the sum Σ token_weights · loss, and where it is differentiated, and only there, its
      gradients are formed together with it from the same logits, some thousand tokens at a time. Fastest: three
      products instead of four; it adds the gradient of `weight` in float32. For a mean, weights are 1 / count.

    Both have the same derivatives, in forward mode and of higher order, too.

    Args:
        x: any leading shape, then d: the hidden states of tokens.
        weight: a matrix as of `flax.nnx.Linear`; of an embedding table pass the transpose.
        labels: any integer dtype, from 0 to vocabulary − 1, as in `softmax_cross_entropy`.
        bias: added to the logits.
        token_weights: the weight of each token's loss in a sum. A token of weight 0 counts for nothing, whatever its
            logits are. Differentiable.
        ignore_index: tokens with this label have loss and gradient 0.
        label_smoothing: 0 ≤ ε < 1.
        z_loss: weight of the squared log-sum-exp.
        logits_soft_cap: positive; logits become cap · tanh(logits / cap) first.
        axis_name: inside `jax.shard_map`, the mesh axis or axes that split the vocabulary: `weight` and `bias` are this
            device's parts, `labels` count from the start of the whole. Elsewhere arrays know how they are split.
        implementation: `None`, `"triton"`, `"xla"` or `"interpret"`, see `jtile.TileOp`; `"xla"` keeps all logits.

    Returns:
        The loss of each token in nats with the shape of `labels`, or their weighted sum, a scalar; float32 (float64 for
        float64).

    Raises:
        ValueError: shapes that do not match, `x` that is not floating point or `weight` of another dtype, labels that
            are not integers, or an option out of its range.
        NotImplementedError: the named implementation cannot serve the call.

    Sources: logits formed again by parts, Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024
    (arXiv:2411.09009), sections 4.2 and 4.3; gradients in the forward pass, Hsu et al., Liger Kernel, 2024
    (arXiv:2410.10989), section 3.2. For the options see `softmax_cross_entropy`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jtile
        >>> x, weight, labels = jnp.ones((4, 8)), jnp.zeros((8, 100)), jnp.arange(4)
        >>> print(jnp.exp(jtile.linear_cross_entropy(x, weight, labels)).round())
        [100. 100. 100. 100.]
        >>> mean = lambda x, weight: jtile.linear_cross_entropy(x, weight, labels, token_weights=jnp.full(4, 1 / 4))
        >>> loss, (dx, dweight) = jax.value_and_grad(mean, argnums=(0, 1))(x, weight)
    """
    x, weight, labels = jnp.asarray(x), jnp.asarray(weight), jnp.asarray(labels)
    if not jnp.issubdtype(x.dtype, jnp.floating) or weight.dtype != x.dtype:
        raise ValueError(
            "linear_cross_entropy: `x` and `weight` must have one floating-point dtype, in which they are multiplied, "
            f"got {x.dtype} and {weight.dtype}; cast them"
        )
    if weight.shape[-1:] == (0,):
        raise ValueError(f"linear_cross_entropy: the vocabulary must not be empty, but `weight` has {weight.shape}")
    options = Options.checked(
        "linear_cross_entropy", labels, ignore_index, label_smoothing, z_loss, logits_soft_cap, axis_name
    )
    labels = labels.astype(jnp.int32)
    if token_weights is None:
        return _losses(options, implementation, x, weight, labels, bias)
    token_weights = jnp.asarray(token_weights, jnp.float64 if x.dtype.itemsize == 8 else jnp.float32)
    if token_weights.shape != labels.shape:
        raise ValueError(
            f"linear_cross_entropy: `token_weights` must have the shape of `labels`, {labels.shape}, got "
            f"{token_weights.shape}"
        )
    return _sum_of_losses(options, implementation, x, weight, labels, bias, token_weights)
