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
    "rng_bit_generator": "Make keys of the kind that is JAX's default, `jax.random.key(seed, impl='threefry2x32')`.",
    "debug_callback": "Run with `jtile.interpret_pallas`, where callbacks work.",
    "linear_solve": "Write the elimination as a loop over columns.",
}

# Each module registers its rules with the table above.
from jtile.compiler.rules import arithmetic, control, debugging, dot, indexing, memory, random, reduction, shape, sort  # noqa: E402, F401
