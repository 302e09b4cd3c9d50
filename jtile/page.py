"""One page on what kernels became: resources, a picture of their tiles, and their lines side by side."""

import ast
import html
import json
import linecache
import math
import os.path
import re
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.extend.core import jaxpr_as_fun

from jtile.compiler.kernel import Kernel, Place, Ref
from jtile.compiler.launch import Launch
from jtile.compiler.target import Target
from jtile.report import report

escape = html.escape


def page(title: str, launches: Mapping[Target, Sequence[Launch]], chosen: Sequence[Target] = ()) -> str:
    """HTML that shows the kernels that a function launches on each of some chips, first the lines for those `chosen`.

    The page needs nothing else: no network and no library.
    """
    kernels: dict[tuple[str, int], dict[Target, Launch]] = {}
    for target, found in launches.items():
        counts: dict[str, int] = {}
        for one in found:
            number = counts[one.compiled.name] = counts.get(one.compiled.name, 0) + 1
            kernels.setdefault((one.compiled.name, number), {})[target] = one
    sections = (
        _section(f"k{i}", f"{name} {number}" if number > 1 else name, by_target, chosen)
        for i, ((name, number), by_target) in enumerate(kernels.items())
    )
    return _PAGE.format(title=escape(title), style=_STYLE, script=_SCRIPT, sections="\n".join(sections))


def _section(key: str, name: str, launches: Mapping[Target, Launch], chosen: Sequence[Target]) -> str:
    views, tabs = [], []
    first = next((target for target in chosen if target in launches), next(iter(launches)))
    for i, (target, one) in enumerate(launches.items()):
        pressed, hidden = ("true", "") if target == first else ("false", " hidden")
        tabs.append(f'<button data-view="{key}-{i}" aria-pressed="{pressed}">{escape(target.name)}</button>')
        views.append(f'<div class="view" id="{key}-{i}"{hidden}>{_panes(one)}</div>')
    pictures: dict[str, list[str]] = {}
    for target, one in launches.items():
        pictures.setdefault(_picture(one), []).append(target.name)
    shown = "".join(
        (f"<p>On {escape(', '.join(names))}:</p>" if len(pictures) > 1 else "") + picture
        for picture, names in pictures.items()
    )
    return (
        f"<section><h2>{escape(name)}</h2>\n{_resources(launches)}\n"
        f"<h3>Which program reads and writes which tile</h3>\n{shown}\n"
        f'<h3>Line by line</h3>\n<p class="tabs">{"".join(tabs)}</p>\n{"".join(views)}</section>'
    )


def _resources(launches: Mapping[Target, Launch]) -> str:
    def row(target: Target, one: Launch) -> list[str]:
        r = report(one, target)
        return [
            f"{target.name} (sm_{target.compute_capability})",
            " × ".join(map(str, one.grid)),
            f"{r.threads:,}",
            f"{r.registers}",
            f"{r.spill_bytes:,} B",
            f"{r.shared_bytes:,} B",
            str(r.occupancy),
            f"{r.tensor_core_instructions:,}",
            f"{r.tma_instructions:,}",
            ", ".join(f"{n} {name}" for name, n in r.instructions.items()),
        ]

    head = ["chip", "grid", "threads", "registers", "spills", "shared memory", "occupancy", "tensor core", "TMA"]
    cells = lambda tag, row: "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)  # noqa: E731
    rows = "".join(f"<tr>{cells('td', row(t, one))}</tr>" for t, one in launches.items())
    return f"<table><tr>{cells('th', [*head, 'instructions'])}</tr>{rows}</table>"


# Line by line


