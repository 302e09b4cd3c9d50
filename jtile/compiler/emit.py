"""A kernel's jaxpr becomes the text of a `@triton.jit` function, one line for each equation."""

import collections
import contextlib
import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import Literal, jaxprs_in_params

from jtile import borrowed
from jtile.compiler.arguments import Array, Descriptor
from jtile.compiler.kernel import Kernel, Place, Ref, Scratch, Source, TileTooLarge, UnsupportedKernel
from jtile.compiler.order import Order
from jtile.compiler.params import CompilerParams
from jtile.compiler.rules import CURES, FOUR_BITS, RULES, dot, random
from jtile.compiler.rules.shape import array_constant
from jtile.compiler.value import (
    TRITON_TYPES,
    Affine,
    Block,
    Value,
    constant,
    float8,
    four_bits,
    is_wide,
    stored,
    tile,
    triton_type,
)

# What an equation works on.
type Operand = Value | Block | Scratch

# Most programs along each axis of a CUDA grid.
GRID_LIMITS = (2**31 - 1, 65535, 65535)

# Of a tile, as Triton counts.
MOST_ELEMENTS = 2**20


class CannotSpecialize(ValueError):
    """A kernel whose loads and products cannot have warps of their own."""


def emit(kernel: Kernel, params: CompilerParams) -> Source:
    """The kernel as Triton source. What `params` leave open is not used.

    Raises:
      UnsupportedKernel: the kernel uses what jtile cannot write in Triton.
      TileTooLarge: a tile has more elements than Triton takes.
      CannotSpecialize: `params` ask for specialised warps, which this kernel cannot have.
    """
    pointers: set[str] = set()
    while True:
        emitter = Emitter(kernel, params, pointers)
        source = emitter.source()
        # An output's buffer is passed once, so several ways to write it must share a pointer.
        shared = {ref.name for ref in kernel.outputs if len(emitter.parameters[ref.name]) > 1}
        if not shared:
            return source
        pointers |= shared


class Line(str):
    """A line of the source, and where in the user's code it came from."""

    origin: Place | None

    def __new__(cls, text: str, origin: Place | None):
        line = super().__new__(cls, text)
        line.origin = origin
        return line


