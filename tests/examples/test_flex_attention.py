import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "4_flex_attention.py"


def test_example_runs():
    run = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert sum("as the whole matrix" in line for line in lines) == 6 and "gradients of 4 slopes" in lines[-1]
