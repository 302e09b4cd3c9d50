"""The kernels that JAX ships for Triton, `jax.experimental.pallas.ops.gpu`, unchanged."""

import dataclasses
import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import triton  # noqa: F401 (its lowering's table of primitives is compared with jtile's)

from jtile.compiler.interpret import interpret_pallas
from jtile.compiler.pallas import retarget_pallas
from jtile.compiler.rules import RULES
from jtile.compiler.schedule import SPILLS
from jtile.debugger import debug
from jtile.report import inspect

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from jax.experimental.pallas.ops.gpu import (
        attention,
        decode_attention,
        layer_norm,
        paged_attention,
        rms_norm,
        softmax,
    )


def test_every_primitive_that_jax_lowers_has_a_rule():
    from jax._src.pallas.triton.lowering import triton_lowering_rules

    assert {primitive.name for primitive in triton_lowering_rules} - set(RULES) == set()


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel, and what it computes.

    Attributes:
      small: the operands to run on a CPU: shapes and dtypes, for integers shapes and a bound.
      large: those to compile for and to run on a GPU, with the tile that is the kernel's default.
      differentiated: how many of the leading operands; their gradients have kernels.
    """

    kernel: Callable
    reference: Callable
    small: tuple
    large: tuple
    differentiated: int = 0

    def operands(self, shapes) -> list[jax.Array]:
        """Normally distributed; integers uniformly from 1, their largest first."""
        random, found = np.random.default_rng(0), []
        for shape, kind in shapes:
            if isinstance(kind, int):
                x = random.integers(1, kind, shape)
                x.flat[0] = kind - 1
                found.append(jnp.asarray(x, jnp.int32))
            else:
                found.append(jnp.asarray(random.standard_normal(shape), kind))
        return found

    def both(self, function: Callable) -> Callable:
        """The function's result, and the gradients of its sum weighted by a ramp, whose own sum is not near zero."""
        if not self.differentiated:
            return lambda *x: [function(*x)]

        def loss(*x):
            y = function(*x)
            return jnp.sum(y.astype(jnp.float32) * jnp.linspace(-1, 2, y.size).reshape(y.shape)), y

        def evaluate(*x):
            (_, y), gradients = jax.value_and_grad(loss, range(self.differentiated), has_aux=True)(*x)
            return [y, *gradients]

        return evaluate


f32, f16, bf16 = jnp.float32, jnp.float16, jnp.bfloat16


def mha(q, k, v, *segments, causal=False, **options):
    ids = segments[0] if segments else None
    return attention.mha(q, k, v, ids, sm_scale=q.shape[-1] ** -0.5, causal=causal, **options)


def mha_reference(q, k, v, *segments, causal=False):
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    return attention.mha_reference(
        q, k, v, segments[0] if segments else None, sm_scale=q.shape[-1] ** -0.5, causal=causal
    )


SMALL_BLOCKS = attention.BlockSizes(32, 32, 32, 32, 32, 32)


def small_mha(*operands, **options):
    return (
        mha(*operands, block_sizes=SMALL_BLOCKS, **options) if operands[0].dtype == f32 else mha(*operands, **options)
    )


def decode(function, reference, splits=4):
    return dict(
        kernel=lambda q, k, v, end: function(
            q, k, v, kv_seq_len=end, **({"k_splits": splits, "block_k": 16} if q.dtype == f32 else {})
        ),
        reference=lambda q, k, v, end: reference(*(x.astype(f32) for x in (q, k, v)), kv_seq_len=end),
    )


def paged(q, k_pages, v_pages, tables, lengths, **options):
    options |= {"k_splits": 2, "pages_per_compute_block": 2} if q.dtype == f32 else {}
    return paged_attention.paged_attention(q, k_pages, v_pages, tables, lengths, **options)


def paged_reference(q, k_pages, v_pages, tables, lengths, **options):
    gathered = (
        jnp.moveaxis(pages[:, tables], 0, 3).reshape(len(q), -1, *pages.shape[:1], pages.shape[-1]).astype(f32)
        for pages in (k_pages, v_pages)
    )
    return paged_attention.paged_attention_reference(q.astype(f32), *gathered, lengths, **options)


