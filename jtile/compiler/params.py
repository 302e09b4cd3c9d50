"""How to compile a kernel: what `pl.pallas_call(compiler_params=...)` takes."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class CompilerParams:
    """Parameters for compiling a Pallas kernel with Triton.

    Attributes:
      num_warps: warps of 32 threads that run one program of the grid: 1, 2, 4, 8, 16 or 32.
      num_stages: depth of software pipelining in loops: loads run this many iterations ahead, less one. With `tma=None`
        the compiler may go one deeper. It takes shared memory. Loops without products are pipelined from 3 on, if they
        load from no ref that is also stored to.
      num_ctas: thread blocks in a cluster that share one program (Hopper and later): 1, 2, 4 or 8.
      warp_specialize: True gives the loads and products of the kernel's one loop warps of their own (Hopper and later,
        with `num_warps=4`; every load in the loop by TMA). None lets the compiler choose, False forbids it.
      max_registers: most registers a thread may use: 24, 32, ..., 248, or 255; None for no limit.
      tma: True moves blocks with the Tensor Memory Accelerator (Hopper and later) wherever it can: matrices of at least
        8 rows of 32 bytes, in an array of up to five dimensions, whose sides are powers of two up to 256 or reach the
        array's end, every stride but the last a multiple of 16 bytes, and so the place in its row where a matrix is
        known to begin. None does so in kernels that multiply matrices of 8 or 16 bits; False uses pointers.
      persistent: launch as many programs as the chip holds at once, each of which takes the place of several in turn.

    Raises:
      ValueError: a field out of its range.

    Example:
      >>> CompilerParams(num_warps=8, num_stages=3).num_warps
      8
    """

    num_warps: int = 4
    num_stages: int = 2
    num_ctas: int = 1
    warp_specialize: bool | None = None
    max_registers: int | None = None
    tma: bool | None = None
    persistent: bool = False

    def __post_init__(self):
        _check("num_warps", self.num_warps, (1, 2, 4, 8, 16, 32))
        _check("num_stages", self.num_stages, range(1, 17))
        _check("num_ctas", self.num_ctas, (1, 2, 4, 8))
        _check("warp_specialize", self.warp_specialize, (None, False, True))
        _check("max_registers", self.max_registers, (None, *range(24, 256, 8), 255))
        _check("tma", self.tma, (None, False, True))
        _check("persistent", self.persistent, (False, True))


def _check(field, value, allowed):
    if not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
        listed = (
            f"{allowed.start} to {allowed.stop - 1}" if isinstance(allowed, range) else ", ".join(map(str, allowed))
        )
        raise ValueError(f"CompilerParams: {field} must be one of {listed}; got {value!r}.")
