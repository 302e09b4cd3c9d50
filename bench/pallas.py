"""Pallas kernels through jtile against the same kernels through JAX's own Triton backend.

The kernels are those of `jax.experimental.pallas.ops.gpu` at their default tiles, and a matrix product.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

import jtile
from jtile.tuning.timing import seconds

warnings.filterwarnings("ignore", category=DeprecationWarning)

from jax.experimental.pallas.ops.gpu import (  # noqa: E402
    attention,
    decode_attention,
    layer_norm,
    paged_attention,
    rms_norm,
    softmax,
)

BF16 = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    function: Callable
    operands: Callable[[jax.Array], tuple]
    backward: bool = False  # measure the pullback alone
    products: bool = False  # a kernel of matrix products


def normal(*shapes, dtype=BF16):
    return lambda key: tuple(
        jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, len(shapes)), shapes, strict=True)
    )


def matmul(a, b, *, block=(128, 256, 64), group=16, num_warps=8, num_stages=4):
    """One program per tile of the result, in groups of rows so that what they read stays in the second-level cache."""
    (m, k), n = a.shape, b.shape[1]
    block_m, block_n, block_k = block
    rows, columns = m // block_m, n // block_n

    def place(i):
        first = i // (group * columns) * group
        return first + i % group, i % (group * columns) // group

    def kernel(a_ref, b_ref, c_ref):
        def body(i, acc):
            here = pl.ds(i * block_k, block_k)
            return acc + jnp.dot(a_ref[:, here], b_ref[here, :], preferred_element_type=jnp.float32)

        acc = jax.lax.fori_loop(0, k // block_k, body, jnp.zeros((block_m, block_n), jnp.float32))
        c_ref[...] = acc.astype(c_ref.dtype)

    return pl.pallas_call(
        kernel,
        grid=(rows * columns,),
        in_specs=[
            pl.BlockSpec((block_m, k), lambda i: (place(i)[0], 0)),
            pl.BlockSpec((k, block_n), lambda i: (0, place(i)[1])),
        ],
        out_specs=pl.BlockSpec((block_m, block_n), place),
        out_shape=jax.ShapeDtypeStruct((m, n), a.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
    )(a, b)


def mha(causal):
    return lambda q, k, v: attention.mha(q, k, v, None, 1 / math.sqrt(q.shape[-1]), causal)


def paged(key, batch=64, heads=32, key_heads=8, pages=256, page_size=16, head_dim=128):
    keys = jax.random.split(key, 4)
    shape = (key_heads, batch * pages, page_size, head_dim)
    tables = jax.random.permutation(keys[3], batch * pages).reshape(batch, pages).astype(jnp.int32)
    lengths = jnp.full((batch,), pages * page_size, jnp.int32)
    q = jax.random.normal(keys[0], (batch, heads, head_dim), BF16)
    return q, jax.random.normal(keys[1], shape, BF16), jax.random.normal(keys[2], shape, BF16), tables, lengths


def attention_cases(batch, sequence, heads, head_dim, causal):
    operands = normal(*[(batch, sequence, heads, head_dim)] * 3)
    name = f"{batch}×{sequence}×{heads}×{head_dim}{' causal' * causal}"
    yield Case(f"attention forward {name}", mha(causal), operands, products=True)
    yield Case(f"attention backward {name}", mha(causal), operands, backward=True, products=True)


def norm_cases(name, function, rows, width):
    def operands(key):
        return jax.random.normal(key, (1, rows, width), BF16), jnp.ones(width, BF16), jnp.zeros(width, BF16)

    yield Case(f"{name} forward {rows}×{width}", function, operands)
    yield Case(f"{name} backward {rows}×{width}", function, operands, backward=True)


CASES = [
    *attention_cases(4, 4096, 16, 128, True),
    *attention_cases(4, 4096, 16, 128, False),
    *attention_cases(4, 4096, 32, 64, True),
    Case(
        "decode attention 64×16×128, 8192 keys",
        decode_attention.mqa,
        normal((64, 16, 128), (64, 8192, 128), (64, 8192, 128)),
        products=True,
    ),
    Case(
        "decode attention 64×32/8×128, 4096 keys",
        decode_attention.gqa,
        normal((64, 32, 128), (64, 4096, 8, 128), (64, 4096, 8, 128)),
        products=True,
    ),
    Case("paged attention 64×32/8×128, 4096 keys", paged_attention.paged_attention, paged, products=True),
    *norm_cases("layer norm", layer_norm.layer_norm, 16384, 8192),
    *norm_cases("RMS norm", rms_norm.rms_norm, 16384, 8192),
    Case("softmax 16384×8192", softmax.softmax, normal((16384, 8192))),
    *(Case(f"matmul {n}³", matmul, normal((n, n), (n, n)), products=True) for n in (4096, 8192)),
]


# How jtile compiles: as the kernel was written, and with what it chooses itself.
VARIANTS: dict[str, Callable[[Callable], Callable]] = {
    "JAX": lambda f: f,
    "as written": functools.partial(jtile.retarget_pallas, tma=False, warp_specialize=False),
    "jtile": jtile.retarget_pallas,
}


def measure(case: Case) -> list[dict]:
    """The time of every variant, and how far its results are from those of JAX's backend."""
    first = case.operands(jax.random.key(0))
    count = max(2, math.ceil((256 << 20) / sum(x.nbytes for x in first)))
    sets = [first, *(case.operands(jax.random.key(i)) for i in range(1, count))]
    variants = VARIANTS | ({"cuBLAS": lambda _: jnp.dot} if case.function is matmul else {})
    work = {name: _work(case, change(case.function), sets) for name, change in variants.items()}
    results = {name: function(*inputs[0]) for name, (function, inputs) in work.items()}
    errors = {name: _difference(result, results["JAX"]) for name, result in results.items()}
    del results
    times = seconds(work)
    return [
        {
            "case": case.name,
            "rival": name,
            "seconds": time,
            "speed-up": times["JAX"] / time,
            "difference": errors[name],
            "products": case.products,
        }
        for name, time in times.items()
    ]


