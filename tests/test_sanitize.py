"""What `tests.sanitize` makes of compute-sanitizer's log."""

import jax
import jax.numpy as jnp

import jtile
from jtile.compiler import schedule
from tests import sanitize
from tests.compiler.kernels import CASES
from tests.sanitize import reports

LOG = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at attention_kernel+0x1a0 in kernel.py:12
=========     by thread (0,0,0) in block (0,0,0)
=========     Access at 0x7f0000000400 is out of bounds
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at loop_add_fusion+0x90
=========     by thread (1,0,0) in block (0,0,0)
=========
========= Error: Race reported between Write access at softmax+0x1230
=========     and Read access at softmax+0x1450 [512 hazards]
=========
========= ERROR SUMMARY: 3 errors
"""


def test_only_what_concerns_our_kernels_is_reported():
    first, second = reports(LOG)
    assert "at attention_kernel+0x1a0" in first and "out of bounds" in first
    assert "between Write access at softmax" in second


def test_a_clean_log():
    assert reports("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n") == []
    assert reports("") == []


def test_what_names_no_kernel_is_reported():
    assert reports("=========\n========= Internal Sanitizer Error: out of memory\n=========\n")


def test_initcheck_sees_every_store(monkeypatch):
    """Those of the Tensor Memory Accelerator it does not see."""
    monkeypatch.setattr(schedule, "schedules", schedule.schedules)
    function, operands = CASES["products"]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), operands)

    def tma():
        kernels = jtile.inspect(jtile.retarget_pallas(function), *shapes, target="NVIDIA H200")
        return [kernel.tma_instructions > 0 for kernel in kernels]

    assert any(tma())
    sanitize.pytest_configure()
    assert not any(tma())
