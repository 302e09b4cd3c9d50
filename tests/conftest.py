"""Tests run on eight simulated CPU devices; those marked `gpu` on a real GPU, when asked for by `pytest -m gpu`."""

import os

import pytest


def pytest_configure(config):  # before JAX is imported
    if config.option.markexpr != "gpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
        # Most tests compile more than they compute: without optimisation, in one part, and by the older of XLA's two
        # compilers of fusions, which takes a quarter of the time.
        os.environ["XLA_FLAGS"] = (
            "--xla_force_host_platform_device_count=8 "
            "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
            "--xla_cpu_parallel_codegen_split_count=1 "
            "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
        )


def pytest_collection_modifyitems(config, items):
    for item in items:
        if marker := item.get_closest_marker("gpu"):
            needed = marker.kwargs.get("compute_capability")
            if config.option.markexpr != "gpu" or (needed and _compute_capability() < needed):
                chip = f" of compute capability {needed / 10}" if needed else ""
                item.add_marker(pytest.mark.skip(reason=f"needs an NVIDIA GPU{chip}: pytest -m gpu"))


def _compute_capability() -> int:
    from jtile.compiler.target import Target

    return Target.current().compute_capability
