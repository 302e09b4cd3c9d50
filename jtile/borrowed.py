"""Every name of JAX and jaxlib that jtile uses and that they do not promise, each with the reason it is needed."""

import contextlib
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
from jax._src import config as _config
from jax._src import core as _core
from jax._src import effects as _effects
from jax._src import sharding_impls as _sharding_impls
from jax._src import source_info_util as _source_info_util
from jax._src.dispatch import (
    # Evaluates a primitive eagerly by compiling it, as `jnp` functions do.
    apply_primitive as apply_primitive,
)
from jax._src.dispatch import (
    # Primitives whose lowering asks which devices it is for: `custom_partitioning` inside ours does.
    prim_requires_devices_during_lowering as prim_requires_devices_during_lowering,
)
from jax._src.lax import special as _special
from jax._src.lib import gpu_triton as _gpu_triton
from jax._src.pallas import core as _pallas_core
from jax._src.pallas.pallas_call import (
    # JAX's own lowering rule, for the kernels that are not for jtile.
    _pallas_call_lowering as lower_pallas_call,  # noqa: F401
)
from jax._src.pallas.primitives import (
    # Masked loads, and their hints to the cache; Pallas offers them only beside its own backends.
    load as load,
)
from jax._src.pallas.primitives import (
    # Masked stores, likewise.
    store as store,
)
from jax._src.random.prng import KeyTy as _KeyTy
from jax._src.state.discharge import (
    # How a primitive that changes refs is to be interpreted, as operations on values.
    register_discharge_rule as register_discharge_rule,
)
from jax._src.state.discharge import (
    # What a ref's indices, reshapes and bitcasts select from its contents, as operations on values.
    transform_array as transform_array,
)
from jax._src.state.discharge import (
    # The selection that was there, and the contents with another in its place.
    transform_swap_array as transform_swap_array,
)
from jax._src.state.primitives import (
    # `ref.at[indices]` and indices taken apart, as Pallas' own operations do.
    get_ref_and_transforms as get_ref_and_transforms,
)
from jax._src.state.types import BitcastTransform as _BitcastTransform
from jax._src.state.types import (
    # That a primitive reads a ref.
    ReadEffect as ReadEffect,
)
from jax._src.state.types import ReshapeTransform as _ReshapeTransform
from jax._src.state.types import (
    # That a primitive writes a ref.
    WriteEffect as WriteEffect,
)
from jax._src.state.types import (
    # The type of what indices, reshapes and bitcasts select from a ref.
    transform_type as transform_type,
)
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

# What `ref.reshape` and `ref.bitcast` make of a ref, beside indexing it.
RESHAPES = (_ReshapeTransform, _BitcastTransform)


class _KernelEffect(_effects.Effect):
    """Something done in a kernel, for which its equation must stay where it is."""


kernel_effect = _KernelEffect()
_effects.control_flow_allowed_effects.add_type(_KernelEffect)
_pallas_core.kernel_local_effects.add_type(_KernelEffect)


def is_key(aval) -> bool:
    """Whether values of this type are keys of `jax.random`."""
    return hasattr(aval, "dtype") and isinstance(aval.dtype, _KeyTy)


def key_functions(aval):
    """What `jax.random` does with keys of this type, as functions of their data: seed, split, fold_in, random_bits."""
    return aval.dtype._impl


def key_data(aval):
    """The type of the arrays that hold values of this type: for keys that of their data."""
    return _core.physical_aval(aval)


def failed_check(err_tree, operands: Sequence) -> tuple[str, list]:
    """The message of a `checkify` check, given its operands, and the values to fill in."""
    error = jax.tree.unflatten(err_tree, operands)
    [metadata], [payload] = error._metadata.values(), error._payload.values()
    exception = jax.tree.unflatten(metadata, payload)
    return exception.fmt_string, jax.tree.leaves((exception.args, exception.kwargs))


def varying_axes(aval) -> frozenset[str]:
    """The manual mesh axes over which a value of this type differs, inside `shard_map(check_vma=True)`."""
    return aval.mat.varying


@contextlib.contextmanager
def no_mesh(avals: Sequence = ()):
    """A context without mesh axes that keeps the abstract device, which says what to compile for: the ambient one, or
    that of these types' mesh.

    A `pallas_call` traced inside `shard_map(check_vma=True)` would want to know over which axes its results vary.
    """
    meshes = jax.sharding.get_abstract_mesh(), mesh_of(avals)
    device = next((mesh.abstract_device for mesh in meshes if mesh is not None and mesh.abstract_device), None)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)), varying_unchecked():
        yield


