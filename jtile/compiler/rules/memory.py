"""Reading and writing refs: pointers, and the masks that keep them inside arrays and padding out of memory."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jtile.compiler.rules import rule
from jtile.compiler.value import Affine, Block, Interval, Value, tile

# Most elements along a side of a block that the Tensor Memory Accelerator moves.
TMA_LIMIT = 256


@rule("get")
def get(e, eqn, block: Block, *indices: Value):
    return _load(e, eqn, block, eqn.params["tree"].unflatten(indices))


@rule("swap")
def swap(e, eqn, block: Block, value: Value, *indices: Value):
    transforms = eqn.params["tree"].unflatten(indices)
    old = _load(e, eqn, block, transforms) if e.is_used(eqn.outvars[0]) else value
    _store(e, block, transforms, value)
    return old


@rule("addupdate")
def addupdate(e, eqn, block: Block, value: Value, *indices: Value):
    transforms = eqn.params["tree"].unflatten(indices)
    access = locate(e, block, transforms)
    old = e.let(f"tl.load({access.arguments(other='0')}){e.comment}", value.shape, value.dtype, "old")
    total = e.let(f"{old.text} + {value.text}", value.shape, value.dtype, "add")
    _store(e, block, transforms, total)
    return []


@rule("masked_load")
def masked_load(e, eqn, *operands):
    block, transforms, mask, other = eqn.params["args_tree"].unflatten(operands)
    hints = {k: eqn.params[k] for k in ("cache_modifier", "eviction_policy", "volatile") if eqn.params.get(k)}
    return _load(e, eqn, block, transforms, mask, other, **hints)


@rule("masked_swap")
def masked_swap(e, eqn, *operands):
    block, transforms, value, mask = eqn.params["args_tree"].unflatten(operands)
    old = _load(e, eqn, block, transforms, mask) if e.is_used(eqn.outvars[0]) else value
    hints = {k: eqn.params[k] for k in ("eviction_policy",) if eqn.params.get(k)}
    _store(e, block, transforms, value, mask, **hints)
    return old


@rule("atomic_rmw")
def atomic_rmw(e, eqn, *operands):
    block, transforms, value, mask = eqn.params["args_tree"].unflatten(operands)
    access = locate(e, block, transforms)
    operation = eqn.params["atomic_type"].value
    text = f"tl.atomic_{operation}({access.arguments(e.tensor(value), mask=mask)})"
    return e.let(text + e.comment, value.shape, value.dtype, "old")


@rule("atomic_cas")
def atomic_cas(e, eqn, block: Block, expected: Value, value: Value):
    text = f"tl.atomic_cas({locate(e, block, ()).pointer}, {e.tensor(expected)}, {e.tensor(value)})"
    return e.let(text + e.comment, (), block.ref.dtype, "old")


@rule("debug_barrier_p")
def debug_barrier(e, eqn):
    e.line("tl.debug_barrier()")
    return []


@rule("program_id")
def program_id(e, eqn):
    own = [axis for axis in range(len(e.kernel.grid)) if axis not in e.kernel.mapped]
    return e.ids[own[eqn.params["axis"]]]


def _load(e, eqn, block: Block, transforms, mask: Value | None = None, other: Value | None = None, **hints) -> Value:
    shape, dtype = eqn.outvars[0].aval.shape, block.ref.dtype
    name = block.ref.name.removesuffix("_ref")
    tma = None if mask is not None or hints else descriptor(e, block, transforms)
    if tma:
        return e.let(f"{tma[0]}.load({tma[1]}){e.comment}", shape, dtype, name, zero_padded=True)
    access = locate(e, block, transforms)
    value = e.let(
        f"tl.load({access.arguments(mask=mask, other='0', **hints)}){e.comment}", shape, dtype, name, zero_padded=True
    )
    if other is not None and other.constant != 0:
        value = e.let(f"tl.where({e.tensor(mask)}, {value.text}, {other.text})", shape, dtype, name)
    return value


def _store(e, block: Block, transforms, value: Value, mask: Value | None = None, **hints) -> None:
    tma = None if mask is not None or hints else descriptor(e, block, transforms)
    if tma:
        e.line(f"{tma[0]}.store({tma[1]}, {e.tensor(value)}){e.comment}")
    else:
        access = locate(e, block, transforms)
        e.line(f"tl.store({access.arguments(value.text, mask=mask, **hints)}){e.comment}")


@dataclasses.dataclass(frozen=True)
class Access:
    """Where the lanes of a value lie in memory, and tests that hold for those that are the array's and the value's."""

    pointer: str
    tests: tuple[str, ...]

    def arguments(self, *values: str, mask: Value | None = None, **options) -> str:
        """The arguments of a load, store or atomic; `other` only where something is masked."""
        tests = [*self.tests, *([mask.text] if mask is not None else [])]
        if tests:
            options = {"mask": tests[0] if len(tests) == 1 else " & ".join(f"({t})" for t in tests), **options}
        else:
            options.pop("other", None)
        texts = (f"{k}={v if k in ('mask', 'other') else repr(v)}" for k, v in options.items())
        return ", ".join([self.pointer, *values, *texts])


def locate(e, block: Block, transforms: Sequence) -> Access:
    """The pointers to what `transforms` select from a block.

    An element's offset is the sum over the array's dimensions of index * stride. Scalars come first, so that in a loop
    only a scalar changes; they are 64-bit where the array is too large for 32. A test against a bound of the array is
    left out where the index is known to respect it.
    """
    ref = block.ref
    indices, shape = indices_of(e, block, transforms)
    wide = math.prod(ref.shape) > 2**31 - 1
    offset, lanes, tests = Affine(), [], []
    padded = {axis for axis, (n, p) in enumerate(zip(shape, tile(shape), strict=True)) if n != p}
    for index, n, stride in zip(indices, ref.shape, ref.strides, strict=True):
        offset += index.start * stride
        if index.lanes:
            term = f"tl.cast({index.lanes}, tl.int64)" if wide and index.reach * stride > 2**31 - 1 else index.lanes
            lanes.append(term if stride == 1 else f"{term} * {stride}")
        text = " + ".join([*index.start.summands(), *([index.lanes] if index.lanes else [])])
        low, high = index.bounds or (-math.inf, math.inf)
        if low < 0:
            tests.append(f"{text} >= 0")
        if high >= n:
            tests.append(f"{text} < {n}")
            if low + index.size * index.step >= n:  # lanes that pad this axis fail this test as well
                padded.discard(index.axis)
    if padded:
        tests.append(e.inside(shape, sorted(padded)))
    return Access(" + ".join([ref.name, *offset.summands(wide), *lanes]), tuple(tests))


@dataclasses.dataclass(frozen=True)
class Index:
    """How one dimension of an array is indexed: a scalar, plus one number per lane if it is an axis of the value.

    Attributes:
      lanes: the number per lane, as source that broadcasts against the value's tile.
      reach: the greatest of them, where known.
      axis, size, step: the axis of the value on which lanes count 0, step, ..., (size - 1) * step, for slices.
      bounds: of the whole index, in lanes inside the value's shape.
    """

    start: Affine
    lanes: str = ""
    reach: float = 0
    axis: int | None = None
    size: int = 0
    step: int = 0

    @property
    def bounds(self) -> Interval | None:
        bounds = self.start.bounds
        return bounds and math.isfinite(self.reach) and (bounds[0], bounds[1] + self.reach) or None


def indices_of(e, block: Block, transforms: Sequence) -> tuple[list[Index], tuple[int, ...]]:
    """Each dimension's index, and the shape that they select together."""
    # Slices of a slice are a slice: start + start' * step, step * step'.
    slices = [
        Index(start, axis=None if d.squeezed else 0, size=d.size, step=1)
        for start, d in zip(block.starts, block.ref.block, strict=True)
    ]
    arrays: dict[int, Value] = {}
    array_axis = 0
    for transform in transforms:
        if not hasattr(transform, "indices") or arrays:
            raise e.unsupported(
                f"a ref is transformed by {type(transform).__name__} before it is read or written",
                "Index the ref once, `ref[...]`, and reshape the value.",
            )
        kept = [i for i, s in enumerate(slices) if s.axis is not None]
        kinds = []
        for i, index in zip(kept, transform.indices, strict=True):
            whole = slices[i]
            if hasattr(index, "size") and hasattr(index, "stride"):
                if not isinstance(index.size, int):
                    raise e.unsupported("a slice has a traced size", "Load a fixed size and mask it with `jnp.where`.")
                start = whole.start + Affine.of(index.start) * whole.step
                slices[i] = dataclasses.replace(whole, start=start, size=index.size, step=whole.step * index.stride)
                kinds.append("slice")
            elif getattr(index, "shape", ()):
                arrays[i] = index
                kinds.append("array")
            else:
                slices[i] = Index(whole.start + Affine.of(index) * whole.step)
        # As in NumPy, arrays that stand together put their axes there, else in front.
        first, last = (kinds.index("array"), len(kinds) - kinds[::-1].index("array")) if arrays else (0, 0)
        array_axis = first if "slice" not in kinds[first:last] else 0
    array_shape = next((a.shape for a in arrays.values()), ())
    sizes = [s.size for i, s in enumerate(slices) if s.axis is not None and i not in arrays]
    shape = (*sizes[:array_axis], *array_shape, *sizes[array_axis:])
    free = iter([a for a in range(len(shape)) if not array_axis <= a < array_axis + len(array_shape)])
    # A tile of one element still needs lanes of its rank.
    single = all(n == 1 for n in shape)
    indices = []
    for i, whole in enumerate(slices):
        if i in arrays:
            indices.append(_array_index(whole, arrays[i], array_axis, len(shape)))
        elif whole.axis is None:
            indices.append(whole)
        else:
            axis = next(free)
            lanes = ""
            if whole.size > 1 or (single and axis == len(shape) - 1):
                lanes = e.lanes(whole.size, axis, len(shape))
                lanes = f"{lanes} * {whole.step}" if whole.step > 1 else lanes
            indices.append(dataclasses.replace(whole, lanes=lanes, axis=axis, reach=(whole.size - 1) * whole.step))
    return indices, shape


