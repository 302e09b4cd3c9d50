"""examples/1_train_a_llama.py: it learns, and an interrupted run ends as an uninterrupted one does."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from models import llama
from tests.small_llama import SMALL

SCRIPT = Path(__file__).parent.parent.parent / "examples" / "1_train_a_llama.py"


def load_example():
    spec = importlib.util.spec_from_file_location("train_a_llama", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        module = load_example()
        patch.setattr(module, "VALIDATION_BYTES", 512)
        patch.setitem(llama.SIZES, "tiny", SMALL)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        yield module
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train(example, output, *options):
    example.main(["--batch-size", "4", "--sequence", "32", "--steps", "30", "--output", str(output), *options])
    return json.loads((output / "losses.json").read_text())


@pytest.fixture(scope="module")
def whole(example, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    return output, train(example, output)


def test_it_learns(whole):
    history = whole[1]
    assert len(history["train"]) == 30
    assert [step for step, _ in history["validation"]] == list(range(3, 31, 3))
    assert history["validation"][-1][1] < history["train"][0] - 1
    assert history["tokens"] == 30 * 4 * 32 and history["seconds"] > 0 and history["peak_memory_bytes"] > 2**20


def test_an_interrupted_run_loses_nothing(example, whole, tmp_path, monkeypatch, capsys):
    """Interrupted between two checkpoints by Ctrl-C, then by SIGTERM, then by an error that leaves no time to save."""
    batch = example.training_batch

    def run_to(step, act):
        def acting_batch(text, options, i):
            if i == step:
                act()
            return batch(text, options, i)

        monkeypatch.setattr(example, "training_batch", acting_batch)
        train(example, tmp_path)

    def fail():
        raise MemoryError

    for number, step in (signal.SIGINT, 7), (signal.SIGTERM, 16):
        with pytest.raises(SystemExit) as stopped:
            run_to(step, lambda number=number: os.kill(os.getpid(), number))
        assert stopped.value.code == 128 + number
        assert f"stopped after step {step + 1}" in capsys.readouterr().out
    with pytest.raises(MemoryError):
        run_to(26, fail)
    assert "going on after step 17" in capsys.readouterr().out

    monkeypatch.setattr(example, "training_batch", batch)
    history = train(example, tmp_path)
    assert "going on after step 24" in capsys.readouterr().out
    assert history["train"] == whole[1]["train"]
    assert history["validation"] == whole[1]["validation"]


def test_a_finished_run_starts_again_and_another_is_refused(example, whole, tmp_path, capsys):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    with pytest.raises(SystemExit, match="holds another run, one with {'seed': 0}"):
        train(example, tmp_path, "--seed", "1")
    with pytest.raises(SystemExit, match="holds another run, one with {'implementation': None}"):
        train(example, tmp_path, "--implementation", "xla")
    assert train(example, tmp_path)["train"] == whole[1]["train"]
    assert "going on" not in capsys.readouterr().out


def test_options(example, whole, tmp_path):
    assert train(example, tmp_path / "seed", "--seed", "1")["train"] != whole[1]["train"]
    # Without a GPU "xla" is what None means.
    assert train(example, tmp_path / "xla", "--implementation", "xla")["train"] == whole[1]["train"]


def test_the_text_is_split_by_file(example):
    train_text, validation_text = example.read_standard_library()
    assert train_text.dtype == validation_text.dtype == np.uint8
    assert 0.03 < len(validation_text) / len(train_text) < 0.3
    source = Path(json.__file__).read_bytes()
    assert (source in train_text.tobytes()) != (source in validation_text.tobytes())
    again = example.read_standard_library()
    assert train_text.tobytes() == again[0].tobytes() and validation_text.tobytes() == again[1].tobytes()


def test_the_command_leaves_a_curve_and_prints_a_sample(tmp_path):
    command = [sys.executable, str(SCRIPT), "--steps", "2", "--batch-size", "2", "--sequence", "16"]
    environment = os.environ | dict(JAX_PLATFORMS="cpu")
    result = subprocess.run(
        [*command, "--output", "run"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    for expected in ("validation loss", "tokens/s", "GiB of memory", "def read_lines(path):"):
        assert expected in result.stdout
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert jax.tree.all(jax.tree.map(np.isfinite, json.loads((tmp_path / "run" / "losses.json").read_text())["train"]))
