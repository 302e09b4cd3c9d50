"""A kernel's jaxpr becomes the text of a `@triton.jit` function, one line for each equation."""

import collections
import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import Literal, jaxprs_in_params

from jtile import borrowed
from jtile.compiler.kernel import Kernel, Place, Scratch, Source, UnsupportedKernel
from jtile.compiler.order import Order
from jtile.compiler.params import CompilerParams
from jtile.compiler.rules import CURES, FOUR_BITS, RULES, dot, random
from jtile.compiler.rules.shape import array_constant
from jtile.compiler.value import TRITON_TYPES, Affine, Block, Value, constant, four_bits, stored, tile, triton_type

# What an equation works on.
type Operand = Value | Block | Scratch

# Most programs along each axis of a CUDA grid.
GRID_LIMITS = (2**31 - 1, 65535, 65535)


def emit(kernel: Kernel, params: CompilerParams) -> Source:
    """The kernel as Triton source.

    Raises:
      UnsupportedKernel: the kernel uses what jtile cannot write in Triton.
      ValueError: `params` ask for what this kernel cannot have.
    """
    emitter = Emitter(kernel, params)
    for ref in kernel.refs:
        emitter.check_type(ref.dtype)
    grid = emitter.program_ids()
    blocks: list[Block] = []
    for ref in kernel.refs:
        starts: Sequence = [0] * len(ref.block)
        if ref.index_map is not None:
            starts = emitter.run(ref.index_map, [*emitter.ids, *blocks[: kernel.num_prefetched]])
        blocks.append(Block(ref, tuple(Affine.of(i) * d.step for i, d in zip(starts, ref.block, strict=True))))
    emitter.run(kernel.jaxpr, [*blocks, *map(emitter.allocate, kernel.scratch)])
    if params.warp_specialize and emitter.loops != 1:
        raise ValueError(
            f"CompilerParams: warp_specialize=True needs a kernel with exactly one loop; {kernel.name} "
            f"({kernel.where}) has {emitter.loops}. Merge its loops, or leave warp_specialize out."
        )
    types = tuple(stored(ref.dtype) for ref in kernel.refs)
    return Source(kernel.name, emitter.text(), types, grid, emitter.origins(), kernel.where)


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

    def __init__(self, kernel: Kernel, params: CompilerParams):
        self.kernel = kernel
        self.params = params
        self.ids: list[Value] = []  # this program's position along each axis of the grid
        names = [ref.name for ref in kernel.refs]
        threads = 32 * params.num_warps * params.num_ctas
        self.order = Order(threads, {names[kernel.num_inputs + o]: names[i] for i, o in kernel.input_output_aliases})
        self.loops = 0
        self.one_way = _one_way(kernel)
        self.helpers: dict[str, None] = {}  # functions to define ahead of the kernel, in order
        self.prelude: list[str] = []
        self.lines: list[str] = []
        self._depth = 1
        self._counts: collections.Counter[str] = collections.Counter()
        self._unassigned: dict[str, int] = {}  # scratch without a value so far, and how deep it was allocated
        self._uses: collections.Counter = collections.Counter()
        self._where = kernel.where
        self._computing = False

    # Writing

    def line(self, text: str) -> None:
        self.lines.append(Line("    " * self._depth + text, self.place))

    @contextlib.contextmanager
    def block(self, head: str) -> Iterator[None]:
        self.line(head)
        self._depth += 1
        start = len(self.lines)
        self.order.enter()
        yield
        loops = head.startswith(("for ", "while "))
        at_end, anywhere = self.order.leave(_assigned(self.lines[start - 1 :]) if loops else None)
        if at_end:
            self.line("tl.debug_barrier()")
        if anywhere and loops:  # nor may Triton load for the next turn before this one has stored
            self.lines[start - 1] = Line(self.lines[start - 1].replace("):", ", num_stages=1):"), self.place)
        if len(self.lines) == start:
            self.line("pass")
        self._depth -= 1

    def name(self, hint: str) -> str:
        self._counts[hint] += 1
        name = f"{hint}_{self._counts[hint]}"
        given = {ref.name for ref in self.kernel.refs} | {scratch.name for scratch in self.kernel.scratch}
        return name if name not in given else self.name(hint)

    def let(self, text: str, shape: tuple[int, ...], dtype, hint: str, **facts) -> Value:
        """Gives the expression `text` a name."""
        name = self.name(hint)
        self.line(f"{name} = {text}")
        return Value(name, shape, np.dtype(dtype), **facts)

    def once(self, name: str, text: str) -> str:
        """A name assigned at the top of the kernel."""
        line = f"    {name} = {text}"
        if line not in self.prelude:
            self.prelude.append(line)
        return name

    def allocate(self, scratch: Scratch) -> Scratch:
        """Makes it known. It is assigned here only if the kernel does not begin with an assignment of its own."""
        self.check_type(scratch.dtype)
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
        self.line(f"{scratch.name} = {self.tensor(value)}")

    def _initialise(self, scratch: Scratch) -> None:
        """Triton wants a value ahead of the loops and branches that assign another."""
        if self._unassigned.pop(scratch.name, None) is not None:
            self.once(scratch.name, self.tensor(constant(0, scratch.shape, scratch.dtype)))

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

    def text(self) -> str:
        parameters = ", ".join(ref.name for ref in self.kernel.refs)
        body = "\n".join([*self.prelude, *self.lines]) or "    pass"
        functions = [*self.helpers, f"@triton.jit\ndef {self.kernel.name}({parameters}):\n{body}"]
        imports = "import triton\nimport triton.language as tl"
        if any("libdevice." in f for f in functions):
            imports += "\nfrom triton.language.extra import libdevice"
        return "\n\n\n".join([imports, *functions]) + "\n"

    def origins(self) -> tuple[Place | None, ...]:
        """For each line of the text, where in the user's code it came from."""
        body = [getattr(line, "origin", None) for line in (*self.prelude, *self.lines)]
        return (None,) * (self.text().count("\n") - len(body)) + tuple(body)

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
            elif eqn.primitive.name in RULES:
                self.check_width(eqn)
                result = RULES[eqn.primitive.name](self, eqn, *map(read, eqn.invars))
            else:
                raise self.unsupported(
                    f"`{eqn.primitive.name}` has no form in Triton",
                    CURES.get(eqn.primitive.name, "Compute it outside of the kernel, or from simpler operations."),
                )
            values.update(zip(eqn.outvars, result if eqn.primitive.multiple_results else [result], strict=True))
            self._where = outer
        return [read(atom) for atom in results]

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
    def comment(self) -> str:
        """The user's line, without folders: the same on every machine."""
        return f"  # {self.place}" if self.place else ""

    @property
    def place(self) -> Place | None:
        """The user's line that the current equation comes from."""
        found = re.match(r"(.*?):(\d+)", self._where)
        return Place(found[1], int(found[2])) if found else None

    # Pieces

    def program_ids(self) -> tuple[int, int, int]:
        """Names this program's position along each axis of the grid; returns the grid to launch.

        Axes that `jax.vmap` added run slowest. Where CUDA's three axes do not suffice, one axis counts all programs.
        """
        grid, mapped = self.kernel.grid, self.kernel.mapped
        order = [*self.kernel.own_axes, *reversed(mapped)]
        order = [a for a in order if grid[a] != 1]
        sizes = [grid[a] for a in order]
        programs = math.prod(sizes)
        if not 0 < programs <= GRID_LIMITS[0]:
            raise self.unsupported(f"its grid {grid} has {programs} programs", f"Launch 1 to {GRID_LIMITS[0]}.")
        self.ids = [constant(0, (), np.int32) for _ in grid]
        flat = len(sizes) > 3 or any(n > limit for n, limit in zip(sizes, GRID_LIMITS, strict=False))
        if flat:
            self.once("pid", "tl.program_id(0)")
        stride = 1
        for i, (axis, size) in enumerate(zip(order, sizes, strict=True)):
            whole = f"pid // {stride}" if stride > 1 else "pid"
            text = f"{whole} % {size}" if i + 1 < len(order) else whole
            name = self.once(f"pid_{axis}", text if flat else f"tl.program_id({i})")
            self.ids[axis] = Value(name, (), np.dtype(np.int32), bounds=(0, size - 1))
            stride *= size
        x, y, z = (programs, 1, 1) if flat else (*sizes, 1, 1, 1)[:3]
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
        return f"tl.full({list(value.tile)}, {value.text}, {triton_type(value.dtype)})"

    def operands(self, *values: Value, shape: tuple[int, ...]) -> list[str]:
        """The values as operands of one operation with a result of this shape.

        Constants stay literals where other operands give the type and the shape.
        """
        given = [v.shape for v in values if v.constant is None]
        if given and np.broadcast_shapes(*given) == shape:
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
        return self.let(
            f"tl.where({self.inside(value.shape, axes)}, {value.text}, {text})", value.shape, value.dtype, "fill"
        )


def _understands_keys(eqn) -> bool:
    """Whether it is of `jax.random`, or holds a jaxpr that works on keys."""
    return eqn.primitive.name.startswith("random_") or any(jaxprs_in_params(eqn.params))


def _assigned(lines: Iterable[str]) -> set[str]:
    """The names that these lines of source assign."""
    heads = (re.match(r"\s*(?:for )?([\w, ]+?) (?:=|in) ", line) for line in lines)
    return {name for head in heads if head for name in head[1].split(", ")}


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
    aliased = {j for i, o in kernel.input_output_aliases for j in (i, kernel.num_inputs + o)}
    return {
        ref.name
        for i, (ref, var) in enumerate(zip(kernel.refs, kernel.jaxpr.invars, strict=False))
        if len(directions[var]) == 1 and i not in aliased
    }
