import re
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from jtile import CompilerParams, TileOp, inspect
from jtile.compiler.target import Target
from jtile.op.lowering import FallbackWarning


def make_op(name="scaled", seen=None):
    """y = factor · x (+ shift), whose kernel adds 100 so that tests can tell who ran."""
    op = TileOp(name, "x: ... d, shift?: ... d -> y: ... d, shifted?: ...")

    @op.reference
    def reference(x, shift, *, factor=2.0):
        y = factor * x if shift is None else factor * x + shift
        return y, None if shift is None else jnp.sum(y, axis=-1)

    @op.kernel
    def kernel(x, shift, *, factor=2.0):
        if seen is not None:
            seen.append((x, shift, factor))

        def scaled(x_ref, y_ref):
            y_ref[...] = factor * x_ref[...] + 100

        y = pl.pallas_call(scaled, x, compiler_params=CompilerParams(), name=name)(x)
        return y, None if shift is None else jnp.sum(y, axis=-1)

    return op


def lower_for_gpu(function, *operands):
    with jax.sharding.use_abstract_mesh(Target.named("NVIDIA H200").abstract_mesh):
        return jax.jit(lambda *x: function(*x)).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


KERNEL = "triton_kernel_call"
X = jnp.arange(24.0).reshape(2, 3, 4)


def raises(error, message):
    return pytest.raises(error, match=rf"^{re.escape(message)}(\n|$)")


@pytest.mark.parametrize("implementation, offset", [(None, 0), ("xla", 0), ("interpret", 100)])
def test_choice_on_cpu(implementation, offset):
    y, _ = make_op()(X, None, implementation=implementation)
    assert jnp.array_equal(y, 2 * X + offset)


@pytest.mark.parametrize(
    "implementation, launched", [(None, True), ("triton", True), ("xla", False), ("interpret", False)]
)
def test_choice_on_gpu(implementation, launched):
    op = make_op()
    text = lower_for_gpu(lambda x: op(x, None, implementation=implementation)[0], X)
    assert (KERNEL in text) == launched


def test_kernel_gets_one_leading_dimension_and_none_for_what_is_absent():
    seen = []
    y, shifted = make_op(seen=seen)(X, None, factor=3.0, implementation="interpret")
    [(x, shift, factor)] = seen
    assert x.shape == (6, 4) and shift is None and factor == 3.0
    assert y.shape == X.shape and shifted is None
    y, shifted = make_op(seen=seen)(X[0, 0], X[0, 0], implementation="interpret")
    assert seen[1][0].shape == seen[1][1].shape == (1, 4)
    assert y.shape == (4,) and shifted.shape == ()


def test_triton_on_cpu_says_why_not():
    with raises(
        NotImplementedError,
        "scaled: implementation='triton' cannot serve this call: kernels run on NVIDIA GPUs, and this is lowered for "
        "cpu",
    ):
        make_op()(X, None, implementation="triton")


def test_dtype_without_kernel():
    with jax.enable_x64(True):
        x = X.astype(jnp.float64)
        with raises(
            NotImplementedError,
            "scaled: implementation='interpret' cannot serve this call: `x` is float64, and kernels take float32, "
            "bfloat16, float16",
        ):
            make_op()(x, None, implementation="interpret")
        y, _ = make_op()(x, None)
        assert y.dtype == jnp.float64


def test_op_without_kernel():
    op = TileOp("plain", "x: ... -> y: ...")
    op.reference(lambda x: (x,))
    with raises(NotImplementedError, "plain: implementation='interpret' cannot serve this call: the op has no kernel"):
        op(X, implementation="interpret")
    with warnings.catch_warnings(action="error"):
        lower_for_gpu(lambda x: op(x)[0], X)


def test_limits():
    op, limited = make_op(), []

    @op.limits
    def limits(x, shift, *, factor):
        limited.append((x, shift, factor))
        return f"its factor is {factor}, not 2" if factor != 2 else None

    assert op(X, X, implementation="interpret")[0][0, 0, 0] == 100
    assert limited == [(jax.ShapeDtypeStruct((6, 4), X.dtype),) * 2 + (2.0,)]
    with raises(
        NotImplementedError, "scaled: implementation='interpret' cannot serve this call: its factor is 3.0, not 2"
    ):
        op(X, None, factor=3.0, implementation="interpret")


def test_fallback_on_gpu_warns_once():
    op = make_op("limited")
    op.limits(lambda x, shift, *, factor: "it is Monday")
    function = lambda x: op(x, None)[0]  # noqa: E731
    message = (
        "limited runs its reference on the GPU: it is Monday. implementation='xla' asks for it without this warning"
    )
    with pytest.warns(FallbackWarning, match=f"^{re.escape(message)}$"):
        assert KERNEL not in lower_for_gpu(function, X)
    with warnings.catch_warnings(action="error"):
        lower_for_gpu(function, X)
        function(X)


def test_reference_asked_for_does_not_warn():
    op = make_op()
    op.limits(lambda x, shift, *, factor: "it is Tuesday")
    with warnings.catch_warnings(action="error"):
        lower_for_gpu(lambda x: op(x, None, implementation="xla")[0], X)


def test_empty_operands_launch_nothing():
    op = make_op()
    x = jnp.zeros((0, 4))
    assert op(x, None, implementation="interpret")[0].shape == (0, 4)
    with warnings.catch_warnings(action="error"):
        assert KERNEL not in lower_for_gpu(lambda x: op(x, None, implementation="triton")[0], x)


def test_kernels_count_in_32_bits():
    op, dtypes = TileOp("index", "x: d -> y: d"), []

    @op.reference
    def reference(x):
        return (x,)

    @op.kernel
    def kernel(x):
        dtypes.append(jnp.arange(3).dtype)
        return (x,)

    with jax.enable_x64(True):
        op(jnp.arange(4, dtype=jnp.float32), implementation="interpret")
    assert dtypes == [jnp.int32]


def test_kernels_without_compiler_params_are_compiled_by_jtile():
    """Not by JAX's own backend, which would refuse six rows."""
    op = TileOp("tripled", "x: ... d -> y: ... d")
    op.reference(lambda x: (3 * x,))

    @op.kernel
    def kernel(x):
        def triple_kernel(x_ref, y_ref):
            y_ref[...] = 3 * x_ref[...]

        return (pl.pallas_call(triple_kernel, out_shape=x)(x),)

    assert KERNEL in lower_for_gpu(lambda x: op(x)[0], X)
    [report] = inspect(lambda x: op(x)[0], X)
    assert report.name == "triple_kernel" and "# test_lowering.py:" in report.source
