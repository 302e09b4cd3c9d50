"""The bench without a GPU: its tables of cases and rivals, what it writes, and what it says of what is missing."""

import dataclasses
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtile
from bench import __main__ as command
from bench import cases, lock, measure, report, results, rivals, targets, timing, trace, workers
from bench.apart import Apart
from bench.cases import BACKWARD, BOTH, CASES, FORWARD

SMALL = cases.rms_norm(16, 64)
IDS = [f"{case.table} {case.name}" for case in CASES]


# The tables


def test_a_table_has_each_case_once():
    assert len(IDS) == len(set(IDS))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_work_is_what_operands_and_results_say(case):
    """Forward: every operand is read once and every result written once. What there is little of may be left out."""
    shapes = jax.eval_shape(lambda key: {n: make(key) for n, make in case.operands.items()}, jax.random.key(0))
    function = rivals.entry(rivals.REFERENCE, case.op).make(**case.options)
    out = jax.eval_shape(lambda operands: function(**operands), shapes)
    moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((shapes, out)))
    if case.unit == "B":
        assert case.work[FORWARD] == pytest.approx(moved, rel=0.02)
    else:
        assert case.work[FORWARD] > 100 * moved  # bound by products, as it says
    if {BACKWARD, BOTH} <= set(case.work):
        assert case.work[BOTH] == case.work[FORWARD] + case.work[BACKWARD]


def test_every_entry_is_for_a_known_rival_and_case():
    ops = {case.op for case in CASES}
    assert all(name in (*rivals.RIVALS, rivals.REFERENCE) and op in ops for name, op in rivals.ENTRIES)
    assert set(rivals.RIVALS) < set(report.COLORS)


def test_what_is_not_installed_is_named():
    absent = dataclasses.replace(rivals.RIVALS["tokamax Triton"], needs=("no_such_module",))
    assert absent.missing() == "not installed: pip install tokamax"
    assert rivals.RIVALS["XLA"].missing() is None and "jax" in rivals.RIVALS["XLA"].version()


FEATURES = {"is_causal": False}, {}, {"window": 5}, {"cap": 2.0}, {"alibi": True}, {"prefix": 9}


@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_attention_is_judged_by_a_reference_that_holds_one_head_at_a_time(features):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 32, heads, 16)) for i, heads in enumerate((4, 2, 2)))
    reference, ours = (
        rivals.entry(name, "dot_product_attention").make(**{"is_causal": True} | features)(query=q, key=k, value=v)
        for name in (rivals.REFERENCE, "XLA")
    )
    assert jnp.allclose(reference, ours, atol=1e-5)
    if not {"cap", "alibi", "prefix"} & set(features):
        window = (features["window"] - 1, 0) if "window" in features else None
        causal = features.get("is_causal", True)
        theirs = jax.nn.dot_product_attention(q, k, v, is_causal=causal, local_window_size=window)
        assert jnp.allclose(reference, theirs, atol=1e-5)


def test_linear_losses_are_judged_by_a_reference_that_holds_some_logits_at_a_time():
    x, weight = jax.random.normal(jax.random.key(0), (2048, 8)), jax.random.normal(jax.random.key(1), (8, 50))
    labels = jnp.arange(2048) % 50
    reference, mean = (rivals.entry(rivals.REFERENCE, f"linear_cross_entropy{end}").make() for end in ("", "_mean"))
    expected = jtile.linear_cross_entropy(x, weight, labels, implementation="xla")
    assert jnp.allclose(reference(x=x, weight=weight, labels=labels), expected, atol=1e-5)
    assert jnp.allclose(mean(x=x, weight=weight, labels=labels), expected.mean(), atol=1e-5)


