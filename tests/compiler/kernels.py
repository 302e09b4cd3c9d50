"""Small kernels, one or more for each rule of the compiler, with operands to run them on."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jtile.compiler.emit import emit
from jtile.compiler.kernel import kernel_of
from jtile.compiler.params import CompilerParams
from jtile.compiler.rewrite import map_pallas_calls

CASES: dict[str, tuple[Callable, tuple]] = {}


def case(*operands, name: str | None = None):
    """Registers a function of these operands that calls Pallas."""

    def register(function):
        CASES[name or function.__name__] = function, operands
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


def like(x, dtype=None, shape=None):
    return jax.ShapeDtypeStruct(x.shape if shape is None else shape, x.dtype if dtype is None else dtype)


# Elementwise operations, on ragged blocks of a width that is no power of two

X, Y = normal(10, 24), normal(10, 24, seed=1)
POSITIVE = np.abs(X) + 0.1
UNIT = np.tanh(X) * 0.99
SPECIAL = np.array([[0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 0.5]] * 4, np.float32)

UNARY = {
    "neg": (lax.neg, X),
    "abs": (lax.abs, X),
    "sign": (lax.sign, SPECIAL),
    "square": (lax.square, X),
    "exp": (lax.exp, X),
    "exp2": (lax.exp2, X),
    "log": (lax.log, POSITIVE),
    "log1p": (lax.log1p, POSITIVE),
    "expm1": (lax.expm1, X),
    "sqrt": (lax.sqrt, POSITIVE),
    "rsqrt": (lax.rsqrt, POSITIVE),
    "cbrt": (lax.cbrt, X),
    "sin": (lax.sin, X),
    "cos": (lax.cos, X),
    "tan": (lax.tan, X),
    "asin": (lax.asin, UNIT),
    "acos": (lax.acos, UNIT),
    "atan": (lax.atan, X),
    "sinh": (lax.sinh, X),
    "cosh": (lax.cosh, X),
    "tanh": (lax.tanh, X),
    "asinh": (lax.asinh, X),
    "acosh": (lax.acosh, POSITIVE + 1),
    "atanh": (lax.atanh, UNIT),
    "erf": (lax.erf, X),
    "erfc": (lax.erfc, X),
    "erf_inv": (lax.erf_inv, UNIT),
    "lgamma": (lax.lgamma, POSITIVE),
    "logistic": (lax.logistic, X),
    "floor": (lax.floor, X * 3),
    "ceil": (lax.ceil, X * 3),
    "round_away": (functools.partial(lax.round, rounding_method=lax.RoundingMethod.AWAY_FROM_ZERO), X * 3),
    "round_even": (jnp.round, np.arange(-12, 12, dtype=np.float32).reshape(2, 12) / 2),
    "is_finite": (lambda x: jnp.where(lax.is_finite(x), 1.0, 0.0), SPECIAL),
    "power_3": (lambda x: x**3, X),
    "power_7": (lambda x: x**7, X),
    "power_minus_2": (lambda x: x**-2, POSITIVE),
    "relu": (jax.nn.relu, SPECIAL),
    "gelu": (functools.partial(jax.nn.gelu, approximate=False), X),
    "gelu_tanh": (jax.nn.gelu, X),
    "silu": (jax.nn.silu, X),
    "softplus": (jax.nn.softplus, X),
    "clip": (lambda x: jnp.clip(x, -0.5, 0.5), SPECIAL),
    "to_integer_and_back": (lambda x: (x * 10).astype(jnp.int32).astype(jnp.float32), X),
    "to_bool_and_back": (lambda x: (x > 0).astype(jnp.float32) + x.astype(bool).astype(jnp.float32), SPECIAL[:, 5:]),
    "to_half_and_back": (lambda x: x.astype(jnp.float16).astype(jnp.float32), X),
    "bits": (lambda x: lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) ^ 1, jnp.float32), X),
    "reduce_precision": (lambda x: lax.reduce_precision(x, 5, 10), X),
    "constants_only": (lambda x: x + jnp.sqrt(jnp.full(x.shape, 2.0)) + jnp.float32(1e-40), X),
    "optimization_barrier": (lambda x: lax.optimization_barrier((x, x))[0] + 1, X),
    "half_arithmetic": (lambda x: jnp.exp(x.astype(jnp.float16) / 3).astype(jnp.float32), X),
}
for _name, (_function, _x) in UNARY.items():
    case(_x, name=_name)(functools.partial(rowwise, _function, 4))

BINARY = {
    "add": (lax.add, X, Y),
    "subtract": (lax.sub, X, Y),
    "multiply": (lax.mul, X, Y),
    "divide": (lax.div, X, Y),
    "maximum": (lax.max, SPECIAL, SPECIAL[:, ::-1].copy()),
    "minimum": (lax.min, SPECIAL, SPECIAL[:, ::-1].copy()),
    "power": (lax.pow, POSITIVE, Y),
    "remainder": (lax.rem, X * 5, Y),
    "mod": (jnp.mod, X * 5, Y),
    "atan2": (lax.atan2, X, Y),
    "nextafter": (lax.nextafter, X, Y),
    "where": (lambda x, y: jnp.where((x < y) & (x != 0) | ~(y >= 0), x, y), X, Y),
    "logical": (lambda x, y: jnp.where((x > 0) ^ (y > 0), 1.0, 2.0), X, Y),
}
for _name, (_function, _x, _y) in BINARY.items():
    case(_x, _y, name=_name)(functools.partial(rowwise, _function, 4))

M, N = integers(10, 24), integers(10, 24, seed=1)
NATURAL = np.abs(N) + 1
INTEGER = {
    "integer_arithmetic": (lambda x, y: x * y - (x + y), M, N),
    "integer_divide": (lax.div, M, NATURAL),
    "integer_remainder": (lax.rem, M, NATURAL),
    "floor_divide": (jnp.floor_divide, M, NATURAL),
    "integer_mod": (jnp.mod, M, NATURAL),
    "integer_extremes": (lambda x, y: jnp.minimum(jnp.maximum(x, y), 7) + jnp.clip(x, -3, 3), M, N),
    "integer_sign": (lambda x, y: jnp.sign(x) + abs(y), M, N),
    "bitwise": (lambda x, y: (x & y) | ~(x ^ 5), M, N),
    "shift_by_a_constant": (lambda x, y: (x << 3) + (y >> 2) + lax.shift_right_logical(x, 4), M, N),
    "shift_by_anything": (
        lambda x, n: lax.shift_left(x, n) + lax.shift_right_logical(x, n) * 3 + lax.shift_right_arithmetic(x, n) * 7,
        M,
        integers(10, 24, low=0, high=40),
    ),
    "unsigned": (lambda x, y: x // y + (x >> 1) - y, M.astype(np.uint32), NATURAL.astype(np.uint32)),
    "unsigned_shift": (
        lambda x, y: lax.shift_right_arithmetic(x, y % 8) + jnp.sign(x),
        M.astype(np.uint32),
        NATURAL.astype(np.uint32),
    ),
    "bytes": (lambda x, y: jnp.maximum(x, y) + jnp.int8(1), M.astype(np.int8), N.astype(np.int8)),
    "select_among_three": (lambda x, y: lax.select_n(jnp.abs(x) % 3, x, y, x + y), M, N),
    "bools": (lambda x, y: x & ~y, M > 0, N > 0),
}
for _name, (_function, _x, _y) in INTEGER.items():
    case(_x, _y, name=_name)(functools.partial(rowwise, _function, 4))


# Reductions and scans, along padded and unpadded axes

REDUCTIONS = {
    "sum": jnp.sum,
    "max": jnp.max,
    "min": jnp.min,
    "prod": jnp.prod,
    "argmax": jnp.argmax,
    "argmin": jnp.argmin,
}
for _name, _function in REDUCTIONS.items():

    def _reduce(x, function=_function):
        kernel = lambda x: function(x + 1, axis=-1).astype(jnp.float32)  # noqa: E731
        return rowwise(kernel, 4, x, out=like(x, jnp.float32, x.shape[:-1]))

    case(normal(10, 24), name=f"{_name}_of_padded")(_reduce)
    case(normal(8, 16), name=f"{_name}_of_whole")(_reduce)
    case(integers(10, 24, low=-3, high=3), name=f"{_name}_of_integers")(_reduce)

case(np.where(SPECIAL == np.inf, np.nan, SPECIAL)[:, :7].copy(), name="nan_is_the_maximum")(
    lambda x: rowwise(lambda x: jnp.max(x, 1) + jnp.argmax(x, 1), 4, x, out=like(x, shape=(4,)))
)


@case(normal(10, 24))
def reduce_over_rows(x):
    return rowwise(lambda x: x + jnp.sum(x * 2 + 1, axis=0, keepdims=True), 10, x)


@case(normal(6, 3, 12))
def reduce_two_axes(x):
    return rowwise(lambda x: jnp.max(x + 1, axis=(1, 2)) + jnp.sum(x + 1, axis=(1, 2)), 4, x, out=like(x, shape=(6,)))


@case(normal(5, 12))
def reduce_everything(x):
    def kernel(x_ref, o_ref):
        x = x_ref[...]
        o_ref[0] = jnp.sum(x + 1)
        o_ref[1] = jnp.max(x - 5)
        o_ref[2] = jnp.all(x > -10).astype(jnp.float32) + jnp.any(x > 10)

    return pl.pallas_call(kernel, out_shape=like(x, shape=(3,)))(x)


@case(normal(6, 12))
def integer_logic_reductions(x):
    def body(x):
        bits = (x * 100).astype(jnp.int32) | 1
        return jnp.bitwise_and.reduce(bits, axis=1) + jnp.bitwise_or.reduce(bits, axis=1)

    return rowwise(body, 4, x, out=like(x, jnp.int32, (6,)))


for _reverse in (False, True):
    for _name, _function in {
        "cumsum": lax.cumsum,
        "cumprod": lax.cumprod,
        "cummax": lax.cummax,
        "cummin": lax.cummin,
    }.items():

        @case(normal(6, 12), name=f"{_name}{'_reversed' * _reverse}")
        def _scan(x, function=_function, reverse=_reverse):
            return rowwise(lambda x: function(x + 1, axis=1, reverse=reverse), 4, x)


@case(normal(6, 24))
def softmax(x):
    return rowwise(lambda x: jax.nn.softmax(x, axis=-1), 4, x)


@case(normal(6, 24), normal(24, seed=3))
def layer_norm(x, scale):
    def body(x, scale):
        mean = jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean((x - mean) ** 2, axis=-1, keepdims=True)
        return (x - mean) * lax.rsqrt(variance + 1e-6) * scale

    # The mean is over 24 lanes of 32: the others must not enter the variance.
    return rowwise(body, 4, x, scale)


@case(normal(6, 24), integers(6, low=0, high=24))
def cross_entropy(logits, labels):
    def body(x, label):
        logsumexp = jax.nn.logsumexp(x, axis=-1)
        hit = lax.broadcasted_iota(jnp.int32, x.shape, 1) == label[:, None]
        return logsumexp - jnp.sum(jnp.where(hit, x, 0.0), axis=-1)

    return rowwise(body, 4, logits, labels, out=like(logits, shape=(6,)))


# Shapes

SHAPES = {
    "transpose": (lambda x: x.T.reshape(-1).reshape(8, 4).T, (4, 8)),
    "merge_and_split": (lambda x: (x.reshape(32) * jnp.arange(32.0)).reshape(4, 8), (4, 8)),
    "merge_padded_rows": (lambda x: (x.reshape(24) * jnp.arange(24.0)).reshape(3, 8), (3, 8)),
    "unit_axes": (lambda x: jnp.squeeze(x[:, None] + x[None, :, :].reshape(3, 1, 12), 1), (3, 12)),
    "slice_halves": (lambda x: jnp.concatenate([-x[:, 8:], x[:, :8]], axis=1), (4, 16)),
    "slice_quarter": (lambda x: jnp.tile(x[:, 4:8], (1, 4)), (4, 16)),
    "slice_rows": (lambda x: jnp.concatenate([x[2:], x[:2]], axis=0), (4, 16)),
    "slice_unevenly": (lambda x: jnp.concatenate([x[:, 3:10], x[:, :3], x[:, 10:]], axis=1), (4, 12)),
    "slice_interleaved": (lambda x: jnp.concatenate([x[:, ::2], x[:, 1::2]], axis=1), (4, 16)),
    "interleave": (lambda x: jnp.stack([-x[:, 1::2], x[:, ::2]], axis=-1).reshape(x.shape), (4, 16)),
    "stack_of_three": (lambda x: jnp.stack([x[:, :4], x[:, 4:], x[:, :4] * 2], axis=0).reshape(12, 4).T[:, :8], (4, 8)),
    "unstack": (lambda x: sum(jnp.unstack(x, axis=0)) + x, (4, 8)),
    "pairs": (lambda x: (x.reshape(4, 8, 2)[..., 1:] + x.reshape(4, 8, 2)).reshape(x.shape), (4, 16)),
    "split": (lambda x: jnp.concatenate(jnp.split(x, 2, axis=1)[::-1], axis=1), (4, 16)),
    "reverse": (lambda x: x[:, ::-1] + x[::-1], (4, 12)),
    "pad": (lambda x: jnp.pad(x[:, :9], ((0, 0), (1, 2)), constant_values=7.0), (4, 12)),
    "roll": (lambda x: jnp.roll(x, 5, axis=1), (4, 12)),
    "dynamic_slice": (lambda x: jnp.tile(lax.dynamic_slice(x, (0, pl.program_id(0) * 20), (4, 3)), (1, 4)), (4, 12)),
    "broadcast": (lambda x: x + jnp.sum(x, 1, keepdims=True) + jnp.sum(x, 0) + jnp.float32(2), (4, 12)),
    "iota": (lambda x: x + lax.broadcasted_iota(jnp.float32, x.shape, 1) * jnp.arange(4)[:, None], (4, 12)),
    "one_element": (lambda x: x.reshape(1).reshape(()).reshape(1, 1) * 2, (1, 1)),
}
for _name, (_function, _shape) in SHAPES.items():
    case(normal(*_shape), name=f"shape_{_name}")(functools.partial(lambda f, x: rowwise(f, x.shape[0], x), _function))


# Products

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


@case(integers(16, 32, dtype=np.int8), integers(32, 16, dtype=np.int8, seed=1))
def dot_of_bytes(a, b):
    def kernel(a_ref, b_ref, o_ref):
        o_ref[...] = jnp.dot(a_ref[...], b_ref[...], preferred_element_type=jnp.int32)

    return pl.pallas_call(kernel, out_shape=like(a, jnp.int32, (16, 16)))(a, b)


@case(normal(40, 48), normal(48, 56, seed=1))
def matmul_ragged(a, b, bm=16, bn=32, bk=16):
    def kernel(a_ref, b_ref, o_ref):
        def step(k, acc):
            here = pl.ds(k * bk, bk)
            return acc + jnp.dot(a_ref[:, here], b_ref[here, :], preferred_element_type=jnp.float32)

        acc = lax.fori_loop(0, a.shape[1] // bk, step, jnp.zeros(o_ref.shape, jnp.float32))
        o_ref[...] = acc.astype(o_ref.dtype)

    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(a.shape[0], bm), pl.cdiv(b.shape[1], bn)),
        in_specs=[
            pl.BlockSpec((bm, a.shape[1]), lambda i, j: (i, 0)),
            pl.BlockSpec((b.shape[0], bn), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((bm, bn), lambda i, j: (i, j)),
        out_shape=like(a, shape=(a.shape[0], b.shape[1])),
    )(a, b)


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


# Refs

REFS = {
    "halves": lambda x, o: (
        o.__setitem__((slice(None), pl.ds(8, 8)), x[:, :8]),
        o.__setitem__((slice(None), pl.ds(0, 8)), x[:, 8:]),
    ),
    "strided_load": lambda x, o: o.__setitem__(
        ..., jnp.concatenate([x[:, pl.ds(1, 8, stride=2)], x[:, pl.ds(0, 8, stride=2)]], axis=1)
    ),
    "strided_store": lambda x, o: (
        o.__setitem__((slice(None), pl.ds(0, 8, stride=2)), x[:, :8]),
        o.__setitem__((slice(None), pl.ds(1, 8, stride=2)), x[:, 8:]),
    ),
    "scalar": lambda x, o: o.__setitem__(..., jnp.full(o.shape, x[1, 3]) + x[2, 5]),
    "row": lambda x, o: o.__setitem__(..., jnp.broadcast_to(x[2][None], o.shape)),
    "column": lambda x, o: o.__setitem__(..., jnp.broadcast_to(x[:, 2][:, None], o.shape)),
    "at": lambda x, o: (
        o.at[1:3].at[:, pl.ds(0, 16)].__setitem__((..., pl.ds(0, 16)), x.at[pl.ds(0, 4)][pl.ds(1, 2), :])
    ),
    "gather": lambda x, o: o.__setitem__(..., x[:, (jnp.arange(16) * 7) % 16]),
    "gather_pairs": lambda x, o: o.__setitem__(
        ..., jnp.broadcast_to(x[jnp.arange(4), jnp.arange(4) * 3][:, None], o.shape)
    ),
    "add": lambda x, o: (o.__setitem__(..., x[...]), plgpu.store(o, o[...] + 1.0)),
    "masked": lambda x, o: (
        o.__setitem__(..., jnp.zeros(o.shape)),
        plgpu.store(
            o.at[:, :],
            plgpu.load(x, mask=x[...] > 0, other=3.0),
            mask=lax.broadcasted_iota(jnp.int32, o.shape, 1) % 3 > 0,
        ),
    ),
    "swap": lambda x, o: (
        o.__setitem__(..., x[...]),
        o.__setitem__(..., o.swap(x[...] * 2) if hasattr(o, "swap") else x[...]),
    ),
}
for _name, _function in REFS.items():

    @case(normal(4, 16), name=f"ref_{_name}")
    def _ref(x, function=_function):
        def kernel(x_ref, o_ref):
            if function is REFS["at"]:
                o_ref[...] = jnp.zeros(o_ref.shape)
            function(x_ref, o_ref)

        return pl.pallas_call(kernel, out_shape=like(x))(x)


@case(normal(10, 12), integers(10, 5, low=0, high=12))
def ref_gather_ragged(x, columns):
    def kernel(x_ref, columns_ref, o_ref):
        rows = lax.broadcasted_iota(jnp.int32, (4, 5), 0)
        o_ref[...] = x_ref[rows, columns_ref[...]]

    by_rows = lambda n: pl.BlockSpec((4, n), lambda i: (i, 0))  # noqa: E731
    return pl.pallas_call(
        kernel, grid=(3,), in_specs=[by_rows(12), by_rows(5)], out_specs=by_rows(5), out_shape=like(x, shape=(10, 5))
    )(x, columns)


@case(normal(20))
def ref_element_blocks(x):
    """Windows that overlap: each program sees 8 elements from its own start."""

    def kernel(x_ref, o_ref):
        o_ref[0] = jnp.sum(x_ref[...])

    return pl.pallas_call(
        kernel,
        grid=(6,),
        in_specs=[pl.BlockSpec((pl.Element(8),), lambda i: (i * 3,))],
        out_specs=pl.BlockSpec((1,), lambda i: (i,)),
        out_shape=like(x, shape=(6,)),
    )(x)


@case(normal(4, 16))
def ref_outside_of_the_array(x):
    """Blocks before, after and beyond the array read as 0; what is written there is dropped."""

    def kernel(before_ref, after_ref, o_ref):
        o_ref[...] = before_ref[...] + 10 * after_ref[...]

    return pl.pallas_call(
        kernel,
        grid=(6, 2),
        in_specs=[
            pl.BlockSpec((None, 8), lambda i, j: (i - 1, j)),
            pl.BlockSpec((None, 8), lambda i, j: (i, j * 3 - 1)),
        ],
        out_specs=pl.BlockSpec((None, 8), lambda i, j: (i, j)),
        out_shape=like(x),
    )(x, x)


@case(normal(20))
def ref_windows_before_the_array(x):
    def kernel(x_ref, o_ref):
        o_ref[0] = jnp.sum(x_ref[...])

    return pl.pallas_call(
        kernel,
        grid=(8,),
        in_specs=[pl.BlockSpec((pl.Element(6),), lambda i: (i * 4 - 5,))],
        out_specs=pl.BlockSpec((1,), lambda i: (i,)),
        out_shape=like(x, shape=(8,)),
    )(x)


@case(normal(10, 12), np.zeros(12, np.float32))
def ref_atomic_add(x, zeros):
    """Every program adds to the same block."""

    def kernel(x_ref, _, o_ref):
        plgpu.atomic_add(o_ref, pl.ds(0, 12), jnp.sum(x_ref[...], axis=0))

    whole = pl.BlockSpec((12,), lambda i: (0,))
    return pl.pallas_call(
        kernel,
        grid=(3,),
        in_specs=[pl.BlockSpec((4, 12), lambda i: (i, 0)), whole],
        out_specs=whole,
        out_shape=like(zeros),
        input_output_aliases={1: 0},
    )(x, zeros)


@case(normal(6, 12), normal(6, 12, seed=1))
def ref_aliased(x, y):
    def kernel(x_ref, y_ref, o_ref):
        o_ref[...] = x_ref[...] + y_ref[...]

    spec = pl.BlockSpec((4, 12), lambda i: (i, 0))
    return pl.pallas_call(
        kernel, grid=(2,), in_specs=[spec, spec], out_specs=spec, out_shape=like(x), input_output_aliases={1: 0}
    )(x, y)


# Grids


@case(normal(3, 5, 4, 6))
def grid_of_four_axes(x):
    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...] + pl.program_id(0) + 10 * pl.program_id(2) + 100 * pl.num_programs(3)

    spec = pl.BlockSpec((None, None, None, 2), lambda a, b, c, d: (a, b, c, d))
    return pl.pallas_call(kernel, grid=(3, 5, 4, 3), in_specs=[spec], out_specs=spec, out_shape=like(x))(x)


@case(normal(3, 4, 10, 12), normal(4, 12, seed=1))
def vmap_of_vmap(x, scale):
    def call(x, scale):
        def kernel(x_ref, scale_ref, o_ref):
            o_ref[...] = x_ref[...] * scale_ref[...] + pl.program_id(0)

        spec = pl.BlockSpec((4, 12), lambda i: (i, 0))
        return pl.pallas_call(
            kernel, grid=(3,), in_specs=[spec, pl.BlockSpec((12,), lambda i: (0,))], out_specs=spec, out_shape=like(x)
        )(x, scale)

    return jax.vmap(jax.vmap(call), in_axes=(0, None))(x, scale)


@case(normal(8, 6, 16))
def grouped_heads(x):
    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...] * 2

    return pl.pallas_call(
        kernel,
        grid=(8, 12),
        in_specs=[pl.BlockSpec((None, None, 16), lambda i, h: (i, h // 2, 0))],
        out_specs=pl.BlockSpec((None, None, 16), lambda i, h: (i, h, 0)),
        out_shape=like(x, shape=(8, 12, 16)),
    )(x)


# Control flow


@case(normal(6, 12))
def loop_with_several_carries(x):
    def body(x):
        def step(i, carry):
            a, b, total, fixed = carry
            return b, a + i, total + jnp.sum(a, axis=1), fixed

        a, b, total, _ = lax.fori_loop(1, 5, step, (x, x * 2, jnp.zeros(x.shape[0]), 3))
        return a + b * total[:, None]

    return rowwise(body, 4, x)


@case(normal(6, 12))
def loop_with_traced_bounds(x):
    def body(x):
        i = pl.program_id(0)
        return lax.fori_loop(i, 2 * i + 3, lambda j, c: c + j * x, x)

    return rowwise(body, 4, x)


@case(normal(6, 12))
def loop_without_counter(x):
    return rowwise(lambda x: lax.scan(lambda c, _: (c * 1.5, None), x, None, length=3)[0], 4, x)


@case(normal(6, 12))
def loop_nested(x):
    def body(x):
        inner = lambda i, c: lax.fori_loop(0, i + 1, lambda j, c: c + i * j, c)  # noqa: E731
        return lax.fori_loop(0, 4, inner, x)

    return rowwise(body, 4, x)


@case(normal(6, 12))
def loop_unrolled(x):
    return rowwise(lambda x: lax.fori_loop(0, 4, lambda i, c: c + i, x, unroll=2), 4, x)


@case(normal(6, 12))
def while_loop(x):
    def body(x):
        return lax.while_loop(lambda c: jnp.sum(jnp.abs(c[0])) < 500.0, lambda c: (c[0] * 2, c[1] + 1), (x, 0))[0]

    return rowwise(body, 4, x)


@case(normal(6, 12))
def branches(x):
    def body(x):
        i = pl.program_id(0)
        y = lax.cond(i > 0, lambda x: x * 2, lambda x: x - 1, x)
        return lax.switch(i, [lambda y: y + 1, lambda y: jnp.zeros_like(y), lambda y: y * y], y)

    return rowwise(body, 2, x)


@case(normal(6, 12))
def when(x):
    def kernel(x_ref, o_ref):
        o_ref[...] = jnp.zeros(o_ref.shape)

        @pl.when(pl.program_id(0) != 1)
        def _():
            o_ref[...] = x_ref[...]

    spec = pl.BlockSpec((2, 12), lambda i: (i, 0))
    return pl.pallas_call(kernel, grid=(3,), in_specs=[spec], out_specs=spec, out_shape=like(x))(x)


@case(normal(6, 12))
def custom_derivatives(x):
    @jax.custom_jvp
    def double(x):
        return 2 * x

    double.defjvp(lambda p, t: (double(*p), t[0]))

    @jax.custom_vjp
    def triple(x):
        return 3 * x

    triple.defvjp(lambda x: (triple(x), None), lambda _, g: (g,))
    return rowwise(lambda x: jax.checkpoint(jax.jit(double))(triple(x)), 4, x)
