"""Attention's schedule for Hopper, in Gluon, Triton's language for schedules.

`forward_kernel.py`, `backward_kernel.py` and, above head dim 128, `wide_backward_kernel.py` are its kernels, `band.py`
which blocks visit each other, `pipeline.py` how warps hand blocks on. Features are not in them: `functions.py` writes a
variant's functions of scores as Gluon for the kernels to call, `features.py` hands over what these read and which
blocks are visited. Here is when the schedule serves, its tiles, and how a call becomes a launch. It needs Triton 3.9,
whose Gluon has the inline assembly and the aggregates that the kernels are written with.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jtile.compiler.target import Target
from jtile.compiler.triton_call import has_gluon, triton_call
from jtile.ops.attention.reference import row_sums

if TYPE_CHECKING:
    from jtile.ops.attention.hopper.functions import Functions

WIDEST = 256  # head dim
CACHE = 50 << 20  # bytes, of the chips that this is for


class ForwardTile(NamedTuple):
    """
    Attributes:
        groups: of four warps, with 64 queries each: 2 or 3.
        block_k: keys of a block.
        stages: blocks of keys, and of values, that shared memory holds.
        together: heads that are worked on at the same time, which share the cache.
        programs: at most so many, each of which then takes several blocks of queries; 0 is one for each block.
    """

    groups: int
    block_k: int
    stages: int
    together: int
    programs: int


class BackwardTile(NamedTuple):
    """
    Attributes:
        block_q: queries of a block: 128 at head dims up to 64, and 64 above.
        stages: blocks of queries that shared memory holds.
        together: key heads that are worked on at the same time, which share the cache.
    """

    block_q: int
    stages: int
    together: int


@dataclasses.dataclass(frozen=True)
class _Call:
    """What a kernel is compiled for. `low` and `high` bound the keys that a query sees: see `band.py`. `flags` tells
    whether a number beside the results is to be set where NaN may have come to what does not see it."""

    batch: int
    queries: int
    keys: int
    heads: int
    key_heads: int
    key_width: int
    value_width: int
    low: int | None
    high: int | None
    scale: float
    block_q: int
    block_k: int
    stages: int
    together: int
    flags: bool

    @property
    def slope(self) -> float:
        return self.scale * math.log2(math.e)

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.heads // self.key_heads

    @property
    def query_blocks(self) -> int:
        return -(-self.queries // self.block_q)

    @property
    def key_blocks(self) -> int:
        return -(-self.keys // self.block_k)


@dataclasses.dataclass(frozen=True)
class Lists:
    """Where a block of queries finds its list: rows from one batch and one head to the next, blocks of queries that
    share a list, blocks of keys to one in a list, and the length of a list."""

    batch: int
    head: int
    rows: int
    columns: int
    length: int


@dataclasses.dataclass(frozen=True)
class Forward(_Call):
    """
    Attributes:
        loops: whether there are fewer programs than blocks.
        functions: what modifies scores, and masks them beyond the band.
        masks_anywhere: whether these may mask a key in any block.
        ranges: where an array tells the blocks to visit, how many there are from one batch to the next.
        lists: where lists tell them.
        sinks: the number of the array of sinks.
    """

    loops: bool
    functions: "Functions | None" = None
    masks_anywhere: bool = False
    ranges: int | None = None
    lists: Lists | None = None
    sinks: int | None = None

    @property
    def slope(self) -> float:
        return super().slope if self.functions is None else self.functions.slope

    @property
    def masks_first(self) -> bool:
        """Whether some query may not see a key of the first blocks that it visits, which are the last to be visited."""
        return self.low is not None or self.ranges is not None

    @property
    def groups(self) -> int:
        return self.block_q // 64

    @property
    def blocks(self) -> int:
        return self.query_blocks * self.batch * self.heads

    @property
    def query_stages(self) -> int:
        """Blocks of queries that shared memory holds: the next comes while one is worked on, if there is room."""
        return 2 if self.loops and not self.out_in_query else 1

    @property
    def out_in_query(self) -> bool:
        """Whether the output leaves by the shared memory of the queries, for want of more."""
        return self.key_width == self.value_width == 256


@dataclasses.dataclass(frozen=True)
class Backward(_Call):
    """
    Attributes:
        functions, masks_anywhere, ranges, lists: as of `Forward`, seen from blocks of keys.
        numbers: where operands tell which blocks of queries to visit, an array tells as the how-manieth each comes to
            them: how many of its matrices there are from one batch and from one key head to the next.
    """

    functions: "Functions | None" = None
    masks_anywhere: bool = False
    ranges: int | None = None
    lists: Lists | None = None
    numbers: tuple[int, int] | None = None

    @property
    def slope(self) -> float:
        return super().slope if self.functions is None else self.functions.slope

    @property
    def masked(self) -> bool:
        """Whether some query does not see all keys of some block that it visits."""
        masks = self.functions is not None and self.functions.masks
        return masks or (self.low, self.high) != (None, None) or self.keys % self.block_k > 0

    @property
    def query_blocks(self) -> int:
        """Lists name several at a time, to the last of them."""
        rows = 1 if self.lists is None else self.lists.rows
        return -(-super().query_blocks // rows) * rows

    # dquery leaves in parts of 64 by 64, two of them in a turn.

    @property
    def by_rows(self) -> bool:
        """Whether parts are of one and the same columns."""
        return self.key_width == 64

    @property
    def turns(self) -> int:
        """Of a block of queries."""
        return self.block_q * self.key_width // (2 * 64 * 64)


def _width(head_dim: int) -> int:
    """The width of blocks: powers of two, filled up with zeros."""
    return max(64, 1 << (head_dim - 1).bit_length())


def _widest(query, value) -> int:
    return max(_width(query.shape[-1]), _width(value.shape[-1]))


def backward_block_k(query, value) -> int:
    """Keys of a block in the backward pass."""
    return 64 if _widest(query, value) == 256 else 128


def obstacle(query, key, value, scale: float, target: Target | None) -> str | None:
    """Why this schedule does not serve a call, as a clause, or None."""
    if target is None or target.compute_capability != 90:
        return "the chip is no Hopper"
    if not has_gluon():
        return "it needs Triton 3.9"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it multiplies 16-bit numbers, and the operands are {query.dtype}"
    for x in query, key, value:
        if x.shape[-1] % 8 or not 40 <= x.shape[-1] <= WIDEST:
            return f"it takes head dims that are multiples of 8 from 40 to {WIDEST}, and one is {x.shape[-1]}"
    if scale <= 0:
        return f"it takes positive scales, and this is {scale}"
    if math.prod(query.shape[:-1]) >= 2**31:
        return "it counts queries in 32 bits"
    return None


def forward_tiles(query, key, value, *, low: int | None, high: int | None, target: Target) -> Iterator[ForwardTile]:
    wide = _widest(query, value)
    (batch, keys, key_heads, _), heads = key.shape, query.shape[2]
    # A program for several blocks saves what lies between two. Where blocks differ much in length, the hardware hands
    # them out better, but not where all heads are worked on together, the longest blocks of all first.
    loops = wide == 128 if low is None and high is None else query.shape[1] <= 4096
    if low is not None and high is not None:  # blocks are alike, and those at work see no more of a head than this
        loops, keys = True, min(keys, high - low + 128 * target.sms)
    programs = target.sms if loops else 0
    head_bytes = keys * (key.shape[-1] + value.shape[-1]) * key.dtype.itemsize
    together = _fitting(CACHE * 6 // 10 // head_bytes * (heads // key_heads), batch * heads)
    if batch * key_heads * head_bytes <= CACHE:
        together = batch * heads
    groups, block_k, stages = {64: (3, 128, 2), 128: (2, 128, 2), 256: (2, 64, 2)}[wide]
    if wide == 64 and (low, high) != (None, None):  # masks take registers that three groups do not have
        groups, stages = 2, 3
    first = ForwardTile(groups, block_k, stages, together, programs)
    yield first
    for other in {0, target.sms} - {programs}:
        yield first._replace(programs=other)
    for factor in (0.25, 0.5, 2, 4):
        yield first._replace(together=_fitting(int(factor * together), batch * heads))
    if wide == 64:
        yield first._replace(groups=5 - groups, stages=groups)


def backward_tiles(query, key, value, *, low, high) -> Iterator[BackwardTile]:
    batch, queries, heads, head_dim = query.shape
    key_heads = key.shape[2]
    # Query and dout in 16 bits, dquery in 32. A program that sees a part of the queries holds but a part in the cache,
    # and of a key head's query heads one after the other.
    head_bytes = queries * head_dim * 8 * -(-heads // (2 * key_heads))
    part = 1 if low is None and high is None else 2
    together = _fitting(CACHE * 6 // 10 * part // head_bytes, batch * key_heads)
    first = BackwardTile(128 if _widest(query, value) == 64 else 64, 2, together)
    yield first
    for factor in (0.25, 0.5, 2, 4):
        yield first._replace(together=_fitting(int(factor * together), batch * key_heads))


def _fitting(number: int, most: int) -> int:
    return max(1, min(number, most))


def _descriptor(x, rows: int, columns: int | None = None):
    """How the Tensor Memory Accelerator sees an array (batch, length, heads, width): blocks of rows of one head, of all
    its columns if not told how many."""
    batch, length, heads, width = x.shape
    strides = (length * heads * width, width, heads * width, 1)
    return _tensor(x, (batch, heads, length, width), strides, (1, 1, rows, columns or _width(width)))


def _tensor(x, shape, strides, block, layout=None):
    import jax_triton
    from triton.experimental.gluon import language as gl

    element = {"bfloat16": gl.bfloat16, "float16": gl.float16, "float32": gl.float32}[x.dtype.name]
    layout = layout or gl.NVMMASharedLayout.get_default_for(list(block), element)
    return jax_triton.TensorDescriptor(x, shape, strides, block, layout)


def _sizes(query, key, value) -> dict[str, Any]:
    (batch, queries, heads, key_dim), (keys, key_heads) = query.shape, key.shape[1:3]
    widths = dict(key_width=_width(key_dim), value_width=_width(value.shape[-1]))
    return dict(batch=batch, queries=queries, keys=keys, heads=heads, key_heads=key_heads, **widths)


ARRAYS = 8  # of operands that the kernels have room for


def _optional(arrays: Sequence, most: int) -> tuple:
    return (*arrays, *[None] * (most - len(arrays)))


def forward(
    query,
    key,
    value,
    origin,
    *,
    tile: ForwardTile,
    scale: float,
    low: int | None,
    high: int | None,
    visits: Sequence = (),
    arrays: Sequence = (),
    flags: bool = False,
    options: Mapping[str, Any] = MappingProxyType({}),
):
    """The output, and the logarithm of the sum of exponentials of scores; and with `flags`, an int32: the size of the
    batch, if something is not finite of the output, else 0. `origin` is None or an int32 scalar."""
    from jtile.ops.attention.hopper.forward_kernel import attention

    block_q = 64 * tile.groups
    blocks = -(-query.shape[1] // block_q) * query.shape[0] * query.shape[2]
    programs = min(tile.programs or blocks, blocks)
    call = Forward(
        **_sizes(query, key, value),
        low=low,
        high=high,
        scale=scale,
        block_q=block_q,
        block_k=tile.block_k,
        stages=tile.stages,
        together=tile.together,
        loops=programs < blocks,
        flags=flags,
        **options,
    )
    out = jax.ShapeDtypeStruct((*query.shape[:-1], value.shape[-1]), query.dtype)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    *results, found, _ = triton_call(
        _descriptor(query, 64),
        _descriptor(key, call.block_k),
        _descriptor(value, call.block_k),
        origin,
        *_optional(visits, 2),
        *_optional(arrays, ARRAYS),
        _descriptor(out, 64),
        kernel=attention,
        out_shape=(out, jax.ShapeDtypeStruct(query.shape[:-1], jnp.float32), number, number),
        zeroed_outputs=[n for n, is_used in ((2, flags), (3, call.loops)) if is_used],
        grid=programs,
        S=call,
    )
    return *results, *[found] * flags


def backward(
    query,
    key,
    value,
    out,
    lse,
    dout,
    dlse,
    *,
    origin,
    tile: BackwardTile,
    scale: float,
    low: int | None,
    high: int | None,
    visits: Sequence = (),
    arrays: Sequence = (),
    flags: bool = False,
    options: Mapping[str, Any] = MappingProxyType({}),
):
    """The gradients of query, key and value; and with `flags`, an int32: the size of the batch, if something is not
    finite of the keys or of their gradients, else 0. (Where these are finite, so is the gradient of query.)"""
    from triton.experimental.gluon import language as gl

    from jtile.ops.attention.hopper.backward_kernel import attention_backward

    width = _widest(query, value)
    call = Backward(
        **_sizes(query, key, value) | dict(key_width=width, value_width=width),
        low=low,
        high=high,
        scale=scale,
        block_q=tile.block_q,
        block_k=backward_block_k(query, value),
        stages=tile.stages,
        together=tile.together,
        flags=flags,
        **options,
    )
    batch, queries, heads, _ = query.shape
    # What the kernel subtracts from scores, in powers of two, and from the weights' gradients. A query that sees no key
    # has the weights 2^-inf.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, math.log2(math.e) * lse)
    padded = call.query_blocks * call.block_q
    ends = [(0, 0), (0, padded - queries), (0, 0)]
    lse = jnp.pad(lse, ends, constant_values=jnp.inf)  # nor has one past the end
    # XLA is not to make the sums while it puts the two together: that takes several times as long.
    delta = jax.lax.optimization_barrier(row_sums(out, dout, dlse))
    statistics = jnp.stack([lse, jnp.pad(delta, ends)]).transpose(0, 1, 3, 2)
    plain = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=4)
    strides = (batch * heads * padded, heads * padded, padded, 1)
    sums = jax.ShapeDtypeStruct(query.shape, jnp.float32)
    like_key_and_value = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key, value)]
    turns = jax.ShapeDtypeStruct((batch * heads * call.query_blocks * call.turns + 1,), jnp.int32)
    dquery, dkey, dvalue, turns = triton_call(
        _descriptor(query, call.block_q, width),
        _descriptor(key, 64, width),
        _descriptor(value, 64, width),
        _descriptor(dout, call.block_q, width),
        _tensor(statistics, statistics.shape, strides, (2, 1, 1, call.block_q), plain),
        origin,
        *_optional(visits, 3),
        *_optional(arrays, ARRAYS),
        _descriptor(sums, 64, 64),
        *(_descriptor(x, 64, width) for x in like_key_and_value),
        kernel=attention_backward,
        out_shape=(sums, *like_key_and_value, turns),
        zeroed_outputs=(3,),
        grid=call.key_blocks * call.key_heads * batch,
        S=call,
    )
    # No program has written where queries see no key.
    position = jnp.arange(queries) + (0 if origin is None else origin)
    if high is not None:
        dquery = jnp.where((position + high >= 0)[:, None, None], dquery, 0)
    if low is not None:
        dquery = jnp.where((position + low < call.keys)[:, None, None], dquery, 0)
    return (scale * dquery).astype(query.dtype), dkey, dvalue, *[turns[-1]] * flags
