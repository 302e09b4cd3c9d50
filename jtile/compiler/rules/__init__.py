"""One rule per JAX primitive: how it is written in Triton.

A rule takes the emitter, the equation and its operands (a `Value`, or a `Block` for a ref), emits what it needs, and
returns the result: one `Value`, or a list for primitives of several results.
"""

from collections.abc import Callable

RULES: dict[str, Callable] = {}


def rule(*primitives: str):
    """Registers the decorated function for these primitives."""

    def register(function):
        RULES.update(dict.fromkeys(primitives, function))
        return function

    return register


# Primitives that take numbers of four bits, which lie in bytes.
FOUR_BITS = frozenset(
    "broadcast_in_dim clamp concatenate convert_element_type copy dot_general dynamic_slice dynamic_update_slice empty "
    "eq freeze gather ge get gt le lt masked_load masked_swap max min name ne new_ref optimization_barrier pad reshape "
    "rev scatter select_n slice split squeeze stack stop_gradient swap tile transpose unstack".split()
)

# Why there is no rule for a primitive, and what to write instead.
OUTSIDE = "Compute it outside of the kernel and pass the result as an operand."
REASONS: tuple[tuple[str, str], ...] = (
    (
        "cholesky cholesky_update custom_linear_solve eig eigh geqp3 geqrf hessenberg householder_product lu "
        "lu_pivots_to_permutation ormqr qr schur svd symmetric_product triangular_solve tridiagonal tridiagonal_solve",
        "A factorisation is a call of a library, not an operation on tiles. Compute it outside of the kernel, or write "
        "its elimination as a loop over columns.",
    ),
    ("fft", "Triton has no Fourier transform, nor complex numbers. " + OUTSIDE),
    (
        "complex conj imag real",
        "Triton has no complex numbers. Pass the real and the imaginary part as two operands.",
    ),
    (
        "conv_general_dilated",
        "Triton has no convolution. Write it as a sum of `jnp.dot` over shifted loads `ref[pl.ds(i, n)]`.",
    ),
    (
        "reduce_window reduce_window_max reduce_window_min reduce_window_sum select_and_gather_add select_and_scatter "
        "select_and_scatter_add",
        "Triton reduces whole axes, not windows. Combine shifted loads `ref[pl.ds(i, n)]`, or slices of a value.",
    ),
    (
        "ragged_dot_general scaled_dot",
        "The groups and scales of such a product are best read where they are needed. Load each group's rows or each "
        "block's scale through the refs, and multiply with `jnp.dot`.",
    ),
    (
        "eq_to",
        "An equality in which NaN equals itself serves `jax.lax.sort` alone, which is written without it. Compare with "
        "`==` and `jnp.isnan`.",
    ),
    (
        "philox2x32 philox4x32 random_clone random_gamma rng_bit_generator rng_uniform threefry4x32",
        "Only JAX's default generator, `jax.random.key(seed, impl='threefry2x32')`, is written in Triton. Make keys of "
        "that kind, and draw from the distributions that need no rejection, such as uniform and normal.",
    ),
    (
        "all_gather all_gather_done all_gather_invariant all_gather_reduced all_gather_reduced_start all_gather_start "
        "all_to_all all_to_all_done all_to_all_start pbroadcast pbroadcast_dynamic pmax pmin ppermute ppermute_done "
        "ppermute_start precv preduced psend psum psum_done psum_invariant psum_invariant_start ragged_all_to_all "
        "reduce_scatter reduce_scatter_done reduce_scatter_start reduced_vary_cast reduced_vary_cast_p unreduced_pmax "
        "unreduced_pmin unreduced_psum unreduced_reduce_scatter vary_unreduced_cast vary_unreduced_cast_p",
        "A kernel runs on one device. Communicate between kernels, in the function given to `jax.shard_map`.",
    ),
    (
        "device_put inspect_sharding layout_constraint pvary relayout shard_map sharding_constraint "
        "with_memory_space_constraint",
        "Where arrays lie is settled before a kernel starts. Place them outside of the kernel.",
    ),
    (
        "after_all call_exported create_token custom_partitioning delay ffi_call get_global mpmd_map pallas_call "
        "semaphore_read semaphore_signal semaphore_wait",
        "A program of the grid cannot launch other programs, call libraries or wait for other programs. Call them "
        "between kernels.",
    ),
    (
        "debug_callback io_callback pure_callback",
        "No Python runs beside a kernel. Print with `pl.debug_print`, or run the kernel by `jtile.interpret_pallas` "
        "or `jtile.debug`.",
    ),
    (
        "accum_grad_in_ref create_linear empty2 empty_ref free_ref pin run_state unpin",
        "Such references serve differentiation, or live outside of kernels. Ask `pl.pallas_call` for `scratch_shapes`.",
    ),
    (
        "call_hi_primitive call_hi_primitive_linearized custom_jvp_call_jaxpr custom_lin linear_call remat_opt "
        "unreachable zeros_like",
        "It serves differentiation, and is gone once a function is differentiated. Differentiate inside of the kernel "
        "with `jax.vjp` or `jax.jvp` of plain functions.",
    ),
    (
        "dim_as_value dimension_size shape_assertion",
        "A kernel is compiled for one shape. Export with the sizes that it is to run with.",
    ),
    (
        "from_edtype to_edtype",
        "Triton has the types of numbers alone. Pass the numbers that an array of another type consists of.",
    ),
    (
        "dce_sink program_order stage tie xla_metadata_call xla_metadata_value",
        "It instructs JAX and XLA about a program, and means nothing inside of a kernel. Leave it out.",
    ),
)
CURES = {name: reason for names, reason in REASONS for name in names.split()}

# Each module registers its rules with the table above.
from jtile.compiler.rules import arithmetic, control, debugging, dot, indexing, memory, random, reduction, shape, sort  # noqa: E402, F401
