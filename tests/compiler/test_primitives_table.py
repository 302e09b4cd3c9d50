"""The documentation's table of primitives is the one that the tests' kernels give."""

import re
import subprocess
import sys

import jax

from tests.compiler.primitives_table import FILE


def test_table_of_primitives():
    """Also that each primitive has a kernel that needs its rule, or else a reason why there is no rule."""
    # In a process of its own: what else is imported here may bring further primitives.
    program = "from tests.compiler.primitives_table import table; print(table(), end='')"
    made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    written = FILE.read_text()
    [version] = re.findall(r"Written for JAX (\S+) ", written)
    if jax.__version__ == version:  # primitives come and go
        assert made.stdout == written, "Run python -m tests.compiler.primitives_table."
