"""Refs read and written in turn: where the threads of a program must wait for each other.

A tile's elements are spread over the program's threads. What one of them stores, another sees only after a barrier, and
Triton, which puts barriers around shared memory, puts none around arrays. Two accesses by one pattern need none: each
thread reads what it wrote itself. Of a tile with fewer elements than threads, though, several threads hold the same
element: all of them load it, and one stores it.
"""

import dataclasses
import math
import re
from collections.abc import Iterable

from jtile.compiler.value import tile

NAME = re.compile(r"[A-Za-z_]\w*")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where along one dimension an access is: at constant + the terms' sum + 0 to reach."""

    terms: tuple[tuple[str, int], ...]
    constant: int
    reach: float
    lanes: str

    @property
    def names(self) -> set[str]:
        return {name for text in (self.lanes, *(t for t, _ in self.terms)) for name in NAME.findall(text)}

    def apart(self, other: "Place") -> bool:
        """Whether the two certainly have no element in common."""
        ends = self.constant + self.reach, other.constant + other.reach
        return self.terms == other.terms and (ends[0] < other.constant or ends[1] < self.constant)


@dataclasses.dataclass(frozen=True)
class Touch:
    """An access to an array: a load, a store or an atomic operation, by a tile of this shape.

    Attributes:
      shared: the tile has fewer elements than there are threads.
    """

    array: str
    kind: str
    shape: tuple[int, ...]
    shared: bool
    places: tuple[Place, ...]

    @property
    def names(self) -> set[str]:
        return {name for place in self.places for name in place.names}

    def waits_for(self, earlier: "Touch", changed: Iterable[str] = ()) -> bool:
        """Whether a barrier must come between; `changed` are names that have other values by now.

        Stores of one pattern in several turns of a loop are taken to be of different elements.
        """
        if self.array != earlier.array or (self.kind == earlier.kind and self.kind != "store"):
            return False
        stores = self.kind == earlier.kind == "store"
        if stores and not self.shape and not earlier.shape:
            return False  # one thread stores all numbers that are no tiles
        if self.shape == earlier.shape and self.places == earlier.places:
            if stores or not (self.shared or self.names & set(changed)):
                return False
        return not any(
            a.apart(b) and a.names.isdisjoint(changed) for a, b in zip(self.places, earlier.places, strict=True)
        )


class Order:
    """The accesses since the last barrier, as the source is written."""

    def __init__(self, threads: int, aliases: dict[str, str]):
        self.threads = threads
        self.aliases = aliases  # names of one buffer, to one of them
        self._pending: list[Touch] = []
        self._turns: list[_Turn] = []  # the loops and branches that are open

    def touch(self, kind: str, name: str, shape: tuple[int, ...], indices) -> bool:
        """Notes an access; returns whether a barrier must come before it."""
        places = tuple(
            Place(tuple((v.text, k) for v, k in i.start.terms), i.start.constant, i.reach, i.lanes) for i in indices
        )
        shared = math.prod(tile(shape)) < self.threads
        touch = Touch(self.aliases.get(name, name), kind, shape, shared, places)
        barrier = any(touch.waits_for(earlier) for earlier in self._pending)
        if barrier:
            self.barrier()
        for turn in self._turns:
            if not turn.begun:
                turn.first.append(touch)
        if touch not in self._pending:
            self._pending.append(touch)
        return barrier

    def barrier(self) -> None:
        """Notes one."""
        self._pending.clear()
        for turn in self._turns:
            turn.begun = True

    def enter(self) -> None:
        self._turns.append(_Turn(list(self._pending), [turn.begun for turn in self._turns]))

    def leave(self, changed: set[str] | None) -> tuple[bool, bool]:
        """Ends a branch, or a turn of a loop in which these names change.

        Returns: whether a barrier must end it, and whether it holds any.
        """
        turn = self._turns.pop()
        barrier = changed is not None and any(
            later.waits_for(earlier, changed) for later in turn.first for earlier in self._pending
        )
        # The branch may not be taken, and the loop take no turn.
        for outer, begun in zip(self._turns, turn.outer_begun, strict=True):
            outer.begun = begun
        inside = [] if barrier else self._pending
        self._pending = turn.before + [touch for touch in inside if touch not in turn.before]
        return barrier, barrier or turn.begun


@dataclasses.dataclass
class _Turn:
    """A loop's turn, or a branch: what was pending before it, and its accesses up to its first barrier."""

    before: list[Touch]
    outer_begun: list[bool]
    begun: bool = False
    first: list[Touch] = dataclasses.field(default_factory=list)
