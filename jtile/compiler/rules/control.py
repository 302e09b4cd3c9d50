"""Loops, branches and calls."""

import contextlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from jtile import borrowed
from jtile.compiler.rules import arithmetic, rule
from jtile.compiler.value import Affine, Block, Value, constant

# What a function called in a kernel may be wrapped in, and the parameter that holds its jaxpr.
CALLS = {
    "jit": "jaxpr",
    "remat2": "jaxpr",
    "eval_jaxpr": "call_jaxpr",
    "composite": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vmap_call": "call",
}


@rule(*CALLS)
def call(e, eqn, *operands):
    name, outs = eqn.params.get("name"), eqn.outvars
    if name in ROUNDED_DOWN and all(_is_natural(v, outs[0].aval.dtype) for v in operands):
        return [arithmetic.apply(e, ROUNDED_DOWN[name], outs[0].aval.shape, outs[0].aval.dtype, *operands)]
    return e.run(eqn.params[CALLS[eqn.primitive.name]], operands)


# `a // b` and `a % b` of jax.numpy: of numbers that are not negative, the hardware's own operations.
ROUNDED_DOWN = {"floor_divide": "div", "remainder": "rem"}


def _is_natural(value: Value | Block, dtype) -> bool:
    if not isinstance(value, Value) or value.bounds is None or value.bounds[0] < 0:
        return False
    return value.dtype == dtype or value.constant is not None


@rule("platform_index")
def platform_index(e, eqn):
    """Which branch of `jax.lax.platform_dependent` is taken; the last where it is the default."""
    platforms = eqn.params["platforms"]
    mine = [i for i, names in enumerate(platforms) if names is None or "cuda" in names]
    if not mine:
        raise e.unsupported(f"it has branches for the platforms {platforms} alone", "Add one for `cuda`, or a default.")
    return constant(mine[0], (), np.int32)


@rule("scan")
def scan(e, eqn, *operands):
    params, body = eqn.params, eqn.params["jaxpr"]
    num_consts, num_carry, _ = (len(group) for group in params["ft_in"].unpack())
    consts, carry = operands[:num_consts], operands[num_consts:][:num_carry]
    xs = operands[num_consts + num_carry :]
    length = params["length"]
    if not xs and len(body.outvars) == num_carry:
        counter = _counter(body, num_consts)
        low = constant(0, (), np.int32) if counter is None else carry[counter]
        return _for(e, body, consts, carry, counter, low, _plus(e, low, length), unroll=params["unroll"])
    values = [e.variable(v, "carry") for v in carry]
    types = [borrowed.key_data(v.aval) for v in eqn.outvars[num_carry:]]
    ys = [constant(0, t.shape, t.dtype) for t in types]
    ys = [e.variable(y, "ys") for y in ys]
    with _range(e, "0", str(length), params["unroll"]) as index:
        if params["reverse"]:
            index = f"{length - 1} - {index}"
        at = e.let(index, (), np.int32, "at", bounds=(0, length - 1))
        slices = [e.compute(_slice, x, at)[0] for x in xs]
        results = e.run(body, [*consts, *values, *slices])
        stacked = [e.compute(_update, y, part, at)[0] for y, part in zip(ys, results[num_carry:], strict=True)]
        _assign(e, [*values, *ys], [*results[:num_carry], *stacked])
    return [*values, *ys]


def _slice(x, index):
    return jax.lax.dynamic_index_in_dim(x, index, keepdims=False, allow_negative_indices=False)


def _update(stack, x, index):
    """`stack` with `x` at `index`: a select, since no lane knows the value of another."""
    rows = jax.lax.broadcasted_iota(index.dtype, stack.shape, 0)
    return jax.lax.select(rows == index, jax.lax.broadcast_in_dim(x, stack.shape, range(1, stack.ndim)), stack)


@rule("while")
def while_(e, eqn, *operands):
    params = eqn.params
    cond, body, m, n = params["cond_jaxpr"], params["body_jaxpr"], params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts, carry = operands[:m], operands[m : m + n], operands[m + n :]
    counter = _counter(body, n)
    if counter is not None:
        limit = _limit(cond, m, body, n, counter, [*cond_consts, *carry])
        if limit is not None:
            values = _for(e, body, body_consts, carry, counter, carry[counter], limit)
            if e.is_used(eqn.outvars[counter]):  # a loop of no turns leaves its counter where it was
                [values[counter]] = e.compute(jnp.maximum, carry[counter], limit)
            return values
    values = [e.variable(v, "carry") for v in carry]
    (test,) = e.run(cond, [*cond_consts, *values])
    proceed = e.variable(test, "proceed")
    with e.block(f"while {proceed.text}:"):
        _assign(e, values, e.run(body, [*body_consts, *values]))
        _assign(e, [proceed], e.run(cond, [*cond_consts, *values]))
    return values


