"""Reading and writing refs: pointers, and the masks that keep them inside arrays and padding out of memory."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jtile import borrowed
from jtile.compiler.arguments import Descriptor
from jtile.compiler.kernel import Scratch, scratch_of
from jtile.compiler.primitives import ATOMIC_TYPES, Atomic
from jtile.compiler.rules import rule
from jtile.compiler.value import Affine, Block, Value, behind_a_move, constant, float8, four_bits, is_wide, tile

# Most elements along a side of a block that the Tensor Memory Accelerator moves.
TMA_LIMIT = 256

# Bytes of a row, and rows, from which shared memory has a layout that both it and tensor cores use.
TMA_ROW, TMA_ROWS = 32, 8


@rule("get")
def get(e, eqn, ref: Block | Scratch, *indices: Value):
    return _load(e, ref, eqn.params["tree"].unflatten(indices))


@rule("swap")
def swap(e, eqn, ref: Block | Scratch, value: Value, *indices: Value):
    transforms = eqn.params["tree"].unflatten(indices)
    old = _load(e, ref, transforms) if e.is_used(eqn.outvars[0]) else value
    _store(e, ref, transforms, value)
    return old


@rule("addupdate")
def addupdate(e, eqn, ref: Block | Scratch, value: Value, *indices: Value):
    """Atomic where other programs could add to the same elements, as in JAX's own lowering for Triton."""
    transforms = eqn.params["tree"].unflatten(indices)
    if isinstance(ref, Scratch):
        [total] = e.compute(jnp.add, _load(e, ref, transforms), value)
        _store(e, ref, transforms, total)
    else:
        access = locate(e, _shared(e, Atomic.ADD, ref), transforms, "atomic")
        e.line(f"tl.atomic_add({access.arguments(e.tensor(value))})")
    return []


@rule("masked_load")
def masked_load(e, eqn, *operands):
    ref, transforms, mask, other = eqn.params["args_tree"].unflatten(operands)
    names = {"cache_modifier": "cache_modifier", "eviction_policy": "eviction_policy", "is_volatile": "volatile"}
    hints = {names[key]: value for key, value in eqn.params.items() if key in names and value}
    return _load(e, ref, transforms, mask, other, **hints)


@rule("masked_swap")
def masked_swap(e, eqn, *operands):
    ref, transforms, value, mask = eqn.params["args_tree"].unflatten(operands)
    old = _load(e, ref, transforms, mask) if e.is_used(eqn.outvars[0]) else value
    hints = {"eviction_policy": policy} if (policy := eqn.params["eviction_policy"]) else {}
    _store(e, ref, transforms, value, mask, **hints)
    return old


@rule("atomic_rmw")
def atomic_rmw(e, eqn, *operands):
    ref, transforms, value, mask = eqn.params["args_tree"].unflatten(operands)
    operation = Atomic(eqn.params["atomic_type"].value)
    access = locate(e, _shared(e, operation, ref), transforms, "atomic")
    text = f"tl.atomic_{operation}({access.arguments(e.tensor(value), mask=mask)})"
    return e.let(text, value.shape, value.dtype, "old")


@rule("atomic_cas")
def atomic_cas(e, eqn, ref: Block | Scratch, expected: Value, value: Value, *indices: Value):
    transforms = eqn.params["tree"].unflatten(indices) if "tree" in eqn.params else ()
    block = _shared(e, Atomic.CAS, ref)
    access = locate(e, block, transforms, "atomic")
    if access.tests:
        raise e.unsupported(
            f"compare-and-swap has no mask, and {block.ref.name} is indexed where it may have no element",
            "Index inside of the array, with sides of a power of two.",
        )
    text = f"tl.atomic_cas({access.pointer}, {e.tensor(expected)}, {e.tensor(value)})"
    return e.let(text, value.shape, value.dtype, "old")


def _shared(e, operation: Atomic, ref: Block | Scratch) -> Block:
    """The ref itself, which is one that can be changed atomically."""
    if isinstance(ref, Scratch):
        raise e.unsupported(
            f"{ref.name} is changed atomically, and is this program's alone", "Read it, and store what it is to be."
        )
    if ref.ref.dtype.name not in ATOMIC_TYPES[operation]:
        raise e.unsupported(
            f"there is no atomic `{operation}` of {ref.ref.dtype}",
            f"There is for {', '.join(ATOMIC_TYPES[operation])}.",
        )
    return ref