def _work(case: Case, function: Callable, sets: list[tuple]) -> tuple[Callable, list[tuple]]:
    """What is timed: a function and its inputs."""
    if not case.backward:
        return jax.jit(function), sets
    out_and_pull = jax.jit(functools.partial(jax.vjp, function))
    pulls = (out_and_pull(*operands) for operands in sets)
    inputs = [(pull, jax.random.normal(jax.random.key(7), y.shape, y.dtype)) for y, pull in pulls]
    return jax.jit(lambda pull, cotangent: pull(cotangent)), inputs


def _difference(got, reference) -> float:
    """The largest ‖got − reference‖ / ‖reference‖ of the results."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(reference), strict=True)
    pairs = ((a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in pairs if jnp.issubdtype(a.dtype, jnp.floating))
    return max(float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())) for a, b in pairs)


def show(rows: list[dict]) -> str:
    """One case's measurements."""
    times = "  ".join(f"{r['rival']} {r['seconds'] * 1e3:.3f} ms ({r['speed-up']:.3f})" for r in rows)
    return f"{rows[0]['case']:44s} {times}  difference {max(r['difference'] for r in rows):.1e}"


def summary(rows: list[dict]) -> str:
    """Geometric means and worst cases of the speed-ups over JAX's backend."""
    lines = []
    for name, chosen in (
        ("as written, all kernels", [r for r in rows if r["rival"] == "as written"]),
        ("jtile's choice, all kernels", [r for r in rows if r["rival"] == "jtile"]),
        ("jtile's choice, attention and matmul", [r for r in rows if r["rival"] == "jtile" and r["products"]]),
    ):
        if chosen:
            mean = math.exp(sum(math.log(r["speed-up"]) for r in chosen) / len(chosen))
            worst = min(chosen, key=lambda r: r["speed-up"])
            lines.append(f"{name}: {mean:.3f} (worst {worst['speed-up']:.3f}: {worst['case']})")
    return "\n".join(lines)


def table(rows: list[dict]) -> str:
    """The measurements as Markdown, and their summary."""
    rivals = list(dict.fromkeys(r["rival"] for r in rows))
    heads = {
        "JAX": "JAX's backend",
        "as written": "jtile, as written",
        "jtile": "jtile, its choice",
        "cuBLAS": "cuBLAS",
    }
    lines = [f"| kernel | {' | '.join(heads[name] for name in rivals)} |", "| --- |" + " --- |" * len(rivals)]
    for case in dict.fromkeys(r["case"] for r in rows):
        times = {r["rival"]: r for r in rows if r["case"] == case}
        cells = (f"{t['seconds'] * 1e3:.3f} ms ({t['speed-up']:.2f})" if t else "" for t in map(times.get, rivals))
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", "Geometric means of the speed-ups:", "", *(f"- {s}" for s in summary(rows).splitlines())]
    )