@pytest.mark.parametrize("features", ({"is_causal": False}, {}, {"window": 200}, {"prefix": 300}, {"packed": True}))
def test_work_and_blocks_of_attention_are_those_of_what_queries_see(features):
    case = cases.attention(1, 1024, 2, 64, **{"is_causal": True} | features)
    i, j = np.arange(1024)[:, None], np.arange(1024)
    seen = (i >= j) | (j < features.get("prefix", 0)) | (not features.get("is_causal", True))
    seen &= i - j < features.get("window", 1024)
    if features.get("packed"):
        ids = np.asarray(case.operands["segment_ids"](None))[0]
        assert len(set(ids)) == len(cases.DOCUMENTS)
        seen &= ids[:, None] == ids
    assert case.work[FORWARD] == 4 * 2 * 64 * seen.sum() and case.work[BOTH] == 3.5 * case.work[FORWARD]
    assert case.blocks == seen.reshape(8, 128, 8, 128).any((1, 3)).sum()
    assert case.plain == ("dot_product_attention 1×1024×2×64 causal" if set(features) - {"is_causal"} else None)


# Measuring


@pytest.fixture
def on_cpu(monkeypatch, tmp_path):
    """As if the CPU were the GPU: jtile's kernels do not run, and the profiler sees none."""
    monkeypatch.setattr(command, "gpu", lambda: jax.devices()[0])
    monkeypatch.setattr(command, "set_up", lambda cold: None)
    monkeypatch.setattr(timing, "MOST_CALLS", 1)
    monkeypatch.setattr(cases, "CASES", [SMALL, cases.softmax_cross_entropy(8, 300)])
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(measure, "MOST_SETS", 2)
    return tmp_path


def test_a_run_writes_every_pass_and_names_the_gaps(on_cpu, capsys):
    status = command.main(["run", "--rivals", "jtile", "XLA", "torch.compile", "--quick"])
    assert status == 1  # jtile's kernels failed, and that is no success
    [path] = on_cpu.glob("cpu/*.json")
    found = results.read(path)
    rows = {(row["case"], row["pass"], row["rival"]): row for row in found["rows"]}
    assert len(rows) == (2 + 3) * 4
    for (_, _, rival), row in rows.items():
        if rival == "jtile":
            assert "kernels run on NVIDIA GPUs" in row["gap"]
        elif rival == "torch.compile":
            assert row["gap"] == "not installed: pip install torch"
        else:
            assert row["seconds"] > 0 and row["right"] and row["share"] > 0 and row["clock"] == "host"
    assert rows[SMALL.name, BACKWARD, "XLA"]["error"] < 1e-2
    assert 16 * 64 * 2 <= rows[SMALL.name, FORWARD, "XLA"]["extra_bytes"] <= 16 * 64 * 8
    assert found["runs"][0]["versions"]["jax"] == jax.__version__
    printed = capsys.readouterr().out
    assert "torch.compile is a gap in every table" in printed and "jtile, rms_norm 16×64, forward" in printed


def test_a_second_run_is_kept_beside_the_first_and_the_last_of_each_case_counts(on_cpu):
    arguments = ["--rivals", "XLA", "--quick", "--output", str(on_cpu / "out.json")]
    assert command.main(["run", *arguments]) == 0
    assert command.main(["run", *arguments, "--filter", "rms_norm", "--passes", "forward"]) == 0
    rows = results.read(on_cpu / "out.json")["rows"]
    assert len(rows) == (2 + 3 + 1) * 2 and {row["case"] for row in rows if row["run"] == 1} == {SMALL.name}
    last = {(row["case"], row["pass"]): row["run"] for row in results.latest(rows)}
    assert len(last) == 2 + 3 and [place for place, run in last.items() if run == 1] == [(SMALL.name, FORWARD)]


def test_no_case_is_begun_when_time_is_up(on_cpu, capsys):
    assert command.main(["run", "--rivals", "XLA", "--limit", "0"]) == 0
    assert "time is up: 2 cases are left: rms_norm 16×64, softmax" in capsys.readouterr().out


def test_a_case_of_two_tables_is_measured_once(on_cpu, monkeypatch):
    swept = dataclasses.replace(SMALL, table="widths", at=64)
    monkeypatch.setattr(cases, "CASES", [swept, SMALL])
    out = on_cpu / "out.json"
    chosen = ["--tables", "core", "widths", "--rivals", "XLA", "--passes", "forward"]
    assert command.main(["run", *chosen, "--quick", "--output", str(out)]) == 0
    rows = [row for row in results.read(out)["rows"] if row["rival"] == "XLA"]
    assert [(row["table"], row["at"]) for row in rows] == [("core", 0), ("widths", 64)]
    assert rows[0]["seconds"] == rows[1]["seconds"]


