"""Attention by blocks. The names of arrays are those of FlashAttention-2's algorithms, written out.

Lanes past the end of an array read as 0. A query past the end is therefore harmless everywhere: its row of query and of
dout is 0, and it adds nothing to a gradient. A key past the end would count as one of score 0 in sums over keys, and is
masked there.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jtile.ops.attention import hopper
from jtile.ops.attention.reference import row_sums


def _dot(a, b, axes):
    """The product of two blocks along one axis of each, in float32; not in TF32, for operands that are float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _mask(scores, query_start, key_start, keys, is_causal, *, query_axis):
    """A block of scores, -inf where the key is past the end or not for the query to see."""
    key_index = key_start + lax.broadcasted_iota(jnp.int32, scores.shape, 1 - query_axis)
    visible = key_index < keys
    if is_causal:
        visible &= key_index <= query_start + lax.broadcasted_iota(jnp.int32, scores.shape, query_axis)
    return jnp.where(visible, scores, -jnp.inf)


def _over_keys(step, carry, query_start, block_q, block_k, keys, is_causal):
    """Run `step` for each block of keys that some query of a block sees. Blocks that all of them see need no mask."""
    unmasked, seen = keys // block_k, pl.cdiv(keys, block_k)
    if is_causal:
        unmasked = jnp.clip(lax.div(query_start, block_k), 0, unmasked)
        seen = jnp.clip(lax.div(query_start + block_q + block_k - 1, block_k), 0, seen)
    carry = lax.fori_loop(0, unmasked, functools.partial(step, masked=False), carry)
    return lax.fori_loop(unmasked, seen, functools.partial(step, masked=True), carry)


def _first_query(origin_ref):
    """The key beside the first query, and whether that matters: whether the mask is causal."""
    return (0, False) if origin_ref is None else (-origin_ref[...], True)


def _query_block(i, blocks, is_causal):
    """The block of queries of the i-th program. Under a causal mask the last ones see the most keys, and go first."""
    return blocks - 1 - i if is_causal else i


