"""Rivals in a process of their own, whose end is theirs alone. There PyTorch finds the Triton that it was made for."""

import importlib.util
import multiprocessing
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.cases import Case
from bench.timing import Time, Told, brief

LIMIT = 300.0  # seconds for one answer


class Apart:
    """What `measure.Bench` is, in another process, which starts with the first rival that needs it."""

    def __init__(self, limit: float = LIMIT):
        self.limit = limit
        self.process: Any = None
        self.prepared: list[str] = []

    def prepare(self, case: Case, name: str, direction: str, count: int | None):
        prepared = self._ask("prepare", case, name, direction, count)
        self.prepared.append(name)
        return prepared

    def drop(self, name: str) -> None:
        self.prepared = [other for other in self.prepared if other != name]
        if self.process is not None:
            self._ask("drop", name)

    def forget(self) -> None:
        self.prepared = []
        if self.process is not None:
            self._ask("forget")

    def turns(self) -> "RemoteTurns":
        return RemoteTurns(self, self.prepared)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None

    def _ask(self, method: str, *given):
        """What the other process answers.

        Raises:
          Told: it ended, or did not answer in time, and is gone now; or the method raised an exception there.
        """
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=serve, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()
        try:
            self.connection.send((method, given))
            if not self.connection.poll(self.limit):
                raise TimeoutError
            right, answer = self.connection.recv()
        except (EOFError, ConnectionError, TimeoutError) as failure:
            late = isinstance(failure, TimeoutError)
            self.process.join(timeout=None if not late else 0)
            code = self.process.exitcode
            self.close()
            how = f"did not answer in {self.limit:.0f} s" if late else f"ended with exit code {code}"
            raise Told(f"the process of other libraries {how} ({method})") from None
        if right:
            return answer
        kind, text = answer
        raise NotImplementedError(text) if kind == "NotImplementedError" else Told(text)


class RemoteTurns:
    """The turns of a process apart. When it ends, each of its rivals has that as its gap."""

    def __init__(self, apart: Apart, names: Sequence[str]):
        self.apart, self.names = apart, list(names)
        self.gap: str | None = None

    def start(self, timed: float) -> None:
        self._ask("start", self.names, timed)

    def turn(self, number: int, name: str, settle: float) -> None:
        self._ask("turn", number, name, settle)

    def finish(self) -> dict[str, Time]:
        found = self._ask("finish")
        return found if self.gap is None else {name: Time(gap=self.gap) for name in self.names}

    def _ask(self, method: str, *given):
        if not self.names or self.gap is not None:
            return {}
        try:
            return self.apart._ask(method, *given)
        except Told as failure:
            self.gap = f"fails: {failure}"


# In the other process.


def serve(connection) -> None:
    import_torchs_triton()
    served = Served()
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
        connection.send(answer)


def import_torchs_triton() -> None:
    """The one that was installed with PyTorch, where a path has another before it."""
    torch = importlib.util.find_spec("torch")
    beside = torch and torch.origin and Path(torch.origin).parents[1]
    if not beside or not (beside / "triton").is_dir():
        return
    sys.path.insert(0, str(beside))
    try:
        import triton  # noqa: F401
    finally:
        sys.path.remove(str(beside))


class Served:
    """A `measure.Bench` that sends results as arrays of the host."""

    def __init__(self) -> None:
        from bench import measure

        self.bench, self.measure = measure.Bench(), measure

    def prepare(self, *given):
        import numpy as np

        prepared = self.bench.prepare(*given)
        prepared.work, prepared.results = None, [np.asarray(x) for x in prepared.results]
        return prepared

    def drop(self, name: str) -> None:
        self.bench.drop(name)

    def forget(self) -> None:
        self.bench.forget()

    def start(self, names: Sequence[str], timed: float) -> None:
        self.turns = self.bench.turns(names)
        self.turns.start(timed)

    def turn(self, number: int, name: str, settle: float) -> None:
        self.turns.turn(number, name, settle)

    def finish(self):
        return self.turns.finish()
