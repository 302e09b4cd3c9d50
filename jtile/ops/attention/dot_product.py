"""`dot_product_attention`: features asked for by arguments."""

import math
from typing import Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from jtile.op import Implementation, check_known
from jtile.op.signature import Signature
from jtile.ops.attention import op
from jtile.ops.attention.variant import Operand, Variant
from jtile.ops.random_bits import BITS, key_words

NAME = "dot_product_attention"
SIGNATURE = Signature.parse(f"{op.QUERY_KEY_VALUE} -> {op.OUT}")


@overload
def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    query_offset: int | Array = 0,
    query_segment_ids: Array | None = None,
    key_value_segment_ids: Array | None = None,
    logits_soft_cap: float | None = None,
    sinks: Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    return_lse: Literal[False] = False,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: Implementation = None,
) -> Array: ...


@overload
def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    query_offset: int | Array = 0,
    query_segment_ids: Array | None = None,
    key_value_segment_ids: Array | None = None,
    logits_soft_cap: float | None = None,
    sinks: Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    return_lse: Literal[True],
    axis_name: str | tuple[str, ...] | None = None,
    implementation: Implementation = None,
) -> tuple[Array, Array]: ...


def dot_product_attention(
    query: Float[Array, "*batch queries heads head_dim"],
    key: Float[Array, "*batch keys key_heads head_dim"],
    value: Float[Array, "*batch keys key_heads value_dim"],
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, "*batch"] | None = None,
    key_value_seq_lengths: Int[Array, "*batch"] | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    query_offset: int | Int[Array, "*batch"] = 0,
    query_segment_ids: Int[Array, "... queries"] | None = None,
    key_value_segment_ids: Int[Array, "... keys"] | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | UInt[Array, " words"] | None = None,
    return_lse: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: Implementation = None,
) -> (
    Float[Array, "*batch queries heads value_dim"]
    | tuple[Float[Array, "*batch queries heads value_dim"], Float[Array, "*batch queries heads"]]
):
    """Scaled dot-product attention, softmax(scale · query keyᵀ) value, as `jax.nn.dot_product_attention` has it.

    A score is scaled, has its bias added, is capped, and is masked, in this order. A query sees the keys that every
    argument lets it see. One that sees none has an output of 0, a log-sum-exp of -inf, and gradients of 0; a score
    under about -7e37, such as with a bias of the least float32, counts as masked. What is in keys and values that a
    query does not see, NaN and infinity included, reaches nothing of it (in `jax.nn`, 0 · NaN is NaN). Of a query that
    sees a value that is not finite, the whole output may be NaN.

    Memory grows with the sequence, not with its square. Scores, softmax and all sums are float32. Float32 operands are
    multiplied in float32 (not TF32); with 16-bit operands the softmax's weights are rounded to their dtype before they
    meet `value`, and their gradients before they meet `query` and `key`. The kernels serve head dims 16 to 576, powers
    of two or not. Operands may be float8, of either kind, without a gradient: the output is bfloat16.

    Blocks that a causal mask, a window, lengths or segment ids make invisible are not visited. Devices may share out
    batches, heads and queries: for these they gather keys and values, and sum their gradients.

    Args:
        query: any leading shape, none included, then queries, heads and head dim.
        key: the same leading shape, keys, key heads and head dim. The number of key heads divides that of heads: query
            head h attends to key head h // (heads // key_heads). Fewer key heads than heads is grouped-query attention
            (Ainslie et al., 2023, arXiv:2305.13245), one is multi-query attention (Shazeer, 2019, arXiv:1911.02150).
        value: like `key`; its head dim may differ.
        bias: added to the scores, (*batch, heads, queries, keys), each dimension full or 1, the leading ones all or
            none, or absent. It is read as it is, not broadcast in memory, and so is its gradient written.
        mask: True where the query may see the key; shapes as of `bias`.
        scale: factor of the scores, a number known when tracing; by default 1 / √head_dim.
        is_causal: query i attends to keys 0 to i and no others. Positions count from the start of each sequence even
            where lengths differ, as in `jax.nn.dot_product_attention`, which masks by `jnp.tril`. To align their ends,
            say `query_offset=keys - queries`.
        query_seq_lengths: how many queries of each sequence there are; the others see nothing.
        key_value_seq_lengths: how many keys of each sequence there are to see.
        local_window_size: how many keys to the left and to the right of its own position a query sees; one number for
            both sides, None for no bound.
        query_offset: query i stands at position i + query_offset among the keys, for `is_causal` and
            `local_window_size`; an array has one for each sequence.
        query_segment_ids: a query sees keys of its own segment alone, (*batch, queries) or (queries,) for all: several
            documents in one sequence. Blocks of other documents are skipped where ids are in order, padding at the end.
        key_value_segment_ids: the same for keys; by default that of the queries, where they are as many.
        logits_soft_cap: c in c · tanh(score / c) (Gemma 2, 2024, arXiv:2408.00118, section 2).
        sinks: one number a head, the score of a key more whose value is 0 (Xiao et al., 2023, arXiv:2309.17453).
        dropout_rate: the probability that a weight is dropped; it counts as the nearest multiple of 2⁻¹⁶. The
            others are divided by what remains.
        dropout_key: what is dropped depends on it and on a weight's place among those of all devices; of those in
            `jax.shard_map` along `axis_name` alone. Where that splits batches or heads, fold `jax.lax.axis_index` in.
        return_lse: also return the logarithm of the sum over keys of exp(score), sinks included.
        axis_name: inside `jax.shard_map`, the mesh axis or axes that split the queries: `query`, and the rows of a
            bias, of a mask and of `query_segment_ids`, are this device's part of them; `key` and `value` are whole
            (`jax.lax.all_gather`), and lengths and positions count in the whole. Elsewhere arrays know how they are
            split.
        implementation: `None`, `"triton"`, `"xla"` or `"interpret"`, see `jtile.TileOp`. On a GPU `None` takes the
            schedule for Hopper where that serves, else the portable one, or what `jtile.autotune` or a shipped table
            has found faster. Each pass is chosen for itself, since any of them goes with any other. `jtile.explain`
            says which, and why.

    Returns:
        The output in the dtype of `query`, or with `return_lse` the pair of it and the float32 log-sum-exp (float64 for
        float64 operands), which is differentiable too. Where there are no keys at all these are 0 and -inf.

    Raises:
        ValueError: shapes do not match, dtypes differ or are not those asked for, an option is traced or out of range.
        NotImplementedError: the named implementation cannot serve the call; or a gradient of float8 operands.

    Source: Dao, FlashAttention-2, 2023, arXiv:2307.08691, section 3.1.

    Example:
        >>> import jax
        >>> import jtile
        >>> query = jax.random.normal(jax.random.key(0), (2, 128, 8, 64))
        >>> key = value = jax.random.normal(jax.random.key(1), (2, 128, 2, 64))
        >>> jtile.dot_product_attention(query, key, value, is_causal=True, local_window_size=(32, None)).shape
        (2, 128, 8, 64)
    """
    check_known(
        NAME,
        is_causal=is_causal,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
        dropout_rate=dropout_rate,
        return_lse=return_lse,
        axis_name=axis_name,
    )
    query, key, value = map(jnp.asarray, (query, key, value))
    sizes, lead = check(NAME, query, key, value)
    scale = checked_scale(NAME, scale, query.shape[-1])
    queries, keys, heads = query.shape[-3], key.shape[-3], query.shape[-2]
    operands: dict[str, tuple[Operand, jax.Array]] = {}

    def add(name: str, axes: str, array: jax.Array, rank: int | None = None) -> None:
        operands[name] = Operand(name, axes, rank), array

    for name, array in ("bias", bias), ("mask", mask):
        if array is not None:
            add(name, *_broadcastable(name, jnp.asarray(array), (*lead, heads, queries, keys)))
    for name, given in ("query_lengths", query_seq_lengths), ("key_lengths", key_value_seq_lengths):
        if given is not None:
            add(name, "b", _integers(name.replace("key", "key_value").replace("_l", "_seq_l"), given, lead))
    window, offset = _window(local_window_size, bool(is_causal)), 0
    if isinstance(query_offset, int):
        offset = query_offset
    else:
        add("query_offset", "b", _integers("query_offset", query_offset, lead))
    for name, axes, ids in _segments(query_segment_ids, key_value_segment_ids, lead, queries, keys):
        add(name, axes, ids)
    if sinks is not None:
        if jnp.shape(sinks) != (heads,) or not jnp.issubdtype(jnp.asarray(sinks).dtype, jnp.floating):
            raise ValueError(
                f"{NAME}: `sinks` must be floating point, one for each of {heads} heads, got "
                f"{jnp.asarray(sinks).dtype} of shape {jnp.shape(sinks)}"
            )
        add("sinks", "h", jnp.asarray(sinks))
    threshold = _dropout(dropout_rate, dropout_key)
    if threshold:
        assert dropout_key is not None  # or `_dropout` has refused it
        planes = jnp.arange(math.prod(lead) * heads, dtype=jnp.int32).reshape(*lead, heads)
        add("plane", "bh", planes)
        add("dropout_key", "", key_words(dropout_key), 1)
    if logits_soft_cap is not None and not 0 < logits_soft_cap < math.inf:
        raise ValueError(f"{NAME}: `logits_soft_cap` must be positive and finite, or None, got {logits_soft_cap}")
    variant = Variant(
        scale=scale,
        window=window,
        offset=offset if window != (None, None) else 0,
        soft_cap=None if logits_soft_cap is None else float(logits_soft_cap),
        dropout=threshold,
    )
    out, lse = op.call(query, key, value, operands, variant, axis_name, implementation)
    return (out, lse) if return_lse else out


