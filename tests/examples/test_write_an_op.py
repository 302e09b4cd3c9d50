import subprocess
import sys
from pathlib import Path

from jtile.testing import LAWS

EXAMPLE = Path(__file__).parents[2] / "examples" / "2_write_an_op.py"


def test_example_keeps_every_law():
    run = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["✓", law] for law in LAWS]


def test_example_is_short():
    lines = EXAMPLE.read_text().splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 120