def _array_index(whole: Index, array: Value, first: int, rank: int) -> Index:
    axes = range(first, first + len(array.shape))
    lanes = array.text
    if rank > len(axes):
        lanes += f"[{', '.join(':' if a in axes else 'None' for a in range(rank))}]"
    if whole.step > 1:
        lanes += f" * {whole.step}"
    if array.bounds is None or array.bounds[0] < 0:
        return Index(whole.start, lanes, reach=math.inf)
    return Index(whole.start, lanes, reach=array.bounds[1] * whole.step)


def descriptor(e, block: Block, transforms: Sequence) -> tuple[str, str] | None:
    """A tensor descriptor for this access and the coordinates of its first element, where the hardware allows one.

    Leading dimensions are folded into rows. The hardware reads zeros and drops stores outside of the descriptor's
    shape, as jtile promises, but rows past the end of one matrix are the next one's: those need pointers.
    """
    ref = block.ref
    if not e.params.tma or ref.name not in e.one_way:
        return None
    indices, shape = indices_of(e, block, transforms)
    *leading, row, column = indices if len(indices) >= 2 else (None, None)
    itemsize = ref.dtype.itemsize
    if (
        column is None
        or [i.axis for i in indices] != [None] * len(leading) + [0, 1]
        or (row.step, column.step) != (1, 1)
        or shape != tile(shape)
        or max(shape) > TMA_LIMIT
        or shape[1] * itemsize < 16
        or ref.shape[-1] * itemsize % 16
        or ref.dtype == np.bool_
        or math.prod(ref.shape[:-1]) > 2**31 - 1
    ):
        return None
    if leading and not all(
        i.bounds and 0 <= i.bounds[0] and i.bounds[1] < n for i, n in zip(indices[:-1], ref.shape[:-1], strict=True)
    ):
        return None
    first_row = Affine()
    for index, stride in zip(indices[:-1], ref.strides[:-1], strict=True):
        first_row += index.start * (stride // ref.shape[-1])
    name = e.once(
        f"{ref.name}_{shape[0]}x{shape[1]}",
        f"tl.make_tensor_descriptor({ref.name}, shape=[{math.prod(ref.shape[:-1])}, {ref.shape[-1]}], "
        f"strides=[{ref.shape[-1]}, 1], block_shape={list(shape)})",
    )
    coordinates = (" + ".join(a.summands()) or "0" for a in (first_row, column.start))
    return name, f"[{', '.join(coordinates)}]"
