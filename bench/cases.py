"""What is measured: one table of cases, each an op at one size with the bytes that it must move, or the floating-point
operations of its matrix products.

Bytes count each input read once and each output written once; causal attention counts half of its products. A case for
another op is a function here and a line in `CASES`; `rivals.py` has what is timed on it.
"""

import dataclasses
import functools
import itertools
import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

FORWARD, BACKWARD, BOTH = PASSES = ("forward", "backward", "value and gradient")  # "backward" is the pullback alone

Operand = Callable[[jax.Array], jax.Array]  # from a random key
Table = Literal["core", "sizes", "widths", "sequences"]
TABLES = typing.get_args(Table)


# Operands, by functions that another process can be sent.


def normal(*shape: int, dtype=jnp.bfloat16) -> Operand:
    return functools.partial(jax.random.normal, shape=shape, dtype=dtype)


def matrix(rows: int, columns: int) -> Operand:
    """Weights whose products with normal numbers are normal."""
    return functools.partial(_matrix, rows, columns)


def _matrix(rows, columns, key):
    return jax.random.normal(key, (rows, columns), jnp.bfloat16) * jnp.bfloat16(rows**-0.5)


def ones(*shape: int) -> Operand:
    return functools.partial(_ones, shape)


def _ones(shape, key):
    return jnp.ones(shape, jnp.float32)


def integers(*shape: int, below: int) -> Operand:
    return functools.partial(jax.random.randint, shape=shape, minval=0, maxval=below, dtype=jnp.int32)


def counting(batch: int, sequence: int) -> Operand:
    """Positions of tokens."""
    return functools.partial(_counting, batch, sequence)


def _counting(batch, sequence, key):
    return jnp.broadcast_to(jnp.arange(sequence, dtype=jnp.int32), (batch, sequence))


DOCUMENTS = 3, 11, 5, 17, 7, 13, 9, 8  # packed into a sequence, in parts of it: their ends are not those of blocks


def starts(sequence: int) -> np.ndarray:
    """Where the documents of a sequence begin, and its end."""
    return np.cumsum([0, *DOCUMENTS]) * sequence // sum(DOCUMENTS)


def documents(batch: int, sequence: int) -> Operand:
    """Segment ids."""
    return functools.partial(_documents, batch, sequence)


def _documents(batch, sequence, key):
    ids = np.repeat(np.arange(len(DOCUMENTS), dtype=np.int32), np.diff(starts(sequence)))
    return jnp.broadcast_to(ids, (batch, sequence))


def squares(*shape: int) -> Operand:
    return functools.partial(_squares, shape)


