"""The norms' backward kernel for wide rows, by NumPy and on a GPU, against the reference."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jtile
from jtile.compiler.target import Target
from jtile.ops.norm import family, wide, wide_kernel
from tests.ops import gluon_on_cpu

VARIANTS = [v for v in itertools.product([False, True], repeat=3) if v[0] or not v[2]]  # centred, residual, biased


def operands(n, d, centred, residual):
    random = np.random.default_rng(0)
    matrix = lambda: random.standard_normal((n, d)).astype(ml_dtypes.bfloat16)  # noqa: E731
    given = {"x": matrix(), "scale": random.standard_normal(d).astype(np.float32), "dy": matrix()}
    given["rstd"] = random.uniform(0.5, 2, n).astype(np.float32)
    if centred:
        given["mean"] = random.standard_normal(n).astype(np.float32)
    return given | ({"dh": matrix()} if residual else {})


def check(actual, given, biased):
    expected = family._gradients(jax.tree.map(jnp.asarray, given), biased, False)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        a, b = (np.asarray(x, np.float32) for x in (actual[name], value))
        # dx is rounded to bfloat16; sums over rows are float32's, in another order.
        np.testing.assert_allclose(a, b, rtol=2**-7 if name == "dx" else 1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("slots, d", [(2, 128), (2, 104), (3, 96)])
@pytest.mark.parametrize("centred, residual, biased", VARIANTS)
def test_by_numpy(centred, residual, biased, slots, d):
    """7 rows for 3 programs; the last part of a row is ragged, or empty."""
    given = operands(7, d, centred, residual)
    out = {"dx": np.zeros((7, d), ml_dtypes.bfloat16), "dscale": np.zeros((3, d), np.float32)}
    out |= {"dbias": np.zeros((3, d), np.float32)} if biased else {}
    pointers = {name: gluon_on_cpu.Pointer(x.reshape(-1)) for name, x in (given | out).items()}
    names = ("x", "scale", "rstd", "mean", "dy", "dh", "dx", "dscale", "dbias")
    kernel = gluon_on_cpu.load(wide_kernel)["wide_backward"]
    options = wide.Wide(7, d, 4, 32, slots, centred, residual, biased)
    gluon_on_cpu.run(kernel, 3, *(pointers.get(name) for name in names), options)
    check(out | {name: out[name].sum(0) for name in out if name != "dx"}, given, biased)


@pytest.mark.parametrize("centred, residual, biased", VARIANTS)
def test_compiles(centred, residual, biased):
    """For each generation."""
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), operands(1, 16384, centred, residual))
    for chip in ("NVIDIA A100", "NVIDIA H200", "NVIDIA B200"):
        target = Target.named(chip)
        tile = next(wide.tiles(given, biased, target))
        kernel, _ = jtile.inspect(
            lambda given, tile=tile: wide.backward("backward", given, biased, tile), given, target=target
        )
        assert kernel.spill_bytes <= (32 if biased and chip == "NVIDIA B200" else 0)
        assert kernel.instructions["cp.async.cg.shared.global"] >= 8


@pytest.mark.gpu
@pytest.mark.parametrize("d", [16384, 12288, 8200])
@pytest.mark.parametrize("centred, residual, biased", VARIANTS)
def test_on_a_gpu(centred, residual, biased, d):
    given = operands(1000, d, centred, residual)
    for tile in wide.tiles(given, biased, Target.current()):
        out = jax.jit(lambda given, tile=tile: wide.backward("backward", given, biased, tile))(given)
        check(out, given, biased)
