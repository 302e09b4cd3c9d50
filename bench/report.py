"""What was measured, as tables and plots. Losses are shown like wins, and rivals that could not run are named."""

import collections
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import rich.table

from bench import cases, pallas, results, targets, training

README = Path(__file__).parent.parent / "README.md"
MARKS = "<!-- the bench: python -m bench report --write -->\n", "<!-- end of the bench -->\n"
PLOTS = results.ROOT / "plots"

Row = dict[str, Any]
FLOORS = ("copy", "cuBLAS")
COLORS = {
    "jtile": "#d62728",
    "XLA": "#1f77b4",
    "cuDNN": "#17becf",
    "tokamax Triton": "#9467bd",
    "tokamax Mosaic": "#c5b0d5",
    "tokamax XLA": "#e377c2",
    "torch.compile": "#ff7f0e",
    "SDPA": "#ffbb78",
    "FlexAttention": "#bcbd22",
    "Liger-Kernel": "#2ca02c",
    "copy": "#7f7f7f",
    "cuBLAS": "#7f7f7f",
}


# On the terminal


def rows_table(rows: Sequence[Row]) -> rich.table.Table:
    """One pass of a case, rival by rival."""
    took = (f"{what} {rows[0].get(f'took_{what}', 0):.1f} s" for what in ("compiling", "preparing", "timing"))
    title = f"{rows[0]['case']}, {rows[0]['pass']}: {', '.join(took)}"
    table = rich.table.Table(title=title, title_justify="left", title_style="bold")
    for name in ("rival", "time", "rate", "of the floor", "error", "memory", "first call"):
        table.add_column(name, justify="left" if name == "rival" else "right")
    for row in rows:
        if "gap" in row:
            table.add_row(row["rival"], "gap")
            continue
        wrong = "" if row["right"] else " [red]wrong[/]"
        floor = row["rival"] in FLOORS
        table.add_row(
            row["rival"],
            time(row),
            rate(row),
            f"{row['share']:.1%}",
            "" if floor else f"{row['error']:.1e}{wrong}",
            "" if floor else f"{row['extra_bytes'] / 2**30:.2f} GiB",
            "" if floor else f"{row['first_call_seconds']:.1f} s",
        )
    table.caption_justify, table.caption = "left", "\n".join(f"{r['rival']}: {r['gap']}" for r in rows if "gap" in r)
    return table


def time(row: Row) -> str:
    seconds = row["seconds"]
    text = f"{seconds * 1e6:,.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:,.2f} ms"
    return text + " by the host's clock" * (row.get("clock") == "host")


def rate(row: Row) -> str:
    return f"{row['rate'] / 1e12:.{0 if row['unit'] == 'FLOP' else 2}f} T{row['unit']}/s"


# As Markdown


def markdown(root: Path = results.ROOT) -> str:
    """The newest results of every chip: targets, the fastest in each core case, plots of cases and sweeps."""
    parts = []
    for path in results.newest(root=root):
        found = results.read(path)
        rows = in_order(results.latest(found["rows"]))
        core = [row for row in rows if row["table"] == "core"]
        page = f"bench/results/{path.parent.name}/{path.stem}.md"
        every = f"Every figure, with memory and times to first call: [{path.stem}.md]({page})."
        parts += [f"{heading(found)} {every}", targets.table(measured(path)), *summaries(core), *gap_list(core)]
        parts += plot_links(path.parent.name, rows)
    for path in results.newest("training_", root):
        parts.append(training.markdown(results.read(path)))
    for path in results.newest("pallas_", root):
        parts.append(pallas_section(results.read(path)))
    return "\n\n".join(parts) + "\n"


def in_order(rows: Iterable[Row]) -> list[Row]:
    """As the table of cases has them."""
    order = {case.name: i for i, case in enumerate(cases.CASES)}
    return sorted(rows, key=lambda row: order.get(row["case"], len(order)))


def measured(path: Path) -> targets.Measured:
    """The rows of a file, and the newest training steps of the same chip."""
    steps = [file for file in results.newest("training_", path.parents[1]) if file.parent == path.parent]
    return targets.Measured.of(
        results.read(path)["rows"], [row for file in steps for row in results.read(file)["rows"]]
    )


def heading(found: dict[str, Any]) -> str:
    used = {row.get("run", 0) for row in found["rows"]}
    runs = [run for i, run in enumerate(found["runs"]) if i in used]
    dates = sorted({run["date"] for run in runs})
    known = collections.ChainMap(*(run["versions"] for run in reversed(runs)))
    versions = ", ".join(f"{name} {version}" for name, version in known.items())
    commits = " and ".join(dict.fromkeys(run["commit"] for run in runs if run.get("commit", "unknown") != "unknown"))
    at = f", jtile at {commits} (the last run of each case counts)" * bool(commits)
    return (
        f"One {found['chip']}, {' and '.join(dates)}, {versions}{at}. Rivals take turns in one run, on inputs that no "
        "cache holds; each is checked against a float32 reference. The percentage is of the floor, measured in the "
        "same turns: a copy of as many bytes, or cuBLAS's product of two matrices of 8192×8192. The fastest is bold."
    )


