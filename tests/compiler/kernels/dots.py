"""Products, and the kernels made of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from tests.compiler.kernels import by_tiles, case, integers, like, normal, whole

DOTS = {
    "nn": (lambda a, b: a @ b, (16, 32), (32, 16)),
    "nt": (lambda a, b: a @ b.T, (16, 32), (16, 32)),
    "tn": (lambda a, b: lax.dot_general(a, b, (((0,), (0,)), ((), ()))), (32, 16), (32, 16)),
    "padded": (lambda a, b: (a + 1) @ (b + 1), (12, 20), (20, 24)),
    "padded_nt": (lambda a, b: (a + 1) @ (b + 1).T, (12, 20), (24, 20)),
    "one_row": (lambda a, b: a @ b, (1, 32), (32, 16)),
    "batched": (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (2, 16, 16), (2, 16, 16)),
    "vector": (lambda a, b: a @ b, (12, 20), (20,)),
    "vector_on_the_left": (lambda a, b: a @ b, (20,), (20, 12)),
    "highest": (functools.partial(jnp.dot, precision="highest"), (16, 16), (16, 16)),
    "accumulate": (lambda a, b: a @ b + (a @ b) * 2 + a[:16, :16], (16, 16), (16, 16)),
}
for _name, (_function, _a, _b) in DOTS.items():

    @case(normal(*_a), normal(*_b, seed=1), name=f"dot_{_name}")
    def _dot(a, b, function=_function):
        out = jax.eval_shape(function, a, b)

        def kernel(a_ref, b_ref, o_ref):
            o_ref[...] = function(a_ref[...], b_ref[...])

        return pl.pallas_call(kernel, out_shape=like(out))(a, b)


@case(normal(12, 20), normal(20, 24, seed=1), normal(12, 1, seed=2), normal(1, seed=3))
def dot_of_broadcasts(a, b, column, scalar):
    """Padding that was 0 is so no more once a column or scalar is added to it."""

    def kernel(a_ref, b_ref, column_ref, scalar_ref, o_ref):
        o_ref[...] = lax.add(a_ref[...], column_ref[...]) @ (b_ref[...] + scalar_ref[0])

    return pl.pallas_call(kernel, out_shape=like(a, shape=(12, 24)))(a, b, column, scalar)


@case(normal(12, 1), normal(12, 20, seed=1))
def constant_and_column(column, x):
    """Operands of one column stand for all columns, and so a constant may be what gives the shape."""

    def kernel(column_ref, x_ref, o_ref):
        difference = lax.sub(jnp.zeros((12, 20)), column_ref[...])
        chosen = lax.select_n(jnp.full((12, 20), True), x_ref[...], jnp.full((12, 20), 2.0))
        o_ref[...] = difference + chosen + jnp.sum(difference * 1.5, axis=0)

    return pl.pallas_call(kernel, out_shape=like(x))(column, x)


def _typed(*shape, dtype, seed=0):
    if jnp.issubdtype(dtype, jnp.floating):
        return normal(*shape, seed=seed).astype(dtype)
    info = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(info.min, info.max, shape, dtype, endpoint=True)


def _float32(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _int32(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.int32)


FLOAT8, NARROWER = jnp.float8_e4m3fn, jnp.float8_e5m2
TYPED_DOTS = {
    "bytes": (_int32, np.int8, np.int8),
    "unsigned_bytes": (_int32, np.uint8, np.uint8),
    "mixed_bytes": (_int32, np.int8, np.uint8),
    "shorts": (_int32, np.int16, np.int16),
    "words": (jnp.dot, np.int32, np.int32),
    "unsigned_words": (jnp.dot, np.uint32, np.uint32),
    "bytes_kept": (jnp.dot, np.int8, np.int8),
    "float8": (_float32, FLOAT8, FLOAT8),
    "float8_e5m2": (_float32, NARROWER, NARROWER),
    "float8_mixed": (_float32, FLOAT8, NARROWER),
    "half_and_float32": (_float32, jnp.bfloat16, np.float32),
    "half_and_float16": (_float32, jnp.bfloat16, np.float16),
    "half_and_bytes": (_float32, np.float16, np.int8),
    "half_kept": (jnp.dot, np.float16, np.float16),
}
for _name, (_function, _a, _b) in TYPED_DOTS.items():
    case(_typed(12, 20, dtype=_a), _typed(20, 10, dtype=_b, seed=1), name=f"dot_of_{_name}")(
        functools.partial(whole, _function)
    )

MANY_AXES = {
    "few_terms": ("ij,jk->ik", (16, 3), (3, 16)),
    "few_of_everything": ("ij,jk->ik", (2, 3), (3, 5)),
    "outer": ("i,k->ik", (5,), (6,)),
    "inner": ("i,i->", (5,), (5,)),
    "two_batches": ("abij,abjk->abik", (2, 3, 4, 5), (2, 3, 5, 6)),
    "two_free": ("aij,jbk->aibk", (2, 3, 16), (16, 2, 5)),
    "two_terms": ("iab,abk->ik", (4, 3, 5), (3, 5, 6)),
    "transposed_batch": ("ibj,kjb->bki", (4, 3, 5), (6, 5, 3)),
    "batched_vector": ("bij,bj->bi", (3, 4, 5), (3, 5)),
    "batched_vector_on_the_left": ("bj,bjk->bk", (3, 5), (3, 5, 4)),
    "batched_inner": ("bi,bi->b", (3, 5), (3, 5)),
    "no_terms": ("bi,bk->bik", (3, 5), (3, 4)),
    "grouped_heads": ("qhgd,khd->hgqk", (8, 2, 3, 16), (8, 2, 16)),
}
for _name, (_subscripts, _a, _b) in MANY_AXES.items():
    case(normal(*_a), normal(*_b, seed=1), name=f"einsum_{_name}")(
        functools.partial(whole, functools.partial(jnp.einsum, _subscripts))
    )


@case(normal(12, 3, 20), normal(20, 8, seed=1), normal(12, 3, 8, seed=2))
def dot_accumulated_after_merging(a, b, c):
    return whole(lambda a, b, c: c + jnp.einsum("xyj,jk->xyk", a, b), a, b, c)


@case(integers(12, 20) > 0, integers(20, 8, seed=1) > 0)
def dot_of_bools(a, b):
    return whole(lambda a, b: lax.dot_general(a, b, (((1,), (0,)), ((), ()))), a, b)


@case(normal(40, 48), normal(48, 56, seed=1))
def matmul_ragged(a, b, bm=16, bn=32, bk=16):
    def kernel(a_ref, b_ref, o_ref):
        def step(k, acc):
            here = pl.ds(k * bk, bk)
            return acc + jnp.dot(a_ref[:, here], b_ref[here, :], preferred_element_type=jnp.float32)

        acc = lax.fori_loop(0, a.shape[1] // bk, step, jnp.zeros(o_ref.shape, jnp.float32))
        o_ref[...] = acc.astype(o_ref.dtype)

    return by_tiles(kernel, a, b, bm, bn)


@case(normal(2, 40, 24), normal(2, 40, 24, seed=1), normal(2, 40, 24, seed=2))
def attention(q, k, v, bq=16, bk=32):
    """Causal, with a length that no block divides and a head dimension that is no power of two."""
    length, d = q.shape[1:]

    def kernel(q_ref, k_ref, v_ref, o_ref, l_ref):
        i = pl.program_id(1)
        q = q_ref[...]
        rows = i * bq + lax.broadcasted_iota(jnp.int32, (bq, bk), 0)

        def step(j, carry):
            acc, top, total = carry
            here = pl.ds(j * bk, bk)
            scores = jnp.dot(q, k_ref[here, :].T, preferred_element_type=jnp.float32) * d**-0.5
            columns = j * bk + lax.broadcasted_iota(jnp.int32, (bq, bk), 1)
            scores = jnp.where((columns <= rows) & (columns < length), scores, -1e30)
            new_top = jnp.maximum(top, jnp.max(scores, axis=1))
            p = jnp.exp(scores - new_top[:, None])
            shrink = jnp.exp(top - new_top)
            values = jnp.dot(p.astype(v.dtype), v_ref[here, :], preferred_element_type=jnp.float32)
            return acc * shrink[:, None] + values, new_top, total * shrink + jnp.sum(p, axis=1)

        start = jnp.zeros((bq, d), jnp.float32), jnp.full((bq,), -1e30, jnp.float32), jnp.zeros((bq,), jnp.float32)
        acc, top, total = lax.fori_loop(0, ((i + 1) * bq + bk - 1) // bk, step, start)
        o_ref[...] = (acc / total[:, None]).astype(o_ref.dtype)
        l_ref[...] = top + jnp.log(total)

    whole = pl.BlockSpec((None, pl.cdiv(length, bk) * bk, d), lambda b, i: (b, 0, 0))
    rows = pl.BlockSpec((None, bq, d), lambda b, i: (b, i, 0))
    return pl.pallas_call(
        kernel,
        grid=(q.shape[0], pl.cdiv(length, bq)),
        in_specs=[rows, whole, whole],
        out_specs=[rows, pl.BlockSpec((None, bq), lambda b, i: (b, i))],
        out_shape=[like(q), like(q, jnp.float32, q.shape[:2])],
    )(q, k, v)
