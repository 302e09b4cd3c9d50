"""Runs jtile's Gluon kernels without a GPU, by NumPy: what they compute, and how their warps hand blocks to each other.

Each partition of warps is a thread. Barriers count as the hardware's do; where all threads wait, the kernel would hang,
and here raises. A product that is under way, or a copy to memory, must find its operands in shared memory unchanged
when it is waited for. What it cannot see: layouts, fences, and that several warps make a partition.
"""

import builtins
import inspect
import re
import sys
import threading
import types
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np


class Tensor(np.ndarray):
    @property
    def type(self):
        return _Anything()

    def to(self, dtype):
        return self.astype(dtype).view(Tensor)

    def broadcast_to(self, *shape):
        return np.broadcast_to(self, shape).view(Tensor)


def tensor(x, dtype=None):
    return np.asarray(x, dtype).view(Tensor)


class _Anything:
    """A layout: nothing depends on it here."""

    def __init__(self, *_, **__):
        pass

    def __getattr__(self, name):
        return _Anything()

    def __call__(self, *_, **__):
        return _Anything()


class Machine:
    """The threads of one program."""

    def __init__(self):
        self.changed = threading.Condition()
        self.running = 0
        self.waiting = []
        self.error = None

    def wait_until(self, condition, what):
        with self.changed:
            self.running -= 1
            self.waiting.append((condition, what))
            self.changed.notify_all()
            while not condition():
                if not self.error and self.running == 0 and not any(other() for other, _ in self.waiting):
                    self.error = RuntimeError(f"all partitions wait, for {', '.join(what for _, what in self.waiting)}")
                    self.changed.notify_all()
                if self.error:
                    raise self.error
                self.changed.wait()
            self.waiting.remove((condition, what))
            self.running += 1

    def change(self, function):
        with self.changed:
            function()
            self.changed.notify_all()


local = threading.local()


class Barrier:
    def __init__(self):
        self.phase = self.pending = self.bytes = self.count = 0

    def init(self, count):
        self.count = self.pending = count

    def update(self, arrivals=0, expected=0):
        def apply():
            self.pending -= arrivals
            self.bytes += expected
            assert self.pending >= 0, "more arrivals than a barrier counts"
            if self.pending == 0 and self.bytes == 0:
                self.phase, self.pending = self.phase + 1, self.count

        local.machine.change(apply)

    def wait(self, parity):
        local.machine.wait_until(lambda: self.phase % 2 != parity, f"a barrier in phase {self.phase}")


class Barriers(list):
    def index(self, i):
        return self[int(i)]


class Shared:
    """A view of shared memory."""

    def __init__(self, array):
        self.array = array

    shape = property(lambda self: list(self.array.shape))
    dtype = property(lambda self: self.array.dtype)

    def index(self, i):
        assert 0 <= i < len(self.array), f"slot {i} of {len(self.array)}"
        return Shared(self.array[int(i)])

    def reshape(self, shape):
        return Shared(self.array.reshape(shape, copy=False))

    def reinterpret(self, dtype, shape, layout):
        return self.reshape(shape)

    def permute(self, order):
        return Shared(self.array.transpose(order))

    def slice(self, start, length, dim=0):
        return Shared(self.array[(builtins.slice(None),) * dim + (builtins.slice(start, start + length),)])

    def load(self, layout=None):
        return tensor(self.array.copy())

    def store(self, value):
        assert value.shape == self.array.shape and value.dtype == self.array.dtype, (value.shape, self.array.shape)
        self.array[...] = value


@dataclass
class Pointer:
    array: np.ndarray  # flat
    offset: object = 0

    dtype = property(lambda self: types.SimpleNamespace(element_ty=self.array.dtype))

    def __add__(self, offset):
        return Pointer(self.array, self.offset + offset)


class Descriptor:
    def __init__(self, array, shape, strides, block_shape):
        steps = tuple(array.itemsize * stride for stride in strides)
        self.array = np.lib.stride_tricks.as_strided(array, tuple(shape), steps)
        self.block_shape, self.dtype, self.layout = list(block_shape), array.dtype, _Anything()
        self.nbytes_per_cta = int(np.prod(block_shape)) * array.itemsize

    def parts(self, place):
        """The part of a block inside the array: there, and in the block."""
        low = [max(0, int(p)) for p in place]
        high = [
            max(lo, min(int(p) + b, s))
            for lo, p, b, s in zip(low, place, self.block_shape, self.array.shape, strict=True)
        ]
        there = tuple(slice(lo, hi) for lo, hi in zip(low, high, strict=True))
        return there, tuple(slice(lo - int(p), hi - int(p)) for lo, hi, p in zip(low, high, place, strict=True))