@rule("run_scoped")
def run_scoped(e, eqn, *captured):
    if eqn.params["collective_axes"]:
        raise e.unsupported("`run_scoped` with collective_axes shares memory between programs", "Use an output.")
    body = eqn.params["jaxpr"]
    names = body.debug_info.arg_names or ["scratch"] * len(body.invars)
    scratch = [
        scratch_of(e.name((name or "scratch").removesuffix("_ref")), var.aval, e.unsupported)
        for name, var in zip(names, body.invars, strict=True)
    ]
    return e.run(body, [e.allocate(s) for s in scratch], captured=captured)


@rule("new_ref")
def new_ref(e, eqn, value: Value):
    scratch = e.allocate(Scratch(e.name("ref"), value.shape, value.dtype))
    e.assign(scratch, value)
    return scratch


@rule("freeze")
def freeze(e, eqn, ref: Scratch):
    return e.read(ref)


@rule("debug_barrier_p", "debug_barrier")  # in JAX 0.11, in 0.12
def debug_barrier(e, eqn):
    e.order.barrier()
    e.line("tl.debug_barrier()")
    return []


@rule("program_id")
def program_id(e, eqn):
    return e.ids[e.kernel.own_axes[eqn.params["axis"]]]


@rule("num_programs")
def num_programs(e, eqn):
    return e.sizes[e.kernel.own_axes[eqn.params["axis"]]]


@rule("axis_index")
def axis_index(e, eqn):
    name = eqn.params["axis_name"]
    if name not in e.kernel.axis_names:
        raise e.unsupported(f"the grid has no axis {name!r}", f"Its axes are {e.kernel.axis_names}.")
    return e.ids[e.kernel.axis_names.index(name)]


def _load(e, ref: Block | Scratch, transforms, mask: Value | None = None, other: Value | None = None, **hints) -> Value:
    if isinstance(ref, Scratch):
        return _masked(e, _viewed(e, e.read(ref), transforms), mask, other)
    transforms, views = _indexed(e, transforms)
    if views:
        return _masked(e, _viewed(e, _load(e, ref, transforms, **hints), views), mask, other)
    shape, dtype = _shape(ref, transforms), ref.ref.dtype
    name = ref.ref.name.removesuffix("_ref")
    mask = None if mask is not None and mask.constant else mask
    tma = None if mask is not None or hints else transfer(e, ref, transforms)
    if tma:
        text = f"{tma.name}.load([{tma.coordinates}])"
        text = text if tma.sizes == tile(shape) else f"tl.reshape({text}, {list(tile(shape))})"
        return e.let(text, shape, dtype, name, zero_padded=True)
    e.by_pointer(ref.ref)
    access = locate(e, ref, transforms, "load")
    zero = "0.0" if float8(dtype) else "0"  # which Triton converts from no integer
    value = e.let(f"tl.load({access.arguments(mask=mask, other=zero, **hints)})", shape, dtype, name, zero_padded=True)
    return _masked(e, value, mask, other) if other is not None and other.constant != 0 else value


def _store(e, ref: Block | Scratch, transforms, value: Value, mask: Value | None = None, **hints) -> None:
    if isinstance(ref, Scratch):
        if mask is not None:
            value = _masked(e, value, mask, _load(e, ref, transforms))
        if not all(map(_is_whole, transforms)):
            value = _replaced(e, e.read(ref), transforms, value)
        e.assign(ref, value)
        return
    transforms, views = _indexed(e, transforms)
    if views:
        if mask is not None or not all(map(_is_whole, views)):
            raise e.unsupported(
                f"a part of {ref.ref.name} is stored through {type(views[0]).__name__}",
                "Index the ref once, before it is reshaped, and store all of that.",
            )
        value = _replaced(e, constant(0, _shape(ref, transforms), ref.ref.dtype), views, value)
    mask = None if mask is not None and mask.constant else mask
    tma = None if mask is not None or hints else transfer(e, ref, transforms)
    if tma:
        text = e.tensor(value) if tma.sizes == value.tile else f"tl.reshape({e.tensor(value)}, {list(tma.sizes)})"
        e.line(f"{tma.name}.store([{tma.coordinates}], {text})")
    else:
        access = locate(e, ref, transforms, "store")
        e.line(f"tl.store({access.arguments(value.text, mask=mask, **hints)})")