def normalised(module, name):
    """Layer norm and RMS norm, with what their references leave out: a batch."""
    return dict(
        kernel=getattr(module, name),
        reference=lambda x, scale, bias: getattr(module, f"{name}_reference")(
            x.astype(f32), scale.astype(f32), bias.astype(f32)
        ),
        small=(((2, 3, 80), f32), ((80,), f32), ((80,), f32)),
        large=(((8, 512, 1000), bf16), ((1000,), bf16), ((1000,), bf16)),
        differentiated=3,
    )


def heads(dtype, length, dim, batch=2, count=2):
    return (((batch, length, count, dim), dtype),) * 3


CASES = {
    "softmax": Case(
        softmax.softmax,
        lambda x: jax.nn.softmax(x.astype(f32)),
        small=(((2, 3, 80), f32),),
        large=(((8, 512, 1000), bf16),),
    ),
    "layer_norm": Case(**normalised(layer_norm, "layer_norm")),
    "rms_norm": Case(**normalised(rms_norm, "rms_norm")),
    "mha": Case(small_mha, mha_reference, small=heads(f32, 64, 16), large=heads(f16, 1024, 64), differentiated=3),
    "mha_causal": Case(
        functools.partial(small_mha, causal=True),
        functools.partial(mha_reference, causal=True),
        small=heads(f32, 64, 24),
        large=heads(bf16, 1024, 128),
        differentiated=3,
    ),
    "mha_segments": Case(
        small_mha,
        mha_reference,
        small=(*heads(f32, 64, 16), ((2, 64), 3)),
        large=(*heads(f16, 1024, 64), ((2, 1024), 3)),
        differentiated=3,
    ),
    "mqa": Case(
        **decode(decode_attention.mqa, decode_attention.mqa_reference),
        small=(((2, 4, 32), f32), ((2, 128, 32), f32), ((2, 128, 32), f32), ((2,), 129)),
        large=(((4, 16, 128), f16), ((4, 8192, 128), f16), ((4, 8192, 128), f16), ((4,), 8193)),
    ),
    "gqa": Case(
        **decode(decode_attention.gqa, decode_attention.gqa_reference),
        small=(((2, 4, 32), f32), ((2, 128, 2, 32), f32), ((2, 128, 2, 32), f32), ((2,), 129)),
        large=(((4, 32, 128), bf16), ((4, 4096, 8, 128), bf16), ((4, 4096, 8, 128), bf16), ((4,), 4097)),
    ),
    "paged": Case(
        paged,
        paged_reference,
        small=(((2, 4, 32), f32), *[((2, 16, 8, 32), f32)] * 2, ((2, 8), 16), ((2,), 65)),
        large=(((4, 32, 128), bf16), *[((8, 512, 16, 128), bf16)] * 2, ((4, 128), 512), ((4,), 2049)),
    ),
}


# The arrays are small: compiling is what takes time.
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def small_case(name):
    case = CASES[name]
    operands = case.operands(case.small)
    return case.both(case.kernel), operands, quickly(case.both(case.reference))(*operands)


@pytest.mark.parametrize("run", [lambda f: quickly(interpret_pallas(f)), debug], ids=["interpreted", "debug"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, run):
    """By Pallas' interpreter, and the generated source on the CPU."""
    function, operands, expected = small_case(name)
    for f, e in zip(run(function)(*operands), expected, strict=True):
        np.testing.assert_allclose(f, e, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_default_tiles_compile(name):
    case = CASES[name]
    shapes = [jax.ShapeDtypeStruct(s, jnp.int32 if isinstance(kind, int) else kind) for s, kind in case.large]
    reports = inspect(case.both(retarget_pallas(case.kernel)), *shapes)
    # Where tiles are too small for wgmma, a block more on a multiprocessor is worth some.
    allowed = {r.name: SPILLS if "mma.sync" in r.ptx else 0 for r in reports}
    assert reports and all(r.spill_bytes <= allowed[r.name] for r in reports)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_on_the_gpu(name):
    case = CASES[name]
    operands = case.operands(case.large)
    found = jax.jit(case.both(retarget_pallas(case.kernel)))(*operands)
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(case.both(case.reference))(*operands)
    for f, e in zip(found, expected, strict=True):
        f, e = np.asarray(f, np.float64), np.asarray(e, np.float64)
        # A few roundings of the widest intermediate, in the operands' type of 8 bits of mantissa or more.
        assert np.linalg.norm(f - e) <= 2**-6 * np.linalg.norm(e)