def test_parts_measured_by_several_processes_are_one_run(on_cpu, monkeypatch):
    out = on_cpu / "out.json"
    common = ["run", "--limit", "99", "--rivals", "XLA", "--passes", "forward", "--quick", "--output", str(out)]
    for more in (["--part", "1/2", "--processes", "2"], ["--part", "2/2"]):
        monkeypatch.setattr("sys.argv", ["bench", *common, *more[:2]])
        assert command.main([*common, *more]) == 0
    found = results.read(out)
    assert [run["command"] for run in found["runs"]] == ["python -m bench run --rivals XLA --passes forward --quick"]
    assert {row["case"] for row in found["rows"]} == {case.name for case in cases.CASES}
    assert all(row["right"] and row["run"] == 0 for row in found["rows"])
    monkeypatch.setattr("sys.argv", ["bench", *common])
    assert command.main([*common, "--filter", "rms_norm"]) == 0 and len(results.read(out)["runs"]) == 2


def test_a_case_whose_process_ends_is_a_gap_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(workers, "Worker", Mortal)
    options = measure.Options(rivals=["XLA"], passes=[FORWARD], rounds=1, settle=0.0, timed=0.0)
    jobs = [(case, options) for case in (SMALL, dataclasses.replace(SMALL, size="fatal"), SMALL)]
    found = [rows for _, [rows] in workers.spread(jobs, ["XLA"], lambda: True, 1, ["0"])]
    gaps = [row["gap"] for rows in found for row in rows if "gap" in row]
    assert gaps == ["fails: the process of worker 0 ended with exit code 3 (measure)"]
    assert sum(row["rival"] == "XLA" and "seconds" in row for rows in found for row in rows) == 2


class Mortal(workers.Worker):
    def measure(self, case, options):
        if case.size == "fatal":
            os._exit(3)
        return super().measure(case, options)


def test_one_at_a_time_is_inside(tmp_path):
    with ThreadPoolExecutor() as threads:
        inside = []

        def enter(i):
            with lock.alone(tmp_path):
                inside.append(i)
                time.sleep(0.01)
                assert inside == [i]
                inside.remove(i)

        list(threads.map(enter, range(4)))


def test_compiling_alone_measures_nothing(on_cpu, capsys):
    assert command.main(["run", "--compile-only", "--rivals", "XLA", "torch.compile", "--filter", "rms_norm"]) == 0
    printed = capsys.readouterr().out
    assert "rms_norm 16×64, backward: XLA 0." in printed and "torch.compile not installed" in printed
    assert not list(on_cpu.rglob("*.json"))


def entered(monkeypatch, name, function):
    monkeypatch.setitem(rivals.ENTRIES, (name, "rms_norm"), rivals.Entry(lambda: function))
    options = measure.Options(rivals=[name], passes=[FORWARD], rounds=1, settle=0.0, timed=0.0)
    [[_, row]] = measure.measure(SMALL, options, {})
    return row


def test_a_rival_that_is_wrong_is_found_out(monkeypatch):
    row = entered(monkeypatch, "cuDNN", lambda x, scale: 1.1 * x * scale)
    assert row["error"] > 0.05 and not row["right"] and row["seconds"] > 0


def test_a_rival_that_fails_is_a_gap_with_its_reason(monkeypatch):
    def fail(x, scale):
        raise ValueError("it does not like it\nat all")

    def lack(x, scale):
        raise NotImplementedError("it has no norms")

    assert entered(monkeypatch, "cuDNN", fail)["gap"] == "fails: ValueError: it does not like it"
    assert entered(monkeypatch, "cuDNN", lack)["gap"] == "it has no norms"


def timed(parties, rounds=1):
    timing.take_turns(parties, rounds=rounds, settle=0.0, timed=0.0)
    return timing.finished(parties)


