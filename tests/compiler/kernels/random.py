"""Random numbers drawn inside of kernels: those that JAX draws outside."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from tests.compiler.kernels import case

KEY = np.array([0x3E1F27A9, 0xC0FFEE11], np.uint32)
bits = jax.random.bits

DRAWS = {
    "bits": lambda key: bits(key, (6, 12)),
    "bytes_and_halves": lambda key: bits(key, (8,), jnp.uint8).astype(jnp.int32) + bits(key, (8,), jnp.uint16),
    "uniform": lambda key: jax.random.uniform(key, (6, 12), minval=-1.0, maxval=3.0),
    "normal": lambda key: jax.random.normal(key, (24,)),
    "integers": lambda key: jax.random.randint(key, (12,), -5, 17),
    "bernoulli": lambda key: jax.random.bernoulli(key, 0.3, (4, 24)),
    "of_a_seed": lambda _: bits(jax.random.key(1234567), (8,)) + bits(jax.random.PRNGKey(8), (8,)),
    "of_a_traced_seed": lambda _: jax.vmap(lambda i: bits(jax.random.key(i)))(jnp.arange(8) - 3),
    "folded_in": lambda key: bits(jax.random.fold_in(jax.random.fold_in(key, bits(key)), 7), (8,)),
    "split": lambda key: [f(k, (8,)) for f, k in zip((bits, jax.random.uniform), jax.random.split(key), strict=True)],
    "of_many_keys": lambda key: jax.vmap(bits)(jax.random.split(key, 8)[::-1]),
    "key_data": lambda key: jax.random.key_data(jax.random.split(key, (2, 2))),
    "in_a_loop": lambda key: lax.fori_loop(
        0, 3, lambda i, c: (jax.random.split(c[0])[1], c[1] + bits(c[0], (8,))), (key, jnp.zeros(8, jnp.uint32))
    )[1],
    "in_a_scan": lambda key: jax.random.key_data(
        lax.scan(lambda key, _: tuple(jax.random.split(key)), key, None, length=4)[1]
    ),
    "in_branches": lambda key: bits(lax.cond(bits(key) > 7, lambda k: k, lambda k: jax.random.split(k)[1], key), (8,)),
}
for _name, _function in DRAWS.items():

    @case(KEY, name=f"random_{_name}")
    def _draw(key, function=_function):
        draw = lambda data: jax.tree.leaves(function(jax.random.wrap_key_data(data)))  # noqa: E731

        def kernel(key_ref, *out_refs):
            for ref, out in zip(out_refs, draw(key_ref[...]), strict=True):
                ref[...] = out

        return pl.pallas_call(kernel, out_shape=jax.eval_shape(draw, key))(key)
