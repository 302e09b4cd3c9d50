"""What varies from one call of attention to another, as functions of one score and its place.

Every feature is a case of three things, and the schedules (`kernels.py`) know of nothing else:

1. `score`: (score, place, operands) -> score, elementwise: bias, soft cap, `score_mod`. Its derivative is a number for
   each element, which `jax.jvp` takes in the backward kernels.
2. `visible`: (place, operands) -> whether the query may see the key: causal order, windows, lengths, segments, masks,
   `mask_mod`.
3. which blocks of keys a block of queries visits, and the other way round: `visits.py`. Blocks visible as a whole skip
   `visible`.

Dropout takes a fourth, `keep`, which weights count; sinks change where the softmax's sums begin, and nothing else.

The functions are of numbers, for one batch, head, query and key. `over` maps them over a block, so what depends on the
query alone is computed once a query. Operands are named by the axes that they have of `b h q k`; a broadcast axis is
one that an operand lacks.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtile.ops.attention.mods import Mod
from jtile.ops.random_bits import BITS, COLUMNS, random_bits

# A score below this counts as masked. The kernels' running maximum starts here, so that it is always finite.
FLOOR = -1e38


class Place(NamedTuple):
    """Where a score stands: positions in the whole arrays, whichever part of them a device or a block has."""

    batch: Any
    head: Any
    query: Any
    key: Any


class Operand(NamedTuple):
    """An operand of attention other than query, key and value.

    `axes` are those of `b h q k` that it has; lists of blocks have `i` and `j`, blocks of queries and of keys, and for
    `k`'s heads `g`. An array of any other shape, read by indices, has none of them and its `rank`. `origin` is where
    key 0 stands among the queries: it tells a device with a part of the queries that its first one is query -origin.
    """

    name: str
    axes: str
    rank: int | None = None

    @property
    def elementwise(self) -> bool:
        return self.rank is None and self.name not in ("sinks", "origin") and not set("ij") & set(self.axes)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One call's features: what is static about them, and which operands they have.

    Attributes:
        scale: factor of the products of query and key.
        operands: the operands that are present, in order.
        window: how many keys to the left and to the right of its own position a query sees; None for all. Causal
            attention sees none to the right.
        offset: query i stands at position i + offset among the keys; where it is an operand it adds to this.
        soft_cap: c in c · tanh(score / c).
        dropout: the share of weights that are dropped, in units of 2⁻¹⁶.
        score_mod, mask_mod: the user's functions.
        block_size: queries and keys of a block in the lists of blocks.
        square: whether there are as many queries as keys, those of all devices counted.
    """

    scale: float
    operands: tuple[Operand, ...] = ()
    window: tuple[int | None, int | None] = (None, None)
    offset: int = 0
    soft_cap: float | None = None
    dropout: int = 0
    score_mod: Mod | None = None
    mask_mod: Mod | None = None
    block_size: tuple[int, int] | None = None
    square: bool = False

    def has(self, *names: str) -> bool:
        return any(operand.name in names for operand in self.operands)

    def named(self, arrays) -> dict[str, jax.Array]:
        return dict(zip((operand.name for operand in self.operands), arrays, strict=True))

    @property
    def kind(self) -> str:
        """What its tiles depend on, beside operands."""
        found = {
            "causal": self.window == (None, 0),
            "window": self.window not in ((None, None), (None, 0)),
            "cap": self.soft_cap is not None,
            "dropout": self.dropout > 0,
            "score_mod": self.score_mod is not None,
            "mask_mod": self.mask_mod is not None,
            "blocks": self.block_size is not None,
        }
        return " ".join(name for name, has in found.items() if has)

    @property
    def bounds(self) -> tuple[int | None, int | None]:
        """Query i sees keys from i + low to i + high, both included; None is no bound."""
        left, right = self.window
        return None if left is None else self.offset - left, None if right is None else self.offset + right

    @property
    def is_band(self) -> bool:
        """Whether there is no more to it than scale and bounds."""
        return not (self.modifies or self.dropout or self.masks_by_data or self.has("sinks", "query_offset"))

    @property
    def splits_queries(self) -> bool:
        """Whether devices may share out the queries: lists of blocks are of all of them."""
        return self.block_size is None

    @property
    def numbers_queries(self) -> bool:
        """Whether it matters which query a query is."""
        mods = self.score_mod is not None or self.mask_mod is not None
        return self.window != (None, None) or self.dropout > 0 or mods or self.has("query_lengths")

    # What the schedules leave out where it is not asked for.

    @property
    def modifies(self) -> bool:
        """Whether scores are more than scaled products."""
        return self.soft_cap is not None or self.score_mod is not None or self.has("bias")

    @property
    def masks(self) -> bool:
        """Whether some keys are not for some queries to see."""
        return self.window != (None, None) or self.masks_by_data

    @property
    def masks_by_data(self) -> bool:
        """Whether operands tell which: then what is masked may be anything, NaN included, and must not leak."""
        return self.mask_mod is not None or self.has("query_lengths", "key_lengths", "query_segments", "mask")

    @property
    def masks_anywhere(self) -> bool:
        """Whether nothing tells beforehand which blocks are visible as a whole."""
        return self.block_size is None and (self.mask_mod is not None or self.has("mask"))

    @property
    def empties_rows(self) -> bool:
        """Whether a query may see no key at all."""
        starts = self.offset < 0 or self.has("query_offset") or self.window[0] is not None
        return self.masks_by_data or (self.masks and starts)

    # The functions. `x` maps the names of operands to numbers, or to functions of indices for arrays that are read.

    def score(self, score, place: Place, x: Mapping[str, Any]):
        if "bias" in x:
            score = score + x["bias"].astype(score.dtype)
        if self.soft_cap is not None:
            # c · tanh(s / c), by a function that is exact where the score is large, and whose derivative is finite.
            score = self.soft_cap * (2 * jax.nn.sigmoid(2 / self.soft_cap * score) - 1)
        if self.score_mod is not None:
            score = self.score_mod((score, *place), reader(x, "score")).astype(score.dtype)
        return score

    def visible(self, place: Place, x: Mapping[str, Any]):
        left, right = self.window
        tests = []
        if left is not None or right is not None:
            own = place.query + self.offset
            own = own + x["query_offset"] if "query_offset" in x else own
            tests += [] if left is None else [place.key >= own - left]
            tests += [] if right is None else [place.key <= own + right]
        if "query_lengths" in x:
            tests.append(place.query < x["query_lengths"])
        if "key_lengths" in x:
            tests.append(place.key < x["key_lengths"])
        if "query_segments" in x:
            tests.append(x["query_segments"] == x["key_segments"])
        if "mask" in x:
            tests.append(x["mask"])
        if self.mask_mod is not None:
            tests.append(self.mask_mod(place, reader(x, "mask")))
        return both(*tests)

    # Dropout draws for eight keys at once, so it is a function of a block.

    def keep(self, key, plane, queries, keys):
        """Which weights of a block count: `queries` and `keys` number its rows and columns, a multiple of eight."""
        groups = keys.reshape(-1, COLUMNS)[:, 0] // COLUMNS
        bits = random_bits((key[0], key[1]), queries[:, None], groups[None], plane)
        return bits >= jnp.uint32(self.dropout)

    @property
    def kept_factor(self) -> float:
        """What the weights that count are multiplied by."""
        return 2**BITS / (2**BITS - self.dropout) if self.dropout < 2**BITS else 0.0


def reader(x: Mapping[str, Any], which: str) -> Callable[..., Any]:
    """How a mod reads the arrays that it closes over."""
    return lambda number, indices: x[f"{which}_array_{number}"](*indices)


def both(*tests):
    """Whether all hold."""
    result = True
    for test in tests:
        result = test if result is True else result & test
    return result


def over(axes: str, function: Callable, *arguments: tuple[Any, str]):
    """`function` of numbers on arrays: each is given with the axes that it has, in their order in `axes`."""
    values = [value for value, _ in arguments]
    for axis in reversed(axes):
        function = jax.vmap(function, in_axes=[0 if axis in own else None for _, own in arguments])
    return function(*values)


def with_slope(score: Callable) -> Callable:
    """An elementwise function and its derivative."""

    def both_of(value, *rest):
        return jax.jvp(lambda s: score(s, *rest), (value,), (jnp.ones_like(value),))

    return both_of


def first_query(x: Mapping[str, Any]):
    """The number of a device's first query, of its operands or of references to them."""
    return -x["origin"][...] if "origin" in x else 0


LOG2_E = math.log2(math.e)
