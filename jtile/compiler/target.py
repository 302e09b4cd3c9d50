"""Chips: what a kernel is compiled for, and how much it may use there."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import jax

from jtile import borrowed

if TYPE_CHECKING:
    from jax.experimental.topologies import TopologyDescription


REGISTERS = 65536  # of a multiprocessor, since compute capability 3.0


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU to compile for, present or not.

    Attributes:
      name: as the driver calls it.
      compute_capability: 90 for 9.0.
      sms: streaming multiprocessors.
      shared_bytes_per_block: most shared memory that one thread block may use.
      memory_bandwidth: bytes per second; None for a chip missing from jtile's table.
      l2_bytes: size of the level-2 cache; None likewise.
      memory_bytes: size of the memory; None likewise.
      clock_ghz: clock of the multiprocessors; None likewise.

    Example:
      >>> Target.named("NVIDIA H200").compute_capability
      90
    """

    name: str
    compute_capability: int
    sms: int
    shared_bytes_per_block: int
    memory_bandwidth: int | None = None
    l2_bytes: int | None = None
    memory_bytes: int | None = None
    clock_ghz: float | None = None

    @classmethod
    def named(cls, name: str) -> Target:
        """The chip of this name, or of the longest known name that begins it (`"NVIDIA H100 80GB HBM3"` is an H100).

        Raises:
          ValueError: no such chip in the table.
        """
        known = _longest_prefix(name)
        if known is None:
            raise ValueError(f"jtile knows no chip named {name!r}. It knows: {', '.join(_CHIPS)}.")
        return _CHIPS[known]

    @classmethod
    def of_device(cls, device: jax.Device) -> Target:
        """The chip that this device is. One missing from the table still works, by what the driver says of it.

        Raises:
          ValueError: not an NVIDIA GPU.
        """
        major, dot, minor = getattr(device, "compute_capability", "").partition(".")
        if not dot:  # absent on a CPU; like "gfx942" on AMD's GPUs
            raise ValueError(f"jtile compiles kernels for NVIDIA GPUs; {device} is a {device.platform} device.")
        # The driver knows better than the table: a partition of a chip (MIG) has fewer multiprocessors.
        reported = dict(
            name=device.device_kind,
            compute_capability=10 * int(major) + int(minor),
            sms=device.core_count,
            shared_bytes_per_block=device.shared_memory_per_block_optin,
        )
        known = _longest_prefix(device.device_kind)
        return dataclasses.replace(_CHIPS[known], **reported) if known else cls(**reported)

    @classmethod
    def current(cls) -> Target:
        """The GPU of this machine.

        Raises:
          RuntimeError: JAX finds none.
        """
        device = _local_gpu()
        if device is None:
            raise RuntimeError(
                "JAX finds no GPU here. To compile for one that is not here, name it: target='NVIDIA H200' where a "
                "target is asked for, or lower inside jax.sharding.use_abstract_mesh(Target.named(...).abstract_mesh)."
            )
        return cls.of_device(device)

    @classmethod
    def of_lowering(cls, ctx) -> Target:
        """The GPU that a lowering rule compiles for, from its context.

        An abstract device comes first: it is how one asks for a GPU that is not here. A mesh of concrete devices (of
        `jax.set_mesh`, `shard_map`, or the operands' shardings) carries one too.
        """
        meshes = [jax.sharding.get_abstract_mesh(), *(a.sharding.mesh for a in (*ctx.avals_in, *ctx.avals_out))]
        for mesh in meshes:
            device = mesh.abstract_device
            if device is not None and device.platform == "gpu":
                return cls._of_kind(device.device_kind)
        for device in borrowed.lowering_devices(ctx):
            if device.platform == "gpu":
                return cls.of_device(device)
        return cls.current()

    @classmethod
    def _of_kind(cls, kind: str) -> Target:
        """A chip by the name an abstract device gives: a chip missing from the table may still be the one present."""
        present = _local_gpu()
        return cls.of_device(present) if present is not None and present.device_kind == kind else cls.named(kind)

    @property
    def model(self) -> str:
        """The chip's name in jtile's table, which does not tell variants of the memory apart, else the driver's."""
        return _longest_prefix(self.name) or self.name

    def occupancy(self, registers: int, shared_bytes: int, threads: int, tensor_memory_columns: int = 0) -> Occupancy:
        """How many blocks of a kernel a multiprocessor holds at once, as CUDA's occupancy calculator counts them.

        Args:
          registers: of a thread.
          shared_bytes: shared memory of a block.
          threads: of a block.
          tensor_memory_columns: of a block (Blackwell).

        Example:
          >>> print(Target.named("NVIDIA H200").occupancy(registers=128, shared_bytes=100_000, threads=128))
          12% (8 of 64 warps: shared memory)
        """
        # A chip unknown to the table is no smaller than the last one before it.
        architecture = _ARCHITECTURES[max(c for c in _ARCHITECTURES if c <= self.compute_capability)]
        warps = math.ceil(threads / 32)
        # A warp's registers come in units of 256, from the quarter of the multiprocessor that it runs on.
        warps_by_registers = REGISTERS // 4 // (math.ceil(registers * 32 / 256) * 256) * 4
        # A block's shared memory comes in units of 128 bytes, and the driver takes 1 KiB for its own.
        shared = math.ceil(shared_bytes / 128) * 128 + 1024
        columns = tensor_memory_columns or 1
        limits = {
            "registers": warps_by_registers // warps,
            "shared memory": (architecture.shared_kib << 10) // shared,
            "tensor memory": 512 // columns,
            "warps": architecture.threads // 32 // warps,
            "blocks": architecture.blocks,
        }
        blocks = min(limits.values())
        # Of several that bind, the first is one that the kernel could change.
        limiter = next(name for name, limit in limits.items() if limit == blocks)
        return Occupancy(blocks, blocks * warps, architecture.threads // 32, limiter)

    @property
    def abstract_mesh(self) -> jax.sharding.AbstractMesh:
        """For `jax.sharding.use_abstract_mesh`: lowering for CUDA inside it compiles for this chip.

        Example:
          >>> with jax.sharding.use_abstract_mesh(Target.named("NVIDIA H200").abstract_mesh):
          ...     lowered = jax.jit(lambda x: x + 1).trace(1.0).lower(lowering_platforms=("cuda",))
        """
        device = jax.sharding.AbstractDevice(self.name, self.sms, "gpu")
        return jax.sharding.AbstractMesh((), (), abstract_device=device)

    def topology(self, devices: int = 1) -> TopologyDescription:
        """`devices` of these GPUs in one host, as devices to compile for (nothing runs on them).

        Whole programs compile for them: shardings, collectives and memory can be read off the executable.

        Raises:
          ValueError: a chip missing from the table.
          RuntimeError: JAX's CUDA plugin is not installed.
        """
        from jax.experimental import topologies  # 20 ms that `import jtile` need not spend

        if self.memory_bandwidth is None:
            raise ValueError(f"jtile's table has no {self.name}, and a topology needs all of its properties.")
        try:
            return topologies.get_topology_desc(
                platform="cuda", target_config=self._proto_text(), topology=f"1x1x{devices}"
            )
        except RuntimeError as error:
            error.add_note("This needs JAX's CUDA plugin: pip install 'jtile[offline]', or 'jtile[cuda13]' with a GPU.")
            raise

    def make_mesh(self, shape: tuple[int, ...], names: tuple[str, ...], axis_types=None) -> jax.sharding.Mesh:
        """A mesh of these GPUs, absent ones, as `jax.make_mesh` makes one of present devices."""
        return jax.make_mesh(shape, names, axis_types, devices=self.topology(math.prod(shape)).devices)

    def _proto_text(self) -> str:
        """XLA's `GpuTargetConfigProto`, in text format."""
        major, minor = divmod(self.compute_capability, 10)
        architecture = _ARCHITECTURES[self.compute_capability]
        device = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 48 << 10,  # without opting in to more
            "shared_memory_per_core": architecture.shared_kib << 10,
            "shared_memory_per_block_optin": self.shared_bytes_per_block,
            "threads_per_core_limit": architecture.threads,
            "core_count": self.sms,
            "fpus_per_core": architecture.float32_lanes,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 65535,
            "block_dim_limit_z": 65535,
            "memory_bandwidth": self.memory_bandwidth,
            "l2_cache_size": self.l2_bytes,
            "clock_rate_ghz": self.clock_ghz,
            "device_memory_size": self.memory_bytes,
            "registers_per_core_limit": REGISTERS,
            "registers_per_block_limit": REGISTERS,
        }
        fields = " ".join(f"{name}: {value}" for name, value in device.items())
        # Hopper and later: the architecture-specific instructions (wgmma, tcgen05), as Triton compiles for sm_90a.
        features = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
        capability = f"cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}"
        return (
            f'gpu_device_info {{ {fields} {capability} }} platform_name: "CUDA" '
            f'dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{self.name}"'
        )


