"""One rule per JAX primitive: how it is written in Triton.

A rule takes the emitter, the equation and its operands (a `Value`, or a `Block` for a ref), emits what it needs, and
returns the result: one `Value`, or a list for primitives of several results.
"""

from collections.abc import Callable

RULES: dict[str, Callable] = {}


def rule(*primitives: str):
    """Registers the decorated function for these primitives."""

    def register(function):
        RULES.update(dict.fromkeys(primitives, function))
        return function

    return register


# What to write in place of a primitive that has no rule.
CURES = {
    "conv_general_dilated": "Write the convolution as `jnp.dot` over shifted loads `ref[pl.ds(i, n)]`.",
    "threefry2x32": "Draw the random numbers outside of the kernel, or compute a counter-based hash with integers.",
    "random_bits": "Draw the random numbers outside of the kernel, or compute a counter-based hash with integers.",
    "debug_print": "Run with `implementation='interpret'`, or `jtile.interpret_pallas`, where printing works.",
    "debug_callback": "Run with `jtile.interpret_pallas`, where callbacks work.",
    "linear_solve": "Write the elimination as a loop over columns.",
}

# Each module registers its rules with the table above.
from jtile.compiler.rules import arithmetic, control, dot, indexing, memory, reduction, shape, sort  # noqa: E402, F401
