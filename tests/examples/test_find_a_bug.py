import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "5_find_a_bug.py"


def sums(printed: str) -> list[float]:
    """The numbers of `The rows sum to [...]`."""
    return [float(number) for number in re.search(r"rows sum to \[([^]]*)\]", printed)[1].split()]


def test_the_print_shows_the_bug(tmp_path):
    run = subprocess.run([sys.executable, EXAMPLE, tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    before, _, after = run.stdout.partition("\n\n")
    assert all(total < 0.5 for total in sums(before))
    assert "# 5_find_a_bug.py:19: e = jnp.exp(x - jnp.max(x, axis=1, keepdims=True))\n    max_1 = tl.reduce(" in after
    assert "mask=lanes_128[None, :] < 100, other=0)" in after
    assert re.findall(r"^program (\d) maxima \[0\. 0\. 0\. 0\.\]$", after, re.MULTILINE) == ["0", "1"]
    assert all(abs(total - 1) < 1e-6 for total in sums(after))
    assert [file.suffix for file in tmp_path.iterdir()] == [".py"]
