"""Who is measured: one table of rivals, and what each of them runs for an op.

jtile's own kernels and XLA compiling their references need no entry: an op of `cases.py` that jtile has is looked up
there. An entry for another rival is a function under `@enter(rival, op)`: it takes the case's options, imports what it
needs, and returns a function of the case's operands by name, which returns an array or a tuple of them.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import operator
import sys
import types
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

import jtile
from bench.cases import BOTH, FORWARD, PASSES, Case


@dataclasses.dataclass(frozen=True)
class Rival:
    """Whose kernels, on whose arrays, from which package on PyPI."""

    framework: Literal["jax", "torch"]
    package: str
    needs: tuple[str, ...] = ()  # modules

    def missing(self) -> str | None:
        """Why it cannot run here."""
        absent = [module for module in self.needs if importlib.util.find_spec(module) is None]
        return f"not installed: pip install {self.package}" if absent else None

    def version(self) -> str:
        try:
            return f"{self.package} {importlib.metadata.version(self.package)}"
        except importlib.metadata.PackageNotFoundError:
            return f"{self.package}, from a folder"


RIVALS = {
    "jtile": Rival("jax", "jtile", ("triton",)),
    "XLA": Rival("jax", "jax"),
    "cuDNN": Rival("jax", "jax"),
    "tokamax Triton": Rival("jax", "tokamax", ("tokamax",)),
    "tokamax Mosaic": Rival("jax", "tokamax", ("tokamax",)),
    "torch.compile": Rival("torch", "torch", ("torch",)),
    "SDPA": Rival("torch", "torch", ("torch",)),
    "FlexAttention": Rival("torch", "torch", ("torch",)),
    "Liger-Kernel": Rival("torch", "liger-kernel", ("torch", "liger_kernel")),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a rival runs for an op, for some passes. One that writes to its operands gets its own copy of them."""

    make: Callable[..., Callable]
    passes: Sequence[str] = PASSES
    writes: bool = False


ENTRIES: dict[tuple[str, str], Entry] = {}
REFERENCE = "reference"  # an entry under this name is compared with, where XLA's would need too much memory


def enter(rival: str, *ops: str, passes: Sequence[str] = PASSES, writes: bool = False) -> Callable:
    def register(make: Callable) -> Callable:
        ENTRIES.update({(rival, op): Entry(make, passes, writes) for op in ops})
        return make

    return register


def entry(rival: str, op: str) -> Entry | None:
    """What a rival runs for an op, if anything."""
    if (rival, op) in ENTRIES:
        return ENTRIES[rival, op]
    implementation = {"jtile": "triton", "XLA": "xla", REFERENCE: "xla"}.get(rival)
    try:
        function = operator.attrgetter(op)(jtile)
    except AttributeError:
        return ENTRIES.get(("XLA", op)) if rival == REFERENCE else None
    if implementation is None:
        return None
    return Entry(lambda **options: functools.partial(function, implementation=implementation, **options))


def gaps(case: Case) -> dict[str, str]:
    """The rivals that would run this case if they were installed, and what is missing."""
    found = {name: rival.missing() for name, rival in RIVALS.items() if entry(name, case.op)}
    return {name: reason for name, reason in found.items() if reason}


# JAX


@enter(REFERENCE, "dot_product_attention")
def _(is_causal):
    def one_head(query, key, value):  # (sequence, head dim)
        out = jtile.dot_product_attention(
            *(x[:, None] for x in (query, key, value)), is_causal=is_causal, implementation="xla"
        )
        return out[:, 0]

    def of_heads(query, key, value):
        key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
        heads = tuple(jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1], x.shape[3]) for x in (query, key, value))
        out = jax.lax.map(lambda head: jax.checkpoint(one_head)(*head), heads)
        return jnp.moveaxis(out.reshape(query.shape[0], query.shape[2], *out.shape[1:]), 1, 2)

    return of_heads


@enter("cuDNN", "dot_product_attention")
def _(is_causal):
    return functools.partial(jax.nn.dot_product_attention, is_causal=is_causal, implementation="cudnn")


@enter("XLA", "silu_mul")
def _():
    return lambda gate, up: jax.nn.silu(gate) * up