def test_a_rival_that_fails_while_it_is_timed_is_a_gap():
    calls = iter([jnp.ones(8)])  # the first call, and no more
    good, bad = timing.Work(jnp.negative, [(jnp.ones(8),)]), timing.Work(lambda x: next(calls), [(jnp.ones(8),)])
    turns = timing.Turns({"good": good, "bad": bad})
    times = timed([turns])
    assert times["good"].seconds > 0 and times["bad"].gap == "fails: StopIteration: "


def test_operands_that_a_function_overwrites_are_made_anew():
    donated = jax.jit(jnp.negative, donate_argnums=0)
    work = timing.Work(donated, [(jnp.arange(8.0),)], measure._fresh, 32)
    times = timed([timing.Turns({"f": work})], rounds=2)
    assert times["f"].gap is None and work.inputs[0][0].sum() == 28


def test_another_process_is_asked_and_its_end_is_a_gap():
    apart = Apart("jax")
    try:
        for _ in range(2):  # the second time in a new process
            apart.forget()
            for name in ("no such rival", rivals.REFERENCE, "XLA"):
                apart.ask("prepare", name, SMALL, name, FORWARD)
            with pytest.raises(timing.Told, match="KeyError: 'no such rival'"):
                apart.answer("no such rival")
            assert apart.answer(rivals.REFERENCE)["error"] == 0 and 0 < apart.answer("XLA")["error"] < 1e-2
            turns = apart.turns()
            times = timed([turns])
            assert set(times) == {"XLA", rivals.REFERENCE} and times["XLA"].seconds > 0
            apart.process.kill()
            times = timed([turns])
            assert times["XLA"].gap == "fails: the process of jax ended with exit code -9 (start)"
    finally:
        apart.close()


def test_without_a_gpu_and_without_such_a_case_it_says_so(monkeypatch):
    monkeypatch.setattr(command, "set_up", lambda cold: None)
    with pytest.raises(SystemExit, match="JAX sees only cpu"):
        command.main(["run"])
    with pytest.raises(SystemExit, match="no case matches 'nothing'; there are: rms_norm"):
        command.pick(CASES, "nothing")


def test_a_trace_sums_the_kernels():
    events = [trace.Event("a", 0, 1), trace.Event("b", 1, 5), trace.Event("a", 6, 2)]
    found = trace.Trace(events, [trace.Event("turn 0/x", 0, 9)])
    assert found.shares() == {"b": (5, 1), "a": (3, 2)} and len(found.annotations("turn ")) == 1


def test_the_list_names_cases_rivals_and_gaps(capsys):
    assert command.main(["list"]) == 0
    printed = capsys.readouterr().out
    assert "rms_norm 32768×8192" in printed and "FlexAttention" in printed and f"jax {jax.__version__}" in printed


# Reporting


def row(case, rival, seconds=None, direction=FORWARD, unit="B", table="core", at=0, **more):
    about = {"case": case, "op": case.split()[0], "table": table, "at": at, "pass": direction, "rival": rival}
    about |= {"work": 4 * 10**9, "unit": unit, "run": 0}
    if seconds is None:
        return about | more
    measured = dict(seconds=seconds, rate=4e9 / seconds, share=1e-3 / seconds, error=1e-3, right=True)
    return about | measured | dict(extra_bytes=2**30, first_call_seconds=0.5) | more


STORED = [
    row("norm 8×8", "copy", 1e-3),
    row("norm 8×8", "jtile", 1.05e-3),
    row("norm 8×8", "XLA", 2e-3),
    row("norm 8×8", "torch.compile", gap="not installed: pip install torch"),
    row("norm 8×8", "copy", 1e-3, BOTH),
    row("norm 8×8", "jtile", 1.5e-3, BOTH),
    row("norm 8×8", "XLA", 1.25e-3, BOTH),
    row("norm 8×8", "torch.compile", gap="not installed: pip install torch", direction=BOTH),
    row("attention 8", "jtile", 2e-3, unit="FLOP"),
    row("attention 8", "cuDNN", 1e-3, unit="FLOP", right=False, error=0.5),
    *(row(f"norm {n}×8", name, 1e-3 * n, table="sizes", at=n) for n in (1, 2, 4) for name in ("jtile", "XLA")),
    *(row(f"norm {n}×8", "jtile", 1e-3 * n, BOTH, table="widths", at=n) for n in (1, 2, 4)),
]


