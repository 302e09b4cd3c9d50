"""Write an op, relu(x + bias)² (So et al. 2021, arXiv:2109.08668), and check it: python examples/2_write_an_op.py"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jtile import CompilerParams, TileOp
from jtile.testing import Case, check_op

forward = TileOp("squared_relu", "x: ... d, bias: d -> y: ... d")  # checks, batching and sharding follow from this
backward = TileOp("squared_relu_backward", "x: ... d, bias: d, dy: ... d -> dx: ... d, dbias: d")


@forward.reference  # the meaning: it runs where there is no GPU, and gives the higher derivatives
def forward_reference(x, bias):
    return (jnp.square(jax.nn.relu(x + bias)),)


@backward.reference
def backward_reference(x, bias, dy):
    dx = 2 * jax.nn.relu(x + bias) * dy
    return dx, jnp.sum(dx, axis=range(x.ndim - 1), dtype=jnp.float32)


tile = pl.BlockSpec((32, 128), lambda i, j: (i, j))  # reads 0 past the edge of an array, and writes nothing there
columns = pl.BlockSpec((128,), lambda i, j: (j,))
sums = pl.BlockSpec((None, 128), lambda i, j: (i, j))  # of a tile, over its rows


@forward.kernel  # `...` is one dimension here
def forward_kernel(x, bias):
    def squared_relu(x_ref, bias_ref, y_ref):
        y_ref[...] = jnp.square(jnp.maximum(x_ref[...] + bias_ref[...], 0))

    grid = pl.cdiv(x.shape[0], 32), pl.cdiv(x.shape[1], 128)
    spec = pl.GridSpec(grid, in_specs=[tile, columns], out_specs=[tile])
    return pl.pallas_call(squared_relu, [x], grid_spec=spec, compiler_params=CompilerParams())(x, bias)


@backward.kernel
def backward_kernel(x, bias, dy):
    def squared_relu_grad(x_ref, bias_ref, dy_ref, dx_ref, dbias_ref):
        dx_ref[...] = dx = 2 * jnp.maximum(x_ref[...] + bias_ref[...], 0) * dy_ref[...]
        dbias_ref[...] = jnp.sum(dx.astype(jnp.float32), axis=0)

    grid = pl.cdiv(x.shape[0], 32), pl.cdiv(x.shape[1], 128)
    shapes = [x, jax.ShapeDtypeStruct((grid[0], x.shape[1]), jnp.float32)]
    spec = pl.GridSpec(grid, in_specs=[tile, columns, tile], out_specs=[tile, sums])
    dx, dbias = pl.pallas_call(squared_relu_grad, shapes, grid_spec=spec, compiler_params=CompilerParams())(x, bias, dy)
    return dx, jnp.sum(dbias, axis=0)


@forward.transpose  # reverse mode: from the cotangents of the results to those of the operands
def forward_transpose(operands, results, cotangents, **options):
    return backward(*operands, cotangents[0], **options)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # simulated, for meshes
    check_op(forward, [Case("x: rows d, bias: d -> y: rows d", {"rows": 48, "d": 200}, split="rows d")], report=print)
