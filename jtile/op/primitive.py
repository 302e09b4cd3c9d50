"""TileOp: a function on tiles made a JAX primitive. Read this first.

An op is a signature, a reference, a kernel and a derivative. Everything else that JAX asks of a primitive is a rule
read off the signature: `rules.py` holds batching and differentiation, `sharding.py` the mesh, `lowering.py` the choice
between kernel and reference.
"""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

from jtile.op import lowering, rules, sharding
from jtile.op.signature import Signature

Implementation = Literal["triton", "xla", "interpret"] | None
IMPLEMENTATIONS = (None, "triton", "xla", "interpret")


def check_known(op: str, **arguments: Any) -> None:
    """Refuse traced arrays where a function of this name needs to know the value."""
    for name, value in arguments.items():
        if isinstance(value, jax.core.Tracer):
            raise ValueError(
                f"{op}: `{name}` must be known when tracing, got a traced array; close over a Python value, or under "
                "jit mark it with static_argnames"
            )


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static about one call of an op; the one parameter of its primitive.

    `present` tells which operands were given: only those are bound. `groups` tells for each of those which group axes
    lead it, outermost first. A group axis is a mapped axis of `vmap` over which the op's results must not be summed:
    the kernel is launched once for all groups, and an operand without the axis is read by all of them. `split` tells
    which mesh axes split a dimension, where operands are one device's parts.
    """

    present: tuple[bool, ...]
    groups: tuple[tuple[bool, ...], ...]
    implementation: Implementation
    static: tuple[tuple[str, Hashable], ...]
    split: sharding.Split = ()

    @property
    def group_count(self) -> int:
        return max(map(len, self.groups), default=0)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that this call passes on to the calls it makes, as a transpose rule gets them."""
        return {**dict(self.static), "implementation": self.implementation}

    def on(self, operands: Sequence, groups: Sequence[tuple[bool, ...]]) -> "Call":
        """The same of other operands, None for what is absent."""
        present = tuple(o is not None for o in operands)
        return dataclasses.replace(self, present=present, groups=tuple(itertools.compress(groups, present)))

    def given(self, values: Sequence) -> tuple:
        """Of one entry for every operand of the signature, those of the operands given."""
        return tuple(itertools.compress(values, self.present))

    def expand(self, values: Sequence, absent: Any = None) -> list:
        """One entry for every operand of the signature, `absent` where none was given."""
        given = iter(values)
        return [next(given) if p else absent for p in self.present]


def _part(attribute: str) -> Callable:
    """A decorator that makes the function a part of the op."""

    def decorate(op: "TileOp", function: Callable) -> Callable:
        setattr(op, attribute, function)
        return function

    return decorate


