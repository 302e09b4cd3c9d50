"""Find a bug inside of a kernel, without a GPU: python examples/5_find_a_bug.py [FOLDER for the kernels' source]"""

import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

import jtile


def softmax(x):
    """Over rows. A bug is planted here."""

    def softmax_kernel(x_ref, y_ref):
        x = x_ref[...]
        e = jnp.exp(x - jnp.max(x, axis=1, keepdims=True))
        y_ref[...] = e / jnp.sum(e, axis=1, keepdims=True)

    block = pl.BlockSpec((4, 128), lambda i: (i, 0))  # 128: the next power of two, as one does for Triton
    return pl.pallas_call(softmax_kernel, grid=(pl.cdiv(len(x), 4),), in_specs=[block], out_specs=block, out_shape=x)(x)


def fixed(x):
    def softmax_kernel(x_ref, y_ref):
        inside = jax.lax.broadcasted_iota(jnp.int32, x_ref.shape, 1) < x.shape[1]
        values = jnp.where(inside, x_ref[...], -jnp.inf)
        e = jnp.exp(values - jnp.max(values, axis=1, keepdims=True))
        y_ref[...] = e / jnp.sum(e, axis=1, keepdims=True)

    block = pl.BlockSpec((4, 128), lambda i: (i, 0))
    return pl.pallas_call(softmax_kernel, grid=(pl.cdiv(len(x), 4),), in_specs=[block], out_specs=block, out_shape=x)(x)


def main(folder: pathlib.Path) -> None:
    x = jax.random.normal(jax.random.key(0), (8, 100)) - 5

    # The symptom: the rows of a softmax sum to 1, and these don't.
    debugged = jtile.debug(softmax, folder=folder)
    print("The rows sum to", debugged(x).sum(axis=1))

    # The call left the source that it ran, with each line of Pallas above what became of it. The next call runs what is
    # in the file by then, so put a print in it, or a breakpoint(): here, ahead of the line that uses the maxima.
    [file] = folder.glob("softmax_kernel_*.py")
    source = file.read_text()
    print(f"\n{file}:\n\n{source}")
    file.write_text(source.replace("    spread_1 =", '    print("program", pid_0, "maxima", max_1)\n    spread_1 ='))
    debugged(x)

    # The maxima are 0, and every number in x is negative. So other numbers are in the tile: of its 128 columns the last
    # 28 are not in the array. The load says what they are: other=0. They are in the sum of exponentials as well.
    print("\nWith the columns past the edge left out, the rows sum to", jtile.debug(fixed)(x).sum(axis=1))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(pathlib.Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as name:
            main(pathlib.Path(name))
