import os
import stat
import subprocess
import sys
import threading
import warnings

import pytest

from jtile.compiler import cache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JTILE_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setattr(cache, "_warned", threading.Event())
    cache.clear_memory()
    return tmp_path / "kernels"


def fetch(key, value):
    """What is found under the key, and how often it had to be made."""
    made = []

    def make():
        made.append(value)
        return value

    return cache.fetch(key, make, bytes, bytes), len(made)


def test_made_once(folder):
    assert fetch("key", b"body") == (b"body", 1)
    assert fetch("key", b"other") == (b"body", 0)
    cache.clear_memory()
    assert fetch("key", b"other") == (b"body", 0)
    assert fetch("another key", b"other") == (b"other", 1)


def test_private(folder):
    fetch("key", b"body")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "key").stat().st_mode) == 0o600


@pytest.mark.parametrize("damage", [b"", b"\0", lambda entry: entry[:-1], lambda entry: entry[:-1] + b"!"])
def test_damaged_entries_are_made_anew(folder, damage):
    fetch("key", b"body")
    entry = folder / "key"
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole) if callable(damage) else damage)
    cache.clear_memory()
    assert fetch("key", b"body") == (b"body", 1)
    assert entry.read_bytes() == whole


def test_least_recently_used_kernels_leave_memory(folder, monkeypatch):
    monkeypatch.setattr(cache, "_IN_MEMORY", 2)
    for key in ("a", "b", "a", "c"):
        fetch(key, key.encode())
    assert list(cache._kernels) == ["a", "c"]


def test_where_entries_are_kept(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("JTILE_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert str(cache.directory()) == "/home/someone/.cache/jtile"
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert str(cache.directory()) == "/caches/jtile"
    monkeypatch.setenv("JTILE_CACHE_DIR", "/kernels")
    assert str(cache.directory()) == "/kernels"


def test_directory_that_cannot_be_written(tmp_path, monkeypatch, folder):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JTILE_CACHE_DIR", str(tmp_path / "file" / "kernels"))
    with pytest.warns(UserWarning, match="JTILE_CACHE_DIR"):
        assert fetch("key", b"body") == (b"body", 1)
    with warnings.catch_warnings():  # once is enough
        warnings.simplefilter("error")
        assert fetch("another key", b"body") == (b"body", 1)
    assert fetch("key", b"body") == (b"body", 0)  # from memory


def test_no_home(monkeypatch, folder):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("JTILE_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", home)
    with pytest.warns(UserWarning, match="home directory"):
        assert fetch("key", b"body") == (b"body", 1)


def test_failed_writes_leave_nothing(folder, monkeypatch):
    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.warns(UserWarning, match="No space left"):
        fetch("key", b"body")
    assert os.listdir(folder) == []


def test_settings_of_triton_are_part_of_the_key(monkeypatch):
    key = cache.key_of("source")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    assert cache.key_of("source") == key
    monkeypatch.setenv("DISABLE_PTXAS_OPT", "1")
    assert cache.key_of("source") != key
    assert cache.key_of("source", 1) != cache.key_of("source", "1")


def test_processes_share_entries_and_agree_on_every_byte(folder):
    """Two processes with different hash seeds compile into one cache at once; a third finds what they left."""
    script = (
        "import hashlib, sys\n"
        "from jtile.compiler import cache, launch\n"
        "from jtile.compiler.build import build\n"
        "from jtile.compiler.params import CompilerParams\n"
        "from jtile.compiler.target import Target\n"
        "from tests.compiler import sources, test_pallas\n"
        "for source in sources.double, sources.product, sources.scratch:\n"
        "    kernel = build(source, CompilerParams(), Target.named('NVIDIA H200'))\n"
        "    buffers = [launch.array() for _ in source.arguments]\n"
        "    print(hashlib.sha256(launch.payload(kernel, source.grid, buffers)).hexdigest())\n"
        "_, program = test_pallas.lower(test_pallas.call, test_pallas.X)\n"
        "print(hashlib.sha256(program.encode()).hexdigest())\n"
        "print('triton' in sys.modules, file=sys.stderr)\n"
    )

    def start(seed):
        environment = os.environ | {"PYTHONHASHSEED": str(seed), "JAX_PLATFORMS": "cpu"}
        return subprocess.Popen(
            [sys.executable, "-c", script], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    together = [start(seed) for seed in (1, 2)]
    (first, errors), (second, _) = (process.communicate(timeout=120) for process in together)
    assert len(first.split()) == 4, errors
    assert first == second
    assert sorted(map(len, os.listdir(folder))) == [64] * 4  # four entries, no temporary files
    third, errors = start(3).communicate(timeout=120)
    assert third == first
    assert errors.endswith("False\n")  # Triton is not even imported
