"""What the norms over rows have in common. With u a row before it is normalised and μ its mean, where it is centred:

    n = (u − μ) · rstd        rstd = 1 / √(mean((u − μ)²) + ε)
    y = n · scale + bias
    ū = rstd · (g − mean(g) − n · mean(g · n))        g = ȳ · scale, mean(g) only where the row is centred

u is x, x + residual, which is a result too, or x · silu(gate); the gate may also come last, y = n · scale · silu(gate).
A member of the family is the operands and results that it has, by these names. Its kernels are in rows.py.
"""

import jax
import jax.numpy as jnp

from jtile.op import TileOp
from jtile.ops.norm import rows
from jtile.ops.norm.common import wide


def row_norm(name: str, forward: str, backward: str, *, centred: bool = False) -> TileOp:
    """The op with these signatures. Arguments of its own: `epsilon`, and `gate_last` with a gate."""
    op = TileOp(name, forward, whole="d")
    gradient = TileOp(f"{name}_backward", backward, whole="d")

    @op.reference
    def forward_reference(*operands, epsilon, gate_last=False):
        return _results(op, _normalized(_named(op, operands), centred, epsilon, gate_last))

    @gradient.reference
    def backward_reference(*operands, biased=False, gate_last=False):
        return _results(gradient, _gradients(_named(gradient, operands), biased, gate_last))

    @op.tiles
    def forward_tiles(*operands, target, **_):
        return rows.forward_tiles(_named(op, operands), centred, target)

    @gradient.tiles
    def backward_tiles(*operands, target, biased, **_):
        return rows.backward_tiles(_named(gradient, operands), biased, target)

    @op.kernel
    def forward_kernel(*operands, tile, epsilon, gate_last):
        return _results(op, rows.forward(name, _named(op, operands), centred, epsilon, gate_last, tile))

    @gradient.kernel
    def backward_kernel(*operands, tile, biased, gate_last):
        results = rows.backward(f"{name}_backward", _named(gradient, operands), biased, gate_last, tile)
        return _results(gradient, results)

    # A residual and x have one cotangent, and their sum h is all of them that the rule needs.
    @op.transpose
    def transpose(operands, results, cotangents, *, epsilon, gate_last, implementation):
        del epsilon  # it is in rstd
        given, found = _named(op, operands), _named(op, results, of_results=True)
        dy, *others = cotangents
        known = {**given, **found, "x": found.get("h", given["x"]), "dy": dy}
        if "h" in found and others[0] is not None:
            known["dh"] = others[0]
        values = gradient(
            *(known.get(t.name) for t in gradient.signature.operands),
            biased="bias" in given,
            gate_last=gate_last,
            implementation=implementation,
        )
        out = _named(gradient, values, of_results=True)
        return tuple(
            None if o is None else out["dx"] if t.name == "residual" else out[f"d{t.name}"]
            for t, o in zip(op.signature.operands, operands, strict=True)
        )

    return op


def _named(op: TileOp, values, *, of_results: bool = False) -> dict[str, jax.Array]:
    """What is there of an op's operands or results, by name."""
    terms = op.signature.results if of_results else op.signature.operands
    return {t.name: v for t, v in zip(terms, values, strict=True) if v is not None}


def _results(op: TileOp, named: dict[str, jax.Array]) -> tuple:
    return tuple(named.get(t.name) for t in op.signature.results)


# The references, in float32, and in float64 where x is.


def _rounded(h):
    """`h` as the next layer will read it, in its dtype: XLA may keep more digits of a sum than it writes."""
    return jax.lax.reduce_precision(h, jnp.finfo(h.dtype).nexp, jnp.finfo(h.dtype).nmant)


def _normalized(given, centred, epsilon, gate_last):
    x, out = given["x"], {}
    if "residual" in given:
        x = out["h"] = _rounded(x + given["residual"])
    gate = jax.nn.silu(wide(given["gate"])) if "gate" in given else 1.0
    u = wide(x) if gate_last else wide(x) * gate
    if centred:
        out["mean"] = jnp.mean(u, axis=-1)
        u = u - out["mean"][..., None]
    out["rstd"] = jax.lax.rsqrt(jnp.mean(u * u, axis=-1) + epsilon)
    y = u * out["rstd"][..., None] * wide(given["scale"])
    if "bias" in given:
        y = y + wide(given["bias"])
    out["y"] = (y * gate if gate_last else y).astype(x.dtype)
    return out


def _gradients(given, biased, gate_last):
    x, dy, scale, rstd = (wide(given[name]) for name in ("x", "dy", "scale", "rstd"))
    rstd, mean = rstd[..., None], given["mean"][..., None] if "mean" in given else 0.0
    leading, u = tuple(range(x.ndim - 1)), x
    if "gate" in given:
        gate, gate_pullback = jax.vjp(jax.nn.silu, wide(given["gate"]))
        u = x if gate_last else x * gate
    n = (u - mean) * rstd
    if "gate" in given and gate_last:
        dgate, dy = dy * n * scale, dy * gate
    g = dy * scale
    du = g - n * jnp.mean(g * n, axis=-1, keepdims=True)
    if "mean" in given:
        du = du - jnp.mean(g, axis=-1, keepdims=True)
    dx = du = rstd * du
    if "gate" in given and not gate_last:
        dgate, dx = du * x, du * gate
    if "dh" in given:
        dx = dx + wide(given["dh"])
    out = {"dx": dx.astype(given["x"].dtype), "dscale": jnp.sum(dy * n, axis=leading)}
    if biased:
        out["dbias"] = jnp.sum(dy, axis=leading)
    if "gate" in given:
        out["dgate"] = gate_pullback(dgate)[0].astype(given["gate"].dtype)
    return out
