"""Sources as the emitter writes them, for tests of what comes after it."""

import numpy as np

from jtile.compiler.arguments import Array
from jtile.compiler.kernel import Source

DOUBLE = """\
import triton
import triton.language as tl


@triton.jit
def double(x, y):
    i = tl.program_id(0) * 128 + tl.arange(0, 128)
    tl.store(y + i, tl.load(x + i) * 2)
"""

PRODUCT = """\
import triton
import triton.language as tl


@triton.jit
def product(a, b, c):
    i = tl.arange(0, 128)
    k = tl.arange(0, 64)
    total = tl.zeros((128, 128), tl.float32)
    for j in tl.range(0, 16):
        x = tl.load(a + i[:, None] * 1024 + (j * 64 + k)[None, :])
        y = tl.load(b + (j * 64 + k)[:, None] * 128 + i[None, :])
        total = tl.dot(x, y, total)
    tl.store(c + i[:, None] * 128 + i[None, :], total)
"""

SCRATCH = """\
import triton
import triton.language as tl


@triton.jit
def scratch(x, y):
    source = tl.make_tensor_descriptor(x, (128, 128), (128, 1), (128, 128))
    target = tl.make_tensor_descriptor(y, (128, 128), (128, 1), (128, 128))
    target.store((0, 0), source.load((0, 0)))
"""

bfloat16, float32 = Array(np.dtype("bfloat16")), Array(np.dtype("float32"))

double = Source("double", DOUBLE, (float32, float32), (0, 1), (8, 1, 1))
product = Source("product", PRODUCT, (bfloat16, bfloat16, float32), (0, 1, 2), (1, 1, 1))
scratch = Source("scratch", SCRATCH, (float32, float32), (0, 1), (1, 1, 1))
