"""Attention's features against plain causal attention and against FlexAttention: `python -m bench.attention_features`.

For each case the time of jtile and of its rival, the rate on the blocks of 128 by 128 that are left, and that rate over
the one of plain causal attention of the same shape: 1 where a feature costs nothing and skipping blocks wins all that
they would have taken.
"""

import argparse
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jtile
from bench import timing

BLOCK = 128
WINDOW, CAP, DOCUMENTS = 1024, 30.0, 8


class Shape(NamedTuple):
    batch: int
    length: int
    heads: int
    head_dim: int


class Case(NamedTuple):
    """Which blocks are left, jtile's function of query, key and value, and PyTorch's."""

    left: Callable
    jtile: Callable
    torch: Callable | None


def causal(b, h, q, k):
    return q >= k


def windowed(b, h, q, k):
    return (q >= k) & (q - k <= WINDOW)


def ids(shape: Shape, *, ragged: bool) -> np.ndarray:
    """Documents in one sequence, all of one length or not."""
    if not ragged:
        return np.arange(shape.length) // (shape.length // DOCUMENTS)
    ends = np.sort(np.random.default_rng(0).choice(shape.length, DOCUMENTS - 1, replace=False))
    return np.searchsorted(ends, np.arange(shape.length), side="right")


def cases(shape: Shape) -> dict[str, Case]:
    attend = functools.partial(jtile.dot_product_attention, is_causal=True)
    lengths = shape.length, shape.length
    blocks = functools.partial(jtile.create_block_mask, batch=None, heads=None, queries=lengths[0], keys=lengths[1])
    slopes = 2.0 ** (-8 * np.arange(1, shape.heads + 1, dtype=np.float32) / shape.heads)

    def flex(score_mod=None, mask_mod=causal):
        mask = blocks(mask_mod)
        return lambda q, k, v: jtile.flex_attention(q, k, v, score_mod=score_mod, block_mask=mask)

    def alibi(score, b, h, q, k):
        return score + jnp.asarray(slopes)[h] * (k - q)

    def torch_alibi(torch):
        given = torch.tensor(slopes, device="cuda")
        return lambda score, b, h, q, k: score + given[h] * (k - q)

    def torch_cap(torch):
        return lambda score, b, h, q, k: CAP * torch.tanh(score / CAP)

    found = {
        "causal": Case(causal, attend, torch_flex(shape)),
        "causal, flex_attention": Case(causal, flex(), None),
        "window": Case(windowed, functools.partial(attend, local_window_size=(WINDOW, 0)), torch_flex(shape, windowed)),
        "soft cap": Case(
            causal, functools.partial(attend, logits_soft_cap=CAP), torch_flex(shape, score_mod=torch_cap)
        ),
        "alibi": Case(causal, flex(alibi), torch_flex(shape, score_mod=torch_alibi)),
    }
    for name, ragged in ("documents", False), ("ragged documents", True):
        segment = ids(shape, ragged=ragged)
        array = jnp.asarray(segment)

        def packed(b, h, q, k, segment=segment):
            return (q >= k) & (segment[q] == segment[k])

        def torch_packed(torch, segment=segment):
            given = torch.tensor(segment, device="cuda")
            return lambda b, h, q, k: (q >= k) & (given[q] == given[k])

        found[name] = Case(
            packed, functools.partial(attend, query_segment_ids=array), torch_flex(shape, torch_packed, made=True)
        )
    return found


def torch_flex(shape: Shape, mask_mod=causal, score_mod=None, *, made: bool = False) -> Callable:
    """Makes FlexAttention's function, of arrays (batch, heads, length, head dim)."""

    def make():
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask = create_block_mask(
            mask_mod(torch) if made else mask_mod, None, None, shape.length, shape.length, device="cuda"
        )
        score = score_mod and score_mod(torch)
        run = torch.compile(flex_attention, dynamic=False)
        return lambda q, k, v: run(q, k, v, score_mod=score, block_mask=mask)

    return make


def blocks_left(left: Callable, length: int) -> int:
    """How many blocks have a key for a query to see, by the corners and the edges of each."""
    n = length // BLOCK
    at = np.arange(n)[:, None] * BLOCK + np.linspace(0, BLOCK - 1, 8).astype(int)
    seen = left(0, 0, at.reshape(-1, 1), at.reshape(1, -1))
    return int(seen.reshape(n, at.shape[1], n, at.shape[1]).any((1, 3)).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=4, default=(1, 32768, 16, 128), metavar="N")
    parser.add_argument("--cases", nargs="*")
    parser.add_argument("--gradient", action="store_true", help="time forward and backward")
    parser.add_argument("--torch", action="store_true", help="time FlexAttention too")
    parser.add_argument("--compile-only", action="store_true")
    options = parser.parse_args()
    shape = Shape(*options.shape)
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, shape[:], jnp.bfloat16) for key in keys]
    works = {}
    chosen = {name: case for name, case in cases(shape).items() if not options.cases or name in options.cases}

    def both(function):
        def run(q, k, v, dout):
            out, pull = jax.vjp(function, q, k, v)
            return out, *pull(dout)

        return run if options.gradient else lambda q, k, v, _: function(q, k, v)

    for name, case in chosen.items():
        work = jax.jit(both(case.jtile))
        jax.block_until_ready(work(*arrays))
        works[f"jtile {name}"] = work, [tuple(arrays)]
    if options.torch:
        import torch

        given = [torch.randn(*shape[:], device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(4)]

        def torch_both(function):
            def run(q, k, v, dout):
                leaves = [x.detach().requires_grad_() for x in (q, k, v)]
                return torch.autograd.grad(function(*leaves), leaves, dout)

            return run if options.gradient else lambda q, k, v, _: function(q, k, v)

        for name, case in chosen.items():
            if case.torch is not None:
                work = torch_both(case.torch())
                timing.wait(work(*given))
                works[f"torch {name}"] = work, [tuple(given)]
    if options.compile_only:
        return
    seconds = timing.kernel_seconds(works, rounds=3, settle=0.05, timed=0.03)
    flops = (14 if options.gradient else 4) * shape.batch * shape.heads * shape.head_dim * BLOCK**2
    base = None
    print(f"{jax.devices()[0].device_kind}, {shape}, {'forward and backward' if options.gradient else 'forward'}")
    print("| case | blocks | jtile ms | TFLOP/s on them | over causal | FlexAttention ms | over it |")
    print("| --- " * 7 + "|")
    for name, case in chosen.items():
        left, time = blocks_left(case.left, shape.length), seconds[f"jtile {name}"]
        rate = flops * left / time / 1e12
        base = base or rate
        rival = seconds.get(f"torch {name}")
        text = f"{1e3 * rival:.3f} | {rival / time:.2f}" if rival else " | "
        print(f"| {name} | {left} | {1e3 * time:.3f} | {rate:.0f} | {rate / base:.2f} | {text} |", flush=True)


if __name__ == "__main__":
    main()