def summaries(rows: Sequence[Row]) -> list[str]:
    """jtile and the fastest of its rivals, a line for each case."""
    parts = []
    for unit, about in ("B", "Of a copy's speed:"), ("FLOP", "Of cuBLAS's speed:"):
        chosen = [row for row in rows if row["unit"] == unit]
        passes = [direction for direction in cases.PASSES if any(row["pass"] == direction for row in chosen)]
        lines = [f"| case | {' | '.join(passes)} |", "| --- |" + " --- |" * len(passes)]
        for case in dict.fromkeys(row["case"] for row in chosen):
            by_pass = [[row for row in chosen if (row["case"], row["pass"]) == (case, d)] for d in passes]
            lines.append(f"| {case} | {' | '.join(map(_fastest, by_pass))} |")
        parts += [about, "\n".join(lines)] if chosen else []
    return parts


def _fastest(rows: Sequence[Row]) -> str:
    """Of one pass of a case: jtile's figure, and that of the fastest beside it."""
    rivals = [row for row in rows if row["rival"] not in FLOORS]
    mine = [row for row in rivals if row["rival"] == "jtile"]
    others = sorted((row for row in rivals if row not in mine and targets.valid(row)), key=lambda row: row["seconds"])
    shown = mine + others[:1]
    fastest = min((row["seconds"] for row in shown if targets.valid(row)), default=None)

    def cell(row: Row) -> str:
        if not targets.valid(row):
            return "gap" if "gap" in row else "wrong"
        text = f"**{row['share']:.0%}**" if row["seconds"] == fastest else f"{row['share']:.0%}"
        return text if row["rival"] == "jtile" else f"{row['rival']} {text}"

    return ", ".join(map(cell, shown))


def tables(rows: Sequence[Row]) -> list[str]:
    """Of cases bound by bandwidth and by products, and what is missing in them."""
    parts = []
    for unit, about in ("B", "Bound by memory"), ("FLOP", "Bound by matrix products"):
        if chosen := [row for row in rows if row["unit"] == unit]:
            parts += [f"{about}:", speed_table(chosen)]
    if memory := [row for row in rows if row["pass"] == "value and gradient" and "gap" not in row]:
        parts += ["Memory that a call takes beside its operands, value and gradient:", memory_table(memory)]
    return parts + gap_list(rows)


def speed_table(rows: Sequence[Row]) -> str:
    return _table(rows, _speeds)


def memory_table(rows: Sequence[Row]) -> str:
    return _table(
        [row for row in rows if row["rival"] not in FLOORS],
        lambda found: {name: f"{row['extra_bytes'] / 2**30:.2f} GiB" for name, row in found.items()},
    )


def _speeds(found: dict[str, Row]) -> dict[str, str]:
    fastest = min((r["seconds"] for n, r in found.items() if "gap" not in r and n not in FLOORS), default=None)

    def cell(name: str, row: Row) -> str:
        if "gap" in row:
            return "gap"
        if not row.get("right", True):
            return "wrong"
        share = f"{row['share']:.0%}" if "share" in row and name not in FLOORS else ""
        text = f"{share} ({rate(row)})" if share and name == "jtile" else share or rate(row)
        return f"**{text}**" if row["seconds"] == fastest else text

    return {name: cell(name, row) for name, row in found.items()}


def _table(rows: Sequence[Row], cells) -> str:
    """A line for each case and pass, a column for each rival."""
    names = [name for name in COLORS if any(row["rival"] == name for row in rows)]
    names = [name for name in names if name not in FLOORS] + [name for name in names if name in FLOORS]
    lines = [f"| case | pass | {' | '.join(names)} |", "| --- |" + " --- |" * (len(names) + 1)]
    for (case, direction), group in itertools.groupby(rows, lambda row: (row["case"], row["pass"])):
        text = cells({row["rival"]: row for row in group})
        lines.append(f"| {case} | {direction} | {' | '.join(text.get(name, '') for name in names)} |")
    return "\n".join(lines)


