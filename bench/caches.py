"""Where compiled programs are kept between runs."""

import os

import jax

from jtile.compiler import cache


def on_disk() -> None:
    """JAX's go to jtile's folder, from this process and those that it starts, unless the environment names another."""
    folder = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache.directory() / "bench"))
    jax.config.update("jax_compilation_cache_dir", folder)