def _panes(one: Launch) -> str:
    """Pallas, Triton and assembly side by side. Lines that belong together share `data-t`, the line in Triton, or
    `data-p`, the line in Pallas."""
    text = one.source.text if one.source else one.compiled.source
    origins = one.source.origins if one.source else ()
    lines = dict(enumerate(text.splitlines(), one.first_line))
    place_of = {n: origins[n - one.first_line] for n in lines if n - one.first_line < len(origins)}
    places = sorted({place for place in place_of.values() if place})

    def of(n: int | None) -> dict[str, str]:
        if n not in lines:
            return {}
        place = place_of.get(n)
        return {"t": str(n)} | ({"p": str(places.index(place))} if place else {})

    triton = "".join(_line(n, line, of(n)) for n, line in lines.items())
    file = f"<jtile {one.source.name} {one.source.digest}>" if one.source else None
    assembly = "".join(_line(None, line, of(n)) for n, line in _assembly(one.compiled.ptx, file))
    panes = {"Triton": triton, "PTX": assembly}
    if places:
        panes = {"Pallas": _pallas(places), **panes}
    return "".join(
        f'<div class="pane" data-pane="{name}"><h4>{name}</h4><pre>{body}</pre></div>' for name, body in panes.items()
    )


def _line(number: int | None, text: str, data: Mapping[str, str]) -> str:
    attributes = "".join(f' data-{key}="{value}"' for key, value in data.items())
    count = "" if number is None else f"<i>{number}</i>"
    return f"<span{attributes}>{count}{escape(text) or ' '}</span>"


def _pallas(places: Sequence[Place]) -> str:
    """The functions that the places lie in, file by file."""
    parts = []
    for file in dict.fromkeys(place.file for place in places):
        numbers = [place.line for place in places if place.file == file]
        parts.append(f"<span><b>{escape(os.path.basename(file))}</b></span>")
        last = None
        for n in sorted({n for span in _functions(file, numbers) for n in span}):
            if last is not None and n != last + 1:
                parts.append("<span>⋯</span>")
            last = n
            data = {"p": str(places.index(Place(file, n)))} if n in numbers else {}
            parts.append(_line(n, linecache.getline(file, n).rstrip("\n"), data))
    return "".join(parts)


def _functions(file: str, numbers: Sequence[int]) -> list[range]:
    """For each line of a file, the lines of the innermost function around it, or that line alone."""
    text = "".join(linecache.getlines(file))
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)] if text else []
    spans = sorted((range(n.lineno, (n.end_lineno or n.lineno) + 1) for n in nodes), key=len)
    return [next((span for span in spans if n in span), range(n, n + 1)) for n in numbers]


def _assembly(ptx: str, file: str | None) -> Iterator[tuple[int | None, str]]:
    """The body of the kernel in PTX: for each instruction the line of the source that it belongs to, and its text."""
    body = ptx[ptx.find(".entry") :]
    body = body[: body.find("\n}\n")]
    inside = re.compile(rf"{re.escape(file)}:(\d+):" if file else r"\.loc\s+1\s+(\d+)")
    line, assembler, fresh = None, False, False
    for text in body.splitlines():
        # Inside of inline assembly LLVM counts its lines as if they were the source's: only the first holds.
        if "end inline asm" in text:
            assembler = False
        elif "begin inline asm" in text:
            assembler, fresh = True, True
        elif text.lstrip().startswith(".loc"):
            found = inside.findall(text)
            if found and (not assembler or fresh):
                line = int(found[-1])
            fresh = False
        elif text.strip() and not text.lstrip().startswith(("//", "$L__tmp")):
            yield line, text.split("//")[0].rstrip().replace("\t", "  ")


# The picture

MOST_PROGRAMS = 128
MOST_PANELS = 4  # matrices of one array


