"""What the compiler chooses where the parameters leave it open, since only it knows the chip and the kernel's size."""

import dataclasses
from collections.abc import Iterator

from jtile.compiler.build import Compiled, TileTooLarge, build
from jtile.compiler.emit import CannotSpecialize, emit
from jtile.compiler.kernel import Kernel, Source
from jtile.compiler.params import CompilerParams
from jtile.compiler.rewrite import equations
from jtile.compiler.target import REGISTERS, Occupancy, Target

# Rows of a product that two groups of four warps share: 64 each, the rows of one wgmma.
SHARED_ROWS = 128

# Blocks on a multiprocessor that leave it waiting.
FEW_BLOCKS = 4

# Bytes of a thread's registers that may be spilled to make room for another block on a multiprocessor.
SPILLS = 256


def compile_kernel(kernel: Kernel, params: CompilerParams, target: Target) -> tuple[Source, Compiled]:
    """The kernel's source and machine code for a chip.

    Raises: as `emit` and `build` do.
    """
    *preferred, plain = schedules(kernel, params, target)
    for schedule in preferred:
        try:
            source = emit(kernel, schedule)
            compiled = build(source, schedule, target)
        except (CannotSpecialize, TileTooLarge):
            continue
        break
    else:
        schedule = plain
        source = emit(kernel, schedule)
        compiled = build(source, schedule, target)
        if target.compute_capability >= 90 and "mma.sync" in compiled.instructions:
            if params.tma is None and schedule.tma:
                schedule, compiled = _further_ahead(source, schedule, target, compiled)
            if params.max_registers is None:
                compiled = _with_room(source, schedule, target, compiled)
    if schedule.persistent or kernel.num_sizes:
        at_once = _blocks(compiled, target).blocks * target.sms
        source = dataclasses.replace(source, grid=(at_once if kernel.num_sizes else min(source.grid[0], at_once), 1, 1))
    return source, compiled


def schedules(kernel: Kernel, params: CompilerParams, target: Target) -> Iterator[CompilerParams]:
    """The parameters with every choice made, best first; the last one serves every kernel.

    Raises:
      NotImplementedError: they ask for what the chip lacks.
    """
    hopper = target.compute_capability >= 90
    for asked in ("tma", "warp_specialize"):
        if getattr(params, asked) and not hopper:
            raise NotImplementedError(
                f"CompilerParams: {asked}=True needs compute capability 9.0 (Hopper) or later; {target.name} has "
                f"{target.compute_capability / 10}. Leave it None, and kernel {kernel.name} ({kernel.where}) gets it "
                "where there is it."
            )
    products = [eqn for eqn in equations(kernel.jaxpr) if eqn.primitive.name == "dot_general"]
    if params.tma is None:
        # It feeds tensor cores well, of types that they take as they are. What is only read once and computed on gains
        # nothing on the way through shared memory.
        feeds = any(all(_bytes(v) <= 2 for v in product.invars) for product in products)
        params = dataclasses.replace(params, tma=hopper and params.num_ctas == 1 and feeds)
    if params.warp_specialize is None:
        # Products that wait for each other, as attention's do, leave the tensor cores to the other group of warps
        # meanwhile. Triton makes the two groups of four, and takes another four to load.
        waiting = len(products) > 1 and all(_rows(p) == SHARED_ROWS for p in products)
        if target.compute_capability == 90 and params.tma and params.num_warps == 8 and waiting:
            yield dataclasses.replace(params, warp_specialize=True, num_warps=4)
        params = dataclasses.replace(params, warp_specialize=False)
    yield params


def _bytes(operand) -> int:
    return operand.aval.dtype.itemsize


def _rows(product) -> int:
    """Of a product of matrices; 0 of several at once."""
    shape = product.outvars[0].aval.shape
    return shape[0] if len(shape) == 2 else 0


# On Hopper and later, tiles that are multiplied by `mma.sync` are small, and such a kernel mostly waits: for loads, and
# for what its other warps compute. More stages and more blocks on a multiprocessor hide more of that.


def _further_ahead(source: Source, params: CompilerParams, target: Target, compiled: Compiled):
    """The kernel with loads a turn further ahead, if as many blocks then fit on a multiprocessor."""
    deeper = dataclasses.replace(params, num_stages=params.num_stages + 1)
    try:
        ahead = build(source, deeper, target)
    except TileTooLarge:
        return params, compiled
    fits = _blocks(ahead, target).blocks >= _blocks(compiled, target).blocks
    return (deeper, ahead) if fits and ahead.spill_bytes <= compiled.spill_bytes else (params, compiled)


def _with_room(source: Source, params: CompilerParams, target: Target, compiled: Compiled) -> Compiled:
    """The kernel with fewer registers for a thread, if another block then fits and few of them are spilled."""
    now = _blocks(compiled, target)
    registers = REGISTERS // ((now.blocks + 1) * compiled.threads) // 8 * 8
    if now.limiter != "registers" or now.blocks > FEW_BLOCKS or registers < 0.75 * compiled.registers:
        return compiled
    fewer = build(source, dataclasses.replace(params, max_registers=registers), target)
    return fewer if _blocks(fewer, target).blocks > now.blocks and fewer.spill_bytes <= SPILLS else compiled


def _blocks(compiled: Compiled, target: Target) -> Occupancy:
    return target.occupancy(compiled.registers, compiled.shared_bytes, compiled.threads)
