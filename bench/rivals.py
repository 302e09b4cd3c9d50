"""Who is measured: one table of rivals, and what each of them runs for an op.

jtile's own kernels and XLA compiling their references need no entry: an op of `cases.py` that jtile has is looked up
there. An entry for another rival is a function under `@enter(rival, op)`: it takes the case's options, imports what it
needs, and returns a function of the case's operands by name, which returns an array or a tuple of them.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import operator
import sys
import types
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

import jtile
from bench.cases import BOTH, FORWARD, PASSES, Case


@dataclasses.dataclass(frozen=True)
class Rival:
    """Whose kernels, on whose arrays, from which package on PyPI.

    One that is `apart` runs in another process, one for each framework: there PyTorch has the Triton that it was made
    for, and what brings the process down is one rival's gap.
    """

    framework: Literal["jax", "torch"]
    package: str
    needs: tuple[str, ...] = ()  # modules
    apart: bool = False

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
    "tokamax Triton": Rival("jax", "tokamax", ("tokamax",), apart=True),
    "tokamax Mosaic": Rival("jax", "tokamax", ("tokamax",), apart=True),
    "tokamax XLA": Rival("jax", "tokamax", ("tokamax",), apart=True),
    "torch.compile": Rival("torch", "torch", ("torch",), apart=True),
    "SDPA": Rival("torch", "torch", ("torch",), apart=True),
    "FlexAttention": Rival("torch", "torch", ("torch",), apart=True),
    "Liger-Kernel": Rival("torch", "liger-kernel", ("torch", "liger_kernel"), apart=True),
}
IN_SWEEPS = "jtile", "XLA", "cuDNN"


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


def _slopes(heads: int) -> list[float]:
    """ALiBi's, of each head (Press et al., 2021, arXiv:2108.12409)."""
    return [2.0 ** (-8 * (head + 1) / heads) for head in range(heads)]


def _alibi_bias(query, key):
    """(1, heads, queries, keys), for those who take it from memory."""
    apart = jnp.arange(key.shape[1]) - jnp.arange(query.shape[1])[:, None]
    return (jnp.array(_slopes(query.shape[2]))[None, :, None, None] * apart).astype(query.dtype)


@enter(REFERENCE, "dot_product_attention")
def _(is_causal, window=None, cap=None, alibi=False, prefix=0):
    """In plain JAX, some queries of one head at a time."""
    block = 1024

    def of_block(query, start, key, value, slope, ids):
        at, keys = start + jnp.arange(len(query))[:, None], jnp.arange(len(key))
        scores = query @ key.T / math.sqrt(query.shape[-1])
        if alibi:
            scores += slope * (keys - at)
        if cap is not None:
            scores = cap * jnp.tanh(scores / cap)
        seen = (keys <= at) | (keys < prefix) if is_causal else True
        if window is not None:
            seen &= at - keys < window
        if ids is not None:
            seen &= lax.dynamic_slice_in_dim(ids, start, len(query))[:, None] == ids
        return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)) @ value

    def of_head(head):
        query, key, value, slope, ids = head
        blocks = query.reshape(-1, min(block, len(query)), query.shape[1])
        starts = jnp.arange(len(blocks)) * blocks.shape[1]
        part = jax.checkpoint(lambda part: of_block(*part, key, value, slope, ids))
        return lax.map(part, (blocks, starts)).reshape(-1, value.shape[1])

    def attention(query, key, value, segment_ids=None):
        batch, _, heads, _ = query.shape
        key, value = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (key, value))
        rows = [jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1], x.shape[3]) for x in (query, key, value)]
        ids = None if segment_ids is None else jnp.repeat(segment_ids, heads, axis=0)
        out = lax.map(of_head, (*rows, jnp.tile(jnp.array(_slopes(heads)), batch), ids))
        return jnp.moveaxis(out.reshape(batch, heads, *out.shape[1:]), 1, 2)

    return attention


def _jtile_attention(implementation):
    def make(is_causal, window=None, cap=None, alibi=False, prefix=0):
        @functools.cache
        def block_mask(queries, keys):
            with jax.ensure_compile_time_eval():  # as a model does once for all of its layers
                return jtile.create_block_mask(lambda b, h, i, j: (i >= j) | (j < prefix), None, None, queries, keys)

        def flexible(query, key, value):
            slopes = jnp.array(_slopes(query.shape[2]))
            return jtile.flex_attention(
                query,
                key,
                value,
                score_mod=(lambda score, b, h, i, j: score + slopes[h] * (j - i)) if alibi else None,
                block_mask=block_mask(query.shape[1], key.shape[1]),
                implementation=implementation,
            )

        def attention(query, key, value, segment_ids=None):
            scores = 4 * query.shape[0] * query.shape[2] * query.shape[1] * key.shape[1]
            if implementation == "xla" and scores > 2**31:
                raise NotImplementedError(f"it keeps all scores, of {scores / 2**30:.0f} GiB, more than once")
            return jtile.dot_product_attention(
                query,
                key,
                value,
                is_causal=is_causal,
                local_window_size=None if window is None else (window - 1, 0),
                logits_soft_cap=cap,
                query_segment_ids=segment_ids,
                implementation=implementation,
            )

        return flexible if alibi or prefix else attention

    return make


enter("jtile", "dot_product_attention")(_jtile_attention("triton"))
enter("XLA", "dot_product_attention")(_jtile_attention("xla"))


