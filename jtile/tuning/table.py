"""What is known of tiles, and the choice of one for a call."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from jtile.compiler.cache import write_file
from jtile.compiler.target import Target
from jtile.context import setting

if TYPE_CHECKING:
    from jtile.op.primitive import TileOp

FORMAT = 1  # of files

# How far sizes may be apart, in powers of two over all dimensions, for one call's tile to tell about another's.
FARTHEST = 6

Pairs = tuple[tuple[str, Any], ...]


class Problem(NamedTuple):
    """A call as its tile depends on it, each part as pairs of name and value: one device's part of the call where it is
    split. Of options that are floats, such as an epsilon, the values do not count; of objects their `kind` does."""

    op: str
    dtypes: Pairs  # of the operands given
    options: Pairs
    sizes: Pairs  # of the dimensions, "..." for all leading ones

    @classmethod
    def of(cls, op: TileOp, operands: Sequence[jax.ShapeDtypeStruct | None], options: Pairs) -> Problem:
        terms = op.signature.operands
        sizes, leading = op.signature.check(op.name, [None if x is None else x.shape for x in operands])
        if any(t.leading for t in terms):
            sizes = {"...": math.prod(leading), **sizes}
        kinds = ((name, getattr(value, "kind", value)) for name, value in options)
        return cls(
            op.name,
            tuple((t.name, x.dtype.name) for t, x in zip(terms, operands, strict=True) if x is not None),
            tuple((name, v) for name, v in kinds if v is None or isinstance(v, bool | int | str)),
            tuple(sizes.items()),
        )

    @property
    def kind(self) -> tuple:
        """What must be the same for one call to tell anything about another."""
        return self.op, self.dtypes, self.options, tuple(name for name, _ in self.sizes)

    @property
    def bucket(self) -> tuple[int, ...]:
        return tuple((n - 1).bit_length() for _, n in self.sizes)

    def distance(self, other: Problem) -> float:
        """From sizes to sizes, in powers of two."""
        pairs = zip(self.sizes, other.sizes, strict=True)
        return sum(abs(math.log2(max(1, n)) - math.log2(max(1, m))) for (_, n), (_, m) in pairs)

    def __str__(self) -> str:
        return f"{self.op} {' '.join(f'{name}={n}' for name, n in self.sizes)} {self.dtypes[0][1]}"


class Entry(NamedTuple):
    """The tile found best for a call on a chip, and how long it took: seconds of one call, beside the heuristic's."""

    problem: Problem
    chip: str
    compute_capability: int  # 90 for 9.0
    tile: Any  # as JSON has it, in tuples
    seconds: float
    untuned_seconds: float
    shipped: bool = False

    def as_json(self) -> dict[str, Any]:
        return {
            "op": self.problem.op,
            "chip": self.chip,
            "compute_capability": self.compute_capability,
            **{name: dict(getattr(self.problem, name)) for name in ("dtypes", "options", "sizes")},
            "tile": _as_dicts(self.tile),
            "microseconds": round(self.seconds * 1e6, 2),
            "untuned_microseconds": round(self.untuned_seconds * 1e6, 2),
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any], shipped: bool = False) -> Entry:
        problem = Problem(fields["op"], *(tuple(fields[name].items()) for name in ("dtypes", "options", "sizes")))
        times = fields["microseconds"] * 1e-6, fields["untuned_microseconds"] * 1e-6
        chip = fields["chip"], fields["compute_capability"]
        return cls(problem, *chip, _as_pairs(fields["tile"]), *times, shipped)


class Choice(NamedTuple):
    """A call's tile, and why: "tuned", "shipped", what it was taken over from, or "heuristic"."""

    tile: Any
    source: str


