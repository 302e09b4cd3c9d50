"""`import jtile` is light: the compiler is loaded when something is compiled."""

import subprocess
import sys


def test_importing_loads_no_compiler():
    code = "import sys, jtile; print([m for m in ('triton', 'jax_triton', 'flax', 'optax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
