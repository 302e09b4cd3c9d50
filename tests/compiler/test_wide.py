"""64-bit floats and integers, which JAX has in x64 mode: the source computes what Pallas does, and compiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jtile.compiler.build import build
from jtile.compiler.interpret import interpret_pallas
from jtile.compiler.params import CompilerParams
from jtile.compiler.target import Target
from jtile.debugger import debug
from tests.compiler.kernels import integers, normal, sources, whole

X, Y = normal(4, 5, dtype=np.float64), normal(9, dtype=np.float64, seed=1)
WORDS = np.random.default_rng(0).integers(-(2**62), 2**62, 11)
PLACES = np.array([3, 0, -(2**20), 2**20])

WIDE = {
    "sort": (jnp.sort, X),
    "sort_words": (jnp.sort, WORDS),
    "sort_unsigned_words": (jnp.sort, WORDS.astype(np.uint64)),
    "argsort": (jnp.argsort, WORDS // 2**60),
    "top_k": (lambda x: lax.top_k(x, 3), X),
    "dot": (lambda x: x @ x.T, normal(12, 20, dtype=np.float64)),
    "dot_of_few_terms": (lambda x: x @ x.T, normal(5, 3, dtype=np.float64)),
    "dot_of_words": (lambda x: x[:, None] @ x[None, :], WORDS),
    "dot_of_bytes": (lambda x: jnp.dot(x, x.T, preferred_element_type=jnp.int64), integers(6, 5, dtype=np.int8)),
    "bits": (lambda x: lax.bitcast_convert_type(x, jnp.uint16), X),
    "bits_joined": (lambda x: lax.bitcast_convert_type(x, jnp.float64), integers(3, 8, low=0, dtype=np.uint8)),
    "count_bits": (lambda x: lax.population_count(x) + lax.clz(x), WORDS),
    "mulhi": (lambda x: lax.mulhi(x, x[::-1]), WORDS),
    "mulhi_unsigned": (lambda x: lax.mulhi(x, x[::-1]), WORDS.astype(np.uint64)),
    "nextafter": (lambda x: lax.nextafter(x, x[::-1]) + lax.nextafter(x, jnp.float64(jnp.inf)), Y),
    "digamma": (lambda x: lax.digamma(x * 5), Y),
    "polygamma": (lambda x: lax.polygamma(jnp.arange(9.0) % 3, jnp.abs(x * 5)), Y),
    "bessel_i1e": (lambda x: lax.bessel_i1e(x * 50), Y),
    "igamma": (lambda x: lax.igamma(jnp.abs(x), jnp.abs(x[::-1])), Y),
    "arguments": (lambda x: jnp.argmax(x, 1) + jnp.argmin(x, 1), X),
    "scans": (lambda x: jnp.cumsum(x) + lax.cummax(x, reverse=True), WORDS),
    "cumlogsumexp": (lax.cumlogsumexp, Y),
    "take": (lambda x, i: jnp.take(x, i, axis=0, mode="clip") + x[i[0]], X, PLACES),
    "fill": (lambda x, i: jnp.take(x, i, axis=0, mode="fill"), X, PLACES),
    "scatter": (lambda x, i: x.at[i].add(1.0).at[:, i[0]].set(2), X, PLACES),
    "update": (lambda x, i: lax.dynamic_update_slice(x, x[:2] * 2, (i[3], i[1])), X, PLACES),
    "reduce_precision": (lambda x: lax.reduce_precision(x, 8, 23) + lax.reduce_precision(x, 5, 3), Y),
    "pad": (lambda x: jnp.flip(jnp.pad(x, ((1, 2), (0, 3)), constant_values=2)), X),
    "casts": (lambda x: (x * 1e3).astype(jnp.int64) + (x * 100).astype(jnp.int16), X),
    "libdevice": (lambda x: lax.erf_inv(jnp.tanh(x)) + jnp.cbrt(x) + 2.0**x + jnp.log1p(jnp.abs(x)), X),
    "reduce": (lambda x: lax.reduce(x, np.float64(1), lambda a, b: a * b, (0,)), X),
}


@pytest.mark.parametrize("name", WIDE)
def test_wide_types(name):
    function, *operands = WIDE[name]
    function = functools.partial(whole, function)
    with jax.enable_x64(True):
        operands = [jnp.asarray(x) for x in operands]
        found, expected = (
            jax.tree.leaves(f(*operands)) for f in (debug(function), jax.jit(interpret_pallas(function)))
        )
        for f, e in zip(found, expected, strict=True):
            assert f.dtype == e.dtype and f.shape == e.shape
            # Up to 20 terms or steps, each rounded once: a unit in the last place is 2e-16.
            np.testing.assert_allclose(f, e, rtol=1e-13, atol=1e-13)
        [source] = sources(function, *operands)
    build(source, CompilerParams(), Target.named("NVIDIA H200"))
