"""How the warps of a program hand blocks to each other: one loads them, groups of four compute on them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma


@gluon.jit
def wait(barrier, phase):
    """As `mbarrier.wait`, before which Triton may bring the warps of a group together."""
    gl.inline_asm(
        "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1; @!done bra.uni again; }",
        "r,r",
        [barrier, phase],
    )


@gluon.jit
def arrive(barrier):
    """One arrival for each warp, after what all of its threads have done. A group's warps need not come together."""
    gl.inline_asm(
        "{ .reg .pred one; bar.warp.sync 0xffffffff; elect.sync _|one, 0xffffffff;"
        " @one mbarrier.arrive.shared::cta.b64 _, [$0]; }",
        "r",
        [barrier],
    )


@gluon.jit
def meet():
    """Both groups come together, at a barrier of the hardware that Triton does not use."""
    gl.inline_asm("barrier.cta.sync 8, 256;")


@gluon.jit
def flag(found, zeros, S: gl.constexpr):
    """Sets a number that is 0 to the size of the batch, unless these are zeros: 0 · x of what is to be finite."""
    gl.store(found + gl.zeros([64], gl.int32, zeros.type.layout), S.batch, zeros != 0.0)


@gluon.jit
def matrix(block):
    """A block (1, 1, rows, width) without its leading dimensions."""
    return block.reshape([block.shape[2], block.shape[3]])


@gluon.aggregate
class Ring:
    """Blocks in shared memory. The n-th to come takes slot n modulo their number, once its reader has released it."""

    blocks: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    slots: gl.constexpr

    @gluon.jit
    def slot(self, n):
        return self.blocks.index(n % self.slots)

    @gluon.jit
    def barrier(self, n):
        return self.full.index(n % self.slots)

    @gluon.jit
    def acquire(self, n, bytes_: gl.constexpr):
        """Waits until there is room for the n-th block; so many bytes are to come."""
        mbarrier.wait(self.empty.index(n % self.slots), n // self.slots % 2 ^ 1)
        mbarrier.expect(self.barrier(n), bytes_)

    @gluon.jit
    def load(self, n, descriptor, place):
        self.acquire(n, descriptor.nbytes_per_cta)
        tma.async_load(descriptor, place, self.barrier(n), self.slot(n))

    @gluon.jit
    def wait(self, n):
        wait(self.barrier(n), n // self.slots % 2)

    @gluon.jit
    def block(self, n):
        """The n-th block as a matrix."""
        return matrix(self.slot(n))

    @gluon.jit
    def release(self, n):
        arrive(self.empty.index(n % self.slots))


@gluon.jit
def barriers(blocks, slots: gl.constexpr, writers: gl.constexpr, readers: gl.constexpr):
    """A ring of these blocks, which so many writers fill, warps or a thread that loads, and so many warps read."""
    full = mbarrier.allocate_mbarrier(slots)
    empty = mbarrier.allocate_mbarrier(slots)
    for i in gl.static_range(slots):
        mbarrier.init(full.index(i), count=writers)
        mbarrier.init(empty.index(i), count=readers)
    return Ring(blocks, full, empty, slots)  # type: ignore[call-arg]  # a dataclass of Triton's


@gluon.jit
def room(
    dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr, slots: gl.constexpr, writers: gl.constexpr,
    readers: gl.constexpr,
):  # fmt: skip
    """Room for blocks that hand-overs go through."""
    return barriers(gl.allocate_shared_memory(dtype, [slots] + shape, layout), slots, writers, readers)


@gluon.jit
def ring(descriptor, slots: gl.constexpr, readers: gl.constexpr):
    """Room for blocks of a descriptor (1, 1, rows, width), each read by so many groups of warps."""
    return room(descriptor.dtype, descriptor.block_shape, descriptor.layout, slots, 1, 4 * readers)


@gluon.jit
def hand_on(part, n, dq):
    """A part of dquery, transposed, to the warp that adds it. Consecutive threads have consecutive columns of it, which
    shared memory takes without conflicts."""
    wait(dq.empty.index(n % dq.slots), n // dq.slots % 2 ^ 1)
    dq.block(n).permute((1, 0)).store(part)
    fence_async_shared()
    arrive(dq.barrier(n))


@gluon.jit
def _claim(counter):
    """How often it was claimed before, to all threads of a warp."""
    return gl.inline_asm(
        "{ .reg .pred one; .reg .b32 lane; mov.u32 lane, %laneid; setp.eq.u32 one, lane, 0; mov.b32 $0, 0;"
        " @one atom.relaxed.gpu.global.add.u32 $0, [$1], 1; shfl.sync.idx.b32 $0, $0, 0, 31, 0xffffffff; }",
        "=&r,l",
        [counter],
        gl.int32,
    )


@gluon.aggregate
class Places:
    """Which places in the order of work a program takes: the one of its own number, or, if there are fewer programs
    than places, one after the other whatever is next, so that programs with short ones take more. The warp that loads
    claims them and tells the others. A place is begun only after all before it, whichever programs the hardware runs.
    """

    told: Ring
    counter: gl.tensor
    blocks: gl.constexpr
    loops: gl.constexpr

    @gluon.jit
    def _own(self, first: gl.constexpr):
        """Of a program with one place: it, and then what is past the last."""
        if first:
            number = gl.program_id(0)
        else:
            number = self.blocks
        return number

    @gluon.jit
    def claim(self, n, first: gl.constexpr = False):
        """The n-th, or what is past the last."""
        if self.loops:
            number = _claim(self.counter)
            wait(self.told.empty.index(n % self.told.slots), n // self.told.slots % 2 ^ 1)
            gl.inline_asm("st.shared.b32 [$0], $1;", "r,r", [self.told.slot(n), number])
            arrive(self.told.barrier(n))
        else:
            number = self._own(first)
        return number

    @gluon.jit
    def take(self, n, first: gl.constexpr = False):
        """The n-th that was claimed."""
        if self.loops:
            self.told.wait(n)
            number = gl.inline_asm("ld.shared.b32 $0, [$1];", "=r,r", [self.told.slot(n)], gl.int32)
            self.told.release(n)
        else:
            number = self._own(first)
        return number


@gluon.jit
def places(counter, warps: gl.constexpr, S: gl.constexpr):
    """So many warps take them."""
    told = room(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]), 2, 1, warps)
    return Places(told, counter, S.blocks, S.loops)  # type: ignore[call-arg]  # a dataclass of Triton's