def _picture(one: Launch) -> str:
    if one.kernel is None:
        return "<p>The kernel is written by hand: what its programs read is in its pointers, which nobody declared.</p>"
    if one.kernel.num_sizes:
        return "<p>A size of the grid is traced: how many programs there are is known when they run.</p>"
    programs, complete = _first_programs(one.kernel)
    names = [f"({', '.join(map(str, ids))})" for ids in programs]
    colours = [f"hsl({300 * i // max(1, len(programs))} 60% 55%)" for i in range(len(programs))]
    note = "" if complete else f" The first {len(programs):,} of {math.prod(one.kernel.known_grid):,} are drawn."
    return (
        f'<div class="picture" data-names="{escape(json.dumps(names))}">'
        "<p>Each program has a colour, and a tile that of the first that uses it. Point at a program to see its tiles, "
        f"or at a tile to see its programs.{note} "
        f'<output></output></p><div class="arrays">{_programs(one.kernel, programs, colours)}'
        f"{''.join(_array(ref, verb, programs, colours) for ref, verb in _uses(one.kernel))}</div></div>"
    )


def _first_programs(kernel: Kernel) -> tuple[np.ndarray, bool]:
    """The positions of the programs that start first, and whether those are all. As in the launch, the first axis runs
    fastest, and those that `jax.vmap` added slowest."""
    grid = kernel.known_grid
    order = [a for a in range(len(grid)) if a not in kernel.mapped] + list(reversed(kernel.mapped))
    shown, room = [1] * len(grid), MOST_PROGRAMS
    for axis in order:
        shown[axis] = min(grid[axis], room)
        room //= shown[axis]
    ids = np.indices([shown[a] for a in reversed(order)]).reshape(len(grid), math.prod(shown))[::-1]
    return ids[np.argsort(order)].T, list(shown) == list(grid)


def _starts(ref: Ref, programs: np.ndarray) -> np.ndarray | None:
    """Where the block of each program begins in each dimension; None where that hangs on values."""
    if ref.index_map is None:
        return np.zeros((len(programs), len(ref.shape)), int)
    prefetched = ref.index_map.invars[programs.shape[1] :]
    if any(v is p for eqn in ref.index_map.eqns for v in eqn.invars for p in prefetched):
        return None

    def at(*ids):
        return jaxpr_as_fun(ref.index_map)(*ids, *prefetched)  # which it does not read

    indices = jax.vmap(at)(*programs.T.astype(np.int32)) if programs.shape[1] else at()
    steps = [dimension.step for dimension in ref.block]
    return np.stack([np.broadcast_to(i, len(programs)) * s for i, s in zip(indices, steps, strict=True)], axis=1)