def _masked(e, value: Value, mask: Value | None, other: Value | None) -> Value:
    """`value` where the mask holds, else `other` or 0."""
    if mask is None:
        return value
    [chosen] = e.compute(jnp.where, mask, value, constant(0, (), value.dtype) if other is None else other)
    return chosen


def _indexed(e, transforms: Sequence) -> tuple[Sequence, Sequence]:
    """The transforms that choose pointers, and those that then rearrange values: all from a reshape, or past arrays."""
    views = len(transforms)
    for i, transform in reversed(list(enumerate(transforms))):
        if not hasattr(transform, "indices"):
            views = i
            if not isinstance(transform, borrowed.RESHAPES):
                raise e.unsupported(
                    f"a ref under a {type(transform).__name__} has no form in Triton", "Rearrange the value instead."
                )
        elif any(getattr(index, "shape", ()) for index in transform.indices):
            views = i + 1
    return transforms[:views], transforms[views:]


def _shape(block: Block, transforms: Sequence) -> tuple[int, ...]:
    """Of what these indices select."""
    if transforms:
        return transforms[-1].get_indexer_shape()
    return tuple(d.size for d in block.ref.block if not d.squeezed)


def _is_whole(transform) -> bool:
    """Whether it leaves nothing out."""
    return not hasattr(transform, "indices") or all(
        hasattr(index, "size") and index.start == 0 and index.size == n and index.stride == 1
        for index, n in zip(transform.indices, transform.shape, strict=True)
    )


def _viewed(e, value: Value, transforms: Sequence) -> Value:
    """What `transforms` select from a value."""
    if not transforms:
        return value
    leaves, tree = jax.tree.flatten(transforms)
    [view] = e.compute(lambda x, *leaves: borrowed.transform_array(x, jax.tree.unflatten(tree, leaves)), value, *leaves)
    return view


def _replaced(e, value: Value, transforms: Sequence, part: Value) -> Value:
    """`value` with `part` in place of what `transforms` select."""
    if not transforms:
        return part
    leaves, tree = jax.tree.flatten(transforms)
    [whole] = e.compute(
        lambda x, part, *leaves: [borrowed.transform_swap_array(x, jax.tree.unflatten(tree, leaves), part)[1]],
        value,
        part,
        *leaves,
    )
    return whole


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


def locate(e, block: Block, transforms: Sequence, kind: str) -> Access:
    """The pointers to what `transforms` select from a block, to `kind` there: "load", "store" or "atomic".

    An element's offset is the sum over the array's dimensions of index * stride. Scalars come first, so that in a loop
    only a scalar changes; they are 64-bit where the array is too large for 32. A test against a bound of the array is
    left out where the index is known to respect it.
    """
    ref = block.ref
    indices, shape = indices_of(e, block, transforms)
    if e.order.touch(kind, ref.name, shape, indices):
        e.line("tl.debug_barrier()")
    wide = is_wide(ref)
    offset, lanes, tests = Affine(), [], []
    padded = {axis for axis, (n, p) in enumerate(zip(shape, tile(shape), strict=True)) if n != p}
    for index, n, stride in zip(indices, ref.shape, ref.strides, strict=True):
        offset += index.start * stride
        if index.lanes:
            term = f"tl.cast({index.lanes}, tl.int64)" if wide and index.reach * stride > 2**31 - 1 else index.lanes
            lanes.append(term if stride == 1 else f"{term} * {stride}")
        summands = index.start.summands(wide=n > 2**30)  # past the end, by up to as much again, is still in 32 bits
        text = " + ".join([*summands, *([index.lanes] if index.lanes else [])])
        low, high = index.bounds
        if low < 0:
            tests.append(f"{text} >= 0")
        if high >= n:
            tests.append(f"{text} < {n}")
            if index.span and low + index.span.size * index.span.step >= n:
                padded.discard(index.axis)  # lanes that pad this axis fail the same test
    if padded:
        tests.append(e.inside(shape, sorted(padded)))
    base, held = e.base(block)
    if lanes and all(index.array is None for index in indices) and (len(lanes) > 1 or not lanes[0].isidentifier()):
        lanes = [e.shared(" + ".join(lanes), "offsets")]
    return Access(" + ".join([base, *(offset - held).summands(wide), *lanes]), tuple(tests))


