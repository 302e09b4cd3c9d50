"""Sorting, and the greatest few."""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.compiler.kernels import case, integers, normal, whole

TIES = integers(3, 11, low=-3, high=3).astype(np.float32)
TIES[0, :6] = np.nan, 0.0, -0.0, np.inf, -np.inf, np.nan
SORTS = {
    "rows": (lambda x: jnp.sort(x, axis=1), TIES),
    "columns": (lambda x: jnp.sort(x, axis=0), normal(5, 3)),
    "arguments": (lambda x: jnp.argsort(x, axis=1), TIES),
    "arguments_descending": (lambda x: jnp.argsort(x, axis=1, descending=True), TIES),
    "halves": (lambda x: jnp.sort(x.astype(jnp.bfloat16), axis=1).astype(jnp.float32), TIES),
    "integers": (lambda x: jnp.sort(x), integers(11)),
    "unsigned": (lambda x: jnp.sort(x), integers(2, 5).astype(np.uint32)),
    "bytes": (lambda x: jnp.sort(x), integers(11, dtype=np.int8)),
    "bools": (lambda x: jnp.sort(x > 0), normal(6)),
    "values_by_key": (lambda x: lax.sort((x, x * 2 + 1), dimension=1, num_keys=1), TIES),
    "by_two_keys": (
        lambda x: lax.sort((x // 2, x % 2, lax.broadcasted_iota(jnp.int32, x.shape, 0)), dimension=0, num_keys=2),
        integers(6, 2, low=0, high=4),
    ),
    "top_k": (lambda x: lax.top_k(x, 3), normal(3, 11)),
    "top_k_of_all_kinds": (lambda x: lax.top_k(x, 11)[1], TIES),
    "narrow": (lambda x: jnp.argsort(x.astype(jnp.float8_e4m3fn)) + jnp.argsort(x.astype(jnp.float8_e5m2)), TIES),
    "top_k_of_ties": (lambda x: lax.top_k(x, 4), integers(3, 11, low=0, high=3)),
    "approximate": (lambda x: lax.approx_min_k(x, 3, recall_target=1.0), normal(3, 11)),
    "search": (lambda x: jnp.searchsorted(jnp.sort(x[0]), x[1:]), TIES),
    "search_in_halves": (lambda x: jnp.searchsorted(jnp.sort(x[0]), x[1:], side="right"), TIES.astype(np.float16)),
    "search_in_integers": (lambda x: jnp.searchsorted(jnp.sort(x), x - 1), integers(11)),
    "median": (lambda x: jnp.median(x, axis=1), normal(3, 11)),
}
for _name, (_function, _x) in SORTS.items():
    case(_x, name=f"sort_{_name}")(functools.partial(whole, _function))
