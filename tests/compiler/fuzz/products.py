"""Products of matrices and vectors."""

import math
from collections.abc import Callable
from typing import Any

from tests.compiler.fuzz.body import MOST_ELEMENTS, PRECISION, Body, NoOperand, greatest


def product(body: Body):
    """Of matrices whose sums are exact: small integers, which TF32 holds too."""
    x = body.pick(lambda v: v.rank == 2 and v.dtype in (*PRECISION, "int8", "uint8", "int32") and v.exact)
    y = body.pick(lambda v: v.rank == 2 and v.exact and bool(set(v.shape) & set(x.shape)))
    turns = [(i, j) for i in (0, 1) for j in (0, 1) if x.shape[1 - i] == y.shape[j]]
    if not turns:
        raise NoOperand
    i, j = body.one_of(turns)
    y = body.cast(y, x.dtype)
    terms = x.shape[1 - i]
    texts = f"{x.text}{'.T' * i}", f"{y.text}{'.T' * j}"
    shape = x.shape[i], y.shape[1 - j]
    if x.is_integer:
        text = f"jnp.dot({texts[0]}, {texts[1]}, preferred_element_type=jnp.int32)"
        body.let(text, shape, "int32", bound=x.bound * y.bound * terms)
        return
    out = x.dtype if body.chance(2) else "float32"
    limit = max(int(math.sqrt(min(greatest(out), 2**22) / terms)), 1)
    x, y = body.tame(x, limit), body.tame(y, limit)
    texts = f"{x.text}{'.T' * i}", f"{y.text}{'.T' * j}"
    text = f"jnp.dot({texts[0]}, {texts[1]}, preferred_element_type=jnp.{out})"
    body.let(text, shape, out, x, y, bound=x.bound * y.bound * terms)


def weighted_sum(body: Body):
    x = body.pick(lambda v: v.rank == 2 and v.is_float and v.exact)
    y = body.pick(lambda v: v.rank == 1 and v.shape[0] == x.shape[1] and v.exact)
    y = body.cast(y, x.dtype)
    limit = max(int(math.sqrt(min(greatest(x.dtype), 2**22) / x.shape[1])), 1)
    x, y = body.tame(x, limit), body.tame(y, limit)
    body.let(f"{x.text} @ {y.text}", x.shape[:1], x.dtype, x, y, bound=x.bound * y.bound * x.shape[1])


def mixed_product(body: Body):
    """Of two types."""
    x = body.pick(lambda v: v.rank == 2 and v.is_float and v.exact)
    y = body.pick(lambda v: v.rank == 2 and v.shape[0] == x.shape[1] and v.exact and v.dtype != x.dtype)
    if not y.is_float:
        raise NoOperand
    limit = max(int(math.sqrt(min(greatest(x.dtype), greatest(y.dtype)) / x.shape[1])), 1)
    x, y = body.tame(x, limit), body.tame(y, limit)
    text = f"jnp.dot({x.text}, {y.text}, preferred_element_type=jnp.float32)"
    body.let(text, (x.shape[0], y.shape[1]), "float32", x, y, bound=x.bound * y.bound * x.shape[1])


def batched_product(body: Body):
    x = body.pick(lambda v: v.rank == 3 and v.is_float and v.exact)
    y = body.pick(lambda v: v.rank == 3 and v.shape[0] == x.shape[0] and v.shape[1] == x.shape[2] and v.exact)
    y = body.cast(y, x.dtype)
    limit = max(int(math.sqrt(min(greatest(x.dtype), 2**22) / x.shape[2])), 1)
    x, y = body.tame(x, limit), body.tame(y, limit)
    shape = (*x.shape[:2], y.shape[2])
    if math.prod(shape) > MOST_ELEMENTS:
        raise NoOperand
    text = f'jnp.einsum("bij,bjk->bik", {x.text}, {y.text})'
    body.let(text, shape, x.dtype, x, y, bound=x.bound * y.bound * x.shape[2])


PRODUCTS: list[Callable[[Body], Any]] = [product, product, product, weighted_sum, batched_product, mixed_product]