def _programs(kernel: Kernel, programs: np.ndarray, colours: Sequence[str]) -> str:
    columns = len(np.unique(programs[:, 0])) if programs.shape[1] else 1
    columns = min(columns, 16)
    rows = -(-len(programs) // columns)
    rects = "".join(
        f'<rect x="{i % columns * 14}" y="{i // columns * 14}" width="13" height="13" fill="{colour}" '
        f'data-programs="{i}"><title>program ({", ".join(map(str, ids))})</title></rect>'
        for i, (ids, colour) in enumerate(zip(programs, colours, strict=True))
    )
    grid = " × ".join(map(str, kernel.grid)) or "1"
    return (
        f"<figure><figcaption><b>programs</b> {grid}</figcaption>"
        f'<svg width="{columns * 14}" height="{rows * 14}" role="img">{rects}</svg></figure>'
    )


def _uses(kernel: Kernel) -> Iterator[tuple[Ref, str]]:
    """Each array, and what programs do to it."""
    verbs = {"ReadEffect": "read", "WriteEffect": "written", "AccumEffect": "added to"}
    for i, (ref, variable) in enumerate(zip(kernel.refs, kernel.jaxpr.invars, strict=False)):  # scratch comes after
        if i < kernel.num_prefetched:
            yield ref, "prefetched"
            continue
        effects = {type(e).__name__ for e in kernel.jaxpr.effects if getattr(e, "input", None) is variable}
        yield ref, " and ".join(verb for effect, verb in verbs.items() if effect in effects) or "unused"


def _array(ref: Ref, verb: str, programs: np.ndarray, colours: Sequence[str]) -> str:
    """An array, and on it the block of each program."""
    caption = f"<b>{escape(ref.name)}</b> {ref.dtype.name}[{', '.join(map(str, ref.shape))}], {verb}"
    starts = _starts(ref, programs)
    if starts is None:
        return f"<figure><figcaption>{caption}: blocks that operands choose</figcaption></figure>"
    sizes = [dimension.size for dimension in ref.block]
    # As a matrix, or several: of the last two dimensions that are cut into tiles, for each place in the others.
    cut = [d for d in range(len(sizes)) if len(set(starts[:, d])) > 1][-2:]
    whole = [d for d in range(len(sizes)) if d not in cut]
    drawn = sorted([*whole[max(0, len(whole) + len(cut) - 2) :], *cut])
    others = [d for d in range(len(sizes)) if d not in drawn]
    matrices: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
    for i, start in enumerate(starts.tolist()):
        tiles = matrices.setdefault(tuple(start[d] for d in others), {})
        tiles.setdefault(tuple(start[d] for d in drawn), []).append(i)
    panels = [
        _matrix(dict(zip(others, place, strict=True)), tiles, drawn, sizes, ref.shape, colours)
        for place, tiles in list(matrices.items())[:MOST_PANELS]
    ]
    rest = f"<p>and {len(matrices) - MOST_PANELS} more like these</p>" if len(matrices) > MOST_PANELS else ""
    return f"<figure><figcaption>{caption}</figcaption>{''.join(panels)}{rest}</figure>"


def _matrix(place: dict[int, int], tiles, drawn: list[int], sizes, shape, colours) -> str:
    """The tiles of an array that lie at a `place` in the dimensions that are not `drawn`."""
    pad = [1] * (2 - len(drawn))  # vectors are drawn as one row
    extents, blocks = [*pad, *(shape[d] for d in drawn)], [*pad, *(sizes[d] for d in drawn)]
    tiles = {(0,) * len(pad) + start: programs for start, programs in tiles.items()}
    (low, high), (left, right) = ((min(s[d] for s in tiles), max(s[d] + blocks[d] for s in tiles)) for d in (0, 1))
    counts = [len({s[d] for s in tiles}) for d in (0, 1)]
    height, width = (min(320, max(28, 16 * n)) for n in counts)
    width = min(320, max(width, 96))
    y_scale, x_scale = height / (high - low), width / (right - left)

    def rect(row: float, column: float, rows: float, columns: float, attributes: str, title: str) -> str:
        return (
            f'<rect x="{(column - left) * x_scale:.2f}" y="{(row - low) * y_scale:.2f}" '
            f'width="{columns * x_scale:.2f}" height="{rows * y_scale:.2f}" {attributes}><title>{title}</title></rect>'
        )

    def words(start: Sequence[int] | None) -> str:
        """A tile, or all tiles of the picture, as indices of the array."""
        at = place if start is None else place | dict(zip(drawn, start[len(pad) :], strict=True))
        return f"[{', '.join(_slice(at[d], size) if d in at else ':' for d, size in enumerate(sizes))}]"

    rects = []
    for (row, column), programs in tiles.items():
        attributes = f'fill="{colours[programs[0]]}" data-programs="{" ".join(map(str, programs))}"'
        rects.append(rect(row, column, *blocks, attributes, words((row, column))))
    # What lies past the array's edges is neither read nor written.
    edges = [(low, left, 0 - low, right - left), (low, left, high - low, 0 - left)]
    edges += [(extents[0], left, high - extents[0], right - left), (low, extents[1], high - low, right - extents[1])]
    rects += [
        rect(*e, 'class="outside"', "past the edge: 0 is read, nothing written") for e in edges if e[2] > 0 and e[3] > 0
    ]
    part = [
        f"{name} {max(0, a)} to {min(b, n)} of {n}"
        for name, a, b, n in (("rows", low, high, extents[0]), ("columns", left, right, extents[1]))
        if a > 0 or b < n
    ]
    label = f"{words(None)} " if place else ""
    caption = f"<small>{label}{', '.join(part)}</small>" if label or part else ""
    svg = f'<svg width="{width}" height="{height}" role="img">{"".join(rects)}</svg>'
    return f"<div>{svg}{caption}</div>"


def _slice(start: int, size: int) -> str:
    return str(start) if size == 1 else f"{start}:{start + size}"


_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{sections}
<script>{script}</script>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --lit: light-dark(#ffe58a, #5b4a00); --rule: light-dark(#ccc, #444); }
body { font: 14px/1.4 system-ui, sans-serif; margin: 1.5rem; }
table { border-collapse: collapse; }
th, td { border: 1px solid var(--rule); padding: .2rem .6rem; text-align: right; white-space: nowrap; }
td:last-child { white-space: normal; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
.view:not([hidden]) { display: flex; gap: .75rem; }
.pane { flex: 1; min-width: 0; }
.pane pre { height: 70vh; overflow: auto; border: 1px solid var(--rule); margin: 0; position: relative; }
.pane span { display: block; min-width: max-content; padding-right: 1rem; }
.pane span[data-t], .pane span[data-p] { cursor: pointer; }
.pane i { display: inline-block; width: 3.5em; padding-right: 1em; text-align: right; font-style: normal; opacity: .5; }
.pane .lit { background: var(--lit); }
[aria-pressed="true"] { font-weight: bold; }
.arrays { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; }
figure { margin: 0; }
svg { background: light-dark(#f4f4f4, #222); display: block; margin-top: .3rem; }
svg rect { stroke: light-dark(#fff, #000); stroke-width: .5; }
svg .outside { fill: light-dark(#fffc, #000c); stroke: none; }
.picture.pointing rect[data-programs]:not(.lit) { opacity: .15; }
"""

_SCRIPT = """
for (const button of document.querySelectorAll("button[data-view]"))
  button.onclick = () => {
    for (const other of button.parentElement.children) {
      other.setAttribute("aria-pressed", other === button);
      document.getElementById(other.dataset.view).hidden = other !== button;
    }
  };
for (const view of document.querySelectorAll(".view")) {
  const lines = [...view.querySelectorAll("span[data-t], span[data-p]")];
  const pane = line => line.closest(".pane").dataset.pane;
  const related = line => lines.filter(other => pane(line) === "Pallas" || pane(other) === "Pallas"
    ? other.dataset.p !== undefined && other.dataset.p === line.dataset.p : other.dataset.t === line.dataset.t);
  const at = event => event.target.closest("span[data-t], span[data-p]");
  view.onmouseover = event => {
    if (!at(event)) return;
    for (const line of lines) line.classList.remove("lit");
    for (const line of related(at(event))) line.classList.add("lit");
  };
  view.onclick = event => {
    if (!at(event)) return;
    for (const box of view.querySelectorAll("pre")) {
      const line = related(at(event)).find(other => box.contains(other));
      if (line && !box.contains(event.target)) box.scrollTop = line.offsetTop - box.clientHeight / 2;
    }
  };
}
for (const picture of document.querySelectorAll(".picture")) {
  const rects = [...picture.querySelectorAll("rect[data-programs]")];
  const of = rect => rect.dataset.programs.split(" ");
  const names = JSON.parse(picture.dataset.names);
  picture.onmouseover = event => {
    const rect = event.target.closest("rect[data-programs]");
    picture.classList.toggle("pointing", rect !== null);
    if (!rect) return picture.querySelector("output").textContent = "";
    const chosen = new Set(of(rect));
    for (const other of rects) other.classList.toggle("lit", of(other).some(p => chosen.has(p)));
    picture.querySelector("output").textContent =
      (chosen.size > 1 ? "Programs " : "Program ") + [...chosen].slice(0, 12).map(p => names[p]).join(" ")
      + (chosen.size > 12 ? " …" : "");
  };
}
"""