@dataclasses.dataclass(frozen=True)
class Occupancy:
    """How much of a kernel a multiprocessor holds at once.

    Attributes:
      blocks: thread blocks.
      warps: their warps.
      most_warps: warps that the multiprocessor has room for.
      limiter: what there is not enough of for another block: `"registers"`, `"shared memory"`,
        `"tensor memory"`, `"warps"` or `"blocks"`.
    """

    blocks: int
    warps: int
    most_warps: int
    limiter: str

    def __str__(self) -> str:
        return f"{self.warps / self.most_warps:.0%} ({self.warps} of {self.most_warps} warps: {self.limiter})"


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """Per multiprocessor. CUDA C++ Programming Guide, "Technical specifications per compute capability"."""

    shared_kib: int
    threads: int
    blocks: int
    float32_lanes: int


_ARCHITECTURES = {
    80: _Architecture(164, 2048, 32, 64),
    86: _Architecture(100, 1536, 16, 128),
    89: _Architecture(100, 1536, 24, 128),
    90: _Architecture(228, 2048, 32, 128),
    100: _Architecture(228, 2048, 32, 128),
    103: _Architecture(228, 2048, 32, 128),
    120: _Architecture(100, 1536, 24, 128),
}


def _chip(name, compute_capability, sms, gigabytes_per_second, l2_mib, memory_gib, clock_ghz):
    shared_kib = _ARCHITECTURES[compute_capability].shared_kib - 1  # the driver keeps 1 KiB of each block's
    return Target(
        name=name,
        compute_capability=compute_capability,
        sms=sms,
        shared_bytes_per_block=shared_kib << 10,
        memory_bandwidth=gigabytes_per_second * 10**9,
        l2_bytes=int(l2_mib * 2**20),
        memory_bytes=int(memory_gib * 2**30),
        clock_ghz=clock_ghz,
    )