@pytest.fixture
def stored(tmp_path):
    folder = tmp_path / "results" / "NVIDIA_H200"
    folder.mkdir(parents=True)
    run = {"date": "2026-11-24", "command": "python -m bench run", "versions": {"jax": "0.11.2"}}
    content = {"chip": "NVIDIA H200", "runs": [run], "rows": STORED}
    (folder / "2026-11-24.json").write_text(json.dumps(content))
    (folder / "2026-11-23.json").write_text("{}")  # an older one
    return tmp_path


def test_the_report_shows_wins_losses_and_gaps(stored):
    text = report.markdown(stored / "results")
    assert "One NVIDIA H200, 2026-11-24, jax 0.11.2." in text
    assert "Every figure, with memory and times to first call: [2026-11-24.md](bench/results/NVIDIA_H200/2" in text
    assert "| norm 8×8 | **95%**, XLA 50% | 67%, XLA **80%** |" in text
    assert "| attention 8 | **50%** |" in text  # cuDNN's is wrong
    assert "- torch.compile not installed: pip install torch: 2 passes" in text
    assert "- cuDNN is wrong by 5.0e-01: attention 8 forward" in text
    assert text.count("norm 4×8") == 0  # sweeps are plotted


def test_writing_puts_it_between_the_marks_and_draws(stored):
    readme, plots = stored / "README.md", report.PLOTS
    readme.write_text(f"before\n{report.MARKS[0]}stale\n{report.MARKS[1]}after\n")
    report.write(stored / "results", readme, stored / "plots")
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text and "**95%" in text
    names = {path.stem for path in (stored / "plots").glob("*.svg")}
    kinds = ("memory", "losses", "sizes", "widths")
    assert names == {f"NVIDIA_H200_{kind}" for kind in kinds}
    assert all(f"({(plots / name).relative_to(report.README.parent)}.svg)" in text for name in names)
    first = {path: path.read_bytes() for path in (stored / "plots").iterdir()}
    report.write(stored / "results", readme, stored / "plots")
    assert readme.read_text() == text and all(path.read_bytes() == old for path, old in first.items())
    page = (stored / "results/NVIDIA_H200/2026-11-24.md").read_text()
    assert "| norm 8×8 | forward | **95% (3.81 TB/s)** | 50% | gap | 4.00 TB/s |" in page
    assert "| norm 8×8 | value and gradient | 67% (2.67 TB/s) | **80%** | gap | 4.00 TB/s |" in page
    assert "| attention 8 | forward | 50% (2 TFLOP/s) | wrong |" in page
    assert "| norm 8×8 | value and gradient | 1.00 GiB | 1.00 GiB |" in page
    assert "| 0 | 2026-11-24 | unknown | `python -m bench run` |" in page
    assert "| norm 4×8 | forward | jtile | 0 | 4.0000 ms | 1.00 TB/s | 25.0% | 1.0e-03 | 1.000 GiB | 0.5 s |" in page


def test_a_readme_without_marks_is_refused(stored):
    readme = stored / "README.md"
    readme.write_text("nothing")
    with pytest.raises(ValueError, match="lacks the line <!-- the bench"):
        report.write(stored / "results", readme, stored / "plots")


# Targets

CAUSAL, CAPPED = (
    cases.attention(4, 4096, 16, 128, is_causal=True),
    cases.attention(4, 4096, 16, 128, is_causal=True, cap=50.0),
)


def lines_of(*rows, steps=()):
    """The table's lines by their first cell, which is followed by what was asked, what was reached, and whether."""
    table = targets.table(targets.Measured.of(rows, steps))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert all(len(line) == 4 for line in cells)
    return {line[0]: tuple(line[1:]) for line in cells}


