"""`pl.debug_print` and `pl.debug_check` inside of kernels."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.experimental import pallas as pl

from jtile.compiler.build import build
from jtile.compiler.kernel import UnsupportedKernel
from jtile.compiler.params import CompilerParams
from jtile.compiler.target import Target
from jtile.debugger import debug
from tests.compiler.kernels import sources

X = np.arange(16, dtype=np.float32)


def call(body, x=X):
    """A copying kernel that does something with its block first."""

    def kernel(x_ref, y_ref):
        body(x_ref[...])
        y_ref[...] = x_ref[...]

    return pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), compiler_params=CompilerParams(num_warps=1)
    )


def printed(body) -> list[str]:
    [source] = sources(call(body), X)
    build(source, CompilerParams(), Target.named("NVIDIA H200"))
    return [
        line.strip().partition("  # test_debugging.py:")[0]
        for line in source.text.splitlines()
        if "device_print" in line
    ]


PRINTS = {
    "values_after_the_text": (lambda x: pl.debug_print("x", x, x), ["tl.device_print('x', x_1, x_1)"]),
    "no_values": (lambda x: pl.debug_print("here"), ["tl.device_print('here')"]),
    "placeholders": (lambda x: pl.debug_print("x = {}, {}", x, 2.0),
                     ["tl.device_print('x = {}, {}', x_1, tl.full([], 2.0, tl.float32))"]),
    "names": (lambda x: jax.debug.print("{x} {y} {0} {x}", 1, x=x, y=True), [
        "tl.device_print('{x} {y} {0} {x}', x_1, tl.full([], True, tl.int1), tl.full([], 1, tl.int32), x_1)"
    ]),
    "text_known_beforehand": (lambda x: jax.debug.print("{:>4}{name!r} {}", "a", x, name="b"),
                              ["""tl.device_print("   a'b' {}", x_1)"""]),
    "hexadecimal": (lambda x: pl.debug_print("{:x}", x.astype(jnp.int32)),
                    ["tl.device_print('{}', int32_1, hex=True)"]),
    "percent": (lambda x: pl.debug_print("100%", x), ["tl.device_print('100%%', x_1)"]),
}  # fmt: skip


@pytest.mark.parametrize("name", PRINTS)
def test_prints(name):
    body, expected = PRINTS[name]
    assert printed(body) == expected


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint32", "bfloat16", "float16", "float8_e5m2"])
def test_types_that_can_be_printed(dtype):
    assert len(printed(lambda x: pl.debug_print("x", x.astype(dtype)))) == 1


REFUSED = {
    "`{:.3f}` does not say how the GPU prints. Use `{}`": lambda x: pl.debug_print("{:.3f}", x[0]),
    "takes a value apart": lambda x: jax.debug.print("{x.real}", x=x),
    "have no order": lambda x: jax.debug.print("{}", x, ordered=True),
    "hexadecimal and other values": lambda x: pl.debug_print("{} {:x}", x, x),
    "is not all ASCII": lambda x: pl.debug_print("π", x),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_printed(message):
    with pytest.raises(UnsupportedKernel, match=r"at .*test_debugging.py:\d+"):
        try:
            sources(call(REFUSED[message]), X)
        except UnsupportedKernel as error:
            assert message in str(error)
            raise


def small(x):
    pl.debug_check(jnp.all(x < 100), "it's 100% small")


def test_checks_wait_until_asked_for():
    [source] = sources(call(small), X)
    assert "device_assert" not in source.text
    np.testing.assert_array_equal(debug(call(small))(X + 100), X + 100)


def test_checks_are_compiled_in():
    line = small.__code__.co_firstlineno + 1
    with pl.enable_debug_checks(True):
        [source] = sources(call(small), X)
    message = f"it's 100% small at test_debugging.py:{line}"
    assert f'tl.device_assert(not_2, "{message}")' in source.text
    ptx = build(source, CompilerParams(), Target.named("NVIDIA H200")).ptx
    constants = [bytes(map(int, part.split("}")[0].split(","))) for part in ptx.split("= {")[1:]]
    assert "__assertfail" in ptx and message.encode() in constants


def test_checks_on_the_cpu():
    with pl.enable_debug_checks(True):
        checked = debug(call(small))
        np.testing.assert_array_equal(checked(X), X)
        with pytest.raises(AssertionError, match="it's 100% small at test_debugging.py"):
            checked(X + 100)


def test_values_of_a_failed_check_are_printed(capsys):
    checked = debug(call(lambda x: checkify.debug_check(x[3] < 100, "{value} is large", value=x[3])))
    with pl.enable_debug_checks(True), pytest.raises(AssertionError, match="{value} is large at"):
        checked(X + 100)
    assert "{value} is large:  [103.]" in capsys.readouterr().out


ON_GPU = """\
import jax, numpy as np
from jax.experimental import pallas as pl
from tests.compiler.test_debugging import X, call, small

def body(x):
    pl.debug_print("value", x)
    small(x)

with pl.enable_debug_checks(True):
    print(np.asarray(jax.jit(call(body))(X)).sum(), flush=True)
    jax.block_until_ready(jax.jit(call(body))(X + 100))
    print("not reached")
"""


@pytest.mark.gpu
def test_on_the_gpu():
    """A failed check ends the process' use of the GPU: JAX raises when it next waits, the message is on stderr."""
    root = pathlib.Path(__file__).parent.parent.parent
    run = subprocess.run(
        [sys.executable, "-c", ON_GPU],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode != 0 and "not reached" not in run.stdout
    assert "120.0" in run.stdout and "value: 15.000000" in run.stdout
    assert "Assertion `it's 100% small at test_debugging.py" in run.stderr
    assert "JaxRuntimeError" in run.stderr