def varying_unchecked():
    """A context in which nobody asks over which manual axes values vary."""
    return _config._check_vma(False)


def mesh_of(avals: Iterable) -> AbstractMesh | None:
    """The mesh that these types live on, if any."""
    return next((a.sharding.mesh for a in avals if not a.sharding.mesh.empty), None)


def explicit_mesh(avals: Sequence) -> AbstractMesh | None:
    """The mesh whose axes are part of these types, if any."""
    meshes = (a.sharding.mesh for a in avals)
    return next((m for m in meshes if not m.empty and m._any_axis_explicit), None)


def make_aval(shape: tuple[int, ...], dtype, *, like: Sequence, spec: PartitionSpec | None):
    """The type of a result computed from operands of types `like`, split as `spec` under an explicit mesh."""
    mesh = mesh_of(like)
    if mesh is None:
        return _core.ShapedArray(shape, dtype)
    varying = frozenset().union(*(varying_axes(a) for a in like))
    return _core.ShapedArray(
        shape,
        dtype,
        sharding=NamedSharding(mesh, spec if spec is not None else PartitionSpec(*[None] * len(shape))),
        manual_axis_type=_core.ManualAxisType(varying=varying),
    )


@contextlib.contextmanager
def own_source_lines():
    """A context in which new equations remember the line that makes them, not that of the primitive being lowered."""
    state = _source_info_util._source_info_context
    before = state.context
    state.context = _source_info_util.SourceInfo(None, before.name_stack)
    try:
        yield
    finally:
        state.context = before


def plain_avals(avals: Sequence) -> list:
    """The same types without shardings and varying axes."""
    return [_core.ShapedArray(a.shape, a.dtype) for a in avals]


def exporting(ctx) -> bool:
    """Whether a lowering rule is called by `jax.export`, whose programs outlive this process."""
    return ctx.module_context.lowering_parameters.for_export


def device_count(ctx) -> int:
    """How many devices a lowering rule lowers for."""
    axes = ctx.module_context.axis_context
    return axes.num_devices if isinstance(axes, _sharding_impls.ShardingContext) else axes.mesh.size


def mesh_around(ctx) -> jax.sharding.Mesh | None:
    """The mesh of the `shard_map` inside which a lowering rule is called, if any."""
    axes = ctx.module_context.axis_context
    return axes.mesh if isinstance(axes, _sharding_impls.SPMDAxisContext) else None


def lowering_devices(ctx) -> Sequence[jax.Device]:
    """The devices that a lowering rule is told of: those of primitives in `prim_requires_devices_during_lowering`, and
    inside `custom_partitioning` those of the mesh."""
    axes = ctx.module_context.axis_context
    if isinstance(axes, _sharding_impls.ShardingContext):
        return axes.device_assignment or ()
    return list(axes.mesh.devices.flat) if isinstance(axes.mesh, jax.sharding.Mesh) else ()


def gpu_triton():
    """jaxlib's builders of the message that launches a Triton kernel; the CUDA plugin brings them, GPU or not."""
    if not getattr(_gpu_triton, "_cuda_triton", None):
        raise ImportError(
            "Launching a kernel needs JAX's CUDA plugin, which is not installed: pip install 'jtile[cuda13]' on a "
            "machine with a GPU, 'jtile[offline]' to compile for one elsewhere."
        )
    return _gpu_triton


@functools.cache
def custom_call_takes_cubin() -> bool:
    """Whether that message has the field for machine code, which the builders leave out.

    The plugin carries the message's description: each field as name (tag 1) and number (tag 3).
    """
    library = Path(gpu_triton()._cuda_triton.__file__).read_bytes()
    fields = {"module_image": 11, "object_file": 1}
    return all(b"\n%c%s\x18%c" % (len(name), name.encode(), number) in library for name, number in fields.items())


# Special functions in terms of simpler operations, as JAX lowers them.
def igamma(a, x):
    return _special.igamma_impl(a, x, dtype=x.dtype)


def igammac(a, x):
    return _special.igammac_impl(a, x, dtype=x.dtype)


def igamma_grad_a(a, x):
    return _special.igamma_grad_a_impl(a, x, dtype=x.dtype)


def regularized_incomplete_beta(a, b, x):
    return _special.regularized_incomplete_beta_impl(a, b, x, dtype=x.dtype)


def bessel_i0e(x):
    return _special.bessel_i0e_impl(x)