class Emitter:
    """Writes the body of one kernel. Rules call `let` and `line`; the rest gives them the pieces they share.

    Every name is assigned once, except for the values that loops and branches carry.
    """

    def __init__(self, kernel: Kernel, params: CompilerParams, pointers: set[str]):
        self.kernel = kernel
        self.params = params
        self.pointers = pointers  # refs that may not be reached by descriptors
        # How each ref is passed, by the parameter's name.
        self.parameters: dict[str, dict[str, Array | Descriptor]] = {ref.name: {} for ref in kernel.refs}
        self.ids: list[Value] = []  # this program's position along each axis of the grid
        names = [ref.name for ref in kernel.refs]
        threads = 32 * params.num_warps * params.num_ctas
        self.changing: set[str] = set()  # names that are assigned again, and copies of them
        self.order = Order(threads, {names[kernel.num_inputs + o]: names[i] for i, o in kernel.input_output_aliases})
        self.sizes: list[Value] = []  # programs along each axis
        self.programs: str | None = None  # how many there are, where each takes the place of several in turn
        self.loops = 0
        self.loads_in_loops: list[str] = []  # where in the user's code, those by pointers
        self.loaded: list[str] = []  # refs, by pointers
        self.one_way = _one_way(kernel)
        self.helpers: dict[str, None] = {}  # functions to define ahead of the kernel, in order
        self.prelude: list[str] = []  # what is the same for every program
        self.start: list[str] = []  # the program's place in the grid, and its scratch
        self.bases: list[str] = []  # where its blocks begin
        self.lines: list[str] = []
        self._depth = 1
        self._shared: dict[str, str] = {}
        self._indices: list[dict[tuple, Value]] = [{}]  # results of integer arithmetic, by block of the source
        self._counts: collections.Counter[str] = collections.Counter()
        self._unassigned: dict[str, int] = {}  # scratch without a value so far, and how deep it was allocated
        self._uses: collections.Counter = collections.Counter()
        self._where = kernel.where
        self._computing = False

    def source(self) -> Source:
        kernel = self.kernel
        for ref in kernel.refs:
            self.check_type(ref.dtype)
        grid = self.program_ids()
        blocks: list[Block] = []
        for ref in kernel.refs:
            starts: Sequence = [0] * len(ref.block)
            if ref.index_map is not None:
                prefetched = blocks[kernel.num_sizes :][: kernel.num_prefetched]
                starts = self.run(ref.index_map, [*self.ids, *prefetched])
            blocks.append(Block(ref, tuple(Affine.of(i) * d.step for i, d in zip(starts, ref.block, strict=True))))
        index_maps = len(self.lines)
        self.run(kernel.jaxpr, [*blocks[kernel.num_sizes :], *map(self.allocate, kernel.scratch)])
        self.lines[index_maps:index_maps] = self.bases
        if self.params.warp_specialize:
            self.check_specialized()
        for ref in kernel.refs:
            if not self.parameters[ref.name]:
                self.pointer(ref)
        passed = [(i, p) for i, ref in enumerate(kernel.refs) for p in self.parameters[ref.name].values()]
        text, origins = self.text()
        return Source(
            name=kernel.name,
            text=text,
            arguments=tuple(argument for _, argument in passed),
            buffers=tuple(i for i, _ in passed),
            grid=grid,
            origins=origins,
            where=kernel.where,
        )

    def check_specialized(self) -> None:
        kernel = f"{self.kernel.name} ({self.kernel.where})"
        if self.loops != 1 or self.programs is not None:
            raise CannotSpecialize(
                "CompilerParams: warp_specialize=True needs a kernel with exactly one loop, and not persistent; "
                f"{kernel} has {self.loops}. Merge its loops, or leave warp_specialize out."
            )
        if self.loads_in_loops:
            raise CannotSpecialize(
                "CompilerParams: warp_specialize=True needs the Tensor Memory Accelerator for every load in the loop; "
                f"{kernel} loads by pointers at {', '.join(dict.fromkeys(self.loads_in_loops))}. Set tma=True and load "
                "blocks that it can move, or leave warp_specialize out."
            )
        if any(line.startswith(" " * 8) and "tl.debug_barrier()" in line for line in self.lines):
            raise CannotSpecialize(
                f"CompilerParams: warp_specialize=True sets warps that run the loop apart; those of {kernel} wait for "
                "each other in it. Write to one part of each ref there, or leave warp_specialize out."
            )

    # Writing

    def line(self, text: str) -> None:
        self.lines.append(Line("    " * self._depth + text, self.place))

    @contextlib.contextmanager
    def block(self, head: str) -> Iterator[None]:
        self.line(head)
        self._depth += 1
        self._indices.append({})
        start, loads = len(self.lines), len(self.loaded)
        self.order.enter()
        yield
        loops = head.startswith(("for ", "while "))
        at_end, anywhere = self.order.leave(_assigned(self.lines[start - 1 :]) if loops else None)
        if at_end:
            self.line("tl.debug_barrier()")
        if anywhere and loops:  # nor may Triton load for the next turn before this one has stored
            self.lines[start - 1] = Line(self.lines[start - 1].replace("):", ", num_stages=1):"), self.place)
        elif head.startswith("for ") and self.streams(self.lines[start:], self.loaded[loads:]):
            stages = f", num_stages={self.params.num_stages}):"
            self.lines[start - 1] = Line(self.lines[start - 1].replace("):", stages), self.place)
        if len(self.lines) == start:
            self.line("pass")
        self._indices.pop()
        self._depth -= 1

    def name(self, hint: str) -> str:
        self._counts[hint] += 1
        name = f"{hint}_{self._counts[hint]}"
        given = {ref.name for ref in self.kernel.refs} | {scratch.name for scratch in self.kernel.scratch}
        return name if name not in given else self.name(hint)

    def let(self, text: str, shape: tuple[int, ...], dtype, hint: str, **facts) -> Value:
        """Gives the expression `text` a name."""
        if math.prod(tile(shape)) > MOST_ELEMENTS:
            raise TileTooLarge(
                f"Kernel {self.kernel.name}, at {self._where}: a tile of shape {tuple(tile(shape))} has "
                f"{math.prod(tile(shape)):,} elements; Triton takes at most {MOST_ELEMENTS:,}. Shrink the kernel's "
                "blocks, or go through them in a loop."
            )
        name = self.name(hint)
        self.line(f"{name} = {text}")
        if text in self.changing:
            self.changing.add(name)
        return Value(name, shape, np.dtype(dtype), **facts)

    def variable(self, value: Value, hint: str) -> Value:
        """A name that loops assign again, which holds `value` for now."""
        variable = self.let(self.tensor(value), value.shape, value.dtype, hint)
        self.changing.add(variable.text)
        return variable

    def set(self, name: str, text: str) -> None:
        """Assigns a name again.

        Triton takes a name to stay what it is in a loop if a first look at the body finds it equal to what it was. That
        may be so just then, where it gets what another name held. What `tl.where` gives is never equal to anything.
        """
        held = self._depth > 1 and text in self.changing
        self.line(f"{name} = {f'tl.where(True, {text}, {text})' if held else text}")

    def once(self, name: str, text: str) -> str:
        """A name assigned at the top of the kernel."""
        line = f"    {name} = {text}"
        if line not in self.prelude:
            self.prelude.append(line)
        return name

    def shared(self, text: str, hint: str) -> str:
        """A name, assigned at the top of the kernel, for an expression of the prelude's names alone."""
        name = self._shared.get(text)
        if name is None:
            name = self._shared[text] = self.once(self.name(hint), text)
        return name

    def pointer(self, ref: Ref) -> str:
        """The parameter that points to an array."""
        self.parameters[ref.name][ref.name] = Array(stored(ref.dtype))
        return ref.name

    def descriptor(self, ref: Ref, descriptor: Descriptor) -> str:
        """The parameter that is this descriptor of an array."""
        name = _descriptor_name(ref, descriptor)
        given = self.parameters[ref.name]
        while given.get(name, descriptor) != descriptor:
            name += "_"
        given[name] = descriptor
        return name

    def descriptor_on_device(self, ref: Ref, offset: Affine, descriptor: Descriptor) -> str:
        """A descriptor of the array from `offset`, which every program makes: a microsecond each, and memory."""
        pointer = " + ".join([self.pointer(ref), *offset.summands(is_wide(ref))])
        shape, strides, block = (list(n) for n in (descriptor.shape, descriptor.strides, descriptor.block_shape))
        text = f"tl.make_tensor_descriptor({pointer}, shape={shape}, strides={strides}, block_shape={block})"
        if text not in self._shared:
            self._shared[text] = self.name(_descriptor_name(ref, descriptor))
            self.bases.append(f"    {self._shared[text]} = {text}")
        return self._shared[text]

    def streams(self, body: Sequence[str], loaded: Sequence[str]) -> bool:
        """Whether Triton is to be told to load ahead in a loop with this body, where it sees no product to load for.

        What the loop loads must be nothing that the kernel also stores: Triton does not look.
        """
        return (
            self.params.num_stages > 2
            and self.one_way.issuperset(loaded)
            and not any(part in line for line in body for part in ("tl.dot", "for ", "while "))
        )

    def by_pointer(self, ref: Ref) -> None:
        """Notes a load that the Tensor Memory Accelerator does not do."""
        self.loaded.append(ref.name)
        if self._depth > 1:
            self.loads_in_loops.append(self._where)

    def base(self, block: Block) -> tuple[str, Affine]:
        """A pointer to where a block begins, and the offset that it holds already."""
        ref = block.ref
        offset = Affine()
        for start, stride in zip(block.starts, ref.strides, strict=True):
            offset += start * stride
        if not offset.terms:
            return self.pointer(ref), Affine()
        name = f"{ref.name}_block"
        line = f"    {name} = {' + '.join([self.pointer(ref), *offset.summands(is_wide(ref))])}"
        if line not in self.bases:
            self.bases.append(line)
        return name, offset

    def allocate(self, scratch: Scratch) -> Scratch:
        """Makes it known. It is assigned here only if the kernel does not begin with an assignment of its own."""
        self.check_type(scratch.dtype)
        self.changing.add(scratch.name)
        self._unassigned[scratch.name] = self._depth
        return scratch

    def read(self, scratch: Scratch) -> Value:
        """The present contents, which stay what they are when the scratch is assigned again."""
        self._initialise(scratch)
        return self.let(scratch.name, scratch.shape, scratch.dtype, scratch.name.removesuffix("_ref"))

    def assign(self, scratch: Scratch, value: Value) -> None:
        if self._unassigned.get(scratch.name) == self._depth:
            del self._unassigned[scratch.name]
        self._initialise(scratch)
        self.set(scratch.name, self.tensor(value))

    def _initialise(self, scratch: Scratch) -> None:
        """Triton wants a value ahead of the loops and branches that assign another."""
        if self._unassigned.pop(scratch.name, None) is not None:
            self.start.append(f"    {scratch.name} = {self.tensor(constant(0, scratch.shape, scratch.dtype))}")

    def helper(self, name: str, text: str) -> str:
        """A function defined ahead of the kernel."""
        self.helpers[text.strip()] = None
        return name

    def function(self, jaxpr, hint: str) -> str:
        """A function of numbers, defined ahead of the kernel."""
        name = f"_{self.name(hint)}"
        operands = [Value(self.name("x"), v.aval.shape, np.dtype(v.aval.dtype)) for v in jaxpr.invars]
        outer, depth = self.lines, self._depth
        self.lines, self._depth = [], 1
        results = [self.tensor(v) for v in self.run(jaxpr, operands)]
        self.line(f"return {', '.join(results)}")
        body, self.lines, self._depth = "\n".join(self.lines), outer, depth
        return self.helper(name, f"@triton.jit\ndef {name}({', '.join(v.text for v in operands)}):\n{body}")

    def text(self) -> tuple[str, tuple[Place | None, ...]]:
        """The whole module, and for each of its lines where in the user's code it came from."""
        lines = [*self.start, *self.lines]
        if self.programs is not None:
            # Flattened, the loads of the next turn begin before this one has ended. Triton 3.9 fails on some loops (it
            # gives the branches of an `if` buffers of two types), so only those are that somebody asked for.
            flatten = ", flatten=True" if self.loops == 1 and not self.kernel.num_sizes else ""
            head = f"    for pid in tl.range(tl.program_id(0), {self.programs}, tl.num_programs(0){flatten}):"
            lines = [head, *(Line(f"    {line}", _origin(line)) for line in lines or ["    pass"])]
        body = [*_used(self.prelude, lines), *lines] or ["    pass"]
        parameters = ", ".join(name for ref in self.kernel.refs for name in self.parameters[ref.name])
        functions = [*self.helpers, "\n".join([f"@triton.jit\ndef {self.kernel.name}({parameters}):", *body])]
        imports = "import triton\nimport triton.language as tl"
        if any("libdevice." in f for f in functions):
            imports += "\nfrom triton.language.extra import libdevice"
        text = "\n\n\n".join([imports, *functions]) + "\n"
        origins = [_origin(line) for line in body]
        return text, (None,) * (text.count("\n") - len(origins)) + tuple(origins)

    # Walking

    def run(
        self,
        jaxpr,
        operands: Sequence[Operand],
        results: Sequence | None = None,
        captured: Sequence[Operand] | None = None,
    ) -> list[Value]:
        """Emits the equations on which `results` depend, by default all of the jaxpr's, and returns them.

        `captured` are the values of its constants, where it does not hold them itself.
        """
        results = jaxpr.outvars if results is None else results
        values = dict(zip(jaxpr.invars, operands, strict=True))
        if captured is None:
            captured = [self.constant(c, v.aval) for v, c in zip(jaxpr.constvars, jaxpr.consts, strict=True)]
        values.update(zip(jaxpr.constvars, captured, strict=True))

        def read(atom):
            return self.constant(atom.val, atom.aval) if isinstance(atom, Literal) else values[atom]

        equations = _needed(jaxpr.eqns, results)
        uses = collections.Counter(v for eqn in equations for v in eqn.invars if not isinstance(v, Literal))
        uses.update(v for v in results if not isinstance(v, Literal))
        self._uses.update(uses)
        sums = dot.accumulations(equations, uses)
        for eqn in equations:
            if any(eqn is product for product, _ in sums.values()):
                continue  # emitted with its sum
            outer = self._where
            if not self._computing:
                self._where = source_info_util.summarize(eqn.source_info) or outer
            for dtype in {v.aval.dtype for v in eqn.outvars if hasattr(v.aval, "dtype")}:
                if isinstance(dtype, np.dtype):  # those of keys are words of 32 bits
                    self.check_type(dtype)
            if eqn.outvars and eqn.outvars[0] in sums:
                product, accumulator = sums[eqn.outvars[0]]
                result = dot.dot_general(self, product, *map(read, product.invars), accumulator=read(accumulator))
            elif any(borrowed.is_key(v.aval) for v in eqn.invars) and not _understands_keys(eqn):
                result = random.moved(self, eqn, *map(read, eqn.invars))
                result = result if eqn.primitive.multiple_results else result[0]
            elif _is_index_arithmetic(eqn):
                result = self.index(eqn, *map(read, eqn.invars))
            elif eqn.primitive.name in RULES:
                self.check_width(eqn)
                result = RULES[eqn.primitive.name](self, eqn, *map(read, eqn.invars))
            elif eqn.primitive.name.startswith("jtile_"):
                self._where = self.kernel.where  # the equation's line is one of jtile's
                raise self.unsupported(
                    f"it calls the op {eqn.primitive.name.removeprefix('jtile_')}, which launches kernels of its own",
                    "Call the op outside of the kernel, or write what it computes in jax.numpy.",
                )
            else:
                raise self.unsupported(
                    f"`{eqn.primitive.name}` has no form in Triton",
                    CURES.get(eqn.primitive.name, "Compute it outside of the kernel, or from simpler operations."),
                )
            values.update(zip(eqn.outvars, result if eqn.primitive.multiple_results else [result], strict=True))
            self._where = outer
        return [read(atom) for atom in results]

    def index(self, eqn, *operands) -> Value:
        """The result of an equation on integers, which is written once where it is the same."""
        key = eqn.primitive.name, str(eqn.params), tuple((v.text, v.shape, v.dtype.name) for v in operands)
        for known in self._indices:
            if key in known:
                return known[key]
        result = self._indices[-1][key] = RULES[eqn.primitive.name](self, eqn, *operands)
        return result

    def forget(self, names: Container[str]) -> None:
        """What was computed from these names is no longer what it was: they are assigned again."""
        for known in self._indices:
            for key in [key for key in known if any(text in names for text, *_ in key[2])]:
                del known[key]

    def hoist(self, body, operands: Sequence[Operand], varying: Container[int]) -> None:
        """Writes the integer arithmetic in a loop's body that no turn changes, ahead of the loop."""
        values = {v: x for i, (v, x) in enumerate(zip(body.invars, operands, strict=True)) if i not in varying}
        for eqn in _needed(body.eqns, body.outvars):
            inputs = [v for v in eqn.invars if not isinstance(v, Literal)]
            if _is_index_arithmetic(eqn) and all(v in values for v in inputs):
                given = (self.constant(v.val, v.aval) if isinstance(v, Literal) else values[v] for v in eqn.invars)
                values[eqn.outvars[0]] = self.index(eqn, *given)

    def compute(self, function: Callable, *operands: Value) -> list[Value]:
        """The results of a function of arrays, by the rules of the primitives that it consists of."""
        jaxpr = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in operands))
        outer, self._computing = self._computing, True  # what goes wrong in there goes wrong at the user's line
        results = self.run(jaxpr, operands)
        self._computing = outer
        return results

    def is_used(self, variable) -> bool:
        """Whether an equation or result so far entered depends on a variable."""
        return self._uses[variable] > 0

    def constant(self, number, aval) -> Value:
        if np.size(number) != 1:
            return array_constant(self, np.asarray(number, aval.dtype))
        return constant(number, aval.shape, aval.dtype)

    def unsupported(self, what: str, cure: str) -> UnsupportedKernel:
        """The error to raise for the current equation."""
        return UnsupportedKernel(f"jtile cannot compile kernel {self.kernel.name}, at {self._where}: {what}. {cure}")

    def check_type(self, dtype) -> None:
        if dtype.name not in TRITON_TYPES:
            raise self.unsupported(f"Triton has no {dtype.name}", f"It has {', '.join(TRITON_TYPES)}.")

    def check_width(self, eqn) -> None:
        """Numbers of four bits are moved, compared and converted: sums in the bytes that hold them would not wrap."""
        types = {getattr(v.aval, "dtype", None) for v in (*eqn.invars, *eqn.outvars)}
        narrow = [t.name for t in types if isinstance(t, np.dtype) and four_bits(t)]
        if narrow and eqn.primitive.name not in FOUR_BITS and not list(jaxprs_in_params(eqn.params)):
            raise self.unsupported(
                f"`{eqn.primitive.name}` of {narrow[0]} has no form in Triton", "Convert to int8 first."
            )

    @property
    def place(self) -> Place | None:
        """The user's line that the current equation comes from."""
        found = re.match(r"(.*?):(\d+)", self._where)
        return Place(found[1], int(found[2])) if found else None

    # Pieces

    def program_ids(self) -> tuple[int, int, int]:
        """Names this program's position along each axis of the grid; returns the grid to launch.

        Axes that `jax.vmap` added run slowest. Where CUDA's three axes do not suffice, one axis counts all programs.
        Where a size is traced, each program takes the place of several in turn, and so any number of them may be
        launched.
        """
        grid, mapped = self.kernel.grid, self.kernel.mapped
        order = [*self.kernel.own_axes, *reversed(mapped)]
        order = [a for a in order if grid[a] != 1]
        traced = iter(self.kernel.refs)
        self.sizes = [constant(1 if n is None else n, (), np.int32) for n in grid]
        for axis in (a for a, n in enumerate(grid) if n is None):
            name = self.once(f"size_{axis}", f"tl.load({self.pointer(next(traced))})")
            self.sizes[axis] = Value(name, (), np.dtype(np.int32), bounds=(0, GRID_LIMITS[0]))
        sizes = [n for a in order if (n := grid[a]) is not None]
        known = math.prod(sizes)
        if not 0 < known <= GRID_LIMITS[0]:
            raise self.unsupported(f"its grid {grid} has {known} programs", f"Launch 1 to {GRID_LIMITS[0]}.")
        self.ids = [constant(0, (), np.int32) for _ in grid]
        flat = len(sizes) > 3 or any(n > limit for n, limit in zip(sizes, GRID_LIMITS, strict=False))
        if self.params.persistent or None in grid:
            flat, self.programs = True, _product(self.sizes)
        elif flat:
            self.start.append("    pid = tl.program_id(0)")
        for i, axis in enumerate(order):
            faster, size = [self.sizes[a] for a in order[:i]], self.sizes[axis]
            stride = _product(faster)
            whole = "pid" if stride == "1" else f"pid // ({stride})" if "*" in stride else f"pid // {stride}"
            text = f"{whole} % {size.text}" if i + 1 < len(order) else whole
            name = f"pid_{axis}"
            self.start.append(f"    {name} = {text if flat else f'tl.program_id({i})'}")
            assert size.bounds is not None
            self.ids[axis] = Value(name, (), np.dtype(np.int32), bounds=(0, size.bounds[1] - 1))
        if None in grid:
            return 1, 1, 1
        x, y, z = (known, 1, 1) if flat else (*sizes, 1, 1, 1)[:3]
        return x, y, z

    def lanes(self, size: int, axis: int = 0, rank: int = 1) -> str:
        """0, 1, ... along `axis` of a tile of this rank, at least up to `size`."""
        (size,) = tile((size,))
        name = self.once(f"lanes_{size}", f"tl.arange(0, {size})")
        return name if rank == 1 else f"{name}[{', '.join(':' if a == axis else 'None' for a in range(rank))}]"

    def tensor(self, value: Value) -> str:
        """The value as a tile (or typed scalar) of its own."""
        if value.constant is None:
            return value.text
        if float8(value.dtype):  # of which Triton 3.6 makes no constants
            return f"tl.cast(tl.full({list(value.tile)}, {value.text}, tl.float32), {triton_type(value.dtype)})"
        return f"tl.full({list(value.tile)}, {value.text}, {triton_type(value.dtype)})"

    def operands(self, *values: Value, shape: tuple[int, ...]) -> list[str]:
        """The values as operands of one operation with a result of this shape.

        Constants stay literals where other operands give the type and the shape.
        """
        given = [v.shape for v in values if v.constant is None]
        if given and np.broadcast_shapes(*given) == shape and not any(float8(v.dtype) for v in values):
            return [v.text for v in values]
        return [v.text if v.constant is None else self.tensor(constant(v.constant, shape, v.dtype)) for v in values]

    def spread(self, value: Value, shape: tuple[int, ...]) -> Value:
        """The value, given to every lane of `shape`."""
        if value.constant is not None:
            return constant(value.constant, shape, value.dtype)
        if value.shape == shape:
            return value
        text = f"tl.broadcast_to({value.text}, {list(tile(shape))})"
        return self.let(text, shape, value.dtype, "spread", bounds=value.bounds)

    def inside(self, shape: tuple[int, ...], axes: Sequence[int]) -> str:
        """Which lanes of a tile lie inside `shape` along `axes`."""
        tests = [f"{self.lanes(shape[a], a, len(shape))} < {shape[a]}" for a in axes]
        return tests[0] if len(tests) == 1 else " & ".join(f"({t})" for t in tests)

    def filled(self, value: Value, axes: Sequence[int], filler: bool | int | float) -> Value:
        """`value`, with `filler` in the lanes outside its shape along `axes`."""
        axes = [a for a in value.padded_axes if a in axes]
        if value.constant is not None:
            value = self.let(self.tensor(value), value.shape, value.dtype, "full")
        if not axes or (value.zero_padded and filler == 0):
            return value
        text = constant(filler, (), value.dtype).text
        if float8(value.dtype):
            text = self.tensor(constant(filler, (), value.dtype))
        return self.let(
            f"tl.where({self.inside(value.shape, axes)}, {value.text}, {text})", value.shape, value.dtype, "fill"
        )