def _forward_kernel(query_ref, key_ref, value_ref, origin_ref, out_ref, lse_ref, *, blocks, keys, block_k, scale):
    block_q = query_ref.shape[0]
    first, is_causal = _first_query(origin_ref)
    query_start = first + block_q * _query_block(pl.program_id(0), blocks, is_causal)
    # exp(scale · s − max(scale · s)) = 2^(slope · s − slope · max(s)), slope = |scale| · log₂ e: one multiply-add an
    # element. The query takes the sign of scale.
    slope = abs(scale) * math.log2(math.e)
    query = query_ref[...] if scale > 0 else -query_ref[...]

    def step(j, carry, masked):
        total, peak, acc = carry
        block = pl.ds(j * block_k, block_k)
        scores = _dot(query, key_ref[block, :], (1, 1))
        if masked:
            scores = _mask(scores, query_start, j * block_k, keys, is_causal, query_axis=0)
        new_peak = jnp.maximum(peak, slope * jnp.max(scores, axis=1))
        weights = jnp.exp2(slope * scores - new_peak[:, None])
        shrink = jnp.exp2(peak - new_peak)
        total = shrink * total + jnp.sum(weights, axis=1)
        value = value_ref[block, :]
        acc = shrink[:, None] * acc + _dot(weights.astype(value.dtype), value, (1, 0))
        return total, new_peak, acc

    # Every query sees key 0, so `peak` is finite from the first block on.
    zeros = jnp.zeros(block_q, jnp.float32)
    carry = zeros, zeros - jnp.inf, jnp.zeros(out_ref.shape, jnp.float32)
    total, peak, acc = _over_keys(step, carry, query_start, block_q, block_k, keys, is_causal)
    out_ref[...] = (acc / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = math.log(2) * (peak + jnp.log2(total))


def _dquery_kernel(
    query_ref, key_ref, value_ref, origin_ref, lse_ref, delta_ref, dout_ref, dquery_ref, *, blocks, keys, block_k, scale
):
    block_q = query_ref.shape[0]
    first, is_causal = _first_query(origin_ref)
    query_start = first + block_q * _query_block(pl.program_id(0), blocks, is_causal)
    slope = scale * math.log2(math.e)
    query, dout, delta = query_ref[...], dout_ref[...], delta_ref[...]
    lse = math.log2(math.e) * lse_ref[...]

    def step(j, acc, masked):
        block = pl.ds(j * block_k, block_k)
        key = key_ref[block, :]
        scores = slope * _dot(query, key, (1, 1)) - lse[:, None]
        if masked:
            scores = _mask(scores, query_start, j * block_k, keys, is_causal, query_axis=0)
        dweights = _dot(dout, value_ref[block, :], (1, 1))
        dscores = jnp.exp2(scores) * (dweights - delta[:, None])
        return acc + _dot(dscores.astype(key.dtype), key, (1, 0))

    acc = jnp.zeros(dquery_ref.shape, jnp.float32)
    acc = _over_keys(step, acc, query_start, block_q, block_k, keys, is_causal)
    dquery_ref[...] = (scale * acc).astype(dquery_ref.dtype)


def _dkey_dvalue_kernel(
    query_ref, key_ref, value_ref, origin_ref, minus_lse_ref, minus_delta_ref, dout_ref, dkey_ref, dvalue_ref,
    *, group, queries, block_q, keys, scale,
):  # fmt: skip
    block_k = key_ref.shape[0]
    query_start, is_causal = _first_query(origin_ref)
    key_start = block_k * pl.program_id(0)
    slope = scale * math.log2(math.e)
    key, value = key_ref[...], value_ref[...]

    def step(n, carry, masked):
        dkey, dvalue = carry
        i, head = lax.div(n, group), lax.rem(n, group)
        block = pl.ds(i * block_q, block_q)
        query, dout = query_ref[block, head, :], dout_ref[block, head, :]
        # Blocks are (block_k, block_q), so that weights and dscores are left operands of the last products as they
        # stand. The first products start from a row statistic, which then holds no registers of its own.
        scores = slope * (minus_lse_ref[head, block][None, :] + _dot(key, query, (1, 1)))
        if masked:
            scores = _mask(scores, query_start + i * block_q, key_start, keys, is_causal, query_axis=1)
        weights = jnp.exp2(scores)
        dvalue += _dot(weights.astype(dout.dtype), dout, (1, 0))
        dscores = weights * (minus_delta_ref[head, block][None, :] + _dot(value, dout, (1, 1)))
        dkey += _dot(dscores.astype(query.dtype), query, (1, 0))
        return dkey, dvalue

    # One loop over blocks and heads, not a loop in a loop: products accumulate across it without leaving registers.
    blocks = pl.cdiv(queries, block_q)
    first: int | jax.Array = 0
    unmasked: int | jax.Array = 0
    if is_causal:
        ahead = key_start - query_start
        first = jnp.clip(lax.div(ahead, block_q), 0, blocks)
        unmasked = jnp.clip(lax.div(ahead + block_k + block_q - 1, block_q), 0, blocks)
    carry = jnp.zeros(dkey_ref.shape, jnp.float32), jnp.zeros(dvalue_ref.shape, jnp.float32)
    carry = lax.fori_loop(first * group, unmasked * group, functools.partial(step, masked=True), carry)
    dkey, dvalue = lax.fori_loop(unmasked * group, blocks * group, functools.partial(step, masked=False), carry)
    dkey_ref[...] = (scale * dkey).astype(dkey_ref.dtype)
    dvalue_ref[...] = dvalue.astype(dvalue_ref.dtype)


def _round_up(size, block):
    return pl.cdiv(size, block) * block


def _by_queries(query, key, tile, is_causal):
    """For kernels whose programs take a block of one head's queries each and walk over its keys: the grid, the block of
    an array (batch, queries, heads, ...), and that of an array (batch, keys, key_heads, width)."""
    (batch, queries, heads, _), (_, keys, key_heads, _) = query.shape, key.shape
    blocks, group = pl.cdiv(queries, tile.block_q), heads // key_heads

    def some_queries(*rest):
        index = lambda i, h, b: (b, _query_block(i, blocks, is_causal), h, *(0 for _ in rest))  # noqa: E731
        return pl.BlockSpec((None, tile.block_q, None, *rest), index)

    def all_keys(width):
        return pl.BlockSpec(
            (None, _round_up(keys, tile.block_k), None, width), lambda i, h, b: (b, 0, lax.div(h, group), 0)
        )

    # Blocks of queries vary fastest: programs that run at the same time share the keys of a few heads in the cache.
    return (blocks, heads, batch), some_queries, all_keys


def _origin_spec(origin):
    return None if origin is None else pl.BlockSpec((), lambda *_: ())


def forward(query, key, value, origin, *, tile, scale):
    if isinstance(tile, hopper.ForwardTile):
        high = None if origin is None else 0
        return hopper.forward(query, key, value, origin, tile=tile, scale=scale, low=None, high=high)
    keys, head_dim, value_dim = key.shape[1], query.shape[-1], value.shape[-1]
    grid, some_queries, all_keys = _by_queries(query, key, tile, origin is not None)
    return pl.pallas_call(
        functools.partial(_forward_kernel, blocks=grid[0], keys=keys, block_k=tile.block_k, scale=scale),
        grid=grid,
        in_specs=[some_queries(head_dim), all_keys(head_dim), all_keys(value_dim), _origin_spec(origin)],
        out_specs=[some_queries(value_dim), some_queries()],
        out_shape=[
            jax.ShapeDtypeStruct((*query.shape[:-1], value_dim), query.dtype),
            jax.ShapeDtypeStruct(query.shape[:-1], jnp.float32),
        ],
        compiler_params=tile.compiler_params,
        name="attention",
    )(query, key, value, origin)


def backward(query, key, value, origin, out, lse, dout, dlse, *, tile, scale):
    if isinstance(tile, hopper.BackwardTile):
        band = dict(low=None, high=None if origin is None else 0)
        return hopper.backward(query, key, value, origin, out, lse, dout, dlse, tile=tile, scale=scale, **band)
    delta = row_sums(out, dout, dlse)
    dquery = _dquery(query, key, value, origin, lse, delta, dout, tile.dquery, scale)
    return dquery, *_dkey_dvalue(query, key, value, origin, lse, delta, dout, tile.dkey_dvalue, scale)


def _dquery(query, key, value, origin, lse, delta, dout, tile, scale):
    keys, head_dim, value_dim = key.shape[1], query.shape[-1], value.shape[-1]
    grid, some_queries, all_keys = _by_queries(query, key, tile, origin is not None)
    return pl.pallas_call(
        functools.partial(_dquery_kernel, blocks=grid[0], keys=keys, block_k=tile.block_k, scale=scale),
        grid=grid,
        in_specs=[
            *(some_queries(head_dim), all_keys(head_dim), all_keys(value_dim), _origin_spec(origin)),
            *(some_queries(), some_queries(), some_queries(value_dim)),
        ],
        out_specs=some_queries(head_dim),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=tile.compiler_params,
        name="attention_dquery",
    )(query, key, value, origin, lse, delta, dout)


def _dkey_dvalue(query, key, value, origin, lse, delta, dout, tile, scale):
    (batch, keys, key_heads, head_dim), value_dim = key.shape, value.shape[-1]
    queries, group = query.shape[1], query.shape[2] // key_heads
    padded_queries = _round_up(queries, tile.block_q)

    def some_keys(width):
        return pl.BlockSpec((None, tile.block_k, None, width), lambda j, h, b: (b, j, h, 0))

    def all_queries(width):  # of all heads in the group: one program sums dkey and dvalue over them
        return pl.BlockSpec((None, padded_queries, group, width), lambda j, h, b: (b, 0, h, 0))

    statistics = pl.BlockSpec((None, group, padded_queries), lambda j, h, b: (b, h, 0))
    return pl.pallas_call(
        functools.partial(
            _dkey_dvalue_kernel,
            **dict(group=group, queries=queries, block_q=tile.block_q, keys=keys, scale=scale),
        ),
        grid=(pl.cdiv(keys, tile.block_k), key_heads, batch),
        in_specs=[
            *(all_queries(head_dim), some_keys(head_dim), some_keys(value_dim), _origin_spec(origin)),
            *(statistics, statistics, all_queries(value_dim)),
        ],
        out_specs=[some_keys(head_dim), some_keys(value_dim)],
        out_shape=[jax.ShapeDtypeStruct(key.shape, key.dtype), jax.ShapeDtypeStruct(value.shape, value.dtype)],
        compiler_params=tile.compiler_params,
        name="attention_dkey_dvalue",
        # A program reads these for many queries of few heads: with the queries innermost they are contiguous.
    )(query, key, value, origin, jnp.swapaxes(-lse / scale, 1, 2), jnp.swapaxes(-delta, 1, 2), dout)
