import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jtile.compiler.target import _ARCHITECTURES, _CHIPS, Target

H200 = Target.named("NVIDIA H200")


def test_h200():
    assert (H200.compute_capability, H200.sms, H200.shared_bytes_per_block) == (90, 132, 232_448)
    assert H200.memory_bandwidth == 4.8e12
    assert H200.l2_bytes == 50 * 2**20


def test_names():
    assert list(_CHIPS) == [chip.name for chip in _CHIPS.values()]
    assert Target.named("NVIDIA H100 80GB HBM3").name == "NVIDIA H100"
    assert Target.named("NVIDIA H100 PCIe").sms == 114
    assert Target.named("NVIDIA A100-SXM4-80GB").name == "NVIDIA A100"
    assert Target.named("NVIDIA A10G").sms == 80  # not the A10 that its name begins with


@pytest.mark.parametrize("name", ["NVIDIA H2000", "H200", ""])
def test_unknown_name_lists_the_known(name):
    with pytest.raises(ValueError, match="NVIDIA A100.*NVIDIA H200.*NVIDIA B200"):
        Target.named(name)


def test_no_gpu_here():
    if any(d.platform == "gpu" for d in jax.devices()):
        assert Target.current().compute_capability >= 80
    else:
        with pytest.raises(RuntimeError, match="NVIDIA H200"):
            Target.current()


def device(**attributes):
    given = {"platform": "gpu", "device_kind": "NVIDIA H200", "compute_capability": "9.0", "core_count": 132}
    return types.SimpleNamespace(**given | {"shared_memory_per_block_optin": 232_448} | attributes)


def test_device_of_a_known_chip():
    assert Target.of_device(device()) == H200


def test_partitioned_chip():
    part = Target.of_device(device(device_kind="NVIDIA H200 MIG 1g.18gb", core_count=16))
    assert (part.sms, part.memory_bandwidth) == (16, H200.memory_bandwidth)


def test_device_of_an_unknown_chip():
    chip = Target.of_device(device(device_kind="NVIDIA R500", compute_capability="13.1", core_count=200))
    assert chip == Target("NVIDIA R500", compute_capability=131, sms=200, shared_bytes_per_block=232_448)
    with pytest.raises(ValueError, match="NVIDIA R500"):
        chip.topology()


@pytest.mark.parametrize("other", [device(compute_capability="gfx942"), jax.devices("cpu")[0]])
def test_devices_of_other_makers(other):
    with pytest.raises(ValueError, match="NVIDIA GPUs"):
        Target.of_device(other)


@pytest.mark.parametrize("capability", _ARCHITECTURES)
def test_topology_describes_the_chip(capability):
    chip = next(c for c in _CHIPS.values() if c.compute_capability == capability)
    devices = chip.topology(devices=2).devices
    assert len(devices) == 2
    assert Target.of_device(devices[0]) == chip


def test_program_for_absent_gpus():
    """Shardings, collectives and memory of a whole program, on a machine without a GPU."""
    mesh = H200.make_mesh((2, 2), ("data", "model"), (AxisType.Auto,) * 2)

    def operand(*spec):
        return jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    product = jax.jit(jnp.dot).lower(operand("data", "model"), operand("model", None)).compile()
    assert product.as_text().count(" all-reduce(") + product.as_text().count(" all-reduce-start(") == 1
    assert product.memory_analysis().argument_size_in_bytes == (128 * 128 + 128 * 256) * 2


@pytest.mark.parametrize(
    "chip, registers, shared_bytes, threads, expected",
    [
        # As NVIDIA's occupancy calculator has them.
        ("NVIDIA A100", 32, 0, 256, (8, 64, 64, "registers")),
        ("NVIDIA A100", 33, 0, 256, (6, 48, 64, "registers")),
        ("NVIDIA H200", 168, 100_000, 128, (2, 8, 64, "shared memory")),
        ("NVIDIA H200", 255, 227 << 10, 256, (1, 8, 64, "registers")),
        ("NVIDIA H200", 16, 0, 1024, (2, 64, 64, "warps")),
        ("NVIDIA H200", 16, 0, 32, (32, 32, 64, "blocks")),
        ("NVIDIA L4", 40, 0, 128, (12, 48, 48, "registers")),
        ("NVIDIA L4", 16, 0, 32, (24, 24, 48, "blocks")),
        ("NVIDIA A10", 16, 0, 32, (16, 16, 48, "blocks")),
        ("NVIDIA B200", 64, 33 << 10, 128, (6, 24, 64, "shared memory")),
    ],
)
def test_occupancy(chip, registers, shared_bytes, threads, expected):
    found = Target.named(chip).occupancy(registers, shared_bytes, threads)
    assert dataclasses.astuple(found) == expected


def test_occupancy_by_tensor_memory():
    found = Target.named("NVIDIA B200").occupancy(64, 33 << 10, 128, tensor_memory_columns=256)
    assert dataclasses.astuple(found) == (2, 8, 64, "tensor memory")
