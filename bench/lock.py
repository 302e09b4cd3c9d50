"""One process at a time."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def alone(place: Path | None) -> Iterator[None]:
    """While no other process is inside with this file or folder; one that ends lets go of it. None is no lock."""
    if place is None:
        yield
        return
    handle = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
