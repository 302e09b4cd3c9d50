"""Kernels drawn at random: `python -m tests.compiler.fuzz` draws more of them."""

import pytest

from jtile.compiler.rules import arithmetic, reduction
from jtile.compiler.triton_on_cpu import OutOfBounds
from tests.compiler import fuzz


@pytest.mark.parametrize("seed", range(6))
def test_source_computes_what_pallas_does(seed):
    fuzz.examples(fuzz.on_cpu, 40, seed)


BUGS = {
    "reductions take padding for zero": (reduction, "_neutral", lambda name, dtype: 0),
    "subtraction the wrong way round": (arithmetic, "PLAIN", arithmetic.PLAIN | {"sub": "{1} - {0}"}),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_found(bug, monkeypatch):
    monkeypatch.setattr(*BUGS[bug])
    with pytest.raises((AssertionError, OutOfBounds)):
        fuzz.examples(fuzz.on_cpu, 100, seed=0, shrink=False)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(100, 104))
def test_compiled_kernels_compute_what_pallas_does(seed):
    fuzz.examples(fuzz.on_gpu, 25, seed)
