"""jtile's own operations for kernels: what they refuse, and that JAX's backend for Triton is not needed."""

import inspect
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

import jtile
from jtile.compiler.kernel import UnsupportedKernel
from jtile.compiler.primitives import ATOMIC_TYPES
from jtile.debugger import debug
from tests.compiler.kernels import sources
from tests.compiler.test_emit import call, source

ROOT = pathlib.Path(__file__).parent.parent.parent
X = np.arange(16, dtype=np.float32)


def run(body, x=X, **options):
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...]
        body(x_ref, y_ref)

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), **options)


def test_names_are_those_of_jax():
    """So that a kernel needs no more than another import."""
    functions = {n for n, f in vars(plgpu).items() if inspect.isfunction(f) and "gpu" not in n}
    assert functions - set(jtile.__all__) == set()
    for name in functions:
        theirs, ours = (list(inspect.signature(getattr(module, name)).parameters) for module in (plgpu, jtile))
        assert ours[1:] == theirs[1:], name


HINTS = {
    "cache_modifier='.cg'": dict(cache_modifier=".cg"),
    "eviction_policy='evict_first'": dict(eviction_policy="evict_first"),
    "volatile=True": dict(volatile=True),
}


@pytest.mark.parametrize("text", HINTS)
def test_hints_of_loads(text):
    assert text in source(run(lambda x_ref, y_ref: y_ref.__setitem__(..., jtile.load(x_ref, **HINTS[text]))), X)


def test_hints_of_stores():
    text = source(run(lambda x_ref, y_ref: jtile.store(y_ref, x_ref[...], eviction_policy="evict_last")), X)
    assert "tl.store(y_ref + lanes_16, x_2, eviction_policy='evict_last')" in text


def test_hints_of_values():
    def body(x_ref, y_ref):
        i = jtile.max_contiguous(pl.multiple_of(jnp.arange(16), 8), 16)
        y_ref[...] = x_ref[i]

    text = source(run(body), X)
    assert "hint_1 = tl.multiple_of(lanes_16, [8])" in text and "hint_2 = tl.max_contiguous(hint_1, [16])" in text


def test_assembly():
    def body(x_ref, y_ref):
        x = x_ref[...]
        both, _ = jtile.elementwise_inline_asm(
            "add.f32 $0, $2, $3; sub.f32 $1, $2, $3;",
            args=[x, x],
            constraints="=f,=f,f,f",
            pack=1,
            result_shape_dtypes=[jax.typeof(x), jax.typeof(x)],
        )
        y_ref[...] = both + jtile.approx_tanh(x) + jtile.approx_exp2(x)
        jtile.debug_barrier()

    [report] = jtile.inspect(run(body, compiler_params=jtile.CompilerParams()), X)
    assert "asm_1, asm_2 = tl.inline_asm_elementwise(" in report.source
    assert "sub.f32" in report.ptx and "tanh.approx.f32" in report.ptx and "bar.sync" in report.ptx
    assert "ex2.approx.ftz.f32" in report.ptx


APPROXIMATE = {jtile.approx_tanh: jnp.tanh, jtile.approx_exp2: jnp.exp2}


@pytest.mark.parametrize("function", APPROXIMATE)
def test_approximate_functions_are_exact_elsewhere(function):
    body = lambda x_ref, y_ref: y_ref.__setitem__(..., jax.vmap(function)(x_ref[...]))  # noqa: E731
    expected = APPROXIMATE[function](X)
    np.testing.assert_array_equal(run(body, interpret=True)(X), expected)
    np.testing.assert_allclose(debug(run(body))(X), expected, rtol=1e-6)


def test_derivative_of_approx_exp2():
    expected = jax.grad(jnp.exp2)(1.5)
    np.testing.assert_allclose(jax.grad(jtile.approx_exp2)(jnp.float32(1.5)), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(jtile.approx_exp2, [jnp.float32(1.5)], [jnp.float32(1)])[1], expected, rtol=1e-6)
    with pytest.raises(TypeError, match="approx_exp2: float32 is needed, not bfloat16"):
        jtile.approx_exp2(jnp.ones(2, jnp.bfloat16))


@pytest.mark.parametrize("operation", ATOMIC_TYPES)
def test_atomics_that_the_hardware_lacks(operation):
    x = np.zeros(16, np.int16)
    arguments = (0, 1) if operation == "cas" else (..., 1)
    with pytest.raises(TypeError, match=f"atomic_{operation}: the hardware has none for int16, only for int32"):
        sources(run(lambda _, y_ref: getattr(jtile, f"atomic_{operation}")(y_ref, *arguments), x), x)


def test_atomics_do_not_convert():
    with pytest.raises(TypeError, match="a value of type int32 for a ref of float32. Convert the value"):
        sources(run(lambda _, y_ref: jtile.atomic_add(y_ref, ..., jnp.arange(16))), X)


def test_compare_and_swap_outside_of_the_array():
    spec = pl.BlockSpec((16,), lambda i: (i,))
    body = lambda _, y_ref: jtile.atomic_cas(y_ref, 0, 1)  # noqa: E731
    with pytest.raises(UnsupportedKernel, match="compare-and-swap has no mask, and y_ref.*powers? of two"):
        sources(run(body, np.zeros(20, np.int32), grid=(2,), in_specs=[spec], out_specs=spec), np.zeros(20, np.int32))