@enter("cuDNN", "dot_product_attention")
def _(is_causal, window=None, cap=None, alibi=False, prefix=0):
    if cap is not None:
        raise NotImplementedError("jax.nn.dot_product_attention has no soft cap")

    def attention(query, key, value, segment_ids=None):
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            **_seen(query, key, segment_ids, is_causal, window, alibi, prefix),
            implementation="cudnn",
        )

    return attention


def _seen(query, key, segment_ids, is_causal, window, alibi, prefix) -> dict:
    """What queries see, under the names that `jax.nn` gives it."""
    mask = None if segment_ids is None else (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    if prefix:
        at = jnp.arange(key.shape[1])
        mask, is_causal = ((at <= at[:, None]) | (at < prefix))[None, None], False
    return dict(
        bias=_alibi_bias(query, key) if alibi else None,
        mask=mask,
        is_causal=is_causal,
        local_window_size=None if window is None else (window - 1, 0),
    )


@enter("XLA", "silu_mul")
def _():
    return lambda gate, up: jax.nn.silu(gate) * up


@enter(REFERENCE, "linear_cross_entropy")
def _():
    """In plain JAX, some tokens at a time."""

    def losses(x, weight, labels):
        part = jax.checkpoint(lambda part: _all_logits(part[0], weight, part[1]))
        parts = jax.tree.map(lambda a: a.reshape(-1, min(1024, len(x)), *a.shape[1:]), (x, labels))
        return lax.map(part, parts).reshape(-1)

    return losses


@enter(REFERENCE, "linear_cross_entropy_mean")
def _():
    losses = ENTRIES[REFERENCE, "linear_cross_entropy"].make()
    return lambda **operands: losses(**operands).mean()


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


@enter("tokamax XLA", "linear_cross_entropy_mean")  # it has kernels for it on TPUs alone
def _():
    return lambda x, weight, labels: _tokamax().linear_softmax_cross_entropy_loss(
        x, labels, weight, reduction="mean", implementation="chunked_xla"
    )


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


def _tokamax_attention(implementation):
    def make(is_causal, window=None, cap=None, alibi=False, prefix=0):
        def attention(query, key, value, segment_ids=None):
            return _tokamax().dot_product_attention(
                query,
                key,
                value,
                **_seen(query, key, segment_ids, is_causal, window, alibi, prefix),
                logits_soft_cap=cap,
                implementation=implementation,
            )

        return attention

    return make


enter("tokamax Triton", "dot_product_attention")(_tokamax_attention("triton"))
enter("tokamax Mosaic", "dot_product_attention")(_tokamax_attention("mosaic"))


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


@enter("torch.compile", "qk_norm_rope")
def _():
    import torch

    def rotated(x, scale, cos, sin):
        wide = x.float()
        wide = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * scale
        first, second = wide.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)

    def qk_norm_rope(q, k, q_scale, k_scale, positions):
        pairs = q.shape[-1] // 2
        frequencies = 10_000.0 ** (-torch.arange(pairs, device=q.device, dtype=torch.float32) / pairs)
        angles = (positions[..., None].float() * frequencies)[:, :, None, :]
        cos, sin = angles.cos(), angles.sin()
        return rotated(q, q_scale, cos, sin), rotated(k, k_scale, cos, sin)

    return compiled(qk_norm_rope)


@enter("torch.compile", "gated_activation", "silu_mul")
def _(activation="silu"):
    import torch.nn.functional as F

    act = {"silu": F.silu, "gelu": F.gelu}[activation]
    return compiled(lambda gate, up: act(gate) * up)


@enter("Liger-Kernel", "gated_activation", writes=True)
def _(activation):
    from liger_kernel.transformers import functional

    if activation != "silu":
        raise NotImplementedError(f"its gated {activation} is the approximation by tanh")
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


@enter("SDPA", "dot_product_attention")
def _(is_causal, **features):
    import torch.nn.functional as F

    if features:
        raise NotImplementedError(f"it has no {', '.join(features)} but by a mask in memory")

    def attention(query, key, value, segment_ids=None):
        if segment_ids is not None:
            raise NotImplementedError("it has no segments but by a mask in memory")
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    return attention


@enter("FlexAttention", "dot_product_attention")
def _(is_causal, window=None, cap=None, alibi=False, prefix=0):
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    flex, prepared = compiled(flex_attention), {}

    def score_mod(heads, device):
        slopes = torch.tensor(_slopes(heads), device=device)

        def changed(score, b, h, i, j):
            if alibi:
                score = score + slopes[h] * (j - i)
            return score if cap is None else cap * torch.tanh(score / cap)

        return changed if alibi or cap is not None else None

    def block_mask(q, k, ids):
        def seen(b, h, i, j):
            visible = (i >= j) | (j < prefix)
            if window is not None:
                visible = visible & (i - j < window)
            return visible if ids is None else visible & (ids[b, i] == ids[b, j])

        batch = None if ids is None else q.shape[0]
        return create_block_mask(seen, batch, None, q.shape[2], k.shape[2], device=q.device) if is_causal else None

    def attention(query, key, value, segment_ids=None):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        at = None if segment_ids is None else segment_ids.data_ptr()
        if at not in prepared:  # as a model does once for all of its layers
            prepared[at] = dict(score_mod=score_mod(q.shape[1], q.device), block_mask=block_mask(q, k, segment_ids))
        return flex(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **prepared[at]).transpose(1, 2)

    return attention
