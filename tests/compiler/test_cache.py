import os
import signal
import stat
import subprocess
import sys
import threading
import time
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


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_private(folder, umask):
    before = os.umask(umask)
    try:
        fetch("key", b"body")
    finally:
        os.umask(before)
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


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777, 0o702])
def test_directory_that_others_can_write_in_is_not_used(folder, mode):
    fetch("key", b"body")
    folder.chmod(mode)
    cache.clear_memory()
    with pytest.warns(UserWarning, match=f"has mode {mode:o}.* chmod 700 .*every process will compile its own"):
        assert fetch("key", b"mine") == (b"mine", 1)
    folder.chmod(0o755)  # others may look
    cache.clear_memory()
    assert fetch("key", b"other") == (b"body", 0)


def test_directory_of_another_user_is_not_used(folder, monkeypatch):
    fetch("key", b"body")
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    cache.clear_memory()
    with pytest.warns(UserWarning, match="belongs to user"):
        assert fetch("key", b"mine") == (b"mine", 1)


@pytest.mark.parametrize("mode", [0o666, 0o644, 0o620])
def test_entries_that_are_not_private_are_made_anew(folder, mode):
    fetch("key", b"body")
    (folder / "key").chmod(mode)
    cache.clear_memory()
    assert fetch("key", b"body") == (b"body", 1)
    assert stat.S_IMODE((folder / "key").stat().st_mode) == 0o600


def test_an_entry_under_the_name_of_another_is_made_anew(folder):
    """So is a link, wherever it leads."""
    fetch("key", b"body")
    for place in (os.rename, os.symlink):
        place(folder / "key", folder / "another key")
        cache.clear_memory()
        assert fetch("another key", b"its own") == (b"its own", 1)
        os.remove(folder / "another key")
        cache.clear_memory()
        fetch("key", b"body")


def test_what_killed_processes_left_is_removed(folder):
    fetch("key", b"body")
    for age in (0, 7200):
        (folder / f".{age}").touch()
        os.utime(folder / f".{age}", (time.time() - age,) * 2)
    fetch("another key", b"body")
    assert sorted(os.listdir(folder)) == [".0", "another key", "key"]


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


KERNELS = """
import hashlib, os, signal, sys, warnings
warnings.simplefilter("ignore")
from jtile.compiler import cache, launch
from jtile.compiler.build import build
from jtile.compiler.params import CompilerParams
from jtile.compiler.target import Target
from tests.compiler import sources

def digests():
    kernels = [sources.double, sources.scratch]
    built = [build(source, CompilerParams(), Target.named("NVIDIA H200")) for source in kernels]
    arguments = ([p for a in s.arguments for p in a.launch_parameters(iter(()))] for s in kernels)
    payloads = [launch.payload(k, s.grid, a) for k, s, a in zip(built, kernels, arguments)]
    return " ".join(hashlib.sha256(p).hexdigest() for p in payloads)
"""


def output(script, *arguments, seed=0):
    """What a Python process of its own prints."""
    environment = os.environ | {"PYTHONHASHSEED": str(seed), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script, *arguments]
    run = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=240)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_eight_processes_some_killed_while_writing(folder):
    """They compile the same kernels into one cold directory at once. Four are killed at their first or second write,
    before it or half-way; the others, and a process that comes later, have the right kernels."""
    crowd = (
        KERNELS
        + """
import triton  # before the forks

def fatal(name, turn, last):
    # The function of this name in `os` kills the process at its call number `turn`.
    function, calls = getattr(os, name), iter(range(9))
    def replacement(*args):
        if next(calls) == turn:
            last(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    setattr(os, name, replacement)

def child(number):
    if number < 4:
        cache._read = lambda key: None  # compiles and writes, even if others were faster
        if number % 2:
            fatal("replace", number // 2, lambda *_: None)
        else:
            fatal("fdopen", number // 2, lambda handle, _: os.write(handle, b"half of an entry"))
    os.write(1, digests().encode() + bytes([10]))  # the line in one piece

children = []
for number in range(8):
    if (pid := os.fork()) == 0:
        child(number)
        os._exit(0)
    children.append(pid)
statuses = [os.waitpid(pid, 0)[1] for pid in children]
print(*(os.WTERMSIG(s) if os.WIFSIGNALED(s) else 0 for s in statuses))
"""
    )
    *survivors, ends = output(crowd).splitlines()
    killed = int(signal.SIGKILL)
    assert ends.split() == [str(killed)] * 4 + ["0"] * 4
    assert len(survivors) == 4
    entries = [name for name in os.listdir(folder) if len(name) == 64]
    assert len(entries) == 2
    assert len(os.listdir(folder)) > 2  # what the killed ones left, whole files and halves
    for name in os.listdir(folder):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    later = output(KERNELS + "print(digests(), 'triton' in sys.modules)", seed=1)
    assert {*survivors, later.removesuffix(" False\n")} == {survivors[0]}  # Triton is not even imported


def test_programs_are_found_in_the_persistent_cache_of_jax(folder, tmp_path):
    """Whatever the hash seed, a program and the kernels in it are the same bytes. Compiled for a GPU that is not here,
    it can be found, but not loaded; tests/compiler/test_on_gpu.py loads it."""
    script = """
import sys, warnings, jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jtile.compiler.target import Target
from tests.compiler import test_pallas

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
mesh = Target.named("NVIDIA H200").make_mesh((1,), ("x",), (AxisType.Auto,))
x = jax.ShapeDtypeStruct((1024, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
with warnings.catch_warnings(record=True) as caught:
    jax.jit(test_pallas.call).lower(x).compile()
print(any("Error reading persistent compilation cache entry" in str(w.message) for w in caught))
"""
    programs = tmp_path / "programs"
    found = []
    for seed in (1, 2):
        found.append(output(script, str(programs), seed=seed))
        [entry] = folder.iterdir()
        entry.unlink()  # the second process compiles the kernel again, to the same bytes
    assert found == ["False\n", "True\n"]
    assert len(list(programs.glob("*-cache"))) == 1
