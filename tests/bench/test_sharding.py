"""bench/sharding.py: where a step's time goes, from a trace, and a run on simulated devices."""

import dataclasses
import json

import pytest

from bench import sharding
from bench.trace import Event
from models import llama
from tests.small_llama import SMALL


def events(device, *spans):
    return [Event(name, start, stop - start, device) for name, start, stop in spans]


def test_communication_is_hidden_or_not():
    """Two devices in two steps of ten seconds each: the second device waits for the first in `AllReduce`."""
    first = events(
        "GPU:0",
        ("fusion", 0, 8),
        ("input_reduce_fusion", 2, 3),  # on another stream
        ("ncclDevKernel_AllGather", 6, 9),  # two of three seconds beside computation
        ("attention", 9, 12),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 14, 16),
        ("fusion", 16, 20),
    )
    second = events("GPU:1", ("fusion", 0, 10), ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 10, 16))
    found = sharding.Shares.of(first + second, steps=2)
    assert dataclasses.astuple(found) == pytest.approx(
        [(15 + 10) / 4, (2 + 0) / 4, (1 + 2 + 6) / 4, (2 + 4) / 4]  # compute, hidden, exposed, idle
    )
    assert found.compute + found.exposed + found.idle == 10


def test_the_table_shows_what_is_lost():
    rows = [
        dict(mode="one", seconds=0.1, speed_up=1.0, compute=0.1, hidden=0.0, exposed=0.0, idle=0.0),
        dict(mode="fsdp", seconds=0.125, speed_up=1.6, compute=0.105, hidden=0.01, exposed=0.015, idle=0.005),
        dict(mode="data", seconds=0.11, speed_up=1.8),  # not profiled
    ]
    *_, one, fsdp = sharding.table(rows).splitlines()
    assert one == "| one | 100.0 | 0.0 | 100.0 | 0.0 | 0.0 | 0.0 | 1.000 |"
    assert fsdp == "| fsdp | 125.0 | 25.0 | 105.0 | 10.0 | 15.0 | 5.0 | 1.600 |"
    assert sharding.table(rows[2:]) == ""


def test_a_run_on_simulated_devices(monkeypatch, tmp_path):
    monkeypatch.setitem(llama.SIZES, "tiny", SMALL)
    options = ["--size", "tiny", "--modes", "fsdp", "--batch-size", "1", "--sequence", "16", "--steps", "1"]
    file = tmp_path / "results" / "sharding.json"
    rows = sharding.main([*options, "--profile", str(tmp_path / "profile"), "--output", str(file)])
    assert [(row["mode"], row["devices"]) for row in rows] == [("one", 1), ("fsdp", 8)]
    assert json.loads(file.read_text())["rows"] == rows and "compute" not in rows[0]  # there is no GPU
    assert all(list((tmp_path / "profile" / mode).rglob("*.xplane.pb")) for mode in ("one", "fsdp"))


def test_compiling_ahead_trains_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(llama.SIZES, "tiny", SMALL)
    options = ["--size", "tiny", "--modes", "fsdp", "pmap", "--batch-size", "1", "--sequence", "16", "--compile-only"]
    monkeypatch.setattr(sharding, "step_seconds", pytest.fail)
    assert sharding.main([*options, "--output", str(tmp_path / "rows.json")]) == []
    assert capsys.readouterr().out.split("\n")[1:3] == [f"{mode:17} compiled" for mode in ("fsdp", "pmap")]
    assert not list(tmp_path.iterdir())