def _squares(shape, key):
    return jnp.square(jax.random.normal(key, shape))


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes:
      op: what `rivals.py` knows it by: the name of jtile's function, where jtile has one.
      size: how tables call the size.
      operands: how each is made, under the names that the op's functions take them by.
      work: bytes or FLOPs of each pass that is measured.
      unit: which of the two.
      options: further arguments of the op's functions.
      by: the operands to differentiate by; None for all that are floating point.
      dead: after its gradient is computed nothing needs what the op was given, as logits in training, and the gradient
        may take its memory: whatever a call may write to is made anew before it, outside of what is timed.
      tolerance: the largest ‖got − reference‖ / ‖reference‖ of a result or gradient that is right. The reference is
        computed in float32.
      table: `"core"`, or the sweep that it belongs to, over sizes in bytes, widths or lengths of sequences.
      at: where in the sweep.
      blocks: of attention, how many of the blocks of 128 queries by 128 keys have a key for a query to see.
      plain: of attention with a feature, the name of the case without it.
    """

    op: str
    size: str
    operands: Mapping[str, Operand]
    work: Mapping[str, int]
    unit: Literal["B", "FLOP"] = "B"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    by: tuple[str, ...] | None = None
    dead: bool = False
    tolerance: float = 1e-2
    table: Table = "core"
    at: int = 0
    blocks: int | None = None
    plain: str | None = None

    @property
    def name(self) -> str:
        return f"{self.op} {self.size}"

    def maker(self):
        """Makes a set of operands from a random key."""

        def make(key):
            keys = jax.random.split(key, len(self.operands))
            return {name: make(key) for (name, make), key in zip(self.operands.items(), keys, strict=True)}

        return jax.jit(make)

    @property
    def bytes(self) -> int:
        """Of all operands."""
        shapes = jax.eval_shape(lambda key: [make(key) for make in self.operands.values()], jax.random.key(0))
        return sum(x.size * x.dtype.itemsize for x in shapes)


MIB = 2**20


def sizes(make: Callable[[int, int], Case]) -> Iterator[Case]:
    """An op of bfloat16 rows over sizes of its first operand, 1 MiB to 1 GiB."""
    for i in range(0, 11, 2):
        yield dataclasses.replace(make(MIB * 2**i // 2 // 4096, 4096), table="sizes", at=MIB * 2**i)


def widths(make: Callable[[int, int], Case]) -> Iterator[Case]:
    """An op of 256 MiB in bfloat16 rows over their widths, 1,024 to 16,384."""
    for d in (1024, 2048, 4096, 8192, 16384):
        yield dataclasses.replace(make(256 * MIB // 2 // d, d), table="widths", at=d)


def row_norm(op: str, rows: int, d: int, residual: bool = False) -> Case:
    size = rows * d * 2
    weights = {"scale": ones(d)} | ({"bias": normal(d, dtype=jnp.float32)} if op == "layer_norm" else {})
    return Case(
        op,
        f"{'with residual ' * residual}{rows}×{d}",
        {"x": normal(rows, d), **weights} | ({"residual": normal(rows, d)} if residual else {}),
        # With a residual x and it share one gradient, of which an XLA program would have to return a copy.
        {FORWARD: 4 * size, BACKWARD: 4 * size} if residual else {FORWARD: 2 * size, BACKWARD: 3 * size},
        by=("x", *weights),
    )


rms_norm, layer_norm = (functools.partial(row_norm, op) for op in ("rms_norm", "layer_norm"))


def gated_rms_norm(rows: int, d: int) -> Case:
    size = rows * d * 2
    operands = {"x": normal(rows, d), "gate": normal(rows, d), "scale": ones(d)}
    return Case("gated_rms_norm", f"{rows}×{d}", operands, {FORWARD: 3 * size, BACKWARD: 5 * size})


def group_norm(batch: int, height: int, width: int, channels: int) -> Case:
    size = batch * height * width * channels * 2
    operands = {"x": normal(batch, height, width, channels), "scale": ones(channels), "bias": ones(channels)}
    return Case(
        "group_norm",
        f"{batch}×{height}×{width}×{channels}",
        operands,
        {FORWARD: 2 * size, BACKWARD: 3 * size},
        options={"groups": 32},
    )


def rope(batch: int, sequence: int, heads: int, head_dim: int) -> Case:
    size = batch * sequence * heads * head_dim * 2
    return Case(
        "rope",
        f"{batch}×{sequence}×{heads}×{head_dim}",
        {"x": normal(batch, sequence, heads, head_dim), "positions": counting(batch, sequence)},
        {FORWARD: 2 * size, BACKWARD: 2 * size},
    )


def qk_norm_rope(batch: int, sequence: int, heads: int, key_heads: int, head_dim: int) -> Case:
    size = batch * sequence * (heads + key_heads) * head_dim * 2
    return Case(
        "qk_norm_rope",
        f"{batch}×{sequence}×{heads}/{key_heads}×{head_dim}",
        {
            "q": normal(batch, sequence, heads, head_dim),
            "k": normal(batch, sequence, key_heads, head_dim),
            "q_scale": ones(head_dim),
            "k_scale": ones(head_dim),
            "positions": counting(batch, sequence),
        },
        {FORWARD: 2 * size, BACKWARD: 3 * size},
    )


def gated_activation(rows: int, d: int, activation: str = "silu") -> Case:
    size = rows * d * 2
    return Case(
        "gated_activation",
        f"{activation} {rows}×{d}",
        {"gate": normal(rows, d), "up": normal(rows, d)},
        {FORWARD: 3 * size, BACKWARD: 5 * size},
        options={"activation": activation},
    )


def softmax(rows: int, d: int, op: str = "softmax") -> Case:
    size = rows * d * 2
    return Case(op, f"{rows}×{d}", {"x": normal(rows, d)}, {FORWARD: 2 * size, BACKWARD: 3 * size})


def dropout(rows: int, d: int, residual: bool = False) -> Case:
    size = rows * d * 2
    operands = {"x": normal(rows, d), "key": jax.random.key_data} | ({"residual": normal(rows, d)} if residual else {})
    return Case(
        "dropout",
        f"{'with residual ' * residual}{rows}×{d}",
        operands,
        {FORWARD: (3 if residual else 2) * size, BACKWARD: 2 * size},
        options={"rate": 0.1},
        by=("x",),
    )


def softmax_cross_entropy(tokens: int, classes: int) -> Case:
    size = tokens * classes * 2
    return Case(
        "softmax_cross_entropy",
        f"{tokens}×{classes}",
        {"logits": normal(tokens, classes), "labels": integers(tokens, below=classes)},
        {FORWARD: size, BACKWARD: 2 * size, BOTH: 3 * size},
        dead=True,
    )


def linear_cross_entropy(tokens: int, d: int, classes: int, mean: bool = False) -> Case:
    """Loss per token, whose gradient forms logits again; or the mean, whose gradients come in the forward pass."""
    product = 2 * tokens * d * classes
    return Case(
        "linear_cross_entropy_mean" if mean else "linear_cross_entropy",
        f"{tokens}×{d}×{classes}",
        {"x": normal(tokens, d), "weight": matrix(d, classes), "labels": integers(tokens, below=classes)},
        {FORWARD: product, BACKWARD: 2 * product, BOTH: 3 * product},
        unit="FLOP",
    )


def attention(
    batch: int,
    sequence: int,
    heads: int,
    head_dim: int,
    key_heads: int | None = None,
    is_causal: bool = False,
    packed: bool = False,
    **features,
) -> Case:
    """`features`: `window`, how many keys each query sees, itself included; `prefix`, how many all see; `cap` of
    scores; `alibi`. With `packed` each row is several documents."""
    key_heads = key_heads or heads
    first = _first_keys(sequence, packed, features.get("window"))
    last = np.arange(sequence) if is_causal else np.full(sequence, sequence - 1)
    last = np.maximum(last, features.get("prefix", 0) - 1)
    flops = 4 * batch * heads * head_dim * int((last - first + 1).sum())
    keys = normal(batch, sequence, key_heads, head_dim)
    operands = {"query": normal(batch, sequence, heads, head_dim), "key": keys, "value": keys}
    about = ["packed"] * packed + [f"{n} {v}" if v is not True else n for n, v in features.items()]
    size = f"{batch}×{sequence}×{heads}{f'/{key_heads}' * (key_heads != heads)}×{head_dim}{' causal' * is_causal}"
    return Case(
        "dot_product_attention",
        " ".join([size, *about]),
        operands | ({"segment_ids": documents(batch, sequence)} if packed else {}),
        {FORWARD: flops, BOTH: 7 * flops // 2},
        unit="FLOP",
        options={"is_causal": is_causal, **features},
        blocks=int((last[BLOCK - 1 :: BLOCK] // BLOCK - first[::BLOCK] // BLOCK + 1).sum()),
        plain=f"dot_product_attention {size}" if about else None,
    )


BLOCK = 128


def _first_keys(sequence: int, packed: bool, window: int | None) -> np.ndarray:
    """The first key that each query sees."""
    first = np.repeat(starts(sequence)[:-1], np.diff(starts(sequence))) if packed else np.zeros(sequence, int)
    return first if window is None else np.maximum(first, np.arange(sequence) - window + 1)


FEATURES = {"window": 1024}, {"packed": True}, {"cap": 50.0}, {"alibi": True}, {"prefix": 512}


def causal(*shape: int, features: Sequence[Mapping[str, Any]] = ()) -> Iterator[Case]:
    """Causal attention as it is, and with each of these."""
    for feature in ({}, *features):
        yield attention(*shape, is_causal=True, **feature)


def sequences() -> Iterator[Case]:
    """16,384 tokens in all, or one sequence that is longer; heads together 2,048 wide, as in FlashAttention's bench."""
    for head_dim, is_causal in itertools.product((64, 128, 256), (True, False)):
        for i in (10, 12, 14, 16):
            case = attention(max(1, 2 ** (14 - i)), 2**i, 2048 // head_dim, head_dim, is_causal=is_causal)
            yield dataclasses.replace(case, table="sequences", at=2**i)


# What XLA alone does at the speed of a copy: jtile has no kernels for it.


def silu_mul(rows: int, d: int) -> Case:
    """Plain elementwise work."""
    operands = {"gate": normal(rows, d), "up": normal(rows, d)}
    return Case("silu_mul", f"{rows}×{d}", operands, {FORWARD: 3 * rows * d * 2})


def adamw(parameters: int) -> Case:
    """One step of an optimiser, in float32: parameters, gradients and two moments in, all but the gradients out."""
    vector = normal(parameters, dtype=jnp.float32)
    operands = {"parameter": vector, "gradient": vector, "first": vector, "second": squares(parameters)}
    return Case("adamw", f"2^{round(math.log2(parameters))}", operands, {FORWARD: 7 * parameters * 4})


CASES = [
    rms_norm(131072, 2048),
    rms_norm(32768, 8192),
    rms_norm(131072, 2048, residual=True),
    rms_norm(32768, 8192, residual=True),
    *sizes(rms_norm),
    *widths(rms_norm),
    *widths(functools.partial(rms_norm, residual=True)),
    layer_norm(131072, 2048),
    layer_norm(32768, 8192, residual=True),
    *widths(layer_norm),
    *widths(functools.partial(layer_norm, residual=True)),
    gated_rms_norm(65536, 4096),
    group_norm(16, 128, 128, 512),
    group_norm(32, 64, 64, 320),
    rope(8, 4096, 32, 128),
    qk_norm_rope(8, 4096, 32, 8, 128),
    gated_activation(16384, 14336, "silu"),
    gated_activation(16384, 14336, "gelu"),
    *sizes(gated_activation),
    *widths(gated_activation),
    softmax(32768, 8192),
    softmax(32768, 8192, op="log_softmax"),
    *sizes(softmax),
    *widths(softmax),
    dropout(65536, 4096),
    dropout(65536, 4096, residual=True),
    softmax_cross_entropy(8192, 128256),
    softmax_cross_entropy(16384, 50257),
    linear_cross_entropy(8192, 4096, 128256),
    linear_cross_entropy(8192, 4096, 128256, mean=True),
    *causal(4, 4096, 16, 128, features=FEATURES),
    attention(4, 4096, 16, 128),
    *causal(1, 16384, 16, 128),
    *causal(4, 4096, 32, 64, features=FEATURES[:4]),
    *causal(4, 4096, 8, 256),
    attention(4, 4096, 32, 128, key_heads=8, is_causal=True),
    *causal(1, 32768, 16, 128, features=FEATURES[:2]),
    *sequences(),
    silu_mul(16384, 14336),
    adamw(2**28),
]