def _all_logits(x, weight, labels):
    import optax

    return optax.softmax_cross_entropy_with_integer_labels((x @ weight).astype(jnp.float32), labels)


@enter("XLA", "linear_cross_entropy")
def _():
    return _all_logits


@enter("XLA", "linear_cross_entropy_mean")
def _():
    return lambda **operands: _all_logits(**operands).mean()


# The forward pass of a gradient forms it; the backward pass alone would only scale that.
@enter("jtile", "linear_cross_entropy_mean", passes=(FORWARD, BOTH))
def _():
    def mean(x, weight, labels):
        weights = jnp.full(labels.shape, 1 / labels.size)
        return jtile.linear_cross_entropy(x, weight, labels, token_weights=weights, implementation="triton")

    return mean


@enter("tokamax Mosaic", "linear_cross_entropy_mean")
def _():
    import tokamax

    def mean(x, weight, labels):
        return tokamax.linear_softmax_cross_entropy_loss(
            x, labels, weight, reduction="mean", implementation="mosaic_gpu"
        )

    return mean


def _adamw(sqrt):
    def step(parameter, gradient, first, second, rate=1e-3, b1=0.9, b2=0.999, epsilon=1e-8, decay=0.1):
        first, second = b1 * first + (1 - b1) * gradient, b2 * second + (1 - b2) * gradient * gradient
        change = first / (1 - b1) / (sqrt(second / (1 - b2)) + epsilon) + decay * parameter
        return parameter - rate * change, first, second

    return step


@enter("XLA", "adamw")
def _():
    return _adamw(jnp.sqrt)


@functools.cache
def _tokamax():
    name = "xprof.cli.tools.get_kernel_stats_tool"
    if importlib.util.find_spec("xprof") is None:  # tokamax imports this, and needs it for its own benchmarks alone
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        for i in range(1, len(parts)):
            setattr(sys.modules[".".join(parts[:i])], parts[i], sys.modules[".".join(parts[: i + 1])])
    import tokamax

    return tokamax


@enter("tokamax Triton", "rms_norm")
def _():
    def rms_norm(x, scale, residual=None):
        h = x if residual is None else x + residual
        y = _tokamax().layer_norm(h, scale, None, subtract_mean=False, implementation="triton")
        return y if residual is None else (y, h)

    return rms_norm


@enter("tokamax Triton", "layer_norm")
def _():
    return lambda x, scale, bias: _tokamax().layer_norm(x, scale, bias, implementation="triton")


@enter("tokamax Triton", "dot_product_attention")
def _(is_causal):
    return functools.partial(_tokamax().dot_product_attention, is_causal=is_causal, implementation="triton")


@enter("tokamax Mosaic", "dot_product_attention")
def _(is_causal):
    return functools.partial(_tokamax().dot_product_attention, is_causal=is_causal, implementation="mosaic")


# PyTorch


def compiled(function: Callable) -> Callable:
    import torch
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # a pullback is timed many times on the same residuals
    return torch.compile(function, dynamic=False)


@enter("torch.compile", "rms_norm")
def _():
    def rms_norm(x, scale, residual=None):
        h = x if residual is None else x + residual
        wide = h.float()
        y = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * scale
        return y.to(x.dtype) if residual is None else (y.to(x.dtype), h)

    return compiled(rms_norm)


@enter("Liger-Kernel", "rms_norm", writes=True)
def _():
    from liger_kernel.transformers import functional

    def rms_norm(x, scale, residual=None):
        if residual is None:
            return functional.liger_rms_norm(x, scale, 1e-6, in_place=False)
        return functional.liger_fused_add_rms_norm(x, residual, scale, 1e-6, in_place=False)

    return rms_norm


@enter("torch.compile", "layer_norm")
def _():
    import torch.nn.functional as F

    def layer_norm(x, scale, bias, residual=None):
        h = x if residual is None else x + residual
        y = F.layer_norm(h.float(), scale.shape, scale, bias, 1e-6).to(x.dtype)
        return y if residual is None else (y, h)

    return compiled(layer_norm)


