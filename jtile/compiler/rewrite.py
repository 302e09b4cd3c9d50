"""Find the equations of a program, and replace some of them, such as every `pallas_call`."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
from jax.extend import linear_util, source_info_util
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxprs_in_params

# Gives the function of its operands that is to stand for an equation, and None for an equation that is to stay.
type Replace = Callable[[JaxprEqn], Callable[..., Sequence[jax.Array]] | None]


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Every equation, however deeply nested."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def map_pallas_calls(fn: Callable, replace: Callable[..., Sequence[jax.Array]]) -> Callable:
    """`fn` with each `pallas_call` in it replaced by `replace(params, *operands)`, as `map_equations` does."""

    def replace_call(eqn: JaxprEqn):
        return functools.partial(replace, eqn.params) if eqn.primitive.name == "pallas_call" else None

    return map_equations(fn, replace_call)


def map_equations(fn: Callable, replace: Replace) -> Callable:
    """`fn` with the equations in it replaced, however deeply nested, that `replace` has something for.

    Loops, branches, `jit`, `checkpoint`, `shard_map` and functions with custom derivatives are entered, the derivatives
    too. Arguments that are not arrays stay as they are.
    """

    @functools.wraps(fn)
    def mapped(*args, **kwargs):
        leaves, tree = jax.tree.flatten((args, kwargs))
        results: list[Any] = []

        def on_arrays(*arrays):
            args, kwargs = jax.tree.unflatten(tree, _with_arrays(leaves, arrays))
            results[:] = jax.tree.flatten(fn(*args, **kwargs))
            return list(filter(_is_array, results[0]))

        arrays = list(filter(_is_array, leaves))
        replaced = evaluate(jax.make_jaxpr(on_arrays)(*arrays), replace, *arrays)
        out_leaves, out_tree = results
        return jax.tree.unflatten(out_tree, _with_arrays(out_leaves, replaced))

    return mapped


def _is_array(x: Any) -> bool:
    """Not the zeros that rules of derivatives get by `symbolic_zeros=True`: they ask for the type."""
    return hasattr(x, "shape") and hasattr(x, "dtype") and not isinstance(x, SymbolicZero)


def _with_arrays(leaves: Sequence, arrays: Iterable) -> list:
    """`leaves`, the arrays among them replaced in order."""
    arrays = iter(arrays)
    return [next(arrays) if _is_array(x) else x for x in leaves]


def evaluate(jaxpr: Jaxpr, replace: Replace, *operands) -> list:
    """The results of a jaxpr, its equations replaced as `map_equations` does."""
    values = dict(zip(jaxpr.constvars, jaxpr.consts, strict=True))
    values.update(zip(jaxpr.invars, operands, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        arguments = map(read, eqn.invars)
        with source_info_util.user_context(eqn.source_info.traceback), eqn.ctx.manager:
            results = _evaluate_equation(eqn, replace, *arguments)
        values.update(zip(eqn.outvars, results if eqn.primitive.multiple_results else [results], strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _evaluate_equation(eqn, replace: Replace, *operands):
    if replacement := replace(eqn):
        return replacement(*operands)
    params = eqn.params
    if eqn.primitive.name == "shard_map":
        return jax.shard_map(
            functools.partial(evaluate, params["jaxpr"], replace),
            mesh=params["mesh"],
            in_specs=params["in_specs"],
            out_specs=list(params["out_specs"]),
            axis_names=params["newly_manual_axes"],
            check_vma=params["check_vma"],
        )(*operands)
    bound = eqn.primitive.get_bind_params(params)
    if "subfuns" in bound:  # a function and its custom derivatives
        functions = (
            linear_util.wrap_init(map_equations(f.call_wrapped, replace), debug_info=f.debug_info)
            for f in bound["subfuns"]
        )
        bound = {**bound, "subfuns": tuple(functions)}
    else:
        bound = {key: _rewrite(value, replace) for key, value in bound.items()}
    return eqn.primitive.bind(*operands, **bound)


def _rewrite(param: Any, replace: Replace):
    """A parameter of an equation, rewritten if it is a jaxpr, or holds jaxprs as `cond` does, with one to replace."""
    if not any(replace(eqn) for jaxpr in jaxprs_in_params({"": param}) for eqn in equations(jaxpr)):
        return param
    if isinstance(param, tuple):
        return tuple(_rewrite(p, replace) for p in param)
    return jax.make_jaxpr(functools.partial(evaluate, param, replace))(*(v.aval for v in param.invars))