def gap_list(rows: Iterable[Row]) -> list[str]:
    """Why a rival has no figure, once for each reason."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for row in rows:
        if "gap" in row:
            found[f"{row['rival']} {row['gap']}"].append(f"{row['case']} {row['pass']}")
        elif not row.get("right", True):
            found[f"{row['rival']} is wrong by {row['error']:.1e}"].append(f"{row['case']} {row['pass']}")
    lines = [
        f"- {what}: {places[0] if len(places) == 1 else f'{len(places)} passes'}" for what, places in found.items()
    ]
    return ["Gaps:", "\n".join(lines)] if lines else []


def pallas_section(found: dict[str, Any]) -> str:
    about = (
        "Kernels that come with JAX (`jax.experimental.pallas.ops.gpu`), at their default tiles, and a matrix product",
        "in Pallas: through JAX's own backend, through jtile compiled as they are written, and with what jtile chooses",
        "itself ([what each choice gave](bench/results/pallas.md); `python -m bench pallas`). In brackets the speed-up",
        f"over JAX's backend. One {found['chip']}, {found['runs'][-1]['date']}.",
    )
    return "\n".join(about) + f"\n\n{pallas.table(found['rows'])}"


def plot_links(chip: str, rows: Sequence[Row]) -> list[str]:
    return [
        f"![{title}]({(PLOTS / f'{chip}_{name}.svg').relative_to(README.parent)})" for name, title, _ in plots(rows)
    ]


def write(root: Path = results.ROOT, readme: Path = README, folder: Path = PLOTS) -> None:
    """The tables between their marks in the README, every figure beside the results, and the plots."""
    before, mark, rest = readme.read_text().partition(MARKS[0])
    if not mark or MARKS[1] not in rest:
        raise ValueError(f"{readme} lacks the line {MARKS[0].strip()} or, after it, {MARKS[1].strip()}")
    for path in results.newest(root=root):
        found = results.read(path)
        rows = in_order(results.latest(found["rows"]))
        parts = [f"# {found['chip']}", heading(found), COLUMNS, runs(found)]
        for table in cases.TABLES:
            of_table, every = ([row for row in some if row["table"] == table] for some in (rows, found["rows"]))
            if of_table:
                parts += [f"## {table.capitalize()}", *tables(of_table), every_figure(every)]
        path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
        folder.mkdir(parents=True, exist_ok=True)
        for name, title, draw in plots(rows):
            _save(draw(title), folder / f"{path.parent.name}_{name}.svg")
    readme.write_text(before + mark + "\n" + markdown(root) + "\n" + MARKS[1] + rest.partition(MARKS[1])[2])


COLUMNS = (
    "Times are the device's. Memory is what a call takes beside its operands, its results among it: of JAX's calls as "
    "the compiled program says, of PyTorch's as its allocator does. A first call traces and compiles, or finds in the "
    "caches on disk what was compiled before (with `--cold` there is none). Tables have the last run of each case."
)


def runs(found: dict[str, Any]) -> str:
    """What was run, for whoever wants to run it again."""
    lines = ["| run | date | commit | command |", "| --- |" + " --- |" * 3]
    for i, run in enumerate(found["runs"]):
        command = run["command"].replace("|", r"\|")
        note = f"; {run['note']}" if "note" in run else ""
        lines.append(f"| {i} | {run['date']} | {run.get('commit', 'unknown')} | `{command}`{note} |")
    return "\n".join(lines)


def every_figure(rows: Sequence[Row]) -> str:
    lines = [
        "| case | pass | rival | run | time | rate | of the floor | error | memory | first call |",
        "| --- |" + " --- |" * 9,
    ]
    for row in (row for row in rows if "gap" not in row and "share" in row):
        rest = (
            ["", "", ""]
            if row["rival"] in FLOORS
            else [f"{row['error']:.1e}", f"{row['extra_bytes'] / 2**30:.3f} GiB", f"{row['first_call_seconds']:.1f} s"]
        )
        figures = [f"{row['seconds'] * 1e3:.4f} ms", rate(row), f"{row['share']:.1%}", *rest]
        lines.append(f"| {row['case']} | {row['pass']} | {row['rival']} | {row['run']} | {' | '.join(figures)} |")
    return "\n".join(lines)


# As plots

SWEEPS = {
    "sizes": "% of a copy's speed, by bytes of the first operand",
    "widths": "% of a copy's speed, by width of a row",
    "sequences": "Attention, % of cuBLAS's speed, by length of sequences",
}


CASES = {
    "memory": ("% of a copy's speed", lambda row: row["unit"] == "B" and row["op"] != "softmax_cross_entropy"),
    "cross_entropy": ("Cross-entropy, % of a copy's speed", lambda row: row["op"] == "softmax_cross_entropy"),
    "attention": ("Attention, % of cuBLAS's speed", lambda row: row.get("blocks") and not row["plain"]),
    "features": ("Attention with features, % of cuBLAS's speed", lambda row: row.get("plain")),
    "losses": (
        "Linear cross-entropy, % of cuBLAS's speed",
        lambda row: row["unit"] == "FLOP" and not row.get("blocks"),
    ),
}


def plots(rows: Sequence[Row]) -> list[tuple[str, str, Any]]:
    """Name, title and how to draw each plot that these rows have something for."""
    rows = [row for row in rows if "share" in row and row.get("right", True) and row["rival"] not in FLOORS]
    found = []
    for name, (title, belongs) in CASES.items():
        if chosen := [row for row in rows if row["table"] == "core" and belongs(row)]:
            found.append((name, title, lambda title, c=chosen: _bars(c, title)))
    for table, title in SWEEPS.items():
        if chosen := [row for row in rows if row["table"] == table]:
            found.append((table, title, lambda title, c=chosen: _lines(c, title)))
    return found


def _bars(rows: Sequence[Row], title: str):
    """A panel for each pass, in which each case has a bar for each rival that can run it."""
    from matplotlib.figure import Figure

    passes = [direction for direction in cases.PASSES if any(row["pass"] == direction for row in rows)]
    names = [name for name in COLORS if any(row["rival"] == name for row in rows)]
    places, middles = {}, {}
    for case in dict.fromkeys(row["case"] for row in rows):
        there = [name for name in names if any((row["case"], row["rival"]) == (case, name) for row in rows)]
        first = len(places) + len(middles)  # an empty line between cases
        places |= {(case, name): first + i for i, name in enumerate(there)}
        middles[case] = first + (len(there) - 1) / 2
    height = len(places) + len(middles)
    figure = Figure(figsize=(3 + 2.8 * len(passes), 1.2 + 0.11 * height), layout="constrained")
    panels = figure.subplots(1, len(passes), squeeze=False, sharey=True)[0]
    most = max(100, *(100 * row["share"] for row in rows))
    for axes, direction in zip(panels, passes, strict=True):
        mine = [row for row in rows if row["pass"] == direction]
        at = [places[row["case"], row["rival"]] for row in mine]
        colors = [COLORS[row["rival"]] for row in mine]
        bars = axes.barh(at, [100 * row["share"] for row in mine], 0.9, color=colors)
        axes.bar_label(bars, fmt="%.0f", fontsize=5, padding=1)
        axes.axvline(100, color="#7f7f7f", linewidth=0.8)
        axes.set_title(direction, fontsize=8)
        axes.set(xlim=(0, 1.1 * most), ylim=(height - 1, -1))
        axes.set_yticks([*middles.values()], [case.removeprefix("dot_product_attention ") for case in middles])
        axes.tick_params(labelsize=6, left=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    handles = [panels[0].barh(0, 0, color=COLORS[name], label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=7, frameon=False)
    return figure


def _lines(rows: Sequence[Row], title: str):
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["op"], _variant(row), row["pass"]) for row in rows))
    columns = 2 if len(panels) <= 6 else 4
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(10, 20 / columns**1.5 * lines + 0.8), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    names = {}
    for axes, (op, variant, direction) in itertools.zip_longest(grid.flat, panels, fillvalue=("", "", "")):
        axes.set_visible(bool(op))
        for name, color in COLORS.items():
            mine = [r for r in rows if (r["op"], _variant(r), r["pass"], r["rival"]) == (op, variant, direction, name)]
            if mine:
                points = sorted((row["at"], 100 * row["share"]) for row in mine)
                (names[name],) = axes.plot(*zip(*points, strict=True), marker=".", color=color)
        axes.set_title(f"{op} {variant}\n{direction}".replace("dot_product_attention ", ""), fontsize=7)
        axes.set_xscale("log", base=2)
        places = sorted({row["at"] for row in rows})
        axes.set_xticks(places, [_place(at, rows[0]["table"]) for at in places], fontsize=6)
        axes.set_ylim(0, max(110, *(105 * row["share"] for row in rows)))
        axes.axhline(100, color="#7f7f7f", linewidth=0.8)
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    figure.legend(names.values(), names, loc="outside lower center", ncols=5, fontsize=7, frameon=False)
    return figure


def _place(at: int, table: str) -> str:
    if table == "widths":
        return f"{at:,}"
    if table == "sequences":
        return f"{at >> 10}k"
    return f"{at >> 30} GiB" if at >= 2**30 else f"{at >> 20} MiB"


def _variant(row: Row) -> str:
    """What a case's name has beside the op and the numbers of its size; of sweeps over sequences the head dim too."""
    if row["table"] == "sequences":
        return re.sub(r" [\d×]*×(\d+)", r"head dim \1", row["case"].removeprefix(row["op"]))
    return re.sub(r"\s*\d[\d×/^]*\s*", " ", row["case"].removeprefix(row["op"])).strip()


def _save(figure, path: Path) -> None:
    import matplotlib

    # The same bytes for the same figures; text stays text.
    with matplotlib.rc_context({"svg.hashsalt": "jtile", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