def check(name: str, query, key, value) -> tuple[dict[str, int], tuple[int, ...]]:
    """The sizes of dimensions, and the leading shape."""
    found = SIGNATURE.check(name, [query.shape, key.shape, value.shape])
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"{name}: `query`, `key` and `value` must have one dtype, "
            f"got {query.dtype}, {key.dtype} and {value.dtype}; cast them to the one to compute in"
        )
    if not jnp.issubdtype(query.dtype, jnp.floating):
        raise ValueError(f"{name}: operands must be floating point, got {query.dtype}; cast them")
    return found


def checked_scale(name: str, scale, head_dim: int) -> float:
    if isinstance(scale, jax.core.Tracer):
        raise ValueError(
            f"{name}: `scale` must be a number known when tracing, got a traced array; "
            "multiply `query` by it and pass scale=1.0"
        )
    scale = max(1, head_dim) ** -0.5 if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"{name}: `scale` must be finite, got {scale}")
    return scale


def _broadcastable(name: str, array: jax.Array, full: tuple[int, ...]) -> tuple[str, jax.Array]:
    """The axes that a bias or a mask has, and it without the others."""
    kind = jnp.floating if name == "bias" else jnp.bool_
    if not jnp.issubdtype(array.dtype, kind):
        cure = "cast it" if name == "bias" else "True lets a query see a key; pass an additive mask as `bias`"
        raise ValueError(f"{NAME}: `{name}` must be {kind.__name__.strip('_')}, got {array.dtype}; {cure}")
    shape = (1,) * (len(full) - array.ndim) + array.shape
    while len(shape) > len(full) and shape[0] == 1:
        shape = shape[1:]
    lead = len(full) - 3
    whole_lead = shape[:lead] == full[:lead]
    fits = len(shape) == len(full) and all(n in (1, m) for n, m in zip(shape, full, strict=True))
    if not fits or not (whole_lead or set(shape[:lead]) <= {1}):
        raise ValueError(
            f"{NAME}: `{name}` has shape {array.shape}; (*batch, heads, queries, keys) is {full}, and each dimension "
            "must be that or 1, the leading ones all or none; map over the others with jax.vmap"
        )
    own = [n == m != 1 for n, m in zip(shape[lead:], full[lead:], strict=True)]
    leading = full[:lead] if whole_lead and math.prod(full[:lead]) != 1 else ()
    axes = "b" * bool(leading) + "".join(a for a, has in zip("hqk", own, strict=True) if has)
    return axes, array.reshape(*leading, *(n for n, has in zip(full[lead:], own, strict=True) if has))


