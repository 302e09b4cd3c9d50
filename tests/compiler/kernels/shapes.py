"""Operations that move values."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from tests.compiler.kernels import case, normal, rowwise, whole

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


# Of any shape to any other, each lane looked up

RESHAPES = {
    "merge_padded": (lambda x: x.reshape(-1), (4, 3)),
    "split_padded": (lambda x: x.reshape(5, 3), (15,)),
    "regroup": (lambda x: x.reshape(5, 6) * 2, (3, 2, 5)),
    "ravel_and_reduce": (lambda x: jnp.argmax(x.reshape(-1)) + jnp.argmin(x), (3, 5)),
    "transpose_three": (lambda x: jnp.transpose(x, (2, 0, 1)).reshape(-1), (2, 3, 5)),
    "repeat": (lambda x: jnp.repeat(x, 3, axis=1) + jnp.tile(x, (1, 3)), (3, 5)),
    "tile_both": (lambda x: jnp.tile(x, (2, 3)), (3, 5)),
    "swap_and_split": (lambda x: jnp.concatenate([y * 2 for y in jnp.split(x, [2, 5], axis=1)], axis=1), (3, 7)),
    "stack_and_unstack": (lambda x: jnp.stack([2 * y for y in jnp.unstack(x, axis=1)], axis=0), (3, 5)),
    "flip_both": (lambda x: jnp.flip(x), (3, 5)),
    "roll_both": (lambda x: jnp.roll(x, (1, -2), axis=(0, 1)), (3, 5)),
    "pad_inside": (lambda x: lax.pad(x, 7.0, ((0, 1, 0), (1, 2, 1))), (3, 5)),
    "pad_away": (lambda x: lax.pad(x, 7.0, ((-1, 0, 0), (1, -2, 2))), (3, 5)),
    "strided": (lambda x: x[::2, 1::3], (5, 11)),
    "of_bools": (lambda x: jnp.flip(x > 0, 1).reshape(-1), (3, 5)),
    "of_halves": (lambda x: jnp.flip(x.astype(jnp.float16), 1).reshape(-1), (3, 5)),
}
for _name, (_function, _shape) in RESHAPES.items():
    case(normal(*_shape), name=f"reshape_{_name}")(functools.partial(whole, _function))
