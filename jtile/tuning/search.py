"""Finding the best tiles, on the GPU that is here."""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtile.compiler import cache
from jtile.report import launches
from jtile.tuning import timing
from jtile.tuning.table import Call, Entry, Tuning, agreed, candidates, encoded, fields, recording

CACHE = 64 << 20  # bytes, no smaller than the second-level cache of any supported chip
HOST = 200e-6  # seconds that a program takes the device at least, for the host to keep up
MOST_CALLS = 64  # in one program
NEAR = 1.2  # tiles this many times slower than the best at first sight are not looked at again

# The largest ‖got − expected‖ / ‖expected‖, by the bytes of an element of the result or the narrowest operand: of
# bfloat16 operands the reference rounds what it computes on the way to a float32 result.
TOLERANCE = {2: 2e-2, 4: 1e-3}


@dataclasses.dataclass(frozen=True)
class Found:
    """What the search for one call came to: the entry, and what became of the tiles that it tried."""

    call: Call
    entry: Entry
    tried: int
    refused: dict[str, str] = dataclasses.field(default_factory=dict)  # tile and reason


def autotune(fn: Callable, *args: Any, report: Callable[[str], None] | None = None) -> Tuning:
    """Measures which tiles are best for every call of a jtile op that a function makes, on this machine's GPU.

    The tiles that an op offers are compiled in parallel; of a kind that is not the untuned one's, and so of another
    kernel, one first, and the rest if it comes near. Those that do not fit the chip, or spill registers, are left out;
    the others are compared with what the op's reference computes, and then timed in turn on random operands that
    no cache holds. The function itself is compiled and not run. What was measured once is kept in jtile's cache on disk
    (`JTILE_CACHE_DIR`), which processes may share. A job of several processes takes the first one's results.

        with jtile.autotune(train_step, state, batch) as tuning:
            state = train_step(state, batch)
        tuning.save("tiles.json")

    Args:
        fn: any function of JAX arrays, differentiated, compiled and sharded as you like.
        args: its arguments, arrays or `jax.ShapeDtypeStruct`s.
        report: called with a line of text after each call that was tuned.

    Returns:
        The tiles found, in force inside of `with`. Beyond it, `save` them, and `jtile.tuning.load` them elsewhere.

    Raises:
        RuntimeError: there is no NVIDIA GPU here.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jtile
        >>> try:
        ...     with jtile.autotune(jtile.rms_norm, jnp.ones((4096, 1024), jnp.bfloat16), jnp.ones(1024)) as tuning:
        ...         pass  # in here, kernels have the best tiles found
        ... except RuntimeError as error:
        ...     print(error)
        tiles are measured on an NVIDIA GPU, and JAX finds none here
    """

    def measure() -> str:
        found = []
        for one in search(calls_of(fn, *args)):
            found.append(one.entry)
            if report is not None:
                report(str(Tuning([one.entry])))
        return Tuning(found).as_text()

    return Tuning.from_text(agreed(measure), "the first process' result")


def calls_of(fn: Callable, *args: Any) -> list[Call]:
    """The calls that a function makes on this machine's GPUs whose tile is a choice, each once: one device's part."""
    if not any(device.platform == "gpu" for device in jax.local_devices()):
        raise RuntimeError("tiles are measured on an NVIDIA GPU, and JAX finds none here")
    with recording() as calls:
        # A new function each time: JAX would take a lowering that it remembers, and no choice would be seen.
        lowered = jax.jit(lambda *args: fn(*args)).lower(*args)
        if len(jax.devices()) > 1:  # what XLA splits it does in compiling
            lowered.compile()
    chosen = [call for call in calls if call.target is not None and len(candidates(call)) > 1]
    return list({_key(call): call for call in chosen}.values())


def search(calls: Sequence[Call], step: Callable[[Call, int, int], None] = lambda *_: None) -> Iterator[Found]:
    """Tunes one call after the other. `step` is called with the call, how many tiles are compiled, and of how many."""
    for call in calls:
        yield _tuned(call, functools.partial(step, call))


def prepare(calls: Sequence[Call], part: int, parts: int) -> None:
    """Compiles this part of all that a search begins with, for the cache on disk."""
    every = [(call, tile) for call in calls for tile in _first(candidates(call))]
    for call, tile in every[part::parts]:
        with contextlib.suppress(Exception):  # a tile that does not fit: the search will say why
            _Trial(call).built(tile)


def _key(call: Call) -> str:
    """Of what was measured for a call, on disk."""
    import triton

    offered = [encoded(tile) for tile in candidates(call)]
    return cache.key_of("tile", triton.__version__, call.chip.model, call.problem, repr(call.options), offered)


