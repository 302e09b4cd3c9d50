"""What is measured: each case with the bytes it must move and the floating-point operations it must do.

Bytes count each input read once and each output written once; FLOPs count matrix products alone, and half of them for
causal attention.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

import jtile

BF16 = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one size. `functions` maps a rival's name to the function measured; `jtile` is always among them."""

    name: str
    operands: Callable[[jax.Array], tuple]  # from a random key
    functions: dict[str, Callable]
    forward_bytes: int = 0
    backward_bytes: int = 0  # of the backward pass alone
    forward_flops: int = 0
    backward_flops: int = 0

    @property
    def bound(self) -> str:
        return "FLOP/s" if self.forward_flops else "B/s"


def _op(op: Callable, **options) -> dict[str, Callable]:
    """jtile's kernel against XLA compiling the op's own reference."""
    return {
        name: functools.partial(op, implementation=implementation, **options)
        for name, implementation in (("jtile", "triton"), ("xla", "xla"))
    }


def rms_norm(rows: int, d: int, residual: bool) -> Case:
    def operands(key):
        x, r = jax.random.normal(key, (2, rows, d), BF16)
        return (x, jnp.ones(d), r) if residual else (x, jnp.ones(d))

    def normalize(x, scale, residual=None, *, implementation):
        return jtile.rms_norm(x, scale, residual=residual, implementation=implementation)

    size, passes = rows * d * 2, (4, 4) if residual else (2, 3)
    return Case(
        f"rms_norm{' residual' * residual} {rows}×{d}", operands, _op(normalize), size * passes[0], size * passes[1]
    )


def rope(batch: int, sequence: int, heads: int, head_dim: int) -> Case:
    def operands(key):
        x = jax.random.normal(key, (batch, sequence, heads, head_dim), BF16)
        return x, jnp.broadcast_to(jnp.arange(sequence, dtype=jnp.int32), (batch, sequence))

    size = batch * sequence * heads * head_dim * 2
    return Case(f"rope {batch}×{sequence}×{heads}×{head_dim}", operands, _op(jtile.rope), 2 * size, 2 * size)


def gated_activation(rows: int, d: int, activation: str) -> Case:
    size = rows * d * 2
    return Case(
        f"gated_activation {activation} {rows}×{d}",
        lambda key: tuple(jax.random.normal(key, (2, rows, d), BF16)),
        _op(jtile.gated_activation, activation=activation),
        3 * size,
        5 * size,
    )


def softmax_cross_entropy(tokens: int, classes: int) -> Case:
    def operands(key):
        logits = jax.random.normal(key, (tokens, classes), BF16)
        return logits, jax.random.randint(key, (tokens,), 0, classes, jnp.int32)

    size = tokens * classes * 2
    return Case(f"softmax_cross_entropy {tokens}×{classes}", operands, _op(jtile.softmax_cross_entropy), size, 2 * size)


def attention(batch: int, sequence: int, heads: int, key_heads: int, head_dim: int, is_causal: bool) -> Case:
    def operands(key):
        keys = jax.random.split(key, 3)
        return tuple(
            jax.random.normal(k, (batch, sequence, n, head_dim), BF16)
            for k, n in zip(keys, (heads, key_heads, key_heads), strict=True)
        )

    flops = 4 * batch * heads * sequence * sequence * head_dim // (1 + is_causal)
    return Case(
        f"attention {batch}×{sequence}×{heads}/{key_heads}×{head_dim}{' causal' * is_causal}",
        operands,
        {
            "jtile": functools.partial(jtile.dot_product_attention, is_causal=is_causal, implementation="triton"),
            "cuDNN": functools.partial(jax.nn.dot_product_attention, is_causal=is_causal, implementation="cudnn"),
        },
        forward_flops=flops,
        backward_flops=5 * flops // 2,
    )


CASES = [
    *(rms_norm(rows, d, r) for rows, d in ((131072, 2048), (32768, 8192)) for r in (False, True)),
    rope(8, 4096, 32, 128),
    gated_activation(16384, 14336, "silu"),
    gated_activation(16384, 14336, "gelu"),
    softmax_cross_entropy(8192, 128256),
    softmax_cross_entropy(16384, 50257),
    attention(4, 4096, 16, 16, 128, True),
    attention(4, 4096, 16, 16, 128, False),
    attention(4, 4096, 32, 8, 64, True),
    attention(1, 16384, 16, 16, 128, True),
]
