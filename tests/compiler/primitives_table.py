"""Writes jtile/compiler/primitives.md: what each JAX primitive becomes, as the kernels of the tests have it.

Run it as `python -m tests.compiler.primitives_table`.
"""

import pathlib
import re
import sys
import textwrap

import jax
import jax.experimental.pallas.triton  # what kernels may call: its primitives are then there to be listed
from jax.experimental import pallas as pl
from jax.extend.core import Primitive

from jtile.compiler import rules
from tests.compiler.kernels import CASES, NATIVE, sources

FILE = pathlib.Path(__file__).parents[2] / "jtile/compiler/primitives.md"

HEAD = """\
# JAX primitives in Pallas kernels

What each primitive becomes in Triton, or why it becomes nothing and what to write instead. The lines are taken from the
sources of the kernels in `tests/compiler/kernels`, every one of which the tests compile, run and compare with Pallas'
interpreter; of several kernels the one with the shortest lines is shown. `lanes_16` is `tl.arange(0, 16)`, and
functions named `_like_this` are defined ahead of the kernel.

Written for JAX {version} by `python -m tests.compiler.primitives_table`; a test compares.

## With a form in Triton

| primitive | for example | from the kernel |
| --- | --- | --- |
"""

TAIL = """
## Without

| primitives | why, and what to write instead |
| --- | --- |
"""

SHOWN = 6  # lines of an example

# Kernels in which these are more telling than where they are shortest.
CLEARER = {
    "cond": "when",
    "get": "shape_transpose",
    "scan": "loop_without_counter",
    "swap": "shape_transpose",
    "while": "while_loop",
}


def primitives() -> list[str]:
    """The names of JAX's primitives, less those for kernels of other kinds (Mosaic, cuDNN)."""
    others = r"mosaic|tpu|cudnn|pallas\.(fuser|einshape)"
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("jax") and not re.search(others, name)]
    return sorted({value.name for m in modules for value in vars(m).values() if isinstance(value, Primitive)})


def examples() -> dict[str, tuple[list[str], str]]:
    """What the rules of primitives wrote in the tests' kernels: for each the shortest lines, and whose they are."""
    found: dict[str, tuple[int, int, int, list[str], str]] = {}

    def recorded(name, rule, case):
        def record(e, eqn, *operands):
            start = len(e.lines)
            result = rule(e, eqn, *operands)
            # Without the numbers of lines in the kernels' files, which change.
            lines = [re.sub(r"  # \S+:\d+$|(?<=\.py):\d+", "", line) for line in e.lines[start:]]
            lines = textwrap.dedent("\n".join(lines)).splitlines()
            rank = 0 if lines and CLEARER.get(name, case) == case else 1
            if not lines:  # of its own: what the results are
                values = result if isinstance(result, list) else [result]
                rank, lines = 2 + all(v.constant is not None for v in values), [", ".join(v.text for v in values)]
            if any(lines):
                candidate = rank, len(lines), sum(map(len, lines)), lines, case
                found[name] = min(found.get(name, candidate), candidate)
            return result

        return record

    written = dict(rules.RULES)
    try:
        for case, (function, operands) in (CASES | NATIVE).items():
            rules.RULES.update((name, recorded(name, rule, case)) for name, rule in written.items())
            with pl.enable_debug_checks(True):
                sources(function, *operands)
    finally:
        rules.RULES.update(written)
    return {name: (lines, case) for name, (*_, lines, case) in found.items()}


def table() -> str:
    """The file's text.

    Raises:
      LookupError: a primitive has neither an example nor a reason, or both a rule and a reason.
    """
    found, names = examples(), primitives()
    neither = [name for name in names if name not in found and name not in rules.CURES]
    both = [name for name in names if name in rules.RULES and name in rules.CURES]
    if neither or both:
        raise LookupError(
            "Every primitive of JAX has a rule and a kernel in tests/compiler/kernels that needs it, or else a reason "
            f"in rules/__init__.py. Neither: {neither}. Both: {both}."
        )
    rows = [f"| `{name}` | {_cell(found[name][0])} | {found[name][1]} |\n" for name in names if name in found]
    text = HEAD.format(version=jax.__version__) + "".join(rows) + TAIL
    for given, reason in rules.REASONS:
        listed = ", ".join(f"`{name}`" for name in given.split() if name in names)
        text += f"| {listed} | {reason} |\n" if listed else ""
    return text


def _cell(lines: list[str]) -> str:
    shown = [*lines[:SHOWN], f"… {len(lines) - SHOWN} more lines"] if len(lines) > SHOWN + 1 else lines
    return "<br>".join(f"`` {line} ``".replace("|", "\\|") if line[0] != "…" else line for line in shown)


if __name__ == "__main__":
    FILE.write_text(table())
