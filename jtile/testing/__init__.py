"""The laws that every op obeys, and `check_op`, which tells whether yours does.

A law is a function of a trial: an op, random operands for it, and the op's reference, in which nothing but `jax.numpy`
is left, so that JAX's own rules transform it. The law asks something of the op and compares the answer with the
reference's. `LAWS` holds them all by name.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

from jtile.op import Implementation, TileOp
from jtile.testing import laws as laws  # fills LAWS
from jtile.testing.trial import LAWS, Case, Trial

__all__ = ["LAWS", "Case", "Trial", "check_op"]


def check_op(
    op: TileOp | Callable,
    cases: Iterable[Case],
    *,
    laws: Iterable[str] | None = None,
    implementation: Implementation = None,
    report: Callable[[str], Any] | None = None,
) -> None:
    """Check that an op keeps the laws: right under every transformation of JAX, on every kind of mesh, in every dtype.

    The laws of sharding need several devices. `jax.config.update("jax_num_cpu_devices", 8)` simulates them, and serves
    where there is one GPU, too.

    Args:
        op: a `TileOp`, or a function such as `jtile.rms_norm` that calls some. Its operands and options are passed to a
            function by name, and so is `implementation`.
        cases: the operands to try it on. Small ones do: the laws of dtypes and shapes vary them.
        laws: names of laws in `LAWS`; all of them by default.
        implementation: what to check against the reference. Default: `"triton"` on a GPU and `"interpret"` elsewhere.
        report: called with a line of text after each check. `print` will do.

    Raises:
        ExceptionGroup: of everything that went wrong. A note tells the op, the law and the case of each, and an
            `AssertionError` says by how much which value is wrong, and where.

    Example:
        >>> import jtile
        >>> from jtile.testing import Case, check_op
        >>> case = Case("x: rows d, scale: d -> y: rows d", {"rows": 4, "d": 10})
        >>> check_op(jtile.rms_norm, [case], laws=["kernel", "gradient", "second_order"])
    """
    failures = []
    for trial in [Trial(op, case, implementation) for case in cases]:
        for name in LAWS if laws is None else laws:
            start = time.perf_counter()
            failure = trial.failure(name)
            if failure:
                failures.append(failure)
            if report:
                seconds = time.perf_counter() - start
                report(f"{'✗' if failure else '✓'} {name:18} {seconds:5.1f} s   {LAWS[name].__doc__}")
    if failures:
        raise ExceptionGroup(f"{len(failures)} checks failed", failures)
