"""The end-to-end measurement without a GPU: its tables, and what it says of contenders that cannot run."""

import json

import pytest

from bench import training

SETTING = {"size": "1b", "batch": 12, "seq": 2048}
KERNELS = {
    "nvjet_tst_128x256_64x4_2x1_v_bz_TNN": (5e-3, 10),
    "dot_product_attention_dkey_dvalue": (2e-3, 2),
    "rms_norm_backward": (1e-3, 4),
    "softmax_cross_entropy_backward": (1e-3, 1),
    "loop_add_fusion_3": (0.5e-3, 8),
    "MemcpyD2D": (0.5e-3, 8),
}


def row(name, seconds, gigabytes):
    return {
        "contender": name,
        **SETTING,
        "run": 0,
        "chip": "NVIDIA H200",
        "seconds": seconds,
        "tokens_per_second": 1000 / seconds,
        "peak_bytes": gigabytes * 2**30,
        "first_step_seconds": 9.0,
        "losses": [11.7, 11.6],
        "busy_seconds": 0.9 * seconds,
        "groups": {group: time / 10e-3 for group, time in training.grouped(KERNELS).items()},
        "kernels": [],
    }


GAP = {"contender": "torch.compile", **SETTING, "run": 0, "gap": "fails: OOM"}
ROWS = [row("jtile", 0.1, 30), row("XLA and cuDNN", 0.15, 60), GAP]


def test_kernels_are_grouped_by_what_they_are_for():
    groups = training.grouped(KERNELS)
    assert sum(groups.values()) == pytest.approx(sum(time for time, _ in KERNELS.values()))
    assert groups["matrix products"] == 5e-3 and groups["attention"] == 2e-3 and groups["norms"] == 1e-3
    assert groups["loss"] == 1e-3 and groups["copies"] == 0.5e-3
    assert groups["other elementwise and reductions"] == 0.5e-3


def test_the_tables_compare_with_jtile_and_name_gaps():
    text = training.markdown({"chip": "NVIDIA H200", "runs": [{"date": "2026-11-24"}], "rows": ROWS})
    assert "Llama 1b, 12 × 2048 tokens a step" in text and "on one NVIDIA H200, 2026-11-24:" in text
    assert "| XLA and cuDNN | 6,667 | 60.0 GiB | 1.50 times | 0.50 times |" in text
    assert "| torch.compile | gap: fails: OOM |" in text
    assert "|  | 0.50 times |" in training.table([ROWS[0], ROWS[1] | {"run": 1}])  # speeds of two runs don't compare
    assert "| matrix products | 45.0 ms (50%) | 67.5 ms (50%) |" in text
    assert "| between kernels | 10.0 ms | 15.0 ms |" in text


def test_runs_are_merged_and_a_gap_hides_no_measurement(tmp_path):
    path = tmp_path / "results.json"
    first, second = {"date": "2026-11-24", "command": "first"}, {"date": "2026-11-24", "command": "second"}
    training.merge(path, "NVIDIA H200", first, ROWS)
    training.merge(path, "NVIDIA H200", second, [row("torch.compile", 0.2, 70), GAP | {"contender": "jtile"}])
    training.merge(path, "NVIDIA H200", second, [row("torch.compile", 0.3, 70)])  # the same run, further on
    found = json.loads(path.read_text())
    assert found["runs"] == [first, second]
    assert [(r["contender"], r["run"], r.get("seconds")) for r in found["rows"]] == [
        ("jtile", 0, 0.1),
        ("XLA and cuDNN", 0, 0.15),
        ("torch.compile", 1, 0.3),
    ]


def test_a_contender_that_fails_is_a_gap_with_its_reason(tmp_path, capsys):
    command = [
        "--size",
        "tiny",
        "--batch",
        "1",
        "--seq",
        "16",
        "--contenders",
        "jtile",
        "--output",
        str(tmp_path / "x"),
    ]
    assert training.main(command) == 1
    [only] = json.loads((tmp_path / "x").read_text())["rows"]
    assert "kernels run on NVIDIA GPUs" in only["gap"]
    assert "jtile: gap" in capsys.readouterr().out


def test_time_that_is_up_is_a_gap(tmp_path):
    command = ["--size", "tiny", "--limit", "0", "--output", str(tmp_path / "x")]
    assert training.main(command) == 1
    rows = json.loads((tmp_path / "x").read_text())["rows"]
    assert len(rows) == len(training.CONTENDERS) and all(
        row["gap"] == "took longer than its part of 0 s" for row in rows
    )
