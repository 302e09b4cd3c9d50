"""What the laws do not see: the two ops that it is made of, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtile


def normal(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
@pytest.mark.parametrize("options", [{}, {"interleaved": True}, {"rotary_dim": 6, "theta": 500.0}], ids=str)
def test_norm_and_then_rope(options, implementation):
    q, k, q_scale, k_scale = normal(2, 5, 3, 12), normal(2, 5, 1, 12, seed=1), normal(12, seed=2), normal(12, seed=3)
    positions = jnp.array([0, 7, -3, 100_000, 5])
    found = jtile.qk_norm_rope(q, k, q_scale, k_scale, positions, implementation=implementation, **options)
    for x, scale, y in ((q, q_scale, found[0]), (k, k_scale, found[1])):
        normed = jtile.rms_norm(x, scale, implementation="xla")
        expected = jtile.rope(normed, positions, implementation="xla", **options)
        # Numbers of size up to 10: a few units in the last place of float32.
        np.testing.assert_allclose(y, expected, rtol=0, atol=10 * 2**-21)


def test_rounded_once():
    """In bfloat16, what float32 gives, rounded."""
    q, scale, positions = normal(1, 9, 2, 32, dtype=jnp.bfloat16), normal(32, seed=1), jnp.arange(9)
    y, _ = jtile.qk_norm_rope(q, q, scale, scale, positions, implementation="interpret")
    wide, _ = jtile.qk_norm_rope(*[q.astype(jnp.float32)] * 2, scale, scale, positions, implementation="xla")
    np.testing.assert_allclose(y.astype(jnp.float32), wide, rtol=2**-8, atol=2**-20)


def test_norms_of_rows_do_not_turn():
    q = normal(1, 6, 2, 16)
    y, _ = jtile.qk_norm_rope(q, q, jnp.ones(16), jnp.ones(16), jnp.arange(6) * 1000, implementation="interpret")
    np.testing.assert_allclose(jnp.mean(y**2, axis=-1), 1.0, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": jnp.ones((2, 4, 1, 8), jnp.bfloat16)}, "qk_norm_rope: `k` must be like `q`, float32"),
        ({"k": jnp.ones((2, 3, 1, 8))}, "qk_norm_rope: `k` must be like `q`, float32 of shape"),
        ({"q_scale": jnp.ones(4)}, "dimension `d` must agree"),
        ({"positions": jnp.zeros(3, jnp.int32)}, "qk_norm_rope: `positions` must have shape"),
        ({"positions": jnp.zeros(4)}, "qk_norm_rope: `positions` must be integers"),
        ({"rotary_dim": 3}, "qk_norm_rope: `rotary_dim` must be even"),
        ({"q": jnp.ones((2, 4, 1, 8), int)}, "qk_norm_rope: `q` must be floating point"),
    ],
)
def test_errors(change, message):
    given = dict(q=jnp.ones((2, 4, 2, 8)), k=jnp.ones((2, 4, 1, 8)), q_scale=jnp.ones(8), k_scale=jnp.ones(8))
    with pytest.raises(ValueError, match=message):
        jtile.qk_norm_rope(**{**given, "positions": jnp.zeros(4, jnp.int32), **change})