def _is_index_arithmetic(eqn) -> bool:
    """Whether an equation computes integers or truth values from nothing but those."""
    types = [getattr(v.aval, "dtype", None) for v in (*eqn.invars, *eqn.outvars)]
    return (
        eqn.primitive.name in RULES
        and not eqn.primitive.multiple_results
        and not eqn.effects
        and not any(jaxprs_in_params(eqn.params))
        and all(isinstance(t, np.dtype) and t.kind in "biu" for t in types)
        and not any(hasattr(v.aval, "inner_aval") for v in eqn.invars)  # refs
    )


def _understands_keys(eqn) -> bool:
    """Whether it is of `jax.random`, or holds a jaxpr that works on keys."""
    return eqn.primitive.name.startswith("random_") or any(jaxprs_in_params(eqn.params))


def _assigned(lines: Iterable[str]) -> set[str]:
    """The names that these lines of source assign."""
    heads = (re.match(r"\s*(?:for )?([\w, ]+?) (?:=|in) ", line) for line in lines)
    return {name for head in heads if head for name in head[1].split(", ")}


def _origin(line: str) -> Place | None:
    return getattr(line, "origin", None)


def _used(prelude: list[str], lines: list[str]) -> list[str]:
    """The prelude without what came of no use: a descriptor needs no lanes."""
    kept: list[str] = []
    text = "\n".join(lines)
    for line in reversed(prelude):
        name = line.split(" = ", 1)[0].strip()
        if re.search(rf"\b{name}\b", text):
            kept.insert(0, line)
            text += "\n" + line
    return kept


