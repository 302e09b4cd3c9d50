"""What holds inside of a `with`."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any


@contextlib.contextmanager
def setting[T](variable: ContextVar[Any], value: T) -> Iterator[T]:
    """A context in which a variable has a value, which it yields."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)
