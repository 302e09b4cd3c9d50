"""Variants of attention's schedule for Hopper beside cuDNN and tokamax: TFLOP/s, causal counts half; and errors."""

import functools
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from bench import trace
from jtile.ops.attention import hopper
from jtile.tuning import timing

jax.config.update("jax_compilation_cache_dir", os.environ.get("XLA_CACHE"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
START = time.perf_counter()
BUDGET = float(os.environ.get("BUDGET", "80"))
B, F = hopper.BackwardTile, hopper.ForwardTile


def flops(shape, causal):
    b, s, h, d = shape
    return 4 * b * h * s * s * d / (2 if causal else 1)


def inputs(shape, sets):
    make = jax.jit(lambda key: [jax.random.normal(k, shape, jnp.bfloat16) for k in jax.random.split(key, 4)])
    return [tuple(make(jax.random.key(i))) for i in range(sets)]


def band(causal):
    return dict(low=None, high=0 if causal else None)


def forward(tile, causal, scale):
    def run(q, k, v, *_):
        return hopper.forward(q, k, v, jnp.int32(0) if causal else None, tile=tile, scale=scale, **band(causal))

    return run


def backward(tile, causal, scale):
    def run(q, k, v, do, out, lse):
        origin = jnp.int32(0) if causal else None
        return hopper.backward(q, k, v, origin, out, lse, do, None, tile=tile, scale=scale, **band(causal))

    return run


def both(forward_tile, backward_tile, causal, scale):
    def run(q, k, v, do):
        out, lse = forward(forward_tile, causal, scale)(q, k, v)
        return (out, *backward(backward_tile, causal, scale)(q, k, v, do, out, lse))

    return run


def of_vjp(function):
    def run(q, k, v, do):
        out, vjp = jax.vjp(function, q, k, v)
        return (out, *vjp(do))

    return run


def cudnn(causal):
    return functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")


def mosaic(causal):
    from bench.rivals import _tokamax

    return functools.partial(_tokamax().dot_product_attention, is_causal=causal, implementation="mosaic")


def error(got, wanted):
    """The largest difference, as a share of the largest number."""
    far = [
        jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))
        for a, b in zip(*([x.astype(jnp.float32) for x in xs] for xs in (got, wanted)), strict=True)
    ]
    return [round(float(x), 4) for x in far]


def profile(function, arguments, calls=3):
    with tempfile.TemporaryDirectory() as folder:
        with trace.recording(Path(folder)):
            for _ in range(calls):
                jax.block_until_ready(function(*arguments))
        return {n[:40]: round(t / calls * 1e6, 1) for n, (t, _) in trace.read(Path(folder)).shares().items()}


