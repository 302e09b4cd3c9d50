"""Small kernels, one or more for each rule of the compiler, with operands to run them on."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from jtile.compiler.emit import emit
from jtile.compiler.kernel import kernel_of
from jtile.compiler.params import CompilerParams
from jtile.compiler.rewrite import map_pallas_calls

CASES: dict[str, tuple[Callable, tuple]] = {}
NATIVE: dict[str, tuple[Callable, tuple]] = {}


def case(*operands, name: str | None = None, native: bool = False):
    """Registers a function of these operands that calls Pallas; `native` if no interpreter can run it."""

    def register(function):
        (NATIVE if native else CASES)[name or function.__name__] = function, operands
        return function

    return register


def normal(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def integers(*shape, low=-100, high=100, dtype=np.int32, seed=0):
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def sources(function, *operands, **params):
    """The source of each kernel that `function` calls."""
    found = []

    def keep(call, *_):
        found.append(emit(kernel_of(call), CompilerParams(**params)))
        return [jnp.zeros(a.shape, a.dtype) for a in call["out_avals"]]

    jax.eval_shape(map_pallas_calls(function, keep), *operands)
    return found


def rowwise(body, rows, *operands, out=None):
    """`body` on blocks of `rows` rows of two-dimensional operands; vectors and scalars are passed whole."""
    n = operands[0].shape[0]

    def kernel(*refs):
        refs[-1][...] = body(*(ref[...] for ref in refs[:-1]))

    specs = [
        pl.BlockSpec((rows, *x.shape[1:]), lambda i, x=x: (i,) + (0,) * (x.ndim - 1))
        if x.shape[0] == n
        else pl.BlockSpec(x.shape, lambda i, x=x: (0,) * x.ndim)
        for x in operands
    ]
    out = jax.ShapeDtypeStruct(operands[0].shape, operands[0].dtype) if out is None else out
    out_spec = pl.BlockSpec((rows, *out.shape[1:]), lambda i: (i,) + (0,) * (len(out.shape) - 1))
    return pl.pallas_call(kernel, grid=(pl.cdiv(n, rows),), in_specs=specs, out_specs=out_spec, out_shape=out)(
        *operands
    )


def by_tiles(kernel, a, b, bm, bn, **options):
    """`kernel` for each tile of a @ b, on the rows of `a` and the columns of `b` that it needs."""
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(a.shape[0], bm), pl.cdiv(b.shape[1], bn)),
        in_specs=[
            pl.BlockSpec((bm, a.shape[1]), lambda i, j: (i, 0)),
            pl.BlockSpec((b.shape[0], bn), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((bm, bn), lambda i, j: (i, j)),
        out_shape=like(a, shape=(a.shape[0], b.shape[1])),
        **options,
    )(a, b)


def whole(body, *operands):
    """`body` on whole operands, in one program."""
    out = jax.eval_shape(body, *operands)

    def kernel(*refs):
        results = jax.tree.leaves(body(*(ref[...] for ref in refs[: len(operands)])))
        for ref, result in zip(refs[len(operands) :], results, strict=True):
            ref[...] = result

    return pl.pallas_call(kernel, out_shape=out)(*operands)


def like(x, dtype=None, shape=None):
    return jax.ShapeDtypeStruct(x.shape if shape is None else shape, x.dtype if dtype is None else dtype)


# Each module adds its kernels to the table above.
from tests.compiler.kernels import (  # noqa: E402, F401
    atomics,
    control,
    dots,
    elementwise,
    fuzzed,
    indexing,
    memory,
    random,
    reductions,
    scratch,
    shapes,
    sorts,
)