class Tuning:
    """Tiles that were found best, for calls on chips. Inside `with tuning:` they are in force.

    `tuning | other` has the entries of both, and where both know a call those of `other`. `save` writes a file to read,
    to edit and to commit, which `jtile.tuning.load` reads.

    Functions that `jax.jit` compiled outside of the `with` block are compiled anew inside, and the other way round.

    Example:
        >>> import jtile
        >>> tuning = jtile.tuning.Tuning()
        >>> with tuning | tuning:
        ...     len(jtile.tuning.current())
        0
    """

    def __init__(self, entries: Iterable[Entry] = ()):
        chosen = {(e.chip, e.problem.kind, e.problem.bucket): e for e in entries}
        self.entries = tuple(sorted(chosen.values(), key=lambda e: (e.problem.op, e.chip, repr(e.problem))))
        self._hash = hash(self.entries)
        self._contexts = threading.local()

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tuning) and self.entries == other.entries

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"Tuning of {len(self)} calls"

    def __str__(self) -> str:
        """A line for each call."""
        return "\n".join(
            f"{e.problem} on {e.chip}: {json.dumps(_as_dicts(e.tile))}, {e.seconds * 1e6:.1f} µs, "
            f"{e.untuned_seconds / e.seconds:.2f} times as fast as untuned"
            for e in self
        )

    def __or__(self, other: Tuning) -> Tuning:
        return Tuning((*self, *other))

    def __enter__(self) -> Tuning:
        context = _in_force(current() | self)
        context.__enter__()
        self._stack.append(context)
        return self

    def __exit__(self, *exception) -> None:
        self._stack.pop().__exit__(*exception)

    @property
    def _stack(self) -> list:
        """Of this thread: what is in force is a thread's own."""
        if not hasattr(self._contexts, "stack"):
            self._contexts.stack = []
        return self._contexts.stack

    def save(self, path: str | os.PathLike) -> None:
        """Writes a JSON file, one line for each call. Whoever reads it meanwhile sees the old one or the new."""
        path = Path(path)
        write_file(path, self.as_text().encode(), 0o644, f".{path.name}")

    def as_text(self) -> str:
        lines = ",\n".join(f"  {json.dumps(entry.as_json())}" for entry in self)
        return f'{{"format": {FORMAT}, "tiles": [\n{lines}\n]}}\n'

    @classmethod
    def from_text(cls, text: str, where: str, shipped: bool = False) -> Tuning:
        try:
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']}, and this version of jtile reads {FORMAT}")
            return cls(Entry.from_json(fields, shipped) for fields in content["tiles"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{where} is no file of tiles, as Tuning.save writes them: {what}") from error

    def find(self, problem: Problem, target: Target) -> list[Entry]:
        """What is known that may serve a call, best first.

        Where nothing was better than the heuristic, that tells nothing of other sizes, for which it may choose another.
        """

        def rank(entry: Entry) -> tuple:
            elsewhere = entry.chip != target.model
            return elsewhere, entry.problem.bucket != problem.bucket, entry.problem.distance(problem), entry.chip

        family = [e for e in self._by_kind.get(problem.kind, ()) if e.compute_capability == target.compute_capability]
        near = (e for e in family if e.problem.distance(problem) <= FARTHEST)
        telling = (e for e in near if e.problem.bucket == problem.bucket or e.seconds < e.untuned_seconds)
        return sorted(telling, key=rank)

    @functools.cached_property
    def _by_kind(self) -> dict[tuple, list[Entry]]:
        found: dict[tuple, list[Entry]] = {}
        for entry in self:
            found.setdefault(entry.problem.kind, []).append(entry)
        return found


def load(path: str | os.PathLike) -> Tuning:
    """Reads what `Tuning.save` wrote. In a job of several processes, what the first one reads is what all get.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file of tiles, or one of another format.
    """
    return Tuning.from_text(agreed(lambda: Path(path).read_text()), str(path))


def save(path: str | os.PathLike) -> None:
    """Writes what is in force."""
    current().save(path)


def current() -> Tuning:
    """What is in force, beside what is shipped."""
    return _in_force.value


# JAX compiles a function anew where this has another value.
_in_force = jax.make_user_context(Tuning())


@functools.cache
def shipped() -> Tuning:
    """What comes with jtile, for every chip."""
    files = importlib.resources.files(__package__) / "data"
    texts = {f.name: f.read_text() for f in files.iterdir() if f.name.endswith(".json")}
    return Tuning(e for name, text in sorted(texts.items()) for e in Tuning.from_text(text, name, shipped=True))


# The choice

_recorded: ContextVar[list[Call] | None] = ContextVar("recorded", default=None)


class Call(NamedTuple):
    """A call whose tile was chosen."""

    op: TileOp
    operands: tuple[jax.ShapeDtypeStruct | None, ...]
    options: Pairs
    target: Target | None

    @property
    def problem(self) -> Problem:
        return Problem.of(self.op, self.operands, self.options)

    @property
    def chip(self) -> Target:
        assert self.target is not None, "the kernel is interpreted"
        return self.target

    def entry(self, tile: Any, seconds: float = 0.0, untuned_seconds: float = 0.0) -> Entry:
        chip = self.chip
        return Entry(self.problem, chip.model, chip.compute_capability, encoded(tile), seconds, untuned_seconds)


def recording() -> AbstractContextManager[list[Call]]:
    """Collects every call whose tile is chosen inside, in order."""
    return setting(_recorded, [])


def choose(
    op: TileOp, operands: Sequence[jax.ShapeDtypeStruct | None], options: Pairs, target: Target | None
) -> Choice:
    """The tile of a call of an op that has tiles. It follows from the arguments and what is in force, so every process
    that lowers the same program makes the same choice.

    `operands` are one group's, `...` folded into one dimension.
    """
    call = Call(op, tuple(operands), options, target)
    if (calls := _recorded.get()) is not None:
        calls.append(call)
    return _choose(call, current())


@functools.lru_cache(maxsize=4096)
def _choose(call: Call, tuning: Tuning) -> Choice:
    offered = candidates(call)
    if call.target is not None:
        by_text = {encoded(tile): tile for tile in offered}
        for entry in (shipped() | tuning).find(call.problem, call.target):
            if entry.tile in by_text:
                return Choice(by_text[entry.tile], _source(entry, call.problem, call.target.model))
    return Choice(offered[0], "heuristic")


def _source(entry: Entry, problem: Problem, chip: str) -> str:
    text = "shipped" if entry.shipped else "tuned"
    if entry.problem.bucket != problem.bucket:
        text += f" for the nearest sizes, {', '.join(f'{name} {n}' for name, n in entry.problem.sizes)}"
    return text + f" on {entry.chip}" * (entry.chip != chip)


def candidates(call: Call) -> list:
    """The tiles that an op offers for a call, each once, its heuristic's first.

    Raises:
        ValueError: it offers none.
    """
    assert call.op.tiles_function is not None
    offered = call.op.tiles_function(*call.operands, target=call.target, **dict(call.options))
    found = list(dict.fromkeys(offered))
    if not found:
        raise ValueError(f"{call.op.name}: its @tiles function must yield at least the tile that runs untuned")
    return found


# Tiles as JSON: objects there, and pairs here, since entries must be hashable.


def fields(tile: Any) -> dict[str, Any] | None:
    """The parts of a tile that has some."""
    if dataclasses.is_dataclass(tile) and not isinstance(tile, type):
        return {field.name: getattr(tile, field.name) for field in dataclasses.fields(tile)}
    return tile._asdict() if hasattr(tile, "_asdict") else None


def _as_plain(tile: Any) -> Any:
    """Dictionaries in place of NamedTuples and dataclasses."""
    if (parts := fields(tile)) is not None:
        return {name: _as_plain(value) for name, value in parts.items()}
    if tile is not None and not isinstance(tile, bool | int | float | str):
        raise TypeError(f"a tile is a NamedTuple or frozen dataclass of numbers, or of such tiles; it has {tile!r}")
    return tile


def _as_pairs(plain: Any) -> Any:
    return tuple((name, _as_pairs(value)) for name, value in plain.items()) if isinstance(plain, dict) else plain


def _as_dicts(pairs: Any) -> Any:
    return {name: _as_dicts(value) for name, value in pairs} if isinstance(pairs, tuple) else pairs


def encoded(tile: Any) -> Any:
    """A tile as entries hold it."""
    return _as_pairs(_as_plain(tile))


# Several processes


def agreed(make: Callable[[], str]) -> str:
    """The text that `make` returns, in a job of several processes that of the first one."""
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return make()
    from jax.experimental import multihost_utils

    mine = np.frombuffer(make().encode() if jax.process_index() == 0 else b"", np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(mine.size)))
    padded = np.zeros(size, np.uint8)
    padded[: mine.size] = mine
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))).decode()
