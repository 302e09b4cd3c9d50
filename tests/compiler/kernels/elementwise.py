"""Elementwise operations, on ragged blocks of a width that is no power of two."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from tests.compiler.kernels import case, integers, normal, rowwise, whole

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
    "log2": (jnp.log2, POSITIVE),
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
    "reduce_mantissa": (lambda x: lax.reduce_precision(x, 8, 3), SPECIAL * 1.3),
    "reduce_exponent": (lambda x: lax.reduce_precision(x * 2.0 ** jnp.round(8 * x), 4, 23), X),
    "one_minus_square": (lax.one_minus_square, X),
    "clamp": (lambda x: lax.clamp(-x, x + 1, x.dtype.type(0.5)), X),
    "accuracy": (lambda x: lax.exp(x, accuracy=lax.AccuracyMode.DEFAULT), X),
    "constants_only": (lambda x: x + jnp.sqrt(jnp.full(x.shape, 2.0)) + jnp.float32(1e-40), X),
    "reciprocal": (pltpu.reciprocal, POSITIVE),
    "optimization_barrier": (lambda x: lax.optimization_barrier((x, x))[0] + 1, X),
    "half_arithmetic": (lambda x: jnp.exp(x.astype(jnp.float16) / 3).astype(jnp.float32), X),
}
if hasattr(lax, "polynomial"):  # JAX 0.12
    UNARY["polynomial"] = functools.partial(lax.polynomial, coeffs=(3.0, -2.0, 0.5)), X
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

SPECIAL_FUNCTIONS = {
    "digamma": (lax.digamma, np.concatenate([X * 6, np.array([[0.0, -1.0, -2.0, 1e3] * 6], np.float32)])),
    "bessel_i1e": (lax.bessel_i1e, np.array([[0.0, 1e-3, -2.0, 30.0, 59.0, -61.0, 80.0, 1e4, -np.inf, np.nan]], "f")),
    "zeta": (lambda x: lax.zeta(x + 1.2, jnp.flip(x, 1) * 3), POSITIVE[:4, :5]),
    "zeta_at_poles": (
        lambda x: lax.zeta(jnp.arange(2.0, 9.0) / 2, x),
        np.array([2.0, 2, -1, -1, -1.5, -1.5, 0.5], "f"),
    ),
    "polygamma": (lambda x: lax.polygamma(jnp.round(x * 2), jnp.flip(x, 1) * 3), POSITIVE[:4, :5]),
    "bessel_i0e": (lax.bessel_i0e, X * 6),
    "igamma": (lambda x: lax.igamma(x, jnp.flip(x, 1)), POSITIVE * 3),
    "igammac": (lambda x: lax.igammac(x, jnp.flip(x, 1)), POSITIVE * 3),
    "igamma_grad_a": (lambda x: lax.igamma_grad_a(x, jnp.flip(x, 1)), POSITIVE[:2, :5]),
    "betainc": (lambda x: lax.betainc(x, jnp.flip(x, 1), x / (1 + x)), POSITIVE[:4, :5] * 2),
}
for _name, (_function, _x) in SPECIAL_FUNCTIONS.items():
    case(_x, name=_name)(functools.partial(whole, _function))

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
    "shift_past_the_width": (
        lambda x, y: (x << 32) + (y >> 40) + lax.shift_right_logical(x, 33) + lax.shift_right_arithmetic(x, 32),
        M,
        N,
    ),
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
    "bool_extremes": (lambda x, y: lax.max(x, y) ^ lax.min(x, ~y) ^ (x < y), M > 0, N > 0),
    "population_count": (lambda x, y: lax.population_count(x) + 100 * lax.clz(y), M, NATURAL),
    "population_count_of_bytes": (
        lambda x, y: lax.population_count(x) + lax.clz(y),
        M.astype(np.int8),
        N.astype(np.int8),
    ),
    "population_count_of_shorts": (
        lambda x, y: lax.population_count(x) + lax.clz(y),
        M.astype(np.uint16),
        N.astype(np.uint16),
    ),
    "mulhi": (lambda x, y: lax.mulhi(x * 10_000_019, y * 20_000_003), M, N),
    "mulhi_unsigned": (
        lambda x, y: lax.mulhi(x * 10_000_019, y * 20_000_003),
        M.astype(np.uint32),
        N.astype(np.uint32),
    ),
    "float_to_bytes": (lambda x, y: (x * 3.7).astype(jnp.int8).astype(jnp.int32) + (y * 1.9).astype(jnp.uint8), M, N),
    "bool_to_integer": (lambda x, y: (x > 0).astype(jnp.int8).astype(jnp.int32) - (y > 0), M, N),
}
for _name, (_function, _x, _y) in INTEGER.items():
    case(_x, _y, name=_name)(functools.partial(rowwise, _function, 4))


# Types

NARROW = np.array([[0.0, -0.0, np.inf, -np.inf, np.nan, 1e9, -500.0, 464.0, 465.0, 61439.0, 61440.0, 0.013, 3e-5]], "f")
TYPES = {
    "nextafter_half": (lambda x: lax.nextafter(x.astype(jnp.float16), jnp.flip(x, 1).astype(jnp.float16)), SPECIAL),
    "nextafter_bfloat16": (lambda x: lax.nextafter(x.astype(jnp.bfloat16), jnp.bfloat16(2)), SPECIAL),
    "to_float8_e4m3fn": (lambda x: x.astype(jnp.float8_e4m3fn).astype(jnp.float32), NARROW),
    "to_float8_e5m2": (lambda x: x.astype(jnp.float8_e5m2).astype(jnp.float32), NARROW),
    "float8_arithmetic": (
        lambda x: (x * x + jnp.exp(x)) / jnp.where(x > 0, x, 2),
        np.asarray(X, jnp.float8_e4m3fn),
    ),
    "float8_reductions": (
        lambda x: jnp.min(x, axis=1).astype(jnp.float32) + jnp.max(x, axis=1).astype(jnp.float32) + jnp.argmax(x, 1),
        np.asarray(X, jnp.float8_e5m2),
    ),
    "float8_moves": (
        lambda x: jnp.sort(jnp.concatenate([jnp.flip(x, 1)[:, 3:], x[:, :3]], axis=1), axis=1).T.reshape(-1),
        np.asarray(X, jnp.float8_e4m3fn),
    ),
    "float8_comparisons": (lambda x: (x < jnp.flip(x, 1)) | (x == 0), np.asarray(X, jnp.float8_e5m2)),
    "int4": (
        lambda x: (jnp.flip(x, 1).astype(jnp.int32) * 3).astype(jnp.int4),
        integers(5, 6, low=-8, high=8, dtype=jnp.int4),
    ),
    "uint4": (
        lambda x: jnp.where(x > 3, x.astype(jnp.float32) * 1.9, -4).astype(jnp.uint4),
        integers(5, 6, low=0, high=16, dtype=jnp.uint4),
    ),
    "bits_of_words": (lambda x: lax.bitcast_convert_type(x, jnp.uint8), X),
    "words_of_bits": (
        lambda x: lax.bitcast_convert_type(x.reshape(-1, 4), jnp.float32),
        integers(24, low=0, high=100, dtype=np.int8),
    ),
    "halves_of_words": (lambda x: lax.bitcast_convert_type(x, jnp.bfloat16)[..., 1].astype(jnp.float32), X),
}
for _name, (_function, _x) in TYPES.items():
    case(_x, name=_name)(functools.partial(whole, _function))