def measure(shape, causal, forwards, backwards, *, rivals=True, warm_only=False, profiled=(), turns=2):
    scale = shape[-1] ** -0.5
    one = 2 * 4 * shape[0] * shape[1] * shape[2] * shape[3]
    sets = (
        inputs(shape, max(1, min(3, int(2e8 // one) + 1)))
        if not warm_only
        else [(jax.ShapeDtypeStruct(shape, jnp.bfloat16),) * 4]
    )
    title = f"{shape} {'causal' if causal else 'full'}"
    functions = {"cuDNN f": (cudnn(causal), "f"), "cuDNN fb": (of_vjp(cudnn(causal)), "fb")}
    if rivals:
        functions |= {"mosaic f": (mosaic(causal), "f"), "mosaic fb": (of_vjp(mosaic(causal)), "fb")}
    functions |= {f"f {n}": (forward(t, causal, scale), "f") for n, t in forwards.items()}
    first = next(iter(forwards.values()), None)
    for n, t in backwards.items():
        functions[f"b {n}"] = backward(t, causal, scale), "b"
    for n, t in backwards.items():
        if not n.endswith("..."):
            continue
        functions[f"fb {n}"] = both(first, t, causal, scale), "fb"
    wanted, works, notes = None, {}, {}
    residuals = None
    for name, (function, which) in functions.items():
        jitted = jax.jit(function)
        try:
            if which == "b":
                if warm_only:
                    residuals = [(sets[0][0], jax.ShapeDtypeStruct(sets[0][0].shape[:3], jnp.float32))] * len(sets)
                residuals = residuals or [jax.jit(forward(first, causal, scale))(*x[:3]) for x in sets]
                given = [(*x, *r) for x, r in zip(sets, residuals, strict=True)]
            else:
                given = [x[:3] for x in sets] if which == "f" else sets
            if warm_only:
                jitted.lower(*given[0]).compile()
                continue
            out = jax.block_until_ready(jitted(*given[0]))
            if name == "cuDNN fb":
                wanted = out
            if wanted is not None and name != "cuDNN fb":
                got = out[:1] if name.startswith("f ") else out
                compared = {"f": wanted[:1], "b": wanted[1:], "fb": wanted}[which]
                got = (got,) if isinstance(got, jax.Array) else got
                notes[name] = error(got, compared)
                again = jitted(*given[0])
                pairs = zip(jax.tree.leaves(out), jax.tree.leaves(again), strict=True)
                if not all(bool(jnp.all(a == b)) for a, b in pairs):
                    notes[name].append("bits differ")
            works[name] = jitted, given
        except Exception as failure:
            print(title, name, "fails:", type(failure).__name__, str(failure)[:300].replace("\n", " "), flush=True)
    if warm_only:
        return
    times = {name: [] for name in works}
    for turn in range(turns):
        for name, work in timing.in_turn(works, turn):
            calls = timing.run(*work, least=0.03, at_once=4, wait=jax.block_until_ready)
            at_once = max(1, min(20, int(0.04 / calls)))
            times[name].append(timing.run(*work, least=0.03, at_once=at_once, wait=jax.block_until_ready))
    rate = {}
    for name in works:
        factor = {"f": 1, "b": 2.5, "fb": 3.5}[functions[name][1]]
        rate[name] = factor * flops(shape, causal) / min(times[name]) / 1e12
    base = {"f": rate.get("cuDNN f", 0), "fb": rate.get("cuDNN fb", 0)}
    if base["f"] and base["fb"]:
        base["b"] = 2.5 / (3.5 / base["fb"] - 1 / base["f"])
    print(f"== {title} [{time.perf_counter() - START:.0f} s]  cuDNN b (by subtraction) {base.get('b', 0):.0f}")
    for name, r in rate.items():
        share = r / base[functions[name][1]] if base.get(functions[name][1]) else 0
        print(f"{name:34s} {r:6.0f}  {share:5.3f}  {min(times[name]) * 1e6:8.0f} us  {notes.get(name, '')}", flush=True)
    for name in profiled:
        if name in works:
            print("   kernels of", name, json.dumps(profile(works[name][0], works[name][1][0])), flush=True)


def plan():
    """What is measured, the most wanted first. Of the backward kernels named "..." both passes together too."""
    one = dict(dq_slots=1, adders=1)

    def b(block_q, t, *others):
        return {
            "new...": B(block_q, 2, t),
            "no carry": B(block_q, 2, t, carry=False),
            "1 slot": B(block_q, 2, t, **one),
            "1 adder": B(block_q, 2, t, adders=1),
            "unordered": B(block_q, 2, t, ordered=False),
        } | {f"t={n}": B(block_q, 2, n) for n in others}

    def f(groups, block_k, stages, ts, ps):
        return {f"{groups} {stages} t={t} p={p}": F(groups, block_k, stages, t, p) for t in ts for p in ps}

    few = lambda d: {n: d[n] for n in d if n in ("new...", "unordered") or n[0] == "t"}  # noqa: E731
    quiet = dict(rivals=False)
    seen = dict(profiled=("fb new...",), rivals=False)
    yield (4, 4096, 16, 128), True, f(2, 128, 2, (15, 8, 4), (0,)), b(64, 15, 8), seen
    yield (4, 4096, 16, 128), False, f(2, 128, 2, (15, 8, 4, 2), (132,)) | f(2, 128, 2, (4,), (0,)), b(64, 7, 14), quiet
    yield (2, 4096, 8, 256), True, f(2, 64, 2, (7, 4), (132,)), {"new...": B(64, 2, 14), "t=7": B(64, 2, 7)}, seen
    yield (2, 4096, 8, 256), False, f(2, 64, 2, (7, 4), (0,)), {"new...": B(64, 2, 7), "t=3": B(64, 2, 3)}, seen
    hd64 = f(2, 128, 2, (30, 15), (0, 132)) | f(3, 128, 2, (15, 30), (132,))
    hd64 |= {f"128 rows p={p}": F(2, 64, 4, 30, p, 128) for p in (0, 132)}
    yield (4, 4096, 32, 64), True, hd64, b(128, 30, 15), quiet
    yield (
        (4, 4096, 32, 64),
        False,
        f(3, 128, 2, (30, 15, 8), (0,)) | {"128 rows": F(2, 64, 4, 30, 0, 128)},
        b(128, 15, 8),
        quiet,
    )
    yield (16, 1024, 16, 128), True, f(2, 128, 2, (60, 30), (0, 132)), few(b(64, 60, 30, 16)), seen
    yield (1, 16384, 16, 128), True, f(2, 128, 2, (3, 2), (0,)), few(b(64, 3, 2, 1)), {}
    yield (1, 16384, 16, 128), False, f(2, 128, 2, (3, 2), (132,)), few(b(64, 1, 2, 3)), {}
    yield (1, 65536, 4, 128), True, f(2, 128, 2, (1,), (0,)), few(b(64, 1, 2)), {}


if __name__ == "__main__":
    chosen = list(plan())
    warm = len(sys.argv) > 1 and sys.argv[1] == "warm"
    if warm:
        number = int(sys.argv[2])
        chosen = chosen[number : number + 1]
    for shape, causal, forwards, backwards, options in chosen:
        if time.perf_counter() - START > BUDGET:
            print("no time for", shape, causal)
            continue
        measure(shape, causal, forwards, backwards, warm_only=warm, **options)
