"""Refs and grids."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from tests.compiler.kernels import case, integers, like, normal

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
        o.__setitem__(..., jax.ref.swap(o, ..., x[...] * 2) + jax.ref.swap(o, ..., x[...])),
    ),
    "swap_of_a_part": lambda x, o: (
        o.__setitem__(..., x[...]),
        o.__setitem__((1, slice(0, 8)), jax.ref.swap(o, (2, pl.ds(8, 8)), x[0, 0:8])),
    ),
    "from_the_end": lambda x, o: o.__setitem__(..., jnp.full(o.shape, x[-1, -3]) + x[-2] + x[:, -16][:, None]),
    "addupdate": lambda x, o: (
        o.__setitem__(..., x[...]),
        jax.ref.addupdate(o, (pl.ds(1, 2), slice(None)), x[:2]),
        jax.ref.addupdate(o, ..., x[...]),
    ),
    "reshaped": lambda x, o: (
        o.reshape(8, 8).__setitem__(..., x.reshape(64)[...].reshape(8, 8)),
        o.at[pl.ds(0, 2)].reshape(32).__setitem__(..., x.at[pl.ds(2, 2), pl.ds(0, 16)].reshape(4, 8)[...].reshape(32)),
        o.__setitem__(3, x.reshape(2, 2, 16)[1, 0] + x.reshape(8, 8).at[pl.ds(2, 4)].reshape(32)[pl.ds(16, 16)]),
    ),
    "bitcast": lambda x, o: (
        o.bitcast(jnp.int32).__setitem__(..., x.bitcast(jnp.int32)[...] ^ 1),
        o.__setitem__(0, x.bitcast(jnp.uint32)[1].astype(jnp.float32)),
    ),
    "part_of_a_gather": lambda x, o: o.__setitem__(
        ..., x.at[:, (jnp.arange(16) * 7) % 16].at[pl.ds(1, 2)][:, 3:11].repeat(2, axis=1).repeat(2, axis=0)
    ),
    "arrays_apart": lambda x, o: o.__setitem__(
        ..., x.reshape(4, 4, 4)[jnp.arange(4)[:, None], :, jnp.arange(4)].reshape(4, 16)
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


@case(normal(4, 16))
def ref_added_to(x):
    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...]
        jax.ref.addupdate(o_ref, (slice(1, 3), pl.ds(3, 5)), jnp.ones((2, 5)))

    return pl.pallas_call(kernel, out_shape=like(x))(x)


@case(normal(4, 16), integers(3, low=0, high=4), integers(5, low=0, high=16))
def ref_gather_of_all_pairs(x, rows, columns):
    def kernel(x_ref, rows_ref, columns_ref, o_ref):
        o_ref[...] = x_ref[rows_ref[...][:, None], columns_ref[...][None, :]]

    return pl.pallas_call(kernel, out_shape=like(x, shape=(3, 5)))(x, rows, columns)


@case(normal(16), integers(16), np.int32(0), native=True)
def ref_as_only_a_gpu_can(x, counts, lock):
    def kernel(x_ref, counts_ref, lock_ref, y_ref):
        y_ref[...] = plgpu.approx_tanh(x_ref[...])
        plgpu.debug_barrier()
        plgpu.atomic_max(counts_ref, pl.ds(0, 16), counts_ref[...] + 1, mask=x_ref[...] > 0)
        plgpu.atomic_cas(lock_ref, 0, 1)
        y_ref[...] += plgpu.load(x_ref, eviction_policy="evict_last") + plgpu.load(x_ref, volatile=True)

    return pl.pallas_call(kernel, out_shape=like(x))(x, counts, lock)


@case(np.zeros((0, 8), np.float32), np.zeros((4, 0), np.float32))
def ref_of_no_elements(x, y):
    """Everything lies outside of the array, and reads as 0."""

    def kernel(x_ref, y_ref, o_ref):
        o_ref[...] = x_ref[...] + y_ref[...] + 1

    rows = pl.BlockSpec((4, 8), lambda i: (i, 0))
    return pl.pallas_call(kernel, grid=(2,), in_specs=[rows, rows], out_specs=rows, out_shape=like(x, shape=(7, 8)))(
        x, y
    )