class TileOp:
    """A tile kernel as a JAX operation, defined by its signature, reference, kernel and derivative.

    Args:
        name: the primitive's name, and what errors call the op.
        signature: operands, results and their dimensions, in the language of `jtile.op.signature`:
            `"x: ... d, scale: d -> y: ... d; rstd: ..."`.
        whole: dimensions that the kernel needs whole, separated by blanks. They are gathered, never split.

    The parts are given by decorators:

    * `@op.reference`: the meaning, in `jax.numpy`, on operands of any leading shape. Returns a tuple, one entry a
      result, `None` for an optional result that is absent. It runs wherever the kernel does not, and forward-mode and
      second-order derivatives come from it.
    * `@op.kernel`: the same function by `pl.pallas_call` or `jtile.triton_call`; `...` arrives folded into one leading
      dimension. Optional: an op without a kernel runs its reference everywhere.
    * `@op.limits`: gets the kernel's operands as `jax.ShapeDtypeStruct`s and returns why the kernel cannot serve them,
      as a clause, or `None`. Optional.
    * `@op.tiles`: gets the same, and the chip as `target`, and yields the tiles that the kernel may be launched with,
      the one to use untuned first. The kernel then gets the chosen one as `tile`. `jtile.tuning` has more. Optional.
    * `@op.notes`: gets the same and the chosen tile as `tile`, and returns what `jtile.explain` is to add. Optional.
    * `@op.transpose`: reverse mode. `transpose(operands, results, cotangents, **options)` returns one cotangent an
      operand, `None` for zero, usually by calling another `TileOp`, the backward kernel. The first result's cotangent
      is always an array, another's is `None` where it is zero. Optional: the reference is differentiated without it.

    Calling the op takes arrays in the signature's order, `None` for an absent optional operand, static arguments by
    keyword, and `implementation`: `None` takes the kernel on NVIDIA GPUs and the reference elsewhere; `"triton"`
    insists on the kernel, `"xla"` on the reference, and `"interpret"` runs the kernel in Pallas' interpreter on any
    machine. Inside `jax.shard_map`, `split={"v": "model"}` tells that operands are a device's parts of larger ones,
    whose dimension v (or `"..."`) a mesh axis, or a tuple of them, splits: results that lack v are completed over
    devices. Under automatic and explicit axes nothing need be told.

    Raises:
        ValueError, TypeError: the signature cannot be read, or a call does not follow it.
        NotImplementedError: the implementation asked for cannot serve a call.

    Example:
        >>> import jax.numpy as jnp
        >>> from jtile import TileOp
        >>> double = TileOp("double", "x: ... -> y: ...")
        >>> @double.reference
        ... def double_reference(x):
        ...     return (x * 2,)
        >>> double(jnp.arange(3.0))[0]
        Array([0., 2., 4.], dtype=float32)

    `examples/2_write_an_op.py` is a complete op with kernels and a derivative.
    """

    def __init__(self, name: str, signature: str | Signature, *, whole: str = ""):
        self.name = name
        self.signature = signature if isinstance(signature, Signature) else Signature.parse(signature, whole)
        self.reference_function: Callable[..., tuple] = self._no_reference
        self.kernel_function: Callable[..., tuple] | None = None
        self.limits_function: Callable[..., str | None] | None = None
        self.kernel_dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")  # of floating operands
        self.overwrites: str | None = None  # the operand in whose memory the kernel may put its first result
        self.tiles_function: Callable[..., Iterable[Hashable]] | None = None
        self.notes_function: Callable[..., str] | None = None
        self.transpose_function: Callable[..., tuple] | None = None
        self.parent: TileOp | None = None  # the op whose derivative this is: such an op has no kernel by design
        self.primitive = TilePrimitive(self)
        self.settled = TilePrimitive(self, settled=True)

    def __repr__(self) -> str:
        return f"TileOp({self.name!r})"

    reference = _part("reference_function")
    kernel = _part("kernel_function")
    limits = _part("limits_function")
    tiles = _part("tiles_function")
    notes = _part("notes_function")
    transpose = _part("transpose_function")

    def __call__(
        self,
        *operands,
        implementation: Implementation = None,
        split: Mapping[str, str | tuple[str, ...]] = MappingProxyType({}),
        **static: Hashable,
    ) -> tuple:
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"{self.name}: `implementation` must be one of {', '.join(map(repr, IMPLEMENTATIONS))}, "
                f"got {implementation!r}"
            )
        static = self._check_static(static)
        arrays = self._check_operands(operands)
        given = [a for a in arrays if a is not None]
        call = Call(
            present=tuple(a is not None for a in arrays),
            groups=((),) * len(given),
            implementation=implementation,
            static=tuple(sorted(static.items())),
            split=sharding.SPLIT.get(),
        )
        shapes = rules.result_shapes(self, given, call)  # first: what is wrong shows under no transformation yet
        results = sharding.bound_to_parts(self, call, split, given) if split else self.bind(*given, call=call)
        return rules.with_absent(shapes, results)

    def bind(self, *given: jax.Array, call: Call) -> list:
        """Bind the primitive: from the operands that are present to the results that are."""
        operands = rules.vary_together(given)
        primitive = self.settled if sharding.settled(map(jax.typeof, operands)) else self.primitive
        return primitive.bind(*operands, call=call)

    @functools.cached_property
    def linear(self) -> "TileOp":
        """The op's tangent map: from primal operands, saved results and tangents to the results' tangents."""
        return rules.linear_of(self)

    @functools.cached_property
    def pullback(self) -> "TileOp":
        """The reference's vector-Jacobian product: from operands and cotangents to the operands' cotangents."""
        return rules.pullback_of(self)

    def _no_reference(self, *operands) -> tuple:
        raise TypeError(
            f"{self.name} has no reference: decorate the function that says what it means with @op.reference"
        )

    @property
    def static_parameters(self) -> dict[str, inspect.Parameter]:
        """The reference's keyword-only parameters. What it has as a default, the kernel gets as well."""
        if self.parent:
            return self.parent.static_parameters
        parameters = inspect.signature(self.reference_function).parameters
        return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}

    def _check_operands(self, operands: tuple) -> list:
        terms = self.signature.operands
        if len(operands) != len(terms):
            names = ", ".join(t.name for t in terms)
            raise TypeError(f"{self.name} takes {len(terms)} operands ({names}), got {len(operands)}")
        arrays = []
        for term, operand in zip(terms, operands, strict=True):
            if operand is None and not term.optional:
                raise TypeError(f"{self.name}: `{term.name}` is required, got None")
            arrays.append(None if operand is None else jnp.asarray(operand))
        self.signature.check(self.name, [None if a is None else a.shape for a in arrays])
        return arrays

    def _check_static(self, given: dict[str, Any]) -> dict[str, Hashable]:
        known = self.static_parameters
        if unknown := sorted(set(given) - set(known)):
            raise TypeError(f"{self.name} has no argument `{unknown[0]}`; it takes {', '.join(known) or 'none'}")
        static = {name: p.default for name, p in known.items() if p.default is not p.empty} | given
        if missing := [name for name in known if name not in static]:
            raise TypeError(f"{self.name} needs the argument `{missing[0]}`")
        for name, value in static.items():
            is_array = isinstance(value, jax.Array)
            if is_array or not isinstance(value, Hashable):
                raise TypeError(
                    f"{self.name}: `{name}` must be a static, hashable Python value, got "
                    f"{'an array' if is_array else type(value).__name__}; "
                    "under jit, mark it with static_argnames or close over it"
                )
        return static


class TilePrimitive(Primitive):
    """A JAX primitive that knows its op, and whether it is bound where types alone tell how operands are split."""

    def __init__(self, op: TileOp, settled: bool = False):
        super().__init__(f"jtile_{op.name}")
        self.multiple_results = True
        self.op, self.settled = op, settled
        rules.register(self)
        lowering.register(self)
