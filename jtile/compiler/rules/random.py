"""`jax.random`: keys are their data, two 32-bit words each, and the numbers are those that JAX draws anywhere."""

import jax
import jax.numpy as jnp

from jtile import borrowed
from jtile.compiler.rules import rule
from jtile.compiler.value import Value

# Threefry-2x32, 20 rounds: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)

MIX = """\
@triton.jit
def _mix(x, y, rotation: tl.constexpr):
    x = x + y
    y = (y << rotation) | (y >> (32 - rotation))
    return x, x ^ y
"""


def _threefry() -> str:
    keys = ["key_x", "key_y", "key_z"]
    lines = ["key_z = key_x ^ key_y ^ 0x1BD11BDA", "x = x + key_x", "y = y + key_y"]
    for group in range(5):
        lines += [f"x, y = _mix(x, y, {rotation})" for rotation in ROTATIONS[group % 2]]
        lines += [f"x = x + {keys[(group + 1) % 3]}", f"y = y + {keys[(group + 2) % 3]} + {group + 1}"]
    head = "@triton.jit\ndef _threefry2x32(key_x, key_y, x, y):\n"
    return head + "".join(f"    {line}\n" for line in [*lines, "return x, y"])


@rule("threefry2x32")
def threefry2x32(e, eqn, *operands: Value):
    e.helper("_mix", MIX)
    cipher = e.helper("_threefry2x32", _threefry())
    outs = [v.aval for v in eqn.outvars]
    names = e.name("bits"), e.name("bits")
    e.line(f"{', '.join(names)} = {cipher}({', '.join(e.tensor(v) for v in operands)})")
    return [Value(name, out.shape, out.dtype) for name, out in zip(names, outs, strict=True)]


@rule("iota_2x32_shape")
def iota_2x32_shape(e, eqn):
    """The number of each element, as a high and a low word; tiles are far too small for the high one."""
    shape = eqn.params["shape"]

    def count():
        low = jnp.zeros(shape, jnp.uint32)
        for axis, size in enumerate(shape):
            low = low * size + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        return jnp.zeros(shape, jnp.uint32), low

    return e.compute(count)


@rule("random_wrap", "random_unwrap")
def same_data(e, eqn, x: Value):
    return x


@rule("random_seed")
def random_seed(e, eqn, seeds: Value):
    return _for_each(e, eqn.params["impl"].seed, seeds, len(seeds.shape))


@rule("random_split")
def random_split(e, eqn, keys: Value):
    split, shape = borrowed.key_functions(eqn.invars[0].aval).split, eqn.params["shape"]
    return _for_each(e, lambda key: split(key, shape), keys, eqn.invars[0].aval.ndim)


@rule("random_bits")
def random_bits(e, eqn, keys: Value):
    draw = borrowed.key_functions(eqn.invars[0].aval).random_bits
    width, shape = eqn.params["bit_width"], eqn.params["shape"]
    return _for_each(e, lambda key: draw(key, width, shape), keys, eqn.invars[0].aval.ndim)


@rule("random_fold_in")
def random_fold_in(e, eqn, keys: Value, numbers: Value):
    fold_in = borrowed.key_functions(eqn.invars[0].aval).fold_in
    return e.compute(jnp.vectorize(fold_in, signature="(k),()->(k)"), keys, numbers)[0]


def _for_each(e, function, x: Value, rank: int) -> Value:
    for _ in range(rank):
        function = jax.vmap(function)
    return e.compute(function, x)[0]


def moved(e, eqn, *operands: Value) -> list[Value]:
    """Results of an operation that moves whole keys: the same for each word of their data."""
    is_key = [borrowed.is_key(v.aval) for v in eqn.invars]
    move = jax.vmap(
        lambda *x: eqn.primitive.bind(*x, **eqn.params), in_axes=[-1 if k else None for k in is_key], out_axes=-1
    )
    return e.compute(move, *operands)