# NVIDIA's data sheets and what drivers report. Where one name covers several boards, the fastest.
_CHIPS = {
    chip.name: chip
    for chip in (
        # Ampere
        _chip("NVIDIA A100", 80, 108, 2039, 40, 80, 1.41),
        _chip("NVIDIA A100-SXM4-40GB", 80, 108, 1555, 40, 40, 1.41),
        _chip("NVIDIA A100-PCIE-40GB", 80, 108, 1555, 40, 40, 1.41),
        _chip("NVIDIA A30", 80, 56, 933, 24, 24, 1.44),
        _chip("NVIDIA A10", 86, 72, 600, 6, 24, 1.695),
        _chip("NVIDIA A10G", 86, 80, 600, 6, 24, 1.71),
        _chip("NVIDIA RTX A6000", 86, 84, 768, 6, 48, 1.8),
        _chip("NVIDIA GeForce RTX 3090", 86, 82, 936, 6, 24, 1.695),
        # Ada
        _chip("NVIDIA L4", 89, 58, 300, 48, 24, 2.04),
        _chip("NVIDIA L40", 89, 142, 864, 96, 48, 2.49),
        _chip("NVIDIA L40S", 89, 142, 864, 96, 48, 2.52),
        _chip("NVIDIA RTX 6000 Ada Generation", 89, 142, 960, 96, 48, 2.505),
        _chip("NVIDIA GeForce RTX 4090", 89, 128, 1008, 72, 24, 2.52),
        # Hopper
        _chip("NVIDIA H100", 90, 132, 3352, 50, 80, 1.98),
        _chip("NVIDIA H100 PCIe", 90, 114, 2039, 50, 80, 1.755),
        _chip("NVIDIA H100 NVL", 90, 132, 3938, 50, 94, 1.785),
        _chip("NVIDIA H200", 90, 132, 4800, 50, 141, 1.98),
        _chip("NVIDIA GH200", 90, 132, 4023, 50, 96, 1.98),
        # Blackwell
        _chip("NVIDIA B200", 100, 148, 7672, 126.5, 178.4, 1.965),
        _chip("NVIDIA GB200", 100, 152, 7928, 129.25, 184.3, 2.062),
        _chip("NVIDIA B300", 103, 158, 7936, 129.25, 276.6, 1.965),
        _chip("NVIDIA GeForce RTX 5090", 120, 170, 1792, 96, 32, 2.41),
        _chip("NVIDIA RTX PRO 6000 Blackwell", 120, 188, 1792, 128, 96, 2.6),
    )
}


def _longest_prefix(name: str) -> str | None:
    """The longest of the table's names that begins this one, ending where a word does: an A10G is no A10."""
    words = [known for known in _CHIPS if name == known or name.startswith((known + " ", known + "-"))]
    return max(words, key=len, default=None)


def _local_gpu() -> jax.Device | None:
    try:
        return jax.local_devices(backend="gpu")[0]
    except RuntimeError:  # JAX's way to say that there is no such backend
        return None
