"""Values indexed by places known at run time: slices, gathers, scatters."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from tests.compiler.kernels import case, integers, normal, whole

ANY, INSIDE = integers(6, low=-2, high=9), integers(4, low=0, high=4, seed=1)
INDEXED = {
    "row": (lambda x, i: x[i[1]], (4, 7), ANY % 4),
    "element": (lambda x, i: x[i[0], i[1]] + jnp.zeros(3), (4, 7), ANY % 4),
    "take_rows": (lambda x, i: jnp.take(x, i, axis=0), (4, 7), ANY % 4),
    "take_columns": (lambda x, i: jnp.take(x, i, axis=1), (4, 7), ANY),
    "take_clipped": (lambda x, i: jnp.take(x, i, axis=1, mode="clip"), (4, 7), ANY),
    "take_filled": (lambda x, i: jnp.take(x, i, axis=1, mode="fill", fill_value=3.0), (4, 7), ANY),
    "take_by_bytes": (
        lambda x, i: jnp.take(x, i.astype(jnp.int8) * 12, mode="fill") + lax.dynamic_index_in_dim(x, jnp.uint8(200)),
        (300,),
        ANY,
    ),
    "take_flat": (lambda x, i: jnp.take(x, i), (4, 7), ANY * 3 + 6),
    "pairs": (lambda x, i: x[i, (i * 2) % 7], (4, 7), INSIDE),
    "grid_of_pairs": (lambda x, i: x[i[:, None], i[None, :]], (4, 7), INSIDE),
    "around_a_slice": (lambda x, i: x[i, :, i], (4, 3, 5), INSIDE),
    "middle": (lambda x, i: x[:, i], (3, 4, 5), INSIDE),
    "matrix_of_indices": (lambda x, i: x[i.reshape(2, 3)], (9, 3), ANY),
    "along_rows": (lambda x, i: jnp.take_along_axis(x, i[None, :] % x.shape[1], axis=1), (4, 7), ANY),
    "along_columns": (lambda x, i: jnp.take_along_axis(x, (i[:, None] + jnp.arange(7)) % 4, axis=0), (4, 7), ANY),
    "slices": (lambda x, i: jax.vmap(lambda k: lax.dynamic_slice(x, (k, k), (2, 3)))(i), (4, 7), ANY),
    "masked_by_comparison": (lambda x, i: jnp.where(i[None, :] > 2, x[:, :6], 0.0), (4, 7), ANY),
    "slice_of_two_axes": (lambda x, i: lax.dynamic_slice(x, (i[0], i[1]), (2, 3)), (4, 7), ANY),
    "update_slice": (lambda x, i: lax.dynamic_update_slice(x, -x[:2, :3], (i[2], i[3])), (4, 7), ANY),
    "update_row": (lambda x, i: lax.dynamic_update_index_in_dim(x, x[0] * 2, i[3] % 4, 0), (4, 7), ANY),
    "roll_by": (lambda x, i: jnp.roll(x, i[2], axis=1), (4, 7), ANY),
    "set_element": (lambda x, i: x.at[i[0] % 4, i[1]].set(5.0), (4, 7), ANY),
    "set_row": (lambda x, i: x.at[i[0] % 4].set(x[1]), (4, 7), ANY),
    "set_rows": (lambda x, i: x.at[i].set(-x[:4]), (7, 5), INSIDE),
    "set_columns": (lambda x, i: x.at[:, i].multiply(3.0), (4, 7), ANY),
    "add_at": (lambda x, i: x.at[i].add(jnp.arange(6.0)), (7,), ANY),
    "add_at_pairs": (lambda x, i: x.at[i, i].add(x[i, 0]), (4, 7), INSIDE),
    "add_rows": (lambda x, i: x.at[i].add(x[:4] * 2), (5, 3), INSIDE),
    "subtract_at": (lambda x, i: x.at[i].subtract(1.5), (7,), ANY),
    "greatest_at": (lambda x, i: x.at[i].max(jnp.arange(6.0) - 3).at[i].min(1.0), (7,), ANY),
    "apply_at": (lambda x, i: x.at[i[1] % 7].apply(jnp.exp), (7,), ANY),
    "set_slice": (lambda x, i: x.at[1:3, 2:5].set(0.0), (4, 7), ANY),
    "set_clipped": (lambda x, i: x.at[i].add(1.0, mode="clip"), (7,), ANY),
    "histogram": (lambda x, i: jnp.bincount(i % 5, length=5).astype(jnp.float32) + x, (5,), ANY),
    "batched_set": (lambda x, i: jax.vmap(lambda r, k: r.at[k].set(9.0))(x, i), (4, 7), INSIDE),
    "one_hot": (lambda x, i: jax.nn.one_hot(i, 7) + x[0], (4, 7), ANY),
}
for _name, (_function, _shape, _indices) in INDEXED.items():
    case(normal(*_shape), _indices, name=f"index_{_name}")(functools.partial(whole, _function))