@dataclass
class Product:
    """A product under way."""

    result: np.ndarray
    operands: list = field(default_factory=list)

    type = property(lambda self: _Anything())
    shape = property(lambda self: self.result.shape)


def _value(x):
    return x.array if isinstance(x, Shared) else x.result if isinstance(x, Product) else x


def _warpgroup_mma(a, b, acc, use_acc=True, is_async=False):
    left, right = _value(a), _value(b)
    if not isinstance(acc, Product):
        assert all(acc is not p.result for p in local.products), "an accumulator that a product under way writes to"
    total = left.astype(np.float32) @ right.astype(np.float32)
    assert _value(acc).shape == total.shape, (total.shape, _value(acc).shape)
    result = tensor(_value(acc) + total if use_acc else total, np.float32)
    product = Product(result, [(x, x.array.copy()) for x in (a, b) if isinstance(x, Shared)])
    local.products.append(product)
    return product if is_async else _warpgroup_mma_wait(0, [product])


def _warpgroup_mma_wait(outstanding=0, deps=()):
    while len(local.products) > outstanding:
        for shared, before in local.products.pop(0).operands:
            assert shared.array.tobytes() == before.tobytes(), "shared memory changed under a product"
    for dep in deps:
        assert all(dep is not p for p in local.products), "the product is not waited for"
    results = [_value(dep) for dep in deps]
    return results[0] if len(results) == 1 else tuple(results)


def _async_load(descriptor, place, barrier, block):
    there, here = descriptor.parts(place)
    block.array[...] = 0
    block.array[here] = descriptor.array[there]
    assert block.array.nbytes == descriptor.nbytes_per_cta
    barrier.update(expected=-descriptor.nbytes_per_cta)


def _async_store(descriptor, place, block, add=False):
    there, here = descriptor.parts(place)
    assert list(block.shape) == descriptor.block_shape
    descriptor.array[there] = block.array[here] + (descriptor.array[there] if add else 0)
    local.stores.append((block, block.array.copy()))


def _store_wait(pending, read_only=True):
    while len(local.stores) > pending:
        shared, before = local.stores.pop(0)
        assert shared.array.tobytes() == before.tobytes(), "shared memory changed under a copy to memory"


class _NamedBarriers(dict):
    def meet(self, number, count, waits):
        machine, threads = local.machine, 32 * local.warps
        state = self.setdefault(number, [0, 0])  # generation, threads that have come
        generation = state[0]

        def come():
            state[1] += threads
            assert state[1] <= count
            if state[1] == count:
                state[:] = state[0] + 1, 0

        machine.change(come)
        if waits:
            machine.wait_until(lambda: state[0] != generation, f"barrier {number}")


def _inline_asm(text, constraints="", args=(), *_):
    if "mbarrier.try_wait" in text:
        args[0].wait(args[1])
    elif "mbarrier.arrive" in text:
        args[0].update(arrivals=local.warps)
    elif found := re.match(r"barrier\.cta\.(sync|arrive) (\d+), (\d+);", text):
        local.named.meet(int(found[2]), int(found[3]), found[1] == "sync")
    elif "atom.relaxed.gpu.global.add" in text:
        [pointer] = args  # programs run one after the other
        pointer.array[pointer.offset] += 1
        return int(pointer.array[pointer.offset]) - 1
    elif "st.shared" in text:
        args[0].array[...] = args[1]
    elif "ld.shared" in text:
        return int(args[0].array[0])
    elif "ld.acquire" in text:
        pointer, turn = args
        local.machine.wait_until(lambda: pointer.array[pointer.offset] == turn, f"turn {turn} of {pointer.offset}")
    elif "st.release" in text:
        args[0].array[args[0].offset] = args[1]
    else:
        raise NotImplementedError(text)


def _copy_async(block, pointer, mask=True):
    """What is copied is there when it is waited for, and until then anything."""
    assert pointer.offset.shape == tuple(block.shape)
    block.array[...] = np.nan
    local.copies[-1].append((block, _load(pointer, mask, np.nan)))


def _wait_group(outstanding):
    while len(local.copies) > outstanding + 1:
        for block, value in local.copies.pop(0):
            block.array[...] = value


