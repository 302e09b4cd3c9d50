"""cuDNN's attention, as one more way to run a plain call: a tile that the tuner measures beside jtile's own.

XLA has it as a custom call whose configuration is JSON: `CudnnfMHABackendConfig` in service/gpu/backend_configs.proto.
There `force_deterministic` asks for gradients with the same bits on every run, for which `jax.nn` has no argument.
"""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jtile.compiler.target import Target
from jtile.ops.attention.variant import Variant


class Cudnn(NamedTuple):
    """In place of a tile. It leaves no choice."""

    library: str = "cuDNN"


def obstacle(query, key, value, *, variant: Variant, target: Target | None) -> str | None:
    """Why cuDNN does not serve a call as jtile promises it, as a clause, or None."""
    if target is None:
        return "it runs on NVIDIA GPUs"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN multiplies 16-bit numbers, and the operands are {query.dtype}"
    widest = 256 if target.compute_capability >= 90 else 128
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    if head_dim != value_dim or head_dim % 8 or head_dim > widest:
        return f"cuDNN takes one head dim, a multiple of 8 up to {widest}, and these are {head_dim} and {value_dim}"
    # Of other masks it does not say what rows have that see nothing. Its causal mask does not know of a device's first
    # query: a device has all of them where they are as many as the keys.
    causal = variant.window == (None, 0) and variant.offset == 0 and variant.square and query.shape[1] == key.shape[1]
    if not variant.is_band or not (variant.window == (None, None) or causal):
        return "cuDNN is called for plain attention alone, causal or full"
    if 0 in (*query.shape, *key.shape):
        return "there is nothing to attend to"
    return None


def _dimensions(contracting: tuple[int, int], batch: tuple[int, int]) -> dict:
    sides = zip(("lhs", "rhs"), contracting, batch, strict=True)
    return {
        f"{side}_{what}_dimensions": dims
        for side, one, second in sides
        for what, dims in (("contracting", [str(one)]), ("batch", ["0", str(second)]))
    }


# Of arrays (batch, length, heads, head dim), and weights (batch, heads, queries, keys).
PRODUCTS = {
    "bmm1": _dimensions((3, 3), (2, 2)),
    "bmm2": _dimensions((3, 1), (1, 2)),
}
GRADIENT_PRODUCTS = {
    "bmm1_grad_gemm1": _dimensions((2, 1), (1, 2)),
    "bmm1_grad_gemm2": _dimensions((3, 1), (1, 2)),
    "bmm2_grad_gemm1": _dimensions((2, 1), (1, 2)),
    "bmm2_grad_gemm2": _dimensions((3, 3), (2, 2)),
}


def _config(query, key, variant: Variant, products: dict) -> str:
    batch, queries, heads, _ = query.shape
    weights = {
        "element_type": "BF16" if query.dtype == jnp.bfloat16 else "F16",
        "dimensions": [str(n) for n in (batch, heads, queries, key.shape[1])],
        "layout": {"minor_to_major": ["3", "2", "1", "0"]},
        "is_dynamic_dimension": [False] * 4,
    }
    algorithm = {
        "algo_id": "0",
        "math_type": "TENSOR_OP_MATH",
        "tuning_knobs": {"17": "1", "24": "0"},
        "is_cudnn_frontend": True,
        "workspace_size": "0",
    }
    config = {
        "algorithm": algorithm,
        "fmha_scale": variant.scale,
        "intermediate_tensor_shape": weights,
        "is_flash_attention": True,
        "mask_type": "NO_MASK" if variant.window == (None, None) else "CAUSAL",
        "dropout_rate": 0.0,
        "max_seg_per_batch": 1,
        "force_deterministic": True,
        **{f"{name}_dot_dimension_numbers": dimensions for name, dimensions in products.items()},
    }
    return json.dumps({"operation_queue_id": "0", "cudnn_fmha_backend_config": config})


def _call(name: str, config: str, operands, results: list[jax.ShapeDtypeStruct]):
    """The results; those with four dimensions are (batch, heads, length, width) that lie in memory like operands."""
    layouts = [(0, 2, 1, 3) if x.ndim == 4 else tuple(range(x.ndim)) for x in results]
    call = jax.ffi.ffi_call(
        name,
        [*results, jax.ShapeDtypeStruct((0,), jnp.uint8)],  # memory to work in, which XLA sizes
        vmap_method="sequential",
        output_layouts=[*layouts, (0,)],
        custom_call_api_version=2,
        legacy_backend_config=config,
    )
    *found, _ = call(*operands)
    return found


def _by_heads(x) -> jax.ShapeDtypeStruct:
    batch, length, heads, width = x.shape
    return jax.ShapeDtypeStruct((batch, heads, length, width), x.dtype)


def forward(query, key, value, *, variant: Variant):
    """The output and the log-sum-exp."""
    lse = jax.ShapeDtypeStruct((query.shape[0], query.shape[2], query.shape[1]), jnp.float32)
    config = _config(query, key, variant, PRODUCTS)
    out, lse = _call("__cudnn$fmhaSoftmax", config, (query, key, value), [_by_heads(query), lse])
    return jnp.swapaxes(out, 1, 2), jnp.swapaxes(lse, 1, 2)


def backward(query, key, value, out, lse, dout, *, variant: Variant):
    """The gradients of query, key and value, the same bits on every run."""
    config = _config(query, key, variant, GRADIENT_PRODUCTS)
    operands = query, key, value, jnp.swapaxes(lse, 1, 2), dout, out
    found = _call("__cudnn$fmhaSoftmaxBackward", config, operands, list(map(_by_heads, (query, key, value))))
    return tuple(jnp.swapaxes(x, 1, 2) for x in found)
