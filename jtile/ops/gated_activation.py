"""Gated linear units without the products: y = activation(gate) · up, elementwise."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jtile.compiler.params import CompilerParams
from jtile.compiler.primitives import approx_exp2
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
    return (activation(gate.astype(wide)) * up.astype(wide)).astype(gate.dtype)


def _gated_gradients(gate, up, dy, activation):
    wide = jnp.promote_types(gate.dtype, jnp.float32)
    activated, pullback = jax.vjp(activation, gate.astype(wide))
    (dgate,) = pullback(dy.astype(wide) * up.astype(wide))
    return dgate.astype(gate.dtype), (dy.astype(wide) * activated).astype(up.dtype)


# Reference.


@forward.reference
def forward_reference(gate, up, *, activation):
    return (_gated(gate, up, ACTIVATIONS[activation]),)


@backward.reference
def backward_reference(gate, up, dy, *, activation):
    return _gated_gradients(gate, up, dy, ACTIVATIONS[activation])


# Kernel. A stream: every thread has a load of 16 bytes of each operand in flight, and there are many. Where memory is
# the limit, there is time for some 30 instructions an element, which libdevice's erf and another exponential for its
# derivative exceed. So:
#
#     Φ(−|x|) = exp(−x²/2) · r(t),   t = 1 / (1 + 0.3 |x|)
#
# with a polynomial r of degree 8, fitted for the least largest relative error up to |x| = 14.5, which is 1.7e-7; beyond
# float32 holds no values of Φ. The same exponential is the derivative of Φ, but for the factor √(1/2π).

TAIL = (0.119631998, 0.120712303, 0.100174889, 0.127695322, -0.0520408340, 0.204564288, -0.156162843, 0.0354248025)


def _normal(x):
    """Φ(x) and its derivative."""
    t = 1 / (1 + 0.3 * jnp.abs(x))
    r: jax.Array | float = TAIL[-1]
    for coefficient in reversed(TAIL[:-1]):
        r = r * t + coefficient
    r = r * t
    falls = approx_exp2(-0.5 * math.log2(math.e) * x * x)
    return jnp.where(x < 0, falls * r, 1 - falls * r), falls * (2 * math.pi) ** -0.5


@jax.custom_jvp
def _gelu(x):
    return x * _normal(x)[0]


@_gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (x_dot,) = primals, tangents
    cumulative, density = _normal(x)
    return x * cumulative, (cumulative + x * density) * x_dot


IN_KERNELS = {**ACTIVATIONS, "gelu": _gelu}


class Tile(NamedTuple):
    """The elements that a program has."""

    elements: int
    num_warps: int


@forward.tiles
def forward_tiles(*operands, **options):
    yield from (Tile(1024 * n, w) for n, w in ((1, 4), (1, 8), (2, 4), (1, 2), (4, 8), (4, 4)))


@backward.tiles
def backward_tiles(*operands, **options):
    yield from (Tile(1024 * n, w) for n, w in ((1, 8), (1, 4), (2, 8), (2, 4)))


def _elementwise(kernel, operands, results, name, tile):
    (n,) = operands[0].shape
    block = pl.BlockSpec((tile.elements,), lambda i: (i,))
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(n, tile.elements),),
        in_specs=[block] * len(operands),
        out_specs=[block] * len(results),
        out_shape=results,
        compiler_params=CompilerParams(num_warps=tile.num_warps, num_stages=1),
        name=name,
    )(*operands)


@forward.kernel
def forward_kernel(gate, up, *, tile, activation):
    def gated_activation_kernel(gate_ref, up_ref, y_ref):
        y_ref[...] = _gated(gate_ref[...], up_ref[...], IN_KERNELS[activation])

    return tuple(_elementwise(gated_activation_kernel, [gate, up], [gate], "gated_activation", tile))


@backward.kernel
def backward_kernel(gate, up, dy, *, tile, activation):
    def gated_activation_backward_kernel(gate_ref, up_ref, dy_ref, dgate_ref, dup_ref):
        gradients = _gated_gradients(gate_ref[...], up_ref[...], dy_ref[...], IN_KERNELS[activation])
        dgate_ref[...], dup_ref[...] = gradients

    out = _elementwise(gated_activation_backward_kernel, [gate, up, dy], [gate, up], "gated_activation_backward", tile)
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