def test_other_needs_a_mask():
    with pytest.raises(ValueError, match="there is no mask"):
        sources(run(lambda x_ref, _: jtile.load(x_ref, other=1.0)), X)


def test_products_that_are_none():
    with pytest.raises(ValueError, match=r"matrices; these have shapes \(4,\) and \(4, 4\)"):
        jtile.dot(jnp.ones(4), jnp.ones((4, 4)))
    with pytest.raises(ValueError, match="allow_tf32=True and precision='highest' say the same"):
        jtile.dot(jnp.ones((4, 4)), jnp.ones((4, 4)), allow_tf32=True, precision="highest")


@pytest.mark.parametrize("allow_tf32, expected", [(None, "tf32"), (True, "tf32"), (False, "ieee")])
def test_precision_of_products(allow_tf32, expected):
    def kernel(a_ref, o_ref):
        o_ref[...] = jtile.dot(a_ref[...], a_ref[...], allow_tf32=allow_tf32)

    text = source(call(kernel, (16, 16)), np.zeros((16, 16), "f"))
    assert f'input_precision="{expected}"' in text


def test_the_source_names_the_kernel_s_lines():
    def kernel(x_ref, y_ref):
        jtile.store(y_ref, jtile.approx_tanh(jtile.load(x_ref)))

    [found] = sources(call(kernel, (16,)), X)
    assert set(re.findall(r"# (\S+):\d+:", found.annotated)) == {"test_primitives.py"}


def test_an_op_of_these_maps():
    """`jax.vmap` gives each call its own part of what is changed."""

    def total(x):
        def kernel(x_ref, _, y_ref):
            jtile.atomic_add(y_ref, 0, jnp.sum(jtile.load(x_ref)))

        block, one = pl.BlockSpec((4,), lambda i: (i,)), pl.BlockSpec((1,), lambda i: (0,))
        return pl.pallas_call(
            kernel,
            grid=(4,),
            in_specs=[block, one],
            out_specs=one,
            out_shape=jax.ShapeDtypeStruct((1,), x.dtype),
            input_output_aliases={1: 0},
        )(x, jnp.zeros(1, x.dtype))

    xs = jnp.arange(96.0).reshape(2, 3, 16)
    for way in (jtile.interpret_pallas, debug):
        np.testing.assert_array_equal(way(jax.vmap(jax.vmap(total)))(xs), jnp.sum(xs, -1, keepdims=True))


WITHOUT_THE_BACKEND = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("jax._src.pallas.triton", "jax.experimental.pallas.triton", "jax._src.pallas.mosaic_gpu")):
            raise ImportError(f"{name} is no more")

sys.meta_path.insert(0, Blocked())

import jax, jax.numpy as jnp, numpy as np
from jax.experimental import pallas as pl
import jtile

def kernel(x_ref, _, y_ref, total_ref):
    x = jtile.load(x_ref, mask=x_ref[...] > 0, other=0.0)
    jtile.store(y_ref, jtile.dot(x, x.T) + jtile.approx_tanh(x), mask=x >= 0)
    jtile.atomic_add(total_ref, 0, jnp.sum(x))
    jtile.debug_barrier()

def f(x):
    block, one = pl.BlockSpec((16, 16), lambda i: (i, 0)), pl.BlockSpec((1,), lambda i: (0,))
    return pl.pallas_call(
        kernel, grid=(2,), in_specs=[block, one], out_specs=[block, one], input_output_aliases={1: 1},
        out_shape=[jax.typeof(x), jax.ShapeDtypeStruct((1,), x.dtype)], compiler_params=jtile.CompilerParams(),
    )(x, jnp.zeros(1))

x = jnp.asarray(np.random.default_rng(0).random((32, 16)), jnp.float32)
expected = jnp.concatenate([p @ p.T + jnp.tanh(p) for p in (x[:16], x[16:])])
y, total = jtile.interpret_pallas(f)(x)
np.testing.assert_allclose(y, expected, rtol=1e-5)
np.testing.assert_allclose(total[0], x.sum(), rtol=1e-5)

scale = jnp.ones(16)
y = jtile.rms_norm(x, scale, implementation="interpret")
np.testing.assert_allclose(y, jtile.rms_norm(x, scale), rtol=1e-5, atol=1e-6)

kernels = jtile.inspect(lambda x: (f(x), jax.grad(lambda x: jtile.rms_norm(x, scale).sum())(x)), x)
print(sorted(k.name for k in kernels))

# JAX's own kernels import the module that is no more. This line is all that they need.
sys.modules["jax.experimental.pallas.triton"] = jtile

from tests.compiler import test_upstream as upstream

for name in upstream.CASES:
    upstream.test_values_and_gradients(name, jtile.debug)
upstream.test_default_tiles_compile("softmax")
"""


def test_without_jax_s_backend():
    """When JAX has dropped it: kernels lower, compile for Hopper and are interpreted, jtile's ops among them. Those of
    `jax.experimental.pallas.ops.gpu` run as they are, with jtile in the place of the module that they import."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_THE_BACKEND],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "'kernel'" in done.stdout and len(eval(done.stdout)) >= 3
