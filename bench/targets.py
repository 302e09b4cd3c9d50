"""What jtile's kernels are held to, beside what they reached: `python -m bench report` makes the table.

A target is a figure of some cases and passes of `cases.py`, and the least or the most that it may be. A rival that has
no such kernel, or a wrong one, sets no mark; jtile's own gap or wrong result misses it. A target is met where nothing
misses it and everything is measured.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from bench.cases import BACKWARD, BOTH, CASES, FORWARD, MIB, Case

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Measured:
    """The rows of each run, the last one first, by case, pass and rival; those of training steps, by contender."""

    runs: Sequence[Mapping[tuple[str, str, str], Row]]
    steps: Mapping[str, Row]

    @classmethod
    def of(cls, rows: Iterable[Row], steps: Iterable[Row]) -> "Measured":
        by_run: dict[int, dict] = collections.defaultdict(dict)
        for row in rows:
            by_run[row["run"]][row["case"], row["pass"], row["rival"]] = row
        runs = [by_run[run] for run in sorted(by_run, reverse=True)]
        return cls(runs, {row["contender"]: row for row in steps})

    def together(self, *places: tuple[str, str, str]) -> tuple[Row | None, ...]:
        """What the last run that has rows for all of these found: figures of two runs are not compared."""
        having = (run for run in self.runs if all(place in run for place in places))
        run = next(having, {})
        return tuple(run.get(place) for place in places)


Figures = dict[str, float | None]  # by place; None is not measured


@dataclasses.dataclass(frozen=True)
class Target:
    """`figures`, or with `mean` their geometric mean, may be no less than `least` or no more than `most`."""

    what: str
    figures: Callable[[Measured], Figures]
    least: float | None = None
    most: float | None = None
    mean: bool = False

    def holds(self, figure: float) -> bool:
        """To what is shown, in three digits."""
        figure = round(figure, 3)
        return figure >= self.least if self.least is not None else figure <= self.most


# Figures of a case and pass


def valid(row: Row | None) -> bool:
    return row is not None and "gap" not in row and row.get("right", True)


def share(found: Measured, case: Case, direction: str) -> float | None:
    """Of the speed of a copy, or of cuBLAS."""
    (mine,) = found.together((case.name, direction, "jtile"))
    return mine and (mine["share"] if valid(mine) else 0.0)


def over(rival: str) -> Callable:
    """jtile's speed over the rival's."""
    return functools.partial(_ratio, rival, lambda mine, other: other["seconds"] / mine["seconds"], 0.0)


def part_of(rival: str, field: str) -> Callable:
    """jtile's seconds or bytes as a part of the rival's."""
    return functools.partial(_ratio, rival, lambda mine, other: mine[field] / other[field], math.inf)


def _ratio(rival, ratio, worst, found: Measured, case: Case, direction: str) -> float | None:
    mine, other = found.together(*((case.name, direction, name) for name in ("jtile", rival)))
    if mine is None or other is None:
        return None
    if not valid(mine):
        return worst
    return ratio(mine, other) if valid(other) else math.nan


def of_plain(found: Measured, case: Case, direction: str) -> float | None:
    """The rate on the blocks that are left over that of the same attention without its feature."""
    plain = next(other for other in CASES if other.name == case.plain)
    mine, base = found.together(*((of.name, direction, "jtile") for of in (case, plain)))
    if mine is None or not valid(base):
        return None
    return base["seconds"] / plain.blocks / (mine["seconds"] / case.blocks) if valid(mine) else 0.0


def each(chosen: Callable[[Case], bool], figure: Callable, *passes: str) -> Callable[[Measured], Figures]:
    """The figure of each case and pass that is chosen, where the rival has something."""

    def figures(found: Measured) -> Figures:
        values = {
            _place(case, direction if len(passes) > 1 else ""): figure(found, case, direction)
            for case in CASES
            for direction in passes
            if chosen(case) and direction in case.work
        }
        return {place: value for place, value in values.items() if value is None or not math.isnan(value)}

    return figures


def _place(case: Case, direction: str) -> str:
    return ", ".join([case.size if attention(case) else case.name, *filter(None, [direction])])


def of_steps(field: str) -> Callable[[Measured], Figures]:
    """jtile's training steps, each over XLA's."""

    def figures(found: Measured) -> Figures:
        steps = {name: row for name, row in found.steps.items() if "gap" not in row}
        base = steps.get("XLA and cuDNN")
        ours = ["jtile", *(name for name in steps if name.startswith("jtile, "))]
        return {name: steps[name][field] / base[field] if base and name in steps else None for name in ours}

    return figures


# Cases

ELEMENTWISE = "silu_mul", "adamw"  # jtile has no kernels for them


def rowwise(case: Case) -> bool:
    """Norms, softmax, rotations, gated activations and dropout."""
    return case.unit == "B" and case.op not in (*ELEMENTWISE, "softmax_cross_entropy")


def large(case: Case) -> bool:
    return rowwise(case) and case.table in ("core", "widths") and case.bytes >= 256 * MIB


def named(name: str) -> Callable[[Case], bool]:
    return lambda case: case.name.startswith(name)


def sized(least: int, most: int = 1024) -> Callable[[Case], bool]:
    """Of the sweep over sizes, in MiB."""
    return lambda case: case.table == "sizes" and least * MIB <= case.at <= most * MIB


def attention(case: Case) -> bool:
    return case.op == "dot_product_attention"


def plain(*head_dims: int) -> Callable[[Case], bool]:
    """Attention without features, of these head dims or any."""

    def chosen(case: Case) -> bool:
        if not attention(case) or case.plain is not None:
            return False
        return not head_dims or case.operands["query"].keywords["shape"][-1] in head_dims

    return chosen


def of(*features: str) -> Callable[[Case], bool]:
    return lambda case: attention(case) and any(feature in case.size.split() for feature in features)


in_memory = of("packed", "prefix", "alibi")  # as a mask or bias, which cuDNN skips no block for


def sparse(case: Case) -> bool:
    return of("packed", "window")(case) and "×32768×" in case.name


def featured(case: Case) -> bool:
    return attention(case) and case.plain is not None and not sparse(case)


def beside(rival: str, mean: float, least: float | None = None) -> Iterator[Target]:
    """Attention of the core cases, with features and without, in each pass."""
    for direction in FORWARD, BOTH:
        figures = each(lambda case: attention(case) and case.table == "core", over(rival), direction)
        yield Target(f"Attention, speed over {rival}, {direction}: geometric mean", figures, least=mean, mean=True)
        if least is not None:
            yield Target("… each", figures, least=least)


OVER_XLA, OVER_CUDNN = over("XLA"), over("cuDNN")
SECONDS, BYTES = part_of("XLA", "seconds"), part_of("XLA", "temporary_bytes")
FAST, LEAN = (named(f"linear_cross_entropy{mean} 8192×4096×128256") for mean in ("_mean", ""))

# By the file in bench/results that has what was tried, and the arguments for what misses.
TARGETS = {
    "norms": [
        Target("Row-wise ops, 256 MiB, of a copy's speed: forward", each(large, share, FORWARD), least=0.95),
        Target("… backward alone", each(large, share, BACKWARD), least=0.9),
        Target("Row-wise ops, speed over XLA's: from 16 MiB", each(sized(16), OVER_XLA, FORWARD, BACKWARD), least=1),
        Target("… 1 MiB", each(sized(1, 1), OVER_XLA, FORWARD, BACKWARD), least=0.833),
    ],
    "cross_entropy": [
        Target(
            "Cross-entropy, value and gradient, of a copy's speed at 3 passes",
            each(named("softmax_cross_entropy 8192×128256"), share, BOTH),
            least=0.9,
        ),
    ],
    "linear_cross_entropy": [
        Target("Linear cross-entropy, of XLA's time: gradients formed forward", each(FAST, SECONDS, BOTH), most=1),
        Target("… of its memory", each(FAST, BYTES, BOTH), most=0.45),
        Target("… logits formed again, of XLA's time", each(LEAN, SECONDS, BOTH), most=1.25),
        Target("… of its memory", each(LEAN, BYTES, BOTH), most=0.1),
        Target("… forward alone, of XLA's time", each(LEAN, SECONDS, FORWARD), most=1),
        Target("… of its memory", each(LEAN, BYTES, FORWARD), most=0.02),
    ],
    "training_1b": [
        Target("Training step of Llama 1b, tokens/s over XLA's with cuDNN", of_steps("tokens_per_second"), least=1.2),
        Target("… of its peak memory", of_steps("peak_bytes"), most=0.6),
    ],
    "attention": [
        Target(
            "Plain attention, speed over cuDNN's: head dim 128, forward",
            each(plain(128), OVER_CUDNN, FORWARD),
            least=1,
        ),
        Target("… 64 and 256, forward", each(plain(64, 256), OVER_CUDNN, FORWARD), least=0.95),
        Target("… forward and backward", each(plain(), OVER_CUDNN, BOTH), least=0.95),
        Target("… over tokamax's Mosaic kernels'", each(plain(), over("tokamax Mosaic"), FORWARD, BOTH), least=1),
        *beside("FlexAttention", mean=1.3, least=1.1),
        *beside("tokamax Triton", mean=1.6),
        Target("Masks that cuDNN reads whole, speed over it", each(in_memory, OVER_CUDNN, FORWARD, BOTH), least=1),
        Target("Features, rate on the blocks left, of plain", each(featured, of_plain, FORWARD, BOTH), least=0.85),
        Target("Windows and documents in 32k, of the ideal speed-up", each(sparse, of_plain, FORWARD, BOTH), least=0.8),
    ],
}


# As Markdown

SHOWN = 4  # of those that miss a target


def table(found: Measured) -> str:
    """Each target, what was reached, and whether that meets it."""
    lines = ["| target | asked | reached | |", "| --- |" + " --- |" * 3]
    for file, targets in TARGETS.items():
        lines += [_line(target, target.figures(found), f"bench/results/{file}.md") for target in targets]
    return "\n".join(lines)


def _line(target: Target, figures: Figures, why: str) -> str:
    asked = f"≥ {target.least:g}" if target.least is not None else f"≤ {target.most:g}"
    known = {place: value for place, value in figures.items() if value is not None}
    if not known:
        return f"| {target.what} | {asked} | not measured by the bench | [tried]({why}) |"
    values = sorted(known.values())
    low, high = values[0], values[-1]
    reached = _number(low) if low == high else f"{_number(low)} to {_number(high)}"
    missed = sorted((value, place) for place, value in known.items() if not target.holds(value))
    if target.mean:
        mean = math.exp(sum(math.log(max(value, 1e-9)) for value in values) / len(values))
        reached, missed = f"{_number(mean)} ({reached})", [] if target.holds(mean) else missed
    elif missed and len(figures) > 1:
        places = missed if target.least is not None else missed[::-1]
        listed = ", ".join(f"{place} {_number(value)}" for value, place in places[:SHOWN])
        reached += f"; {len(missed)} of {len(known)} miss it: {listed}{', …' * (len(missed) > SHOWN)}"
    if len(known) < len(figures):
        reached += f"; {len(figures) - len(known)} of {len(figures)} not measured"
    mark = f"[missed]({why})" if missed else "met" if len(known) == len(figures) else "so far met"
    return f"| {target.what} | {asked} | {reached} | {mark} |"


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "gap"
