"""The meaning of attention: the whole score matrix, in memory."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jtile.ops.attention.variant import FLOOR, LOG2_E, Place, Variant, first_query, over, with_slope
from jtile.ops.random_bits import COLUMNS


def einsum(subscripts, a, b):
    """Operands of one dtype, summed in float32. Float32 operands are multiplied in float32, not in TF32."""
    if a.dtype.itemsize == 1:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=_statistics_dtype(a.dtype))


def _statistics_dtype(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def split_heads(x, key_heads):
    """... s (k g) d -> ... s k g d"""
    return x.reshape(*x.shape[:-2], key_heads, x.shape[-2] // key_heads, x.shape[-1])


def row_sums(out, dout, dlse):
    """delta in the derivative of softmax: for weights P, dS = P · (dP − delta), with delta = Σ out · dout − dlse."""
    dtype = _statistics_dtype(out.dtype)
    delta = jnp.sum(out.astype(dtype) * dout.astype(dtype), axis=-1)
    return delta if dlse is None else delta - dlse


def _folded(variant: Variant, query, key, value, arrays):
    """`...` as one dimension, and the operands by name."""
    lead = query.ndim - 3
    fold = lambda x: x.reshape(math.prod(x.shape[:lead]), *x.shape[lead:])  # noqa: E731
    x = {name: fold(a) if o.axes.startswith("b") else a for o, (name, a) in zip(variant.operands, arrays, strict=True)}
    return *map(fold, (query, key, value)), x


def _products(query, key):
    """Of query b s h d and key b t k d: b h s t."""
    products = einsum("bskgd,btkd->bkgst", split_heads(query, key.shape[-2]), key)
    return products.reshape(query.shape[0], query.shape[2], query.shape[1], key.shape[1])


class _Elements:
    """The variant's functions on the whole score matrix, b h q k."""

    def __init__(self, variant: Variant, x, shape: tuple[int, ...]):
        self.variant, self.x = variant, x
        number = lambda name, n: x.get(name, jnp.arange(n, dtype=jnp.int32))  # noqa: E731
        batch, heads, queries, keys = shape
        self.place = (
            (number("batch_index", batch), "b"),
            (number("head_index", heads), "h"),
            (first_query(x) + jnp.arange(queries, dtype=jnp.int32), "q"),
            (jnp.arange(keys, dtype=jnp.int32), "k"),
        )
        self.values = {o.name: (x[o.name], o.axes) for o in variant.operands if o.elementwise}
        self.readers = {o.name: _reader(x[o.name]) for o in variant.operands if o.rank is not None}

    def map(self, function, *first):
        def call(*values):
            given, place, rest = values[: len(first)], values[len(first) :][:4], values[len(first) + 4 :]
            return function(*given, Place(*place), {**self.readers, **dict(zip(self.values, rest, strict=True))})

        return over("bhqk", call, *((value, "bhqk") for value in first), *self.place, *self.values.values())

    def kept(self):
        key, (plane, axes) = self.x["dropout_key"], self.values["plane"]
        queries, keys = self.place[2][0], self.place[3][0]
        padded = jnp.arange(pl.cdiv(keys.size, COLUMNS) * COLUMNS, dtype=jnp.int32)
        keep = over("bh", lambda plane: self.variant.keep(key, plane, queries, padded), (plane, axes))
        return keep[..., : keys.size]


def _reader(array):
    return lambda *indices: array[indices or (0,)]


def _clean(x, *, guarded: bool):
    """0 in place of what is not finite, and which rows had that."""
    if not guarded:
        return x, None
    finite = jnp.isfinite(x.astype(jnp.float32))
    return jnp.where(finite, x, jnp.zeros_like(x)), ~jnp.all(finite, axis=-1)


def _rows(bad, heads: int):
    """Of b s h: b h s 1."""
    return jnp.swapaxes(bad, 1, 2)[..., None]


