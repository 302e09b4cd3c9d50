"""Files of measurements: `bench/results/<chip>/<date>.json` holds a day's, however many runs it took."""

import contextlib
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.lock import alone

ROOT = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "triton", "nvidia-cudnn-cu13", "torch", "tokamax", "liger-kernel")


def of_today(chip: str, prefix: str = "") -> Path:
    return ROOT / chip.replace(" ", "_") / f"{prefix}{datetime.date.today().isoformat()}.json"


def newest(prefix: str = "2", root: Path | None = None) -> list[Path]:
    """Of each chip the last file whose name begins so."""
    folders = sorted(p for p in (root or ROOT).iterdir() if p.is_dir())
    return [max(files) for folder in folders if (files := list(folder.glob(f"{prefix}*.json")))]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


class Results:
    """A file that is written anew after each addition: what was measured before an interruption is there.

    With `join`, processes that add to one file at once have one run in it if they measure the same, each its part.
    """

    def __init__(self, path: Path, chip: str, join: bool = False):
        self.path, self.chip = path, chip
        run = {
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", "-m", "bench", *_without(sys.argv[1:], "--part", "--limit", "--output")]),
            "commit": commit(),
            "versions": versions(),
        }
        with self._changed() as content:
            if not (join and run in content["runs"]):
                content["runs"].append(run)
            self.run = content["runs"].index(run) if join else len(content["runs"]) - 1

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        with self._changed() as content:
            content["rows"] += [row | {"run": self.run} for row in rows]

    @contextlib.contextmanager
    def _changed(self) -> Iterator[dict[str, Any]]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with alone(self.path.parent):
            content = read(self.path) if self.path.exists() else {"chip": self.chip, "runs": [], "rows": []}
            yield content
            unfinished = self.path.with_suffix(f".{os.getpid()}")
            unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
            unfinished.replace(self.path)


def _without(arguments: Sequence[str], *options: str) -> list[str]:
    """A command's arguments without these options, which take a value each."""
    pairs = itertools.pairwise(["", *arguments])
    return [text for before, text in pairs if text not in options and before not in options]


def latest(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each case and pass the rows of the last run that has it."""
    rows = list(rows)
    last = {(row["case"], row["pass"]): row["run"] for row in rows}
    return [row for row in rows if last[row["case"], row["pass"]] == row["run"]]


def versions() -> dict[str, str]:
    """Of the packages here. Triton's is that of jtile; PyTorch may have come with another."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if importlib.util.find_spec("triton") is not None:
        import triton

        if "torch" in found and found.get("triton", triton.__version__) != triton.__version__:
            found["triton of torch"] = found["triton"]
        found["triton"] = triton.__version__
    return found


def commit() -> str:
    """The commit measured, for whoever wants to measure it again; "unknown" where git or the history is missing."""
    if shutil.which("git") is None:
        return "unknown"
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT.parent)
    return done.stdout.strip() or "unknown"
