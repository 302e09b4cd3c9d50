"""Compiled kernels, kept in memory and on disk under the hash of everything that they depend on."""

import collections
import contextlib
import hashlib
import json
import os
import stat
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Raise when the same key would compile to something else, or an entry's format changes.
VERSION = 2

_DIGEST_BYTES = hashlib.sha256().digest_size
_IN_MEMORY = 1024  # kernels; one is about 100 kB
_ABANDONED = 3600  # seconds: a file that a process takes longer to write belongs to one that was killed

_kernels: collections.OrderedDict[str, Any] = collections.OrderedDict()  # least recently used first
_lock = threading.Lock()
_warned = threading.Event()


def key_of(*parts) -> str:
    """The hash of these parts, of Triton's settings in the environment, and of jtile's own version."""
    # Triton reads some fifty variables under these names, most of them for debugging: which assembler, which
    # optimisations, what to print. A kernel built under other settings is another kernel.
    prefixes = ("TRITON_", "DISABLE_", "LLVM_", "MLIR_", "NVPTX_", "PTXAS_")
    settings = {k: v for k, v in sorted(os.environ.items()) if k.startswith(prefixes) and k not in _PLACES}
    return hashlib.sha256(json.dumps([VERSION, settings, *parts], sort_keys=True).encode()).hexdigest()


_PLACES = ("TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_DUMP_DIR")


def fetch[T](key: str, make: Callable[[], T], encode: Callable[[T], bytes], decode: Callable[[bytes], T]) -> T:
    """The value under this key: from memory, from disk, or made and kept in both."""
    with _lock:
        if key in _kernels:
            _kernels.move_to_end(key)
            return _kernels[key]
    body = _read(key)
    if body is None:
        value = make()
        _write(key, encode(value))
    else:
        value = decode(body)
    with _lock:
        _kernels[key] = value
        if len(_kernels) > _IN_MEMORY:
            _kernels.popitem(last=False)
    return value


def clear_memory() -> None:
    """Forgets the kernels held in memory; those on disk stay."""
    with _lock:
        _kernels.clear()


def directory() -> Path:
    """Where kernels are kept: `$JTILE_CACHE_DIR`, else `$XDG_CACHE_HOME/jtile`, else `~/.cache/jtile`."""
    if chosen := os.environ.get("JTILE_CACHE_DIR"):
        return Path(chosen)
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "jtile"


def _read(key: str) -> bytes | None:
    """An entry's body, or None where there is none to trust: what was cut short or altered is made anew."""
    try:
        with open(os.open(_private(directory()) / key, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            status = os.fstat(file.fileno())
            entry = file.read() if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == 0o600 else b""
    except (OSError, RuntimeError):  # none, or not to be read: `_write` reports why the directory cannot be used
        return None
    digest, body = entry[:_DIGEST_BYTES], entry[_DIGEST_BYTES:]
    return body if _digest(key, body) == digest else None


def write_file(path: Path, content: bytes, mode: int, unfinished: str) -> None:
    """Writes a file so that no reader, in any process, ever sees a part of it.

    Its mode is this, whatever the umask. Until it is finished it stands beside, under a name that begins so.
    """
    handle, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=unfinished)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, mode)
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _write(key: str, body: bytes) -> None:
    try:
        folder = _private(directory())
        _sweep(folder)
        write_file(folder / key, _digest(key, body) + body, 0o600, _UNFINISHED)
    except (OSError, RuntimeError) as error:  # RuntimeError: `Path.home()` where the user has none
        if not _warned.is_set():
            _warned.set()
            warnings.warn(
                f"jtile cannot keep compiled kernels on disk ({error}); every process will compile its own. "
                "Set JTILE_CACHE_DIR to a directory of your own that can be written.",
                stacklevel=2,
            )


def _digest(key: str, body: bytes) -> bytes:
    """Of an entry under its own name: under another it would be another kernel."""
    return hashlib.sha256(key.encode() + body).digest()


def _private(folder: Path) -> Path:
    """The directory, made if it is missing.

    Raises:
      PermissionError: someone else could put machine code in it, for this process to run.
    """
    try:
        folder.mkdir(mode=0o700, parents=True)
        folder.chmod(0o700)  # whatever the umask
    except FileExistsError:
        status = folder.stat()
        mode = stat.S_IMODE(status.st_mode)
        if status.st_uid != os.geteuid() or mode & 0o022:
            raise PermissionError(
                f"{folder} belongs to user {status.st_uid} and has mode {mode:o}; it must be user {os.geteuid()}'s, "
                f"and nobody else may write in it: chmod 700 {folder}"
            ) from None
    return folder


_UNFINISHED = "."  # how the names of files that are still being written begin


def _sweep(folder: Path) -> None:
    """Removes what processes that were killed while writing left behind."""
    with os.scandir(folder) as files:
        for file in files:
            if file.name.startswith(_UNFINISHED):
                with contextlib.suppress(FileNotFoundError):  # its writer finished, or another process swept
                    if time.time() - file.stat().st_mtime > _ABANDONED:
                        os.unlink(file)