def test_every_target_has_cases_and_a_file_with_its_arguments():
    nothing = targets.Measured.of([], [])
    assert all(target.figures(nothing) for chosen in targets.TARGETS.values() for target in chosen)
    assert all((results.ROOT / f"{file}.md").is_file() for file in targets.TARGETS)
    assert {line[1] for line in lines_of().values()} == {"not measured by the bench"}


def test_a_target_is_met_where_all_is_measured_and_nothing_misses_it():
    what, name = "Cross-entropy, value and gradient, of a copy's speed at 3 passes", "softmax_cross_entropy 8192×128256"
    assert lines_of(row(name, "jtile", 1.1e-3, BOTH))[what] == ("≥ 0.9", "0.909", "met")
    missed = "[missed](bench/results/cross_entropy.md)"
    assert lines_of(row(name, "jtile", 1.2e-3, BOTH))[what] == ("≥ 0.9", "0.833", missed)
    assert lines_of(row(name, "jtile", 1e-3, BOTH, right=False))[what] == ("≥ 0.9", "0.000", missed)


def test_rivals_that_cannot_set_no_mark_and_a_mean_is_geometric():
    rows = [
        row(case.name, rival, seconds, unit="FLOP")
        for case, times in ((CAUSAL, (1e-3, 2e-3)), (CAPPED, (2e-3, 2e-3)))
        for rival, seconds in zip(("jtile", "FlexAttention"), times, strict=True)
    ]
    found = lines_of(*rows)
    mean = "Attention, speed over FlexAttention, forward: geometric mean"
    assert found[mean] == ("≥ 1.3", "1.414 (1.000 to 2.000); 16 of 18 not measured", "so far met")
    features = "Features, rate on the blocks left, of plain"
    assert found[features][1].startswith("0.500; 1 of 1 miss it: 4×4096×16×128 causal cap 50.0, forward 0.500;")
    rows += [row(CAPPED.name, "tokamax Triton", unit="FLOP", gap="it has none")]
    rows += [row(CAUSAL.name, "tokamax Triton", 3e-3, unit="FLOP")]
    tokamax = lines_of(*rows)["Attention, speed over tokamax Triton, forward: geometric mean"]
    assert tokamax == ("≥ 1.6", "3.000 (3.000); 16 of 17 not measured", "so far met")


def test_figures_of_two_runs_are_not_compared():
    first = [row(CAUSAL.name, rival, 1e-3, unit="FLOP") for rival in ("jtile", "cuDNN", "tokamax Mosaic")]
    second = [
        row(CAUSAL.name, rival, seconds, unit="FLOP", run=1) for rival, seconds in (("jtile", 5e-4), ("cuDNN", 1e-3))
    ]
    found = lines_of(*first, *second)
    assert found["Plain attention, speed over cuDNN's: head dim 128, forward"][1].startswith("2.000;")
    assert found["… over tokamax's Mosaic kernels'"][1].startswith("1.000;")


def test_training_steps_have_targets_too():
    steps = [
        {"contender": name, "tokens_per_second": speed, "peak_bytes": size}
        for name, speed, size in (("jtile", 130.0, 9), ("jtile, lean", 110.0, 5), ("XLA and cuDNN", 100.0, 10))
    ]
    found, missed = lines_of(steps=steps), "[missed](bench/results/training_1b.md)"
    speed = found["Training step of Llama 1b, tokens/s over XLA's with cuDNN"]
    assert speed[1:] == ("1.100 to 1.300; 1 of 2 miss it: jtile, lean 1.100", missed)
    assert found["… of its peak memory"][1:] == ("0.500 to 0.900; 1 of 2 miss it: jtile 0.900", missed)


def test_the_terminal_shows_one_pass(capsys):
    from rich.console import Console

    Console(width=120).print(report.rows_table([r for r in STORED if r["case"] == "norm 8×8" and r["pass"] == FORWARD]))
    printed = capsys.readouterr().out
    assert "1.05 ms" in printed and "95.2%" in printed and "torch.compile: not installed: pip install torch" in printed
