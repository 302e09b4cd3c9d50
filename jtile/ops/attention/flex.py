"""`flex_attention`: features asked for by functions of a score and its place."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jtile.op import Implementation, check_known
from jtile.ops.attention import op
from jtile.ops.attention.dot_product import check, checked_scale
from jtile.ops.attention.mods import Mod, trace
from jtile.ops.attention.variant import Operand, Variant, over

# A number of a score, and those of its place.
ScoreMod = Callable[..., jax.Array]
MaskMod = Callable[..., jax.Array]

LEAST_BLOCK = 16


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["key_blocks", "key_counts", "query_blocks", "query_counts", "kinds"],
    meta_fields=["queries", "keys", "block_size", "mask_mod"],
)
@dataclasses.dataclass(frozen=True)
class BlockMask:
    """Which blocks of keys each block of queries visits, from `create_block_mask`.

    Every list has the blocks that are visible as a whole first, then those that are in part.

    Attributes:
        key_blocks: (batch, heads, i, j): for block i of queries the blocks of keys.
        key_counts: (batch, heads, i, 2): how many are visible as a whole, and how many are visited.
        query_blocks: (batch, heads, j, i): for block j of keys the blocks of queries.
        query_counts: (batch, heads, j, 2): likewise.
        kinds: (batch, heads, i, j): 0 for blocks not visited, 1 for those visible in part, 2 for those as a whole.
        queries, keys: the lengths of the sequences.
        block_size: queries and keys of a block.
        mask_mod: the function it was made of.

    Example:
        >>> import jtile
        >>> causal = jtile.create_block_mask(lambda b, h, q, k: k <= q, None, None, 256, 256)
        >>> print(causal.kinds[0, 0])
        [[1 0]
         [2 1]]
    """

    key_blocks: Int[Array, "batch heads i j"]
    key_counts: Int[Array, "batch heads i 2"]
    query_blocks: Int[Array, "batch heads j i"]
    query_counts: Int[Array, "batch heads j 2"]
    kinds: Int[Array, "batch heads i j"]
    queries: int
    keys: int
    block_size: tuple[int, int]
    mask_mod: MaskMod

    @property
    def sparsity(self) -> jax.Array:
        """The share of blocks that are not visited."""
        return jnp.mean(self.kinds == 0)


def create_block_mask(
    mask_mod: MaskMod,
    batch: int | None,
    heads: int | None,
    queries: int,
    keys: int,
    *,
    block_size: int | tuple[int, int] = 128,
) -> BlockMask:
    """Which blocks a mask lets attention skip, computed on the device, a row of blocks at a time.

    Args:
        mask_mod: (batch, head, query, key) -> whether the query sees the key; numbers of int32.
        batch: how many batches, or None where the mask is the same for all.
        heads: how many heads of queries, or None likewise.
        queries: the number of queries.
        keys: the number of keys.
        block_size: queries and keys of a block, powers of two from 16.

    Returns:
        The lists, for `flex_attention`. It is a pytree, and may be made under `jit`.

    Raises:
        ValueError: the mask is no function to a truth value, or depends on a batch or a head where there is to be but
            one; or block sizes are not powers of two from 16.

    Source: He et al., Flex Attention, 2024, arXiv:2412.05496, section 3.2.

    Example:
        >>> import jtile
        >>> causal = jtile.create_block_mask(lambda b, h, q, k: q >= k, None, None, 512, 512)
        >>> causal.key_counts[0, 0].tolist(), causal.key_blocks[0, 0, 2].tolist()
        ([[0, 1], [1, 2], [2, 3], [3, 4]], [0, 1, 2, 3])
    """
    check_known("create_block_mask", batch=batch, heads=heads, queries=queries, keys=keys, block_size=block_size)
    sides = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
    if len(sides) != 2 or any(n < LEAST_BLOCK or n & (n - 1) for n in sides):
        raise ValueError(f"create_block_mask: `block_size` must be powers of two from {LEAST_BLOCK}, got {block_size}")
    number = jax.ShapeDtypeStruct((), jnp.int32)
    mod, arrays = _traced_mask("create_block_mask", mask_mod, number)
    for place, (what, name, given) in enumerate((("batch", "batch", batch), ("head", "heads", heads))):
        if given is None and mod.depends_on(place):
            raise ValueError(
                f"create_block_mask: `mask_mod` depends on the {what}, and `{name}` is None, for a mask that is the "
                "same for all; say how many there are"
            )
    read = lambda which, indices: arrays[which][indices]  # noqa: E731
    count = [-(-size // side) for size, side in zip((queries, keys), sides, strict=True)]
    numbers = lambda n: jnp.arange(n, dtype=jnp.int32)  # noqa: E731

    def row(i):
        """The kinds of a row of blocks."""
        places = (numbers(batch or 1), "b"), (numbers(heads or 1), "h")
        rows, columns = i * sides[0] + numbers(sides[0]), numbers(count[1] * sides[1])
        inside = (rows < queries)[None, None, :, None] & (columns < keys)[None, None, None]
        seen = over("bhqk", lambda *place: mod(place, read), *places, (rows, "q"), (columns, "k")) & inside
        seen = seen.reshape(*seen.shape[:2], sides[0], count[1], sides[1])
        return jnp.any(seen, axis=(2, 4)).astype(jnp.int8) + jnp.all(seen, axis=(2, 4)).astype(jnp.int8)

    kinds = jnp.moveaxis(jax.lax.map(row, numbers(count[0])), 0, 2)
    of_keys, of_queries = _lists(kinds), _lists(jnp.swapaxes(kinds, 2, 3))
    return BlockMask(*of_keys, *of_queries, kinds, queries, keys, sides, mask_mod)


def _lists(kinds) -> tuple[jax.Array, jax.Array]:
    """The blocks of each row, those of kind 2 first and those of kind 1 next; how many there are of 2, and of both."""
    blocks = jnp.argsort(-kinds, axis=-1, stable=True).astype(jnp.int32)
    counts = jnp.stack([jnp.sum(kinds == 2, axis=-1), jnp.sum(kinds > 0, axis=-1)], axis=-1)
    return blocks, counts.astype(jnp.int32)


def _traced_mask(name: str, mask_mod: MaskMod, number) -> tuple[Mod, list[jax.Array]]:
    mod, arrays = trace(mask_mod, f"{name}: `mask_mod`", number, number, number, number)
    if mod.dtype != jnp.bool_:
        raise ValueError(f"{name}: `mask_mod` must return a truth value, and returns {mod.dtype}; compare with 0")
    return mod, arrays


@overload
def flex_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: Implementation = None,
) -> Array: ...


@overload
def flex_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    axis_name: str | tuple[str, ...] | None = None,
    implementation: Implementation = None,
) -> tuple[Array, Array]: ...


def flex_attention(
    query: Float[Array, "*batch queries heads head_dim"],
    key: Float[Array, "*batch keys key_heads head_dim"],
    value: Float[Array, "*batch keys key_heads value_dim"],
    *,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: Implementation = None,
) -> (
    Float[Array, "*batch queries heads value_dim"]
    | tuple[Float[Array, "*batch queries heads value_dim"], Float[Array, "*batch queries heads"]]
):
    """Attention whose scores are changed and masked by functions of your own, inside of the kernels.

    The functions are ordinary JAX functions of numbers, for one score; batch, head, query and key are int32 positions
    in the whole arrays, also where devices share them out. They are traced into the forward and the backward kernels,
    where JAX differentiates them. They may close over arrays, to be read element by element (`slopes[head]`,
    `table[query - key + n]`) at indices that are clipped to the array; what is computed of such arrays alone is
    computed once, outside. Gradients of the arrays that `score_mod` closes over are summed in a pass of their own, in
    one order; it takes as many steps a block as the elements that the block reads lie apart.

    Args:
        query: any leading shape, none included, then queries, heads and head dim. `batch` counts the leading shape.
        key: the same leading shape, keys, key heads and head dim; heads as in `dot_product_attention`.
        value: like `key`; its head dim may differ.
        score_mod: (score, batch, head, query, key) -> score, of the scaled product in float32.
        mask_mod: (batch, head, query, key) -> whether the query sees the key. A query that sees none has an output of 0
            and a log-sum-exp of -inf. Every block is visited unless there is a `block_mask`.
        block_mask: from `create_block_mask`: blocks that it leaves out are skipped, and in those that it has as a whole
            nothing is masked. Elsewhere `mask_mod` holds, by default the one that it was made of.
        scale: factor of the products, a number known when tracing; by default 1 / √head_dim.
        return_lse: also return the logarithm of the sum over keys of exp(score).
        axis_name: inside `jax.shard_map`, the mesh axis or axes that split the queries, as in `dot_product_attention`;
            not with a `block_mask`, whose lists are of all queries.
        implementation: `None`, `"triton"`, `"xla"` or `"interpret"`, see `jtile.TileOp`.

    Returns:
        As `dot_product_attention`.

    Raises:
        ValueError: shapes or dtypes do not match, `scale` is traced or not finite, a function returns something else or
            uses an array otherwise than by reading its elements.
        NotImplementedError: the named implementation cannot serve the call.

    Source: He et al., Flex Attention, 2024, arXiv:2412.05496.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jtile
        >>> query = key = value = jax.random.normal(jax.random.key(0), (2, 128, 8, 64))
        >>> slopes = 2.0 ** -jnp.arange(1, 9)
        >>> alibi = lambda score, batch, head, query, key: score + slopes[head] * (key - query)
        >>> jtile.flex_attention(query, key, value, score_mod=alibi, mask_mod=lambda b, h, q, k: q >= k).shape
        (2, 128, 8, 64)
    """
    name = "flex_attention"
    check_known(name, return_lse=return_lse)
    query, key, value = map(jnp.asarray, (query, key, value))
    sizes, lead = check(name, query, key, value)
    scale = checked_scale(name, scale, query.shape[-1])
    operands: dict[str, tuple[Operand, jax.Array]] = {}
    number = jax.ShapeDtypeStruct((), jnp.int32)
    score = mask = None
    mask_mod = block_mask.mask_mod if mask_mod is None and block_mask is not None else mask_mod
    heads, batch = query.shape[-2], math.prod(lead)
    if score_mod is not None:
        dtype = query.dtype if query.dtype.itemsize > 4 else jnp.float32  # float8 is promoted to nothing
        score, arrays = trace(score_mod, f"{name}: `score_mod`", jax.ShapeDtypeStruct((), dtype), *[number] * 4)
        if not jnp.issubdtype(score.dtype, jnp.floating):
            raise ValueError(f"{name}: `score_mod` must return a score, and returns {score.dtype}")
        _add_arrays(operands, "score", arrays)
    if mask_mod is not None:
        mask, arrays = _traced_mask(name, mask_mod, number)
        _add_arrays(operands, "mask", arrays)
    if score is not None or mask is not None:
        operands["batch_index"] = Operand("batch_index", "b"), jnp.arange(batch, dtype=jnp.int32).reshape(lead)
        operands["head_index"] = Operand("head_index", "h"), jnp.arange(heads, dtype=jnp.int32)
    if block_mask is not None:
        _add_lists(operands, block_mask, lead, query.shape[-3], key.shape[-3], heads, key.shape[-2])
    variant = Variant(
        scale=scale,
        score_mod=score,
        mask_mod=mask,
        block_size=None if block_mask is None else block_mask.block_size,
    )
    out, lse = op.call(query, key, value, operands, variant, axis_name, implementation)
    return (out, lse) if return_lse else out


def _add_arrays(operands, which: str, arrays) -> None:
    for i, array in enumerate(arrays):
        array = jnp.atleast_1d(array)
        operands[f"{which}_array_{i}"] = Operand(f"{which}_array_{i}", "", array.ndim), array


def _add_lists(operands, mask: BlockMask, lead, queries: int, keys: int, heads: int, key_heads: int) -> None:
    batch, mask_heads = mask.kinds.shape[:2]
    if (
        (mask.queries, mask.keys) != (queries, keys)
        or batch not in (1, math.prod(lead))
        or mask_heads not in (1, heads)
    ):
        raise ValueError(
            f"flex_attention: `block_mask` was made for batch {batch}, {mask_heads} heads, {mask.queries} queries and "
            f"{mask.keys} keys, and this is batch {math.prod(lead)}, {heads} heads, {queries} queries and {keys} keys; "
            "make another by create_block_mask"
        )
    of_queries = mask.query_blocks, mask.query_counts
    if mask_heads not in (1, key_heads):
        # A block of keys is visited by all heads of its group, or by none.
        kinds = mask.kinds.reshape(batch, key_heads, -1, *mask.kinds.shape[2:])
        kinds = (jnp.any(kinds > 0, axis=2).astype(jnp.int8) + jnp.all(kinds == 2, axis=2)).astype(jnp.int8)
        of_queries = _lists(jnp.swapaxes(kinds, 2, 3))
    lists = zip(("key_blocks", "key_counts", "query_blocks", "query_counts"), ("hij", "hi2", "gji", "gj2"), strict=True)
    for (name, axes), array in zip(lists, (mask.key_blocks, mask.key_counts, *of_queries), strict=True):
        shared_heads, shared_batch = mask_heads == 1, batch == 1 and math.prod(lead) != 1
        array = array[:, 0] if shared_heads else array
        array = array[0] if shared_batch else array.reshape(*lead, *array.shape[1:])
        operands[name] = Operand(name, "b" * (not shared_batch) + axes[shared_heads:]), array
