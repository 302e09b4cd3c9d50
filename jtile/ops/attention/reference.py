"""The meaning of attention: the whole score matrix, in memory."""

import jax
import jax.numpy as jnp
from jax import lax


def einsum(subscripts, a, b):
    """Operands of one dtype, summed in float32. Float32 operands are multiplied in float32, not in TF32."""
    if a.dtype.itemsize == 1:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=statistics_dtype(a.dtype))


def statistics_dtype(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def split_heads(x, key_heads):
    """... s (k g) d -> ... s k g d"""
    return x.reshape(*x.shape[:-2], key_heads, x.shape[-2] // key_heads, x.shape[-1])


def _scores(query, key, origin, scale):
    """Of query ... s k g d and key ... t k d: ... k g s t."""
    scores = scale * einsum("...skgd,...tkd->...kgst", query, key)
    if origin is not None:
        queries, keys = map(jnp.arange, scores.shape[-2:])
        scores = jnp.where(keys <= queries[:, None] - origin, scores, -jnp.inf)
    return scores


def forward(query, key, value, origin, *, scale):
    scores = _scores(split_heads(query, key.shape[-2]), key, origin, scale)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - lse[..., None])
    out = einsum("...kgst,...tke->...skge", weights.astype(value.dtype), value)
    out = out.reshape(*query.shape[:-1], value.shape[-1]).astype(query.dtype)
    return out, jnp.moveaxis(lse, -1, -3).reshape(query.shape[:-1])


def backward(query, key, value, origin, out, lse, dout, dlse, *, scale):
    delta = row_sums(out, dout, dlse)
    query_shape, key_heads = query.shape, key.shape[-2]
    query, dout, lse, delta = (split_heads(x, key_heads) for x in (query, dout, lse[..., None], delta[..., None]))
    lse, delta = (jnp.moveaxis(x, -4, -2) for x in (lse, delta))  # ... k g s 1
    weights = jnp.exp(_scores(query, key, origin, scale) - lse)
    dweights = einsum("...skge,...tke->...kgst", dout, value)
    dscores = (scale * weights * (dweights - delta)).astype(query.dtype)
    dquery = einsum("...kgst,...tkd->...skgd", dscores, key).reshape(query_shape)
    dkey = einsum("...kgst,...skgd->...tkd", dscores, query)
    dvalue = einsum("...kgst,...skge->...tke", weights.astype(dout.dtype), dout)
    return dquery.astype(query.dtype), dkey.astype(key.dtype), dvalue.astype(value.dtype)


def row_sums(out, dout, dlse):
    """delta in the derivative of softmax: for weights P, dS = P · (dP − delta), with delta = Σ out · dout − dlse."""
    dtype = statistics_dtype(out.dtype)
    delta = jnp.sum(out.astype(dtype) * dout.astype(dtype), axis=-1)
    return delta if dlse is None else delta - dlse
