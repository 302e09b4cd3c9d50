"""Runs every kernel of `kernels` as generated source in Triton's interpreter, and by Pallas' interpreter.

A program of its own, since Triton chooses its interpreter when it is imported. Writes, as JSON to the path given, for
each case what went wrong, or nothing.
"""

import importlib.util
import json
import os
import pathlib
import sys
import tempfile
import traceback
import warnings

os.environ["TRITON_INTERPRET"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # the kernels are small: compiling is what takes time
warnings.simplefilter("ignore")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.language.extra import libdevice  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle  # noqa: E402

from jtile.compiler.emit import emit  # noqa: E402
from jtile.compiler.interpret import interpret_pallas  # noqa: E402
from jtile.compiler.kernel import kernel_of  # noqa: E402
from jtile.compiler.params import CompilerParams  # noqa: E402
from jtile.compiler.rewrite import map_pallas_calls  # noqa: E402
from jtile.compiler.value import TRITON_TYPES  # noqa: E402
from tests.compiler.kernels import CASES  # noqa: E402

# Triton's interpreter has none of CUDA's library of functions.
LIBDEVICE = {
    "fmod": np.fmod, "pow": np.power, "atan2": np.arctan2, "nextafter": np.nextafter, "log1p": np.log1p,
    "expm1": np.expm1, "tan": np.tan, "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan, "sinh": np.sinh,
    "cosh": np.cosh, "tanh": np.tanh, "asinh": np.arcsinh, "acosh": np.arccosh, "atanh": np.arctanh, "cbrt": np.cbrt,
    "erfc": jax.lax.erfc, "erfinv": jax.lax.erf_inv, "lgamma": jax.lax.lgamma, "rint": np.rint,
    "round": lambda x: np.trunc(x + np.copysign(0.5, x)),
}  # fmt: skip


def stand_in(function):
    def call(*arguments):
        arrays = [a.handle.data if isinstance(a, tl.tensor) else np.float32(a) for a in arguments]
        like = next(a for a in arguments if isinstance(a, tl.tensor))
        result = np.asarray(function(*arrays), like.handle.data.dtype)
        shape = np.broadcast_shapes(*(a.shape for a in arrays))
        kind = tl.block_type(like.dtype, list(shape)) if like.type.is_block() else like.type
        return tl.tensor(TensorHandle(np.broadcast_to(result, shape).copy(), like.dtype), kind)

    return call


for name, function in LIBDEVICE.items():
    setattr(libdevice, name, stand_in(function))


def splat(self, kind, value):
    return TensorHandle(np.full(kind.shape, value.data, value.data.dtype), value.dtype.scalar)


# The interpreter's own takes the type of a comparison of scalars to be its operands', and then refuses it as a mask.
InterpreterBuilder.create_splat = splat


class Memory:
    """What Triton's interpreter asks of a tensor."""

    def __init__(self, array):
        self.array = array
        self.dtype = eval(TRITON_TYPES[array.dtype.name])

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, *_, **__):
        return Memory(self.array)

    def set_(self, storage, *_):
        self.array = storage.array

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return None

    def copy_(self, other):
        """Both are the same memory."""


def load(source, folder):
    path = pathlib.Path(folder) / f"{source.name}_{abs(hash(source.text))}.py"
    path.write_text(source.text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, source.name)


def run_source(folder, params, *operands):
    kernel = kernel_of(params)
    source = emit(kernel, CompilerParams())
    inputs = [np.array(x) for x in operands]
    # Whatever a kernel fails to write shows.
    outputs = [np.full(ref.shape, 77, ref.dtype) for ref in kernel.outputs]
    for i, o in kernel.input_output_aliases:
        outputs[o] = inputs[i]
    load(source, folder)[source.grid](*map(Memory, inputs + outputs))
    return [jax.numpy.asarray(x) for x in outputs]


def check(name, folder):
    function, operands = CASES[name]
    operands = [jax.numpy.asarray(x) for x in operands]
    found = jax.tree.leaves(map_pallas_calls(function, lambda p, *x: run_source(folder, p, *x))(*operands))
    expected = jax.tree.leaves(jax.jit(interpret_pallas(function))(*operands))
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape and f.dtype == e.dtype, (f.shape, f.dtype, e.shape, e.dtype)
        tolerance = 2e-3 if "half" in name else 1e-5  # of float16: two units in the last place
        np.testing.assert_allclose(np.asarray(f, np.float64), np.asarray(e, np.float64), tolerance, tolerance)


if __name__ == "__main__":
    failures = {}
    chosen = sys.argv[2:] or list(CASES)
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            try:
                check(name, folder)
                failures[name] = ""
            except Exception as error:
                failures[name] = "".join(traceback.format_exception(error))
    pathlib.Path(sys.argv[1]).write_text(json.dumps(failures))
