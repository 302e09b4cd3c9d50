"""Gated linear units without the products: y = activation(gate) · up, elementwise."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jtile.compiler.params import CompilerParams
from jtile.op import Implementation, TileOp, check_known

# Spec.

forward = TileOp("gated_activation", "gate: ..., up: ... -> y: ...")
backward = TileOp("gated_activation_backward", "gate: ..., up: ..., dy: ... -> dgate: ..., dup: ...")

ACTIVATIONS = {
    "silu": lambda x: x * jax.nn.sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5)),
    # ½ (1 + tanh u) = sigmoid(2u), with u = √(2/π) (x + 0.044715 x³)
    "gelu_tanh": lambda x: x * jax.nn.sigmoid((8 / jnp.pi) ** 0.5 * (x + 0.044715 * x**3)),
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
}


# The same for a whole array and for a block of it.


def _gated(gate, up, activation):
    wide = jnp.promote_types(gate.dtype, jnp.float32)
    return (ACTIVATIONS[activation](gate.astype(wide)) * up.astype(wide)).astype(gate.dtype)


def _gated_gradients(gate, up, dy, activation):
    wide = jnp.promote_types(gate.dtype, jnp.float32)
    activated, pullback = jax.vjp(ACTIVATIONS[activation], gate.astype(wide))
    (dgate,) = pullback(dy.astype(wide) * up.astype(wide))
    return dgate.astype(gate.dtype), (dy.astype(wide) * activated).astype(up.dtype)


# Reference.


@forward.reference
def forward_reference(gate, up, *, activation):
    return (_gated(gate, up, activation),)


@backward.reference
def backward_reference(gate, up, dy, *, activation):
    return _gated_gradients(gate, up, dy, activation)


# Kernel. A stream: every thread has several loads of 16 bytes in flight.

BLOCK = 4096


def _elementwise(kernel, operands, results, name):
    (n,) = operands[0].shape
    block = pl.BlockSpec((BLOCK,), lambda i: (i,))
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(n, BLOCK),),
        in_specs=[block] * len(operands),
        out_specs=[block] * len(results),
        out_shape=results,
        compiler_params=CompilerParams(num_warps=4, num_stages=1),
        name=name,
    )(*operands)


@forward.kernel
def forward_kernel(gate, up, *, activation):
    def gated_activation_kernel(gate_ref, up_ref, y_ref):
        y_ref[...] = _gated(gate_ref[...], up_ref[...], activation)

    return tuple(_elementwise(gated_activation_kernel, [gate, up], [gate], "gated_activation"))


@backward.kernel
def backward_kernel(gate, up, dy, *, activation):
    def gated_activation_backward_kernel(gate_ref, up_ref, dy_ref, dgate_ref, dup_ref):
        dgate_ref[...], dup_ref[...] = _gated_gradients(gate_ref[...], up_ref[...], dy_ref[...], activation)

    out = _elementwise(gated_activation_backward_kernel, [gate, up, dy], [gate, up], "gated_activation_backward")
    return tuple(out)


# Derivative. The activation is computed again rather than kept.


@forward.transpose
def forward_transpose(operands, results, cotangents, **options):
    return backward(*operands, cotangents[0], **options)


# Public name.


def gated_activation(
    gate: Float[Array, "*shape"],
    up: Float[Array, "*shape"],
    *,
    activation: str = "silu",
    implementation: Implementation = None,
) -> Float[Array, "*shape"]:
    """`activation(gate) * up`, the heart of a gated linear unit (GLU, GEGLU, ReGLU, SwiGLU).

    Computed in float32 (float64 for float64 operands) and rounded once. The gradient is one pass over `gate`, `up` and
    the cotangent: nothing but the operands is kept for it.

    Args:
        gate: any shape.
        up: the shape and dtype of `gate`.
        activation: `"silu"`, x · sigmoid(x); `"gelu"`, x · Φ(x) with the normal distribution function Φ; `"gelu_tanh"`,
            its approximation ½ x (1 + tanh(√(2/π) (x + 0.044715 x³))); `"relu"`, whose derivative at 0 is 0; or
            `"sigmoid"`.
        implementation: `None`, `"triton"`, `"xla"` or `"interpret"`, see `jtile.TileOp`.

    Returns:
        An array of the shape and dtype of `gate`.

    Raises:
        ValueError: shapes or dtypes of `gate` and `up` differ, they are not floating point, or `activation` is unknown.
        NotImplementedError: the named implementation cannot serve the call.

    Source: Shazeer, GLU Variants Improve Transformer, 2020 (arXiv:2002.05202), section 2.

    Example:
        >>> import jax.numpy as jnp
        >>> import jtile
        >>> jtile.gated_activation(jnp.array([-1.0, 0.0, 2.0]), jnp.array([1.0, 1.0, 3.0]), activation="relu")
        Array([0., 0., 6.], dtype=float32)
    """
    check_known("gated_activation", activation=activation)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"gated_activation: `activation` must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}"
        )
    gate, up = jnp.asarray(gate), jnp.asarray(up)
    if gate.dtype != up.dtype or not jnp.issubdtype(gate.dtype, jnp.floating):
        raise ValueError(
            f"gated_activation: `gate` and `up` must have one floating-point dtype, got {gate.dtype} and {up.dtype}; "
            "cast one of them"
        )
    (y,) = forward(gate, up, activation=activation, implementation=implementation)
    return y
