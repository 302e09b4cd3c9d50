"""Every name of JAX and jaxlib that jtile uses and that they do not promise, each with the reason it is needed."""

from collections.abc import Sequence

import jax
from jax._src import core as _core
from jax._src.dispatch import (
    # Evaluates a primitive eagerly by compiling it, as `jnp` functions do.
    apply_primitive as apply_primitive,
    # Primitives whose lowering asks which devices it is for: `custom_partitioning` inside ours does.
    prim_requires_devices_during_lowering as prim_requires_devices_during_lowering,
)
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec


def varying_axes(aval) -> frozenset[str]:
    """The manual mesh axes over which a value of this type differs, inside `shard_map(check_vma=True)`."""
    return aval.mat.varying


def no_mesh():
    """A context without mesh axes that keeps the ambient abstract device, which says what to compile for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def explicit_mesh(avals: Sequence) -> AbstractMesh | None:
    """The mesh whose axes are part of these types, if any."""
    meshes = (a.sharding.mesh for a in avals)
    return next((m for m in meshes if not m.empty and m._any_axis_explicit), None)


def make_aval(shape: tuple[int, ...], dtype, *, like: Sequence, spec: PartitionSpec | None):
    """The type of a result computed from operands of types `like`, split as `spec` under an explicit mesh."""
    mesh = next((a.sharding.mesh for a in like if not a.sharding.mesh.empty), None)
    if mesh is None:
        return _core.ShapedArray(shape, dtype)
    varying = frozenset().union(*(varying_axes(a) for a in like))
    return _core.ShapedArray(
        shape,
        dtype,
        sharding=NamedSharding(mesh, spec if spec is not None else PartitionSpec(*[None] * len(shape))),
        manual_axis_type=_core.ManualAxisType(varying=varying),
    )


def plain_avals(avals: Sequence) -> list:
    """The same types without shardings and varying axes."""
    return [_core.ShapedArray(a.shape, a.dtype) for a in avals]