@dataclasses.dataclass(frozen=True)
class Span:
    """Evenly spaced elements along a dimension of an array, which make an axis of the value."""

    start: Affine
    size: int
    step: int = 1


@dataclasses.dataclass(frozen=True)
class Picks:
    """The elements start + array * step along a dimension."""

    start: Affine
    array: Value
    step: int


@dataclasses.dataclass(frozen=True)
class Index:
    """How one dimension of an array is indexed: by a scalar, and for all but single elements a number for each lane.

    Attributes:
      lanes: the numbers, as source that broadcasts against the value's tile.
      reach: the greatest of them inside the value's shape; infinite where unknown. The least is 0, or unknown too.
      span, axis: the slice that they come from, and its axis of the value.
      array: the array that they come from.
    """

    start: Affine
    lanes: str = ""
    reach: float = 0
    span: Span | None = None
    axis: int | None = None
    array: Value | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        if self.start.bounds is None or self.reach == math.inf:
            return -math.inf, math.inf
        low, high = self.start.bounds
        return low, high + self.reach


def indices_of(e, block: Block, transforms: Sequence) -> tuple[list[Index], tuple[int, ...]]:
    """Each dimension's index, and the shape that they select together."""
    selection = _select(e, block, transforms)
    kept = [s for s in selection if not isinstance(s, Affine)]
    picks = [i for i, s in enumerate(kept) if isinstance(s, Picks)]
    # As in NumPy, arrays that stand together put their axes there, else in front.
    together = bool(picks) and picks[-1] - picks[0] + 1 == len(picks)
    first = picks[0] if together else 0
    array_shape = next((s.array.shape for s in kept if isinstance(s, Picks)), ())
    sizes = [s.size for s in kept if isinstance(s, Span)]
    shape = (*sizes[:first], *array_shape, *sizes[first:])
    array_axes = range(first, first + len(array_shape))
    span_axes = (axis for axis in range(len(shape)) if axis not in array_axes)
    indices = []
    for s in selection:
        match s:
            case Affine():
                indices.append(Index(s))
            case Picks():
                indices.append(_picked(e, s, array_axes, len(shape)))
            case Span():
                axis = next(span_axes)
                lanes = e.lanes(s.size, axis, len(shape))
                lanes = lanes if s.step == 1 else f"{lanes} * {s.step}"
                # Axes of one element need no lanes, but a tile of one element needs its rank from somewhere.
                if s.size == 1 and (max(shape) > 1 or axis > 0):
                    lanes = ""
                indices.append(Index(s.start, lanes, (s.size - 1) * s.step, s, axis))
    return indices, shape


def _picked(e, picks: Picks, axes: range, rank: int) -> Index:
    array = picks.array
    lanes = e.tensor(array) if array.constant is None else e.let(e.tensor(array), array.shape, array.dtype, "full").text
    if rank > len(axes):
        lanes += f"[{', '.join(':' if a in axes else 'None' for a in range(rank))}]"
    if picks.step > 1:
        lanes += f" * {picks.step}"
    low, high = array.bounds or (-1, -1)
    return Index(picks.start, lanes, high * picks.step if low >= 0 else math.inf, array=array)


def _select(e, block: Block, transforms: Sequence) -> list[Affine | Span | Picks]:
    """What `transforms`, one applied to the result of the other, select in each dimension of the array."""
    selection: list[Affine | Span | Picks] = [
        start if d.squeezed else Span(start, d.size) for start, d in zip(block.starts, block.ref.block, strict=True)
    ]
    for transform in transforms:
        if not hasattr(transform, "indices") or any(isinstance(s, Picks) for s in selection):
            raise e.unsupported(
                f"a ref is transformed by {type(transform).__name__} before it is changed atomically",
                "Index the ref itself, once.",
            )
        spans = [(i, s) for i, s in enumerate(selection) if isinstance(s, Span)]
        for (i, span), index in zip(spans, transform.indices, strict=True):
            selection[i] = _narrowed(e, span, index)
    return selection