@rule("cond")
def cond(e, eqn, which: Value, *operands):
    branches = eqn.params["branches"]
    if which.constant is not None:
        return e.run(branches[min(max(int(which.constant), 0), len(branches) - 1)], operands)
    types = [borrowed.key_data(v.aval) for v in eqn.outvars]
    results = [Value(e.name("either"), t.shape, np.dtype(t.dtype)) for t in types]
    for i, branch in enumerate(branches):
        # As in JAX, an index out of range takes the nearest branch.
        head = "else:" if i == len(branches) - 1 else f"{'el' if i else ''}if {which.text} <= {i}:"
        if head == "else:" and not results and not branch.eqns:
            break
        with e.block(head):
            _assign(e, results, e.run(branch, operands))
    return results


def _for(e, body, consts, carry, counter: int | None, low: Value, high: Value, unroll: int = 1) -> list[Value]:
    """A loop with a counter. What no turn changes is not carried."""
    changing = [
        i
        for i, (before, after) in enumerate(zip(body.invars[len(consts) :], body.outvars, strict=True))
        if before is not after and i != counter
    ]
    values = list(carry)
    for i in changing:
        values[i] = e.variable(carry[i], "carry")
    e.hoist(body, [*consts, *values], {len(consts) + i for i in (*changing, counter) if i is not None})
    ends = [" + ".join(Affine.of(v).summands()) or "0" for v in (low, high)]
    with _range(e, ends[0], ends[1], unroll) as index:
        if counter is not None:
            bounds = low.bounds and high.bounds and (low.bounds[0], max(low.bounds[0], high.bounds[1] - 1))
            values[counter] = Value(index, (), np.dtype(np.int32), bounds=bounds)
            if low.dtype != np.int32:
                values[counter] = e.let(f"tl.cast({index}, tl.int64)", (), low.dtype, "i", bounds=bounds)
        _assign(e, [values[i] for i in changing], e.run(body, [*consts, *values], [body.outvars[i] for i in changing]))
    if counter is not None:
        values[counter] = high
    return values


@contextlib.contextmanager
def _range(e, low: str, high: str, unroll: int) -> Iterator[str]:
    """The head of a loop; gives its counter's name."""
    options = f", loop_unroll_factor={unroll}" if unroll > 1 else ""
    options += ", warp_specialize=True" if e.params.warp_specialize else ""
    e.loops += 1
    index = e.name("i")
    with e.block(f"for {index} in tl.range({low}, {high}{options}):"):
        yield index


def _assign(e, targets: Sequence[Value], values: Sequence[Value]) -> None:
    """Assigns all at once: a value that is a target assigned before it is copied first."""
    texts = [e.tensor(v) for v in values]
    for i, text in enumerate(texts):
        if any(text == t.text for t in targets[:i]):
            texts[i] = e.let(text, values[i].shape, values[i].dtype, "old").text
    for target, text in zip(targets, texts, strict=True):
        if target.text != text:
            e.set(target.text, text)
    e.forget([target.text for target in targets])


def _counter(body, num_consts: int) -> int | None:
    """Which carried value is an integer that the body increases by one."""
    sums = {eqn.outvars[0]: eqn for eqn in body.eqns if eqn.primitive.name == "add"}
    for i, (before, after) in enumerate(zip(body.invars[num_consts:], body.outvars, strict=False)):
        eqn = None if isinstance(after, Literal) else sums.get(after)
        if eqn is not None and eqn.invars[0] is before and before.aval.dtype in (np.int32, np.int64):
            if isinstance(eqn.invars[1], Literal) and eqn.invars[1].val == 1:
                return i
    return None


def _limit(cond, num_cond_consts: int, body, num_body_consts: int, counter: int, operands) -> Value | None:
    """The value that the counter must stay below, if that is all that the loop's condition says."""
    if len(cond.eqns) != 1 or cond.eqns[0].primitive.name != "lt" or cond.outvars != cond.eqns[0].outvars:
        return None
    left, right = cond.eqns[0].invars
    if left is not cond.invars[num_cond_consts + counter]:
        return None
    if isinstance(right, Literal):
        return constant(right.val, (), operands[num_cond_consts + counter].dtype)
    position = cond.invars.index(right)
    carried = position - num_cond_consts
    if carried >= 0 and body.invars[num_body_consts + carried] is not body.outvars[carried]:
        return None
    return operands[position]


def _plus(e, value: Value, number: int) -> Value:
    total = Affine.of(value) + number
    if not total.terms:
        return constant(total.constant, (), value.dtype)
    return e.let(f"{value.text} + {number}", (), value.dtype, "end", bounds=total.bounds)
