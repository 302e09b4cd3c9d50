"""The README's Python runs as it stands, block after block."""

import inspect
import pathlib
import re
import shlex

import jax
import pytest

import jtile
from jtile.__main__ import main
from jtile.tuning import search
from tests.laws import CASES

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_readme_code_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 5
    scope: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), scope)
    printed = capsys.readouterr().out
    assert "kernel" in printed and "@triton.jit" in printed


def test_readme_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    [command] = re.findall(r"^python -m jtile (inspect .*)$", README.read_text(), re.MULTILINE)
    assert main(shlex.split(command)) == 0
    printed = capsys.readouterr().out
    assert all(chip in printed for chip in ("sm_80", "sm_89", "sm_90", "sm_100"))
    assert (tmp_path / "rms_norm.html").exists()


def test_readme_commands_tune_what_is_there(tmp_path, monkeypatch):
    """All but the measuring."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search, "calls_of", lambda fn, *args: jax.eval_shape(fn, *args) and [])
    commands = re.findall(r"^python -m jtile (tune .*)$", README.read_text(), re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert main(shlex.split(command, comments=True)) == 0


@pytest.mark.parametrize("name", re.findall(r"`jtile\.(\w+)", README.read_text()))
def test_readme_names_exist(name):
    assert hasattr(jtile, name)


def test_the_table_of_ops_is_whole_and_has_their_arguments():
    rows = dict(re.findall(r"^\| `jtile\.(\w+)\((.*?)\)`", README.read_text(), re.MULTILINE))
    for name, arguments in rows.items():
        listed = set(re.findall(r"\w+", arguments))
        assert listed <= set(inspect.signature(getattr(jtile, name)).parameters), name
    assert {op.__name__ for op, _ in CASES.values()} <= {*rows, "log_softmax"}  # which stands beside `softmax`