def _product(sizes: Sequence[Value]) -> str:
    """The product of a grid's sizes, as source."""
    known = math.prod(int(n.constant) for n in sizes if n.constant is not None)
    factors = [n.text for n in sizes if n.constant is None]
    return " * ".join([*factors, *([str(known)] if known != 1 or not factors else [])])


def _descriptor_name(ref: Ref, descriptor: Descriptor) -> str:
    return f"{ref.name}_{'x'.join(str(n) for n in descriptor.block_shape if n > 1)}"


def _needed(equations: Sequence, results: Sequence) -> list:
    """The equations that have effects or on which `results` depend."""
    needed = {v for v in results if not isinstance(v, Literal)}
    kept = []
    for eqn in reversed(equations):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            kept.append(eqn)
            needed.update(v for v in eqn.invars if not isinstance(v, Literal))
    return kept[::-1]


def _one_way(kernel: Kernel) -> set[str]:
    """Refs that are only read or only written: what the Tensor Memory Accelerator wrote cannot be read back at once."""
    directions = collections.defaultdict(set)
    for effect in kernel.jaxpr.effects:
        directions[getattr(effect, "input", None)].add(type(effect))
    aliased = {j - kernel.num_sizes for i, o in kernel.input_output_aliases for j in (i, kernel.num_inputs + o)}
    return {
        ref.name
        for i, (ref, var) in enumerate(zip(kernel.refs[kernel.num_sizes :], kernel.jaxpr.invars, strict=False))
        if len(directions[var]) == 1 and i not in aliased
    }
