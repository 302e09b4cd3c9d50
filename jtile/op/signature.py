"""The language of dimensions: one line of text that an op's checks, batching and sharding all follow from.

    x: ... d, scale: d, residual?: ... d -> y: ... d, h?: ... d; rstd: ...

Operands stand left of the arrow and results right of it, each a name and its dimensions. `...` is any leading shape,
the same one wherever it occurs; `(k g)` is one dimension of size k·g; `?` marks what may be absent; results after `;`
are there for the backward pass alone. Dimensions named in `whole` are never split over devices.

A result that lacks a dimension of the operands must be a sum over it: where devices share that dimension out, each
computes its part of the sum. `logsumexp lse` is the logarithm of a sum of exponentials instead. The operand
`labels[v]` holds positions along dimension v, which a device with a part of v gets as positions in that part, and which
may then lie outside of it. Given 0, `origin[v]: ` so tells a device where its part of v begins: at -origin.

    logits: ... v, labels[v]: ... -> logsumexp lse: ..., picked: ...
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal

Dim = tuple[str, ...]  # ("d",) is a plain dimension; ("k", "g") a compound one of size k·g
Shape = tuple[int, ...]

_TERM = re.compile(
    r"^((?P<reduction>logsumexp) )?(?P<name>[a-z]\w*)(\[(?P<indexes>[a-z]\w*)\])?(?P<optional>\?)?: *(?P<dims>.*)$"
)
_DIM = re.compile(r"\.\.\.|[a-z]\w*|\([a-z]\w*(?: [a-z]\w*)+\)")


@dataclasses.dataclass(frozen=True)
class Term:
    """One operand or result: its name and its dimensions."""

    name: str
    dims: tuple[Dim, ...]
    leading: bool = False  # `...` stands before the named dimensions
    optional: bool = False
    saved: bool = False  # a result for the backward pass alone
    indexes: str | None = None  # an operand of positions along this dimension
    reduction: Literal["sum", "logsumexp"] = "sum"  # what a result is over the dimensions that it lacks

    def __str__(self) -> str:
        names = [d[0] if len(d) == 1 else f"({' '.join(d)})" for d in self.dims]
        return " ".join([*["..."] * self.leading, *names]) or "scalar"

    @property
    def factors(self) -> list[str]:
        return [factor for dim in self.dims for factor in dim]

    def shape(self, sizes: Mapping[str, int], leading: Shape) -> Shape:
        return (*(leading if self.leading else ()), *(math.prod(sizes[f] for f in dim) for dim in self.dims))


@dataclasses.dataclass(frozen=True)
class Signature:
    operands: tuple[Term, ...]
    results: tuple[Term, ...]
    whole: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, text: str, whole: str = "") -> "Signature":
        """Read a signature. Raises `ValueError` naming the piece that does not follow the language."""
        sides = text.split("->")
        if len(sides) != 2:
            raise ValueError(f"a signature is 'operands -> results', got {text!r}")
        public, _, saved = sides[1].partition(";")
        signature = cls(
            tuple(_terms(sides[0], text)),
            tuple(_terms(public, text)) + tuple(dataclasses.replace(t, saved=True) for t in _terms(saved, text)),
            frozenset(whole.split()),
        )
        signature._validate(text)
        return signature

    def _validate(self, text: str) -> None:
        if not self.operands or not self.results:
            raise ValueError(f"there are no {'results' if self.operands else 'operands'} in {text!r}")
        known = {factor for term in self.operands for factor in term.factors}
        for name in sorted(self.whole - known):
            raise ValueError(f"whole dimension {name!r} is not one of the operands' in {text!r}")
        seen: set[str] = set()
        for term in (*self.operands, *self.results):
            if term.name in seen:
                raise ValueError(f"`{term.name}` stands twice in {text!r}; every name must differ")
            seen.add(term.name)
            for factor in term.factors:
                if term.factors.count(factor) > 1:
                    raise ValueError(f"`{term.name}` has dimension {factor!r} twice in {text!r}; rename one of them")
                if factor not in known:
                    raise ValueError(f"dimension {factor!r} of `{term.name}` is not one of the operands' in {text!r}")
            if term.indexes is not None and (term in self.results or term.indexes not in known):
                raise ValueError(
                    f"`{term.name}[{term.indexes}]` must be an operand, and index one's dimension, in {text!r}"
                )
            if term.reduction != "sum" and (term in self.operands or known <= set(term.factors)):
                raise ValueError(f"`{term.name}` must be a result that lacks a dimension to reduce over, in {text!r}")
            if term.leading and not any(operand.leading for operand in self.operands):
                raise ValueError(f"`{term.name}` has leading dimensions, and no operand has, in {text!r}")

    @property
    def derivative_whole(self) -> frozenset[str]:
        """The dimensions that derivatives need whole: also those over which a result is no sum, and its tangent none of
        the tangents that devices compute each from its part."""
        factors = {factor for term in self.operands for factor in term.factors}
        lacking = [factors - set(term.factors) for term in self.results if term.reduction != "sum"]
        return self.whole.union(*lacking)

    def check(self, op: str, shapes: Sequence[Shape | None]) -> tuple[dict[str, int], Shape]:
        """The size of every named dimension and the shape that `...` stands for.

        `shapes` holds one shape an operand, `None` where it is absent. Raises `ValueError` with the rule, the shapes
        that break it, and the cure.
        """
        sizes: dict[str, tuple[int, str]] = {}
        leading: tuple[Shape, str] | None = None
        compounds = []
        for term, shape in zip(self.operands, shapes, strict=True):
            if shape is None:
                continue
            n = len(term.dims)
            if len(shape) < n or (not term.leading and len(shape) != n):
                count = f"at least {n}" if term.leading else str(n)
                raise ValueError(
                    f"{op}: `{term.name}` has dimensions ({term}), so {count} of them, but its shape is {shape}"
                )
            split = len(shape) - n
            if term.leading:
                if leading is not None and leading[0] != shape[:split]:
                    raise ValueError(
                        f"{op}: leading dimensions must agree: they are {leading[0]} in `{leading[1]}` and "
                        f"{shape[:split]} in `{term.name}`; broadcast or reshape one of them"
                    )
                leading = leading or (shape[:split], term.name)
            for dim, size in zip(term.dims, shape[split:], strict=True):
                if len(dim) > 1:
                    compounds.append((dim, size, term.name))
                elif sizes.setdefault(dim[0], (size, term.name))[0] != size:
                    first, owner = sizes[dim[0]]
                    raise ValueError(
                        f"{op}: dimension `{dim[0]}` must agree: it is {first} in `{owner}` and {size} in "
                        f"`{term.name}`, whose dimensions are ({term}) and shape is {shape}"
                    )
        for dim, size, name in compounds:
            _split_compound(op, dim, size, name, sizes)
        return {dim: size for dim, (size, _) in sizes.items()}, leading[0] if leading else ()


def _split_compound(op: str, dim: Dim, size: int, name: str, sizes: dict[str, tuple[int, str]]) -> None:
    """Find the one unknown factor of a compound dimension, or check it where all are known."""
    unknown = [f for f in dim if f not in sizes]
    known = math.prod(sizes[f][0] for f in dim if f in sizes)
    owners = ", ".join(f"`{f}` is {sizes[f][0]} in `{sizes[f][1]}`" for f in dim if f in sizes)
    if len(unknown) > 1:
        raise ValueError(f"{op}: ({' '.join(dim)}) of `{name}` has more than one factor that no operand tells")
    if size != known if not unknown else (known == 0 or size % known):
        multiple = "a multiple of " if unknown else ""
        raise ValueError(f"{op}: ({' '.join(dim)}) of `{name}` must be {multiple}{known} ({owners}), got {size}")
    if unknown:
        sizes[unknown[0]] = (size // known, name)


def _terms(side: str, text: str):
    for piece in filter(None, (p.strip() for p in side.split(","))):
        match = _TERM.match(piece)
        dims = _DIM.findall(match["dims"]) if match else []
        if not match or " ".join(dims) != " ".join(match["dims"].split()) or "..." in dims[1:]:
            raise ValueError(f"cannot read {piece!r} in the signature {text!r}: write 'name: ... a b (c d)'")
        leading = dims[:1] == ["..."]
        yield Term(
            match["name"],
            tuple(tuple(d.strip("()").split()) for d in dims[leading:]),
            leading,
            bool(match["optional"]),
            indexes=match["indexes"],
            reduction="logsumexp" if match["reduction"] else "sum",
        )
