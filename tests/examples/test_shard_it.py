"""examples/3_shard_it.py: every way of splitting a model comes to the losses of one device, also in two processes."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from models import llama
from tests.small_llama import SMALL

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "3_shard_it.py"
OPTIONS = ["--steps", "3", "--batch-size", "8", "--sequence", "16"]


@pytest.fixture(scope="module")
def example():
    """The example, compiled in a third less of the time that optimised programs take."""
    jax.config.update("jax_disable_most_optimizations", True)
    spec = importlib.util.spec_from_file_location("shard_it", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    jax.config.update("jax_disable_most_optimizations", False)


def same_losses(losses):
    """Float32 sums of a few thousand terms, of which the optimizer makes a few more, in another order."""
    assert np.ptp(losses["one"]) > 1e-3  # parameters change
    for mode, found in losses.items():
        np.testing.assert_allclose(found, losses["one"], rtol=2e-5, err_msg=mode)


def test_every_mode_trains_to_the_losses_of_one_device(example, monkeypatch):
    monkeypatch.setitem(llama.SIZES, "tiny", SMALL)
    losses = example.main(OPTIONS)
    assert set(losses) == set(example.MODES)
    same_losses(losses)


def test_parameters_are_split_as_the_mode_says(example, monkeypatch):
    monkeypatch.setitem(llama.SIZES, "tiny", SMALL)
    options = example.parse_options(OPTIONS)

    def local_share(mode):
        """Of all parameters and optimizer's state, what one device holds."""
        training = example.Training.start(mode, llama.SIZES["tiny"], options, jax.devices())
        leaves = [x for x in jax.tree.leaves(training.state) if x.ndim]
        return sum(x.addressable_shards[0].data.size for x in leaves) / sum(x.size for x in leaves)

    assert local_share("data") == 1
    assert local_share("fsdp") == 1 / 8
    assert 1 / 2 < local_share("tensor") < 0.51  # norms are whole


def test_two_processes():
    """As a cluster runs it, with two devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    script = (
        "import importlib.util, json, sys; from models import llama; from tests.small_llama import SMALL; "
        "llama.SIZES['tiny'] = SMALL; "
        f"spec = importlib.util.spec_from_file_location('shard_it', {str(SCRIPT)!r}); "
        "module = importlib.util.module_from_spec(spec); sys.modules['shard_it'] = module; "
        "spec.loader.exec_module(module); print(json.dumps(module.main(sys.argv[1:])))"
    )
    modes = ["--modes", "one", "fsdp", "tensor_shard_map", "pmap"]
    where = ["--simulate", "2", "--distributed", "--coordinator", coordinator, "--processes", "2"]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script, *OPTIONS, *modes, *where, "--process", str(i)],
            cwd=ROOT,
            env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [run.communicate(timeout=300) for run in runs]
    for run, (_, errors) in zip(runs, outputs, strict=True):
        assert run.returncode == 0, errors
    first, second = (json.loads(output.splitlines()[-1]) for output, _ in outputs)
    assert first == second
    same_losses(first)
    assert "pmap              4 devices" in outputs[0][0] and "devices" not in outputs[1][0]