def _narrowed(e, span: Span, index) -> Affine | Span | Picks:
    if hasattr(index, "size") and hasattr(index, "stride"):
        if not isinstance(index.size, int):
            raise e.unsupported("a slice has a traced size", "Load a fixed size and mask it with `jnp.where`.")
        return Span(span.start + Affine.of(index.start) * span.step, index.size, span.step * index.stride)
    if getattr(index, "shape", ()):
        return Picks(span.start, index, span.step)
    if index.constant is not None and index.constant < 0:  # as in NumPy, counted from the end
        index = constant(index.constant + span.size, (), index.dtype)
    return span.start + Affine.of(index) * span.step


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A block that the Tensor Memory Accelerator moves: by which descriptor, from where, of which size."""

    name: str
    coordinates: str
    sizes: tuple[int, ...]


def transfer(e, block: Block, transforms: Sequence) -> Transfer | None:
    """This access by the Tensor Memory Accelerator, where that can do it.

    It reads zeros and drops stores outside of the array, in every dimension, as jtile promises. Dimensions of which a
    single element is taken come first, whatever their strides: Triton reads a block of (1, 1, m, n) as one of (m, n).
    """
    ref = block.ref
    if (
        not e.params.tma
        or ref.name not in e.one_way
        or ref.name in e.pointers
        or ref.dtype == np.bool_
        or four_bits(ref.dtype)
    ):
        return None
    indices, shape = indices_of(e, block, transforms)
    if any(i.array is not None or (i.span is not None and i.span.step > 1) for i in indices):
        return None
    dimensions = []
    for index, start, n, stride in zip(indices, block.starts, ref.shape, ref.strides, strict=True):
        size = 1 if index.axis is None else shape[index.axis]
        low, high = index.bounds
        if size != tile((size,))[0] and low + size < n:
            return None  # the lanes that pad the block would hold the array's elements
        fixed = size == 1 and index.start == start and 0 <= low and high < n
        dimensions.append(Dimension(tile((size,))[0], n, stride, index.start, fixed))
    if not e.params.warp_specialize:
        # Singles first; those of which there is but one element need no dimension.
        dimensions = [d for d in dimensions if not (d.fixed and d.extent == 1)]
        dimensions.sort(key=lambda d: d.size > 1)
        offset = Affine()
    else:
        # Triton divides the blocks of specialised warps, which works for matrices whose descriptor each program makes.
        offset = sum((d.start * d.stride for d in dimensions if d.fixed), Affine())
        dimensions = [d for d in dimensions if not d.fixed]
        if len(dimensions) != 2:
            return None
    if (
        not 2 <= len(dimensions) <= 5
        or sum(d.size > 1 for d in dimensions) != 2  # a matrix, as wgmma takes it
        or dimensions[-1].stride != 1
        or dimensions[-1].size * ref.dtype.itemsize < TMA_ROW
        or dimensions[-1].start.multiple * ref.dtype.itemsize % 16
        or max(d.size for d in dimensions[:-1]) < TMA_ROWS
        or any(d.size > TMA_LIMIT or not 0 < d.extent < 2**31 for d in dimensions)
        or any(s * ref.dtype.itemsize % 16 for s in ref.strides[:-1])
        or ref.strides[0] * ref.dtype.itemsize >= 2**40
    ):
        return None
    sizes = tuple(d.size for d in dimensions)
    made = Descriptor(ref.dtype, tuple(d.extent for d in dimensions), tuple(d.stride for d in dimensions), sizes)
    name = e.descriptor_on_device(ref, offset, made) if e.params.warp_specialize else e.descriptor(ref, made)
    coordinates = [" + ".join(d.start.summands()) or "0" for d in dimensions]
    if e.params.warp_specialize:
        # For the warps that take the second half of a block, Triton 3.9 changes the number that is the coordinate
        # wherever the kernel uses it, in masks too. Hidden behind a move, it is a number of its own.
        coordinates = [behind_a_move(c, np.int32) for c in coordinates]
    return Transfer(name, ", ".join(coordinates), sizes)


@dataclasses.dataclass(frozen=True)
class Dimension:
    """A dimension of an array, for a descriptor: how much of it is moved at once, and from where."""

    size: int
    extent: int
    stride: int
    start: Affine
    fixed: bool  # a single element, inside the array, the same for all of a program