def _tuned(call: Call, step: Callable[[int, int], None]) -> Found:
    refused: dict[str, str] = {}

    def measure() -> Entry:
        return _measured(call, step, refused)

    def encode(entry: Entry) -> bytes:
        return json.dumps(entry.as_json()).encode()

    entry = cache.fetch(_key(call), measure, encode, lambda body: Entry.from_json(json.loads(body)))
    return Found(call, entry, len(candidates(call)), refused)


def _measured(call: Call, step: Callable[[int, int], None], refused: dict[str, str]) -> Entry:
    offered = candidates(call)
    untuned = offered[0]
    trial = _Trial(call)
    right: dict[Any, Callable] = {}
    times: dict[Any, float] = {}

    def look_at(tiles: Sequence) -> None:
        """Compiles them, and times those that are right at first sight."""
        found = trial.right(trial.compiled([untuned, *(t for t in tiles if t != untuned)], refused, step), refused)
        new = {tile: program for tile, program in found.items() if tile not in right}
        right.update(new)
        times.update(timing.seconds({t: (new[t], [()]) for t in new}, rounds=1, settle=0.005, timed=0.01))

    first = _first(offered)
    look_at(first)
    best = min(times.values())
    near = {type(tile) for tile in times if times[tile] <= NEAR * best}
    others = [tile for tile in offered if tile not in first]
    refused.update({str(tile): "its kind is far from the best" for tile in others if type(tile) not in near})
    if more := [tile for tile in others if type(tile) in near]:
        look_at(more)
    if (both := _combined(untuned, times)) and both not in times:
        look_at([both])
    best = min(times.values())
    finalists = {t: (right[t], [()]) for t in times if times[t] <= NEAR * best or t == untuned}
    times = timing.seconds(finalists, rounds=4, settle=0.01, timed=0.02)
    winner = min(times, key=lambda tile: times[tile])
    if times[winner] > 0.99 * times[untuned]:  # within what measurements differ by
        winner = untuned
    return call.entry(winner, times[winner] / trial.count, times[untuned] / trial.count)


def _first(offered: Sequence) -> list:
    """What to look at first: tiles of the untuned one's kind, and one of each other kind, which has another kernel."""
    kinds = {type(tile): tile for tile in reversed(offered)}
    return [tile for tile in offered if type(tile) is type(offered[0]) or tile == kinds[type(tile)]]


def _combined(untuned: Any, times: dict[Any, float]) -> Any:
    """Of a tile made of tiles, one for each of several kernels, the best of each, among those that differ from the
    untuned one in that alone."""
    parts = fields(untuned)
    if parts is None or any(fields(part) is None for part in parts.values()):
        return None
    best = {}
    for name in parts:
        rest = {other: part for other, part in parts.items() if other != name}
        alone = [tile for tile in times if (fields(tile) or {}).items() >= rest.items()]
        best[name] = getattr(min(alone, key=lambda tile: times[tile]), name)
    return type(untuned)(**best)


