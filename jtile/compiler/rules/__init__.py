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
    "gather": "Index the ref with integer arrays, `ref[rows, columns]`, which loads just those elements; or sum over a "
    "mask, `jnp.sum(jnp.where(iota == index, x, 0), axis)`.",
    "scatter": "Store through the ref instead: `ref[rows, cols] = value`.",
    "scatter-add": "Use `plgpu.atomic_add(ref, (rows, cols), value)`, or sum over a mask `iota == index`.",
    "dynamic_update_slice": "Store through the ref, `ref[pl.ds(start, size)] = value`, or select with `jnp.where`.",
    "sort": "Sort outside of the kernel.",
    "top_k": "Take the maximum k times, masking what was taken with `jnp.where`.",
    "conv_general_dilated": "Write the convolution as `jnp.dot` over shifted loads `ref[pl.ds(i, n)]`.",
    "threefry2x32": "Draw the random numbers outside of the kernel, or compute a counter-based hash with integers.",
    "random_bits": "Draw the random numbers outside of the kernel, or compute a counter-based hash with integers.",
    "debug_print": "Run with `implementation='interpret'`, or `jtile.interpret_pallas`, where printing works.",
    "debug_callback": "Run with `jtile.interpret_pallas`, where callbacks work.",
    "cumlogsumexp": "Subtract the running maximum, `jax.lax.cummax`, and take `jnp.cumsum` of the exponentials.",
    "linear_solve": "Write the elimination as a loop over columns.",
}

# Each module registers its rules with the table above.
from jtile.compiler.rules import arithmetic, control, dot, memory, reduction, shape  # noqa: E402, F401
