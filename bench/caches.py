"""Where compiled programs are kept between runs."""

import os

import jax

from jtile.compiler import cache


def on_disk() -> None:
    """JAX's go to jtile's folder, small ones too, from this process and those that it starts.

    The environment may name another folder, and how many seconds of compiling are worth keeping.
    """
    folder = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache.directory() / "bench"))
    least = os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float(least))