def _load(pointer, mask=True, other=0):
    if not isinstance(pointer.offset, np.ndarray):
        assert 0 <= pointer.offset < pointer.array.size, "a load outside of an array"
        return pointer.array[pointer.offset].item()
    offset, mask = np.broadcast_arrays(pointer.offset, mask)
    assert (offset[mask] >= 0).all() and (offset[mask] < pointer.array.size).all(), "a load outside of an array"
    value = np.full(offset.shape, other, pointer.array.dtype)
    value[mask] = pointer.array[offset[mask]]
    return tensor(value)


def _reduce(values, axis, combine):
    """By sums, which is all that kernels reduce several values by."""
    assert combine(1, 2, 3, 4) == (4, 6)
    return tuple(np.sum(x, axis) for x in values)


def _store(pointer, value, mask=True):
    offset, value, mask = np.broadcast_arrays(pointer.offset, value, mask)
    assert (offset[mask] >= 0).all() and (offset[mask] < pointer.array.size).all(), "a store outside of an array"
    pointer.array[offset[mask]] = value[mask]


def _warp_specialize(partitions, warps, registers):
    machine, parent, named = Machine(), local.__dict__.copy(), _NamedBarriers()
    machine.running = len(partitions)

    def run(function, args, count):
        local.__dict__.update(parent, machine=machine, warps=count, products=[], stores=[], named=named)
        try:
            with np.errstate(all="ignore"):
                function(*args)
            assert not local.products and not local.stores, "a partition ends with work under way"
        except BaseException as error:
            machine.error = machine.error or error
        machine.change(lambda: setattr(machine, "running", machine.running - 1))

    threads = [
        threading.Thread(target=run, args=(f, args, count), daemon=True)
        for (f, args), count in zip(partitions, [4, *warps], strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if machine.error:
        raise machine.error
    assert all(came == 0 for _, came in named.values()), "an arrival at a named barrier that nobody waits for"


def _allocate_mbarrier(number=None):
    return Barrier() if number is None else Barriers(Barrier() for _ in range(number))


def _allocate(dtype, shape, layout):
    return Shared(np.full(tuple(shape), np.nan if np.issubdtype(dtype, np.inexact) else -1, dtype))


def _decorator(function=None, **_):
    return function if function else lambda f: f


def _any_array(*values):
    return any(isinstance(x, np.ndarray) for x in values)


def _number(function):
    """Of numbers a number, of arrays an array."""
    return lambda a, b: function(a, b) if _any_array(a, b) else int(function(a, b))


gl = types.SimpleNamespace(
    constexpr=lambda x: x,
    shared_memory_descriptor=Shared,
    tensor=None,
    float32=np.dtype(np.float32),
    int32=np.dtype(np.int32),
    bfloat16=np.dtype(ml_dtypes.bfloat16),
    program_id=lambda axis: local.program,
    num_programs=lambda axis: local.programs,
    static_range=range,
    static_assert=lambda *_: None,
    arange=lambda start, stop, layout: tensor(np.arange(start, stop, dtype=np.int32)),
    zeros=lambda shape, dtype, layout: tensor(np.zeros(shape, dtype)),
    full=lambda shape, value, dtype, layout: tensor(np.full(shape, value, dtype)),
    where=lambda c, a, b: tensor(np.where(c, a, b), np.float32) if _any_array(c, a, b) else (a if c else b),
    maximum=_number(np.maximum),
    minimum=_number(np.minimum),
    cast=lambda x, dtype: dtype.type(x),
    cdiv=lambda a, b: -(-a // b),
    max=lambda x, axis: tensor(np.max(x, axis)),
    sum=lambda x, axis: tensor(np.sum(x, axis)),
    exp2=lambda x: np.exp2(x),
    log2=lambda x: np.log2(x),
    convert_layout=lambda x, layout: x,
    allocate_shared_memory=_allocate,
    load=_load,
    reduce=_reduce,
    join=lambda a, b: np.stack([a, b], axis=-1),
    permute=lambda x, order: np.transpose(x, order),
    reshape=lambda x, shape: np.reshape(x, shape),
    int64=np.dtype(np.int64),
    num_warps=lambda: 4,
    store=_store,
    inline_asm=_inline_asm,
    inline_asm_elementwise=lambda *args, **_: _elementwise_asm(*args),
    warp_specialize=_warp_specialize,
    **dict.fromkeys(
        (
            "BlockedLayout",
            "NVMMADistributedLayout",
            "SliceLayout",
            "DotOperandLayout",
            "SwizzledSharedLayout",
            "NVMMASharedLayout",
        ),
        _Anything(),
    ),
)
gluon = types.SimpleNamespace(jit=_decorator, constexpr_function=_decorator, aggregate=dataclass)
hopper = types.SimpleNamespace(
    fence_async_shared=lambda: None,
    mbarrier=types.SimpleNamespace(
        allocate_mbarrier=_allocate_mbarrier,
        init=lambda barrier, count: barrier.init(count),
        wait=lambda barrier, phase: barrier.wait(phase),
        expect=lambda barrier, bytes_per_cta: barrier.update(arrivals=1, expected=bytes_per_cta),
        arrive=lambda barrier, count=1: barrier.update(arrivals=count),
    ),
    tma=types.SimpleNamespace(
        async_load=_async_load,
        async_store=_async_store,
        async_atomic_add=lambda *args: _async_store(*args, add=True),
        store_wait=_store_wait,
    ),
    warpgroup_mma=_warpgroup_mma,
    warpgroup_mma_wait=_warpgroup_mma_wait,
)

async_copy = types.SimpleNamespace(
    async_load=_copy_async, commit_group=lambda: local.copies.append([]), wait_group=_wait_group
)


def load(module):
    """A module of Gluon functions, made of Python ones."""
    text = inspect.getsource(module)
    fakes = {
        "triton.experimental": types.SimpleNamespace(gluon=gluon),
        "triton.experimental.gluon": types.SimpleNamespace(language=gl),
        "triton.experimental.gluon.language.nvidia.ampere": types.SimpleNamespace(async_copy=async_copy),
        "triton.experimental.gluon.language.nvidia.hopper": hopper,
    }

    def importing(name, globals=None, locals=None, names=(), level=0):
        if name in fakes:
            return fakes[name]
        if name.startswith("jtile.ops.attention.hopper."):
            fakes[name] = types.SimpleNamespace(**load(sys.modules[name]))
            return fakes[name]
        return __import__(name, globals, locals, names, level)

    namespace = {"__name__": module.__name__, "__builtins__": {**vars(builtins), "__import__": importing}}
    exec(compile(text, module.__file__, "exec"), namespace)
    return namespace


def _elementwise_asm(asm, constraints, args, **_):
    if asm == "tanh.approx.f32 $0, $1;":
        return np.tanh(args[0])
    if asm == "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;":
        return tensor(args[0], np.float32)
    if "setp.eq.f32 none, $2, 0f00000000; selp.f32 $0, 0f00000000, $1, none;" in asm:
        return tensor(np.where(args[1] == 0, np.float32(0), args[0]))
    assert "setp.le.s32 yes, $2, $3; selp.f32 $0, $1, 0fFF800000, yes;" in asm, asm
    x, a, b = args
    return tensor(np.where(np.less_equal(a, b), x, np.float32(-np.inf)))


# What functions of scores are written with.
tl = types.SimpleNamespace(
    load=_load,
    where=lambda c, a, b: tensor(np.where(c, a, b)),
    cast=lambda x, dtype: tensor(np.asarray(x, dtype)),
    broadcast=lambda a, b: tuple(map(tensor, np.broadcast_arrays(a, b))),
    minimum=lambda a, b, **_: np.minimum(a, b),
    maximum=lambda a, b, **_: np.maximum(a, b),
    abs=np.abs,
    exp=np.exp,
    sigmoid=lambda x: 1 / (1 + np.exp(-x)),
    inline_asm_elementwise=_elementwise_asm,
    PropagateNan=types.SimpleNamespace(ALL=None),
    float32=np.float32,
    int32=np.int32,
    int1=np.bool_,
)


def written(text, name):
    """In place of `jtile.ops.attention.hopper.functions._load`: a function of a module that was written for Triton."""
    body = "\n".join(line for line in text.splitlines() if not line.startswith(("import ", "from ")))
    namespace = {"tl": tl, "gluon": gluon}
    exec(body, namespace)
    return namespace[name]


def run(kernel, programs, *args):
    """Runs a kernel's programs one after the other."""
    with np.errstate(all="ignore"):
        for program in range(programs):
            local.program, local.programs, local.copies = program, programs, [[]]
            kernel(*args)
            assert not any(local.copies), "a program ends with a copy under way"
