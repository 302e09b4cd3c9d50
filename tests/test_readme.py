"""The README's Python runs as it stands, block after block."""

import pathlib
import re

import pytest

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_readme_code_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 5
    scope: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), scope)
    printed = capsys.readouterr().out
    assert "kernel" in printed and "@triton.jit" in printed


@pytest.mark.parametrize("name", re.findall(r"`jtile\.(\w+)", README.read_text()))
def test_readme_names_exist(name):
    import jtile

    assert hasattr(jtile, name)