def _integers(name: str, array, shape: tuple[int, ...]) -> jax.Array:
    array = jnp.asarray(array)
    if array.shape != shape or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"{NAME}: `{name}` must be integers of shape {shape}, one for each sequence, got {array.dtype} of shape "
            f"{array.shape}"
        )
    return array.astype(jnp.int32)


def _segments(query_ids, key_ids, lead: tuple[int, ...], queries: int, keys: int):
    if query_ids is None and key_ids is None:
        return
    if query_ids is None or (key_ids is None and queries != keys):
        raise ValueError(
            f"{NAME}: `query_segment_ids` and `key_value_segment_ids` are needed together, for {queries} queries and "
            f"{keys} keys; only those of keys may be left out, where they are as many as the queries"
        )
    key_ids = query_ids if key_ids is None else key_ids
    for public, name, ids, size in (
        ("query_segment_ids", "query_segments", query_ids, queries),
        ("key_value_segment_ids", "key_segments", key_ids, keys),
    ):
        ids = jnp.asarray(ids)
        if ids.shape not in ((*lead, size), (size,)) or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(
                f"{NAME}: `{public}` must be integers of shape {(*lead, size)}, or {(size,)} for all sequences, got "
                f"{ids.dtype} of shape {ids.shape}"
            )
        axis = name[0]
        yield name, f"b{axis}" if ids.ndim > 1 or not lead else axis, ids.astype(jnp.int32)


def _window(window, is_causal: bool) -> tuple[int | None, int | None]:
    sides = (window, window) if window is None or isinstance(window, int) else tuple(window)
    if len(sides) != 2 or not all(n is None or (isinstance(n, int) and n >= 0) for n in sides):
        raise ValueError(
            f"{NAME}: `local_window_size` must be a number of keys, a pair of them for left and right, or None, none "
            f"of them negative; got {window}"
        )
    left, right = sides
    return left, 0 if is_causal else right


def _dropout(rate: float, key) -> int:
    """The share of weights that are dropped, in units of 2⁻¹⁶."""
    if not 0 <= rate <= 1:
        raise ValueError(f"{NAME}: `dropout_rate` must be from 0 to 1, got {rate}")
    if rate and key is None:
        raise ValueError(f"{NAME}: dropout_rate={rate} needs a `dropout_key`, from jax.random.key")
    if key is not None:
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if not (typed and key.ndim == 0 or key.dtype == jnp.uint32 and key.ndim == 1 and key.size >= 2):
            raise ValueError(
                f"{NAME}: `dropout_key` must be one key, from jax.random.key or jax.random.PRNGKey, got {key.dtype} of "
                f"shape {key.shape}; of several, map over them with jax.vmap"
            )
    return round(rate * 2**BITS)
