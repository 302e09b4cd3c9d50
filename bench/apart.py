"""Rivals in processes of their own, whose end is theirs alone. In its own, PyTorch finds the Triton it was made for."""

import contextlib
import functools
import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.timing import Time, Told, brief

LIMIT = 150.0  # seconds for one answer


class Process:
    """Another process and what it serves: an object made there, whose methods are called from here.

    It starts with the first call. What `make` returns is told apart by `name`.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Any],
        limit: float = LIMIT,
        environment: Mapping[str, str] | None = None,
        daemon: bool = True,
    ):
        self.name, self.limit = name, limit
        self.made, self.daemon = (make, dict(environment or {})), daemon
        self.process: Any = None

    def start(self) -> None:
        """Before anyone is asked: importing a framework takes a while."""
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *self.made), daemon=self.daemon)
        self.process.start()
        theirs.close()

    def call(self, method: str, *given):
        self.send(method, given)
        return self.receive(method)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None

    def send(self, method: str, given: tuple) -> None:
        if self.process is None:
            self.start()
        with contextlib.suppress(ConnectionError):  # it has ended, as whoever waits for the answer will hear
            self.connection.send((method, given))

    def receive(self, method: str):
        """What the other process answers.

        Raises:
          Told: it ended, or did not answer in time, and is gone now; or the method raised an exception there.
        """
        try:
            if not self.connection.poll(self.limit):
                raise TimeoutError
            right, answer = self.connection.recv()
        except (EOFError, ConnectionError, TimeoutError) as failure:
            late = isinstance(failure, TimeoutError)
            if not late:
                self.process.join()
            how = f"did not answer in {self.limit:.0f} s" if late else f"ended with exit code {self.process.exitcode}"
            self.close()
            raise Told(f"the process of {self.name} {how} ({method})") from None
        if right:
            return answer
        kind, text = answer
        raise NotImplementedError(text) if kind == "NotImplementedError" else Told(text)


class Apart(Process):
    """What `measure.Bench` is, in another process."""

    def __init__(self, framework: str, limit: float = LIMIT, environment: Mapping[str, str] | None = None):
        # Beside PyTorch, JAX makes operands and references alone, and gives back their memory at once.
        own = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"} if framework == "torch" else {}
        super().__init__(framework, functools.partial(Served, framework), limit, {**(environment or {}), **own})
        self.asked: dict[str, tuple] = {}
        self.names: list[str] = []  # of those that are prepared
        self.used = False

    def forget(self) -> None:
        if self.used and self.process is not None:
            with contextlib.suppress(Told):  # it has ended, and knows nothing any more
                self.call("forget")
        self.asked, self.names, self.used = {}, [], False

    def ask(self, method: str, name: str, *given) -> None:
        self.asked[name], self.used = (method, given), True
        self.send(method, given)

    def answer(self, name: str):
        """Of what was asked, in the same order. Whom another took along asks again."""
        if self.process is None:
            self.names = []
            for method, given in self.asked.values():
                self.send(method, given)
        method, _ = self.asked.pop(name)
        answer = self.receive(method)
        if method == "prepare":
            self.names.append(name)
        return answer

    def close(self) -> None:
        self.names = []
        super().close()

    def turns(self) -> "RemoteTurns":
        return RemoteTurns(self)


class RemoteTurns:
    """The turns of a process apart. When it ends, each of its rivals has that as its gap."""

    def __init__(self, apart: Apart):
        self.apart, self.names = apart, list(apart.names)
        self.gap: str | None = None

    def start(self) -> None:
        self._call("start")

    def turn(self, number: int, name: str, settle: float, timed: float) -> None:
        self._call("turn", number, name, settle, timed)

    def finish(self) -> dict[str, Time]:
        found = self._call("finish")
        return found if self.gap is None else {name: Time(gap=self.gap) for name in self.names}

    def _call(self, method: str, *given):
        if not self.names or self.gap is not None:
            return {}
        try:
            return self.apart.call(method, *given)
        except Told as failure:
            self.gap = f"fails: {failure}"


# In the other process.


def serve(connection, make: Callable[[], Any], environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    served = make()
    while True:
        try:
            method, given = connection.recv()
        except EOFError:
            return
        try:
            answer = True, getattr(served, method)(*given)
        except NotImplementedError as lack:
            answer = False, ("NotImplementedError", str(lack))
        except Exception as failure:
            answer = False, (type(failure).__name__, brief(failure))
        try:
            connection.send(answer)
        except ConnectionError:  # nobody waits for it any more
            return


def import_torchs_triton() -> bool:
    """The one that was installed with PyTorch, where a path has another before it. Whether there is one."""
    torch = importlib.util.find_spec("torch")
    beside = torch and torch.origin and Path(torch.origin).parents[1]
    if not beside or not (beside / "triton").is_dir():
        return False
    sys.path.insert(0, str(beside))
    try:
        import triton  # noqa: F401
    finally:
        sys.path.remove(str(beside))
    return True


class Served:
    """A `measure.Bench`, of which no arrays are sent."""

    def __init__(self, framework: str) -> None:
        if framework == "torch" and import_torchs_triton():
            import torch  # noqa: F401
        from bench import measure

        self.bench = measure.Bench()
        self.compile, self.prepare = self.bench.compile, self.bench.prepare

    def forget(self) -> None:
        self.bench.forget()

    def start(self) -> None:
        self.turns = self.bench.turns()
        self.turns.start()

    def turn(self, number: int, name: str, settle: float, timed: float) -> None:
        self.turns.turn(number, name, settle, timed)

    def finish(self) -> dict[str, Time]:
        return self.turns.finish()