def _columns(bad, heads: int):
    """Of b t k: b h 1 t, each key head for its group of heads."""
    return jnp.repeat(jnp.swapaxes(bad, 1, 2), heads // bad.shape[-1], axis=1)[:, :, None]


def _scores(variant: Variant, query, key, elements: _Elements, *, with_derivative: bool = False):
    """Scores, -inf where masked; their derivative by the scaled products; and whether they count."""
    guarded, heads = variant.masks, query.shape[2]
    (query, bad_query), (key, bad_key) = (_clean(x, guarded=guarded) for x in (query, key))
    scores, slope = variant.scale * _products(query, key), None
    if guarded:  # NaN for those that see it alone
        scores = jnp.where(_rows(bad_query, heads) | _columns(bad_key, heads), jnp.nan, scores)
    if variant.modifies:
        score = with_slope(variant.score) if with_derivative else variant.score
        found = elements.map(score, scores)
        scores, slope = found if with_derivative else (found, None)
    visible = elements.map(variant.visible) if variant.masks else True
    if variant.modifies:
        visible = visible & ~(scores < FLOOR / LOG2_E)
    return (scores if visible is True else jnp.where(visible, scores, -jnp.inf)), slope, visible


def forward(query, key, value, *arrays, variant: Variant):
    shape, out_shape = query.shape[:-1], (*query.shape[:-1], value.shape[-1])
    query, key, value, x = _folded(variant, query, key, value, list(variant.named(arrays).items()))
    batch, queries, heads, _ = query.shape
    elements = _Elements(variant, x, (batch, heads, queries, key.shape[1]))
    scores, _, visible = _scores(variant, query, key, elements)
    value, bad = _clean(value, guarded=variant.masks)
    if bad is not None:
        scores = jnp.where(visible & _columns(bad, heads), jnp.nan, scores)
    lse = _logsumexp(scores)
    if "sinks" in x:
        lse = jnp.logaddexp(lse, x["sinks"].astype(lse.dtype)[:, None])
    weights = jnp.exp(scores - jnp.where(lse == -jnp.inf, 0.0, lse)[..., None])
    if variant.dropout:
        weights = jnp.where(elements.kept(), variant.kept_factor * weights, 0.0)
    weights = weights.reshape(batch, key.shape[2], heads // key.shape[2], *weights.shape[2:])
    narrow = jnp.bfloat16 if value.dtype.itemsize == 1 else value.dtype
    out = einsum("bkgst,btke->bskge", weights.astype(narrow), value.astype(narrow))
    out_dtype = jnp.bfloat16 if query.dtype.itemsize == 1 else query.dtype
    return out.reshape(out_shape).astype(out_dtype), jnp.swapaxes(lse, 1, 2).reshape(shape)


def _logsumexp(scores):
    """Over keys; -inf, with a gradient of 0, of those that see none."""
    peak = lax.stop_gradient(jnp.max(scores, axis=-1, initial=-jnp.inf))
    peak = jnp.where(peak == -jnp.inf, 0.0, peak)
    total = jnp.sum(jnp.exp(scores - peak[..., None]), axis=-1)
    empty = total == 0
    return jnp.where(empty, -jnp.inf, peak + jnp.log(jnp.where(empty, 1.0, total)))


def _derivatives(variant: Variant, query, key, value, rest):
    """What gradients are made of: folded operands, weights as the values get them, dscores by scores, and the slope."""
    *arrays, out, lse, dout, dlse = rest
    delta = row_sums(out, dout, dlse)
    lead = query.ndim - 3
    query, key, value, x = _folded(variant, query, key, value, list(variant.named(arrays).items()))
    lse, delta, dout = (a.reshape(math.prod(a.shape[:lead]), *a.shape[lead:]) for a in (lse, delta, dout))
    lse, delta = (jnp.swapaxes(a, 1, 2)[..., None] for a in (lse, delta))
    elements = _Elements(variant, x, (query.shape[0], query.shape[2], query.shape[1], key.shape[1]))
    scores, slope, visible = _scores(variant, query, key, elements, with_derivative=True)
    weights = counted = jnp.exp(scores - jnp.where(lse == -jnp.inf, jnp.inf, lse))
    dweights = _products(dout, value.astype(dout.dtype))
    if variant.dropout:
        kept = elements.kept()
        counted = jnp.where(kept, variant.kept_factor * weights, 0.0)
        dweights = jnp.where(kept, variant.kept_factor * dweights, 0.0)
    dscores = weights * (dweights - delta)
    dscores = dscores if visible is True else jnp.where(visible, dscores, 0.0)
    return query, key, value, dout, counted, dscores, slope, elements


def backward(query, key, value, *rest, variant: Variant):
    shapes = query.shape, key.shape, value.shape
    query, key, value, dout, weights, dscores, slope, _ = _derivatives(variant, query, key, value, rest)
    dscores = variant.scale * (dscores if slope is None else dscores * slope)
    key_heads, guarded = key.shape[2], variant.masks
    heads = query.shape[2] // key_heads
    group = lambda x, dtype: x.reshape(x.shape[0], key_heads, heads, *x.shape[2:]).astype(dtype)  # noqa: E731
    (clean_query, _), (clean_key, _) = (_clean(x, guarded=guarded) for x in (query, key))
    dquery = einsum("bkgst,btkd->bskgd", group(dscores, key.dtype), clean_key)
    dkey = einsum("bkgst,bskgd->btkd", group(dscores, query.dtype), split_heads(clean_query, key_heads))
    dvalue = einsum("bkgst,bskge->btke", group(weights, dout.dtype), split_heads(dout, key_heads))
    gradients = zip((dquery, dkey, dvalue), (query, key, value), shapes, strict=True)
    return tuple(d.reshape(shape).astype(x.dtype) for d, x, shape in gradients)


def operand_gradient(query, key, value, *rest, variant: Variant, operand: str):
    """The gradient of an operand that scores depend on."""
    query, key, *_, dscores, _, elements = _derivatives(variant, query, key, value, rest)
    scaled = variant.scale * _products(query, key)
    x = elements.x[operand]

    def scores(array):
        changed = _Elements(variant, elements.x | {operand: array}, scaled.shape)
        return changed.map(variant.score, scaled)

    _, pull = jax.vjp(scores, x)
    (gradient,) = pull(dscores)
    shape = rest[[o.name for o in variant.operands].index(operand)].shape
    return (gradient.reshape(shape),)