@enter("Liger-Kernel", "layer_norm")
def _():
    from liger_kernel.transformers import functional

    def layer_norm(x, scale, bias, residual=None):
        h = x if residual is None else x + residual
        y = functional.liger_layer_norm(h, scale, bias, 1e-6)
        return y if residual is None else (y, h)

    return layer_norm


@enter("torch.compile", "gated_rms_norm")
def _():
    import torch.nn.functional as F

    def gated_rms_norm(x, gate, scale):
        u = x.float() * F.silu(gate.float())
        return (u * (u.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * scale).to(x.dtype)

    return compiled(gated_rms_norm)


@enter("torch.compile", "group_norm")
def _(groups):
    import torch.nn.functional as F

    def group_norm(x, scale, bias):
        y = F.group_norm(x.float().permute(0, 3, 1, 2), groups, scale, bias, 1e-6)
        return y.permute(0, 2, 3, 1).to(x.dtype)

    return compiled(group_norm)


@enter("torch.compile", "rope")
def _():
    def rope(x, positions):
        import torch

        pairs = x.shape[-1] // 2
        frequencies = 10_000.0 ** (-torch.arange(pairs, device=x.device, dtype=torch.float32) / pairs)
        angles = (positions[..., None].float() * frequencies)[:, :, None, :]
        first, second = x.float().chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)

    return compiled(rope)


@enter("torch.compile", "gated_activation", "silu_mul")
def _(activation="silu"):
    import torch.nn.functional as F

    act = {"silu": F.silu, "gelu": F.gelu}[activation]
    return compiled(lambda gate, up: act(gate) * up)


@enter("Liger-Kernel", "gated_activation", writes=True)
def _(activation):
    from liger_kernel.transformers import functional

    if activation != "silu":
        raise NotImplementedError(f"it has no gated {activation}")
    return lambda gate, up: functional.liger_swiglu(gate, up)


@enter("torch.compile", "adamw", passes=(FORWARD,))
def _():
    import torch

    return compiled(_adamw(torch.sqrt))


@enter("torch.compile", "softmax")
def _():
    import torch

    return compiled(lambda x: torch.softmax(x, -1))


@enter("torch.compile", "log_softmax")
def _():
    import torch

    return compiled(lambda x: torch.log_softmax(x, -1))


@enter("Liger-Kernel", "softmax")
def _():
    from liger_kernel.transformers import functional

    return functional.liger_softmax


@enter("torch.compile", "softmax_cross_entropy")
def _():
    import torch.nn.functional as F

    return compiled(lambda logits, labels: F.cross_entropy(logits.float(), labels.long(), reduction="none"))


# Its forward pass writes the gradient over the logits; the backward pass would only scale that.
@enter("Liger-Kernel", "softmax_cross_entropy", passes=(BOTH,), writes=True)
def _():
    from liger_kernel.transformers import functional

    return lambda logits, labels: functional.liger_cross_entropy(logits, labels.long(), reduction="none")


@enter("torch.compile", "linear_cross_entropy_mean")
def _():
    import torch.nn.functional as F

    return compiled(lambda x, weight, labels: F.cross_entropy((x @ weight).float(), labels.long()))


@enter("Liger-Kernel", "linear_cross_entropy_mean", passes=(BOTH,))
def _():
    from liger_kernel.transformers import functional

    return lambda x, weight, labels: functional.liger_fused_linear_cross_entropy(x, weight.t(), labels.long())


def _heads_first(function: Callable) -> Callable:
    return lambda query, key, value: function(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)


@enter("SDPA", "dot_product_attention")
def _(is_causal):
    import torch.nn.functional as F

    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1])

    return _heads_first(attention)


@enter("FlexAttention", "dot_product_attention")
def _(is_causal):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    flex, masks = compiled(flex_attention), {}

    def attention(q, k, v):
        lengths = q.shape[2], k.shape[2]
        if is_causal and lengths not in masks:
            masks[lengths] = create_block_mask(lambda b, h, i, j: i >= j, None, None, *lengths, device=q.device)
        return flex(q, k, v, block_mask=masks.get(lengths), enable_gqa=q.shape[1] != k.shape[1])

    return _heads_first(attention)
