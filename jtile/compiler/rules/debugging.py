"""Printing and checking inside of a kernel."""

import string

import jax
from jax.experimental import pallas as pl

from jtile import borrowed
from jtile.compiler.rules import rule
from jtile.compiler.value import Value


@rule("debug_print")
def debug_print(e, eqn, *operands: Value):
    """A line for each lane and value behind the whole text, since the GPU prints values only after it."""
    params = eqn.params
    if params["ordered"]:
        raise e.unsupported("prints of programs that run at once have no order", "Leave out ordered=True.")
    dynamic = iter(operands)
    static = dict(params["static_args"])
    flat = [static[i] if i in static else next(dynamic) for i in range(len(static) + len(operands))]
    positional, named = jax.tree.unflatten(params["in_tree"], flat)
    text, values, formats = "", [], set()
    counter = iter(range(len(flat)))
    for before, field, spec, conversion in string.Formatter().parse(params["fmt"]):
        text += before
        if field is None:
            continue
        key = field or str(next(counter))
        argument = positional[int(key)] if key.isdigit() else named.get(key)
        if isinstance(argument, Value):
            if conversion or spec not in ("", "x"):
                raise e.unsupported(
                    f"`{{{field}{'!' + conversion if conversion else ''}:{spec}}}` does not say how the GPU prints",
                    "Use `{}`, or `{:x}` for hexadecimal digits.",
                )
            text += f"{{{field}}}"
            values.append(argument)
            formats.add(spec)
        elif key.isdigit() or key in named:
            text += string.Formatter().vformat(f"{{0{'!' + conversion if conversion else ''}:{spec}}}", (argument,), {})
        else:
            raise e.unsupported(f"`{{{field}}}` takes a value apart", "Name the part: `{part}`, and pass `part=...`.")
    if not params["has_placeholders"] and not values:
        values = [v for v in positional if isinstance(v, Value)]
    if len(formats) > 1:
        raise e.unsupported("one print has hexadecimal and other values", "Print them in two.")
    _print(e, text, values, hexadecimal="x" in formats)
    return []


def _print(e, text: str, values: list[Value], hexadecimal: bool = False) -> None:
    if not set(text) <= set(string.printable):
        raise e.unsupported(f"{text!r} is not all ASCII, which is what the GPU prints", "Use ASCII characters.")
    # The text ends up in a format of C's.
    arguments = [repr(text.replace("%", "%%")), *map(e.tensor, values), *(["hex=True"] if hexadecimal else [])]
    e.line(f"tl.device_print({', '.join(arguments)})")


@rule("check")
def check(e, eqn, failed: Value, *rest: Value):
    """An assertion, where `pl.enable_debug_checks` asks for them, as its documentation has it."""
    if not eqn.params["debug"]:
        raise e.unsupported("`checkify.check` has no form in Triton", "Use `pl.debug_check`.")
    if not pl.enable_debug_checks.value:
        return []
    message, values = borrowed.failed_check(eqn.params["err_tree"], [failed, *rest])
    if values:
        with e.block(f"if {failed.text}:"):
            _print(e, message, values)
    [holds] = e.compute(jax.numpy.logical_not, failed)
    e.line(f"tl.device_assert({e.tensor(holds)}, {f'{message} at {e.place}' if e.place else message!r})")
    return []
