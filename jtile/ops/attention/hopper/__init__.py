"""Attention's schedule for Hopper, in Gluon (Triton's language for schedules): `forward.py` and `backward.py`."""

import dataclasses
import functools
import math


@dataclasses.dataclass(frozen=True)
class Forward:
    """A forward call and its schedule, all of it known when compiling.

    Attributes:
        groups: of four warps, with 64 queries each.
        block_k: keys of a block.
        stages: blocks of keys, and of values, that shared memory holds.
        turns: whether groups take turns in sending off products.
        by_polynomial: how many of four exponentials are computed without the special function units.
        out_in_query: whether the output leaves by the queries' shared memory.
        together: heads that are worked on at the same time.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    key_heads: int
    key_width: int
    value_width: int
    low: int | None
    high: int | None
    slope: float
    groups: int
    block_k: int
    stages: int
    turns: bool
    by_polynomial: int
    out_in_query: bool
    together: int

    @property
    def block_q(self) -> int:
        return 64 * self.groups

    @property
    def query_blocks(self) -> int:
        return -(-self.queries // self.block_q)

    @property
    def key_blocks(self) -> int:
        return -(-self.keys // self.block_k)

    @property
    def tiles(self) -> int:
        return self.query_blocks * self.batch * self.heads

    @property
    def group(self) -> int:
        return self.heads // self.key_heads


@dataclasses.dataclass(frozen=True)
class Backward:
    """A backward call and its schedule, all of it known when compiling.

    Attributes:
        block_q: queries of a block, 64 or 128.
        stages: blocks of queries that shared memory holds.
        together: key heads that are worked on at the same time.
    """

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
    stages: int
    together: int

    block_k = 128

    @property
    def slope(self) -> float:
        return self.scale * math.log2(math.e)

    @property
    def query_blocks(self) -> int:
        return -(-self.queries // self.block_q)

    @property
    def key_blocks(self) -> int:
        return -(-self.keys // self.block_k)

    @property
    def group(self) -> int:
        return self.heads // self.key_heads

    @property
    def masked(self) -> bool:
        """Whether some query does not see all keys of some block that it visits."""
        return (self.low, self.high) != (None, None) or self.keys % self.block_k > 0

    # Each group makes half of a block of dquery: half of its rows, or half of its columns.

    @property
    def dq_rows(self) -> int:
        return 64 if self.block_q == 128 else 0

    @property
    def dq_columns(self) -> int:
        return 0 if self.block_q == 128 else self.key_width // 2

    @property
    def dq_width(self) -> int:
        return self.dq_columns or self.key_width