class _Trial:
    """One call to be made with different tiles, on random operands."""

    def __init__(self, call: Call):
        self.call = call
        size = sum(x.size * x.dtype.itemsize for x in call.operands if x is not None)
        bandwidth = call.chip.memory_bandwidth or 2e12
        # Several calls in one program, each on operands of its own: more than a cache holds, and enough for the host to
        # keep up.
        least = max(2, math.ceil(4 * CACHE / max(1, size)), math.ceil(HOST * bandwidth / max(1, size)))
        self.count = min(MOST_CALLS, least)

    @functools.cached_property
    def sets(self) -> list[list[jax.Array]]:
        return [_operands(self.call, seed) for seed in range(self.count)]

    def function(self, *operands, implementation="triton"):
        """The op, of the operands that are there."""
        rest = iter(operands)
        full = [None if x is None else next(rest) for x in self.call.operands]
        results = self.call.op(*full, implementation=implementation, **dict(self.call.options))
        return [r for r in results if r is not None]

    def fitting(self, tiles: Sequence, refused: dict[str, str], step: Callable[[int, int], None]) -> list:
        """The tiles that fit and spill no more than they must; of those that launch the same kernels, the first."""
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as workers:
            done = {}
            # What is in force is a thread's own; so is the choice made in it.
            futures = {tile: workers.submit(contextvars.copy_context().run, self.built, tile) for tile in tiles}
            for i, (tile, future) in enumerate(futures.items()):
                try:
                    done[tile] = future.result()
                except Exception as error:  # too large, mostly; Triton also fails on some tiles
                    refused[str(tile)] = _brief(error)
                step(i + 1, len(tiles))
        spills = {tile: sum(one.compiled.spill_bytes for one in launched) for tile, launched in done.items()}
        least = min(spills.values(), default=0)
        kept: dict[Any, Any] = {}
        for tile, launched in done.items():
            if spills[tile] > least and tile != tiles[0]:
                refused[str(tile)] = f"spills {spills[tile]} bytes"
                continue
            same = tuple((one.compiled.cubin, one.grid) for one in launched)
            if same not in kept.values():
                kept[tile] = same
        return list(kept)

    def compiled(
        self, tiles: Sequence, refused: dict[str, str], step: Callable[[int, int], None]
    ) -> dict[Any, Callable]:
        """A program for each tile that fits.

        Raises:
          RuntimeError: the first, which runs untuned, does not.
        """
        kept = self.fitting(tiles, refused, step)
        if tiles[0] not in kept:
            raise RuntimeError(f"{self.call.op.name}: the tile that runs untuned cannot: {refused[str(tiles[0])]}")
        _ = self.sets  # before several threads ask for them
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as workers:
            programs = {tile: workers.submit(self._program, tile) for tile in kept}
            done = {}
            for tile, program in programs.items():
                try:
                    done[tile] = program.result()
                except Exception as error:  # what XLA is to compile: a library may not serve the call
                    if tile == tiles[0]:
                        raise
                    refused[str(tile)] = _brief(error)
            return done

    def built(self, tile: Any) -> list:
        shapes = [x for x in self.call.operands if x is not None]
        with Tuning([self.call.entry(tile)]):
            return launches(self.function, shapes, self.call.chip)

    def _program(self, tile: Any) -> Callable:
        with Tuning([self.call.entry(tile)]):
            many = jax.jit(lambda sets: [self.function(*operands) for operands in sets])
            compiled = many.lower(self.sets).compile()
        return functools.partial(compiled, self.sets)

    @functools.cached_property
    def expected(self) -> list[jax.Array] | None:
        """What the reference computes of the first operands; None where it takes more than a quarter of the memory."""
        reference = functools.partial(self.function, implementation="xla")
        quickly: Any = {"xla_gpu_autotune_level": 0}  # it runs once
        compiled = jax.jit(reference).lower(*self.sets[0]).compile(quickly)
        memory: Any = compiled.memory_analysis()
        affordable = (self.call.chip.memory_bytes or math.inf) / 4
        fits = memory.temp_size_in_bytes + memory.output_size_in_bytes <= affordable
        return compiled(*self.sets[0]) if fits else None

    def right(self, programs: dict[Any, Callable], refused: dict[str, str]) -> dict[Any, Callable]:
        """The programs that compute what the reference does, or the untuned one, the first, if that takes too much.

        Raises:
          RuntimeError: the untuned one does not.
        """
        results = {tile: program()[0] for tile, program in programs.items()}
        untuned, *_ = programs
        expected = self.expected or results[untuned]
        floats = (x.dtype for x in self.call.operands if x is not None and jnp.issubdtype(x.dtype, jnp.floating))
        narrowest = min((dtype.itemsize for dtype in floats), default=4)
        wrong = {tile: error for tile, got in results.items() if (error := _difference(got, expected, narrowest))}
        if untuned in wrong:
            raise RuntimeError(f"{self.call.op.name}: {untuned}, which runs untuned, is wrong: {wrong[untuned]}")
        refused.update({str(tile): error for tile, error in wrong.items()})
        return {tile: program for tile, program in programs.items() if tile not in wrong}


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _operands(call: Call, seed: int) -> list[jax.Array]:
    """Random ones: floats normal, positions along a dimension inside of it, other integers small. A single integer,
    such as where a sequence begins, is 0."""
    sizes, _ = call.op.signature.check(call.op.name, [None if x is None else x.shape for x in call.operands])
    made = []
    for i, (term, x) in enumerate(zip(call.op.signature.operands, call.operands, strict=True)):
        key = jax.random.fold_in(jax.random.key(seed), i)
        if x is None:
            continue
        if jnp.issubdtype(x.dtype, jnp.floating):
            made.append(jax.random.normal(key, x.shape, x.dtype))
        elif x.ndim == 0:
            made.append(jnp.zeros((), x.dtype))
        elif x.dtype == bool:
            made.append(jax.random.bernoulli(key, shape=x.shape))
        else:
            made.append(jax.random.randint(key, x.shape, 0, sizes[term.indexes] if term.indexes else 100, x.dtype))
    return made


def _difference(got: Sequence[jax.Array], expected: Sequence[jax.Array], narrowest: int = 4) -> str | None:
    """In words, where results differ by more than rounding."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        error, allowed = float(_relative(a, b)), TOLERANCE[min(4, a.dtype.itemsize, narrowest)]
        if not error <= allowed:
            return f"result {i} differs by {error:.1e} of its norm, and {allowed:.0e} is allowed"
    return None


@jax.jit
def _relative(a, b):
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    apart = jnp.where((a == b) | (jnp.isnan(a) & jnp.isnan(b)), 0.0, a - b)
    size = jnp.linalg.norm(jnp.where(jnp.isfinite(b), b, 0.0).ravel())
    return jnp.linalg.norm(apart.ravel()) / jnp.maximum(size, np.finfo(np.float32).tiny)
