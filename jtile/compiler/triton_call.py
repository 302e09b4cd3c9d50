"""`triton_call`: a hand-written Triton or Gluon kernel, launched as jtile launches its own."""

import collections
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jtile import borrowed
from jtile.compiler import launch
from jtile.compiler.arguments import ALIGNMENT, Argument, Array, Constant, Descriptor, Scalar
from jtile.compiler.build import build_function
from jtile.compiler.target import Target

type Grid = int | tuple[int, ...]


def has_gluon() -> bool:
    """Whether Triton's Gluon has what jtile's kernels in it are written with: from 3.9 on."""
    import triton

    major, minor, *_ = triton.__version__.split(".")
    return (int(major), int(minor)) >= (3, 9)


def triton_call(
    *args: Any,
    kernel: Any,
    out_shape: Any,
    grid: Grid | Callable[[Mapping[str, Any]], Grid],
    num_warps: int = 4,
    num_stages: int = 2,
    num_ctas: int = 1,
    max_registers: int | None = None,
    input_output_aliases: Mapping[int, int] | None = None,
    zeroed_outputs: Sequence[int] = (),
    **metaparams: Any,
) -> Any:
    """Calls a `@triton.jit` or `@gluon.jit` kernel, with the calling conventions of `jax_triton.triton_call`.

    Arguments are bound to the kernel's parameters by position and by name, as Python does. What a parameter gets:

    - for an array: a pointer to its elements, in row-major order, aligned to 16 bytes;
    - for a `jax_triton.TensorDescriptor`: a descriptor for the Tensor Memory Accelerator, made by the host; one whose
      base is a `jax.ShapeDtypeStruct` describes the next result;
    - for a Python number: its value, fixed in the launch (a 1 is compiled in, as Triton does);
    - if it is `constexpr`: the value given, or its default, compiled in;
    - if nothing is given: a pointer to the next result. These parameters follow all arrays.

    The call runs on NVIDIA GPUs. As the kernel of a `jtile.TileOp` it gets derivatives, sharding, and a reference for
    other platforms. Under `jax.vmap` it is launched once for each element.

    Args:
      *args: the kernel's arguments.
      kernel: the decorated function.
      out_shape: a pytree of objects with `shape` and `dtype`: the results.
      grid: programs along x, y and z; or a function of the `constexpr` values, by name, that returns them.
      num_warps: warps of 32 threads that share a program.
      num_stages: depth of software pipelining.
      num_ctas: thread blocks in a cluster.
      max_registers: most registers a thread may use.
      input_output_aliases: operand to the result that shares its buffer, which has no parameter of its own then.
        Operands are counted among the arguments that are not `constexpr`, in the order of the kernel's parameters;
        results among the leaves of `out_shape`.
      zeroed_outputs: results whose buffers are zeroed before the launch.
      **metaparams: further arguments by name.

    Returns:
      The results, a pytree like `out_shape`.

    Raises:
      TypeError: the arguments do not fit the kernel's parameters.
      ValueError: the grid is outside CUDA's limits.
      jtile.compiler.build.TileTooLarge: when it is lowered, if the kernel does not fit the chip.

    Example:
      >>> import triton
      >>> import triton.language as tl
      >>> @triton.jit
      ... def double(x, y, size: tl.constexpr):
      ...     lanes = tl.program_id(0) * size + tl.arange(0, size)
      ...     tl.store(y + lanes, 2 * tl.load(x + lanes))
      >>> def f(x):
      ...     return jtile.triton_call(x, kernel=double, out_shape=x, grid=x.size // 128, size=128)
      >>> jtile.inspect(f, jax.ShapeDtypeStruct((1024,), jnp.float32))[0].threads
      128
    """
    from triton.runtime import JITFunction

    if not isinstance(kernel, JITFunction):
        raise TypeError(
            f"triton_call: kernel must be a function decorated with @triton.jit or @gluon.jit, not {kernel!r}. Of an "
            "autotuned or heuristic one, pass its `.fn` and the values chosen."
        )
    name = kernel.fn.__name__
    try:
        given = inspect.signature(kernel.fn).bind_partial(*args, **metaparams).arguments
    except TypeError as error:
        raise TypeError(f"triton_call: {error}. The parameters of kernel {name}: {_listed(kernel.params)}.") from None
    leaves, out_tree = jax.tree.flatten(out_shape)
    types = [jax.ShapeDtypeStruct(t.shape, t.dtype) for t in leaves]
    aliases = dict(input_output_aliases or {})
    _check_results("zeroed_outputs", zeroed_outputs, len(types))
    _check_results("input_output_aliases", list(aliases.values()), len(types))

    # The launch has the results in another order, those with a parameter of their own first: parameters that are arrays
    # take buffers in order, operands and then results, and what is left over goes unused.
    own = [i for i in range(len(types)) if i not in aliases.values()]
    order = own + list(aliases.values())
    unclaimed = collections.deque(own)
    arguments: list[Argument] = []
    arrays: list[jax.Array] = []
    array_aliases: dict[int, int] = {}
    constants: dict[str, Any] = {}
    operand_number = 0
    for parameter in kernel.params:
        where = f"triton_call: parameter {parameter.name} of kernel {name}"
        value = given.get(parameter.name, parameter.default)
        if parameter.is_constexpr:
            if value is inspect.Parameter.empty:
                raise TypeError(f"{where} is constexpr and has no default: it needs a value.")
            if _is_array(value):
                raise TypeError(f"{where} is constexpr, a value known when compiling; it got an array.")
            constants[parameter.name] = value
            arguments.append(Constant.of(value))
        elif value is inspect.Parameter.empty:
            if not unclaimed:
                raise TypeError(
                    f"{where} is left without an argument: the call gives {len(given)}, and out_shape has {len(own)} "
                    "results that are not aliased."
                )
            result = unclaimed.popleft()
            arguments.append(Array(types[result].dtype, _bytes(types[result]) if result in zeroed_outputs else 0))
        elif _is_descriptor(value) and isinstance(value.base, jax.ShapeDtypeStruct):
            described = unclaimed.popleft() if unclaimed else None
            base = jax.ShapeDtypeStruct(value.base.shape, value.base.dtype)
            if described is None or types[described] != base:
                raise TypeError(
                    f"{where} describes a result {base}; the next of out_shape is {_nth(types, described)}."
                )
            if described in zeroed_outputs:
                raise TypeError(f"{where} is a TensorDescriptor: its buffer cannot be zeroed at launch.")
            arguments.append(Descriptor.of(value, where))
        else:
            argument = _argument(value, parameter, where)
            if isinstance(argument, Array | Descriptor):
                if len(unclaimed) < len(own):
                    raise TypeError(f"{where} is an array after one that is left for a result. Put results last.")
                if operand_number in aliases:
                    result = aliases.pop(operand_number)
                    array_aliases[len(arrays)] = order.index(result)
                    if result in zeroed_outputs:
                        if isinstance(argument, Descriptor):
                            raise TypeError(f"{where} is a TensorDescriptor: its buffer cannot be zeroed at launch.")
                        argument = Array(argument.dtype, _bytes(types[result]))
                arrays.append(value.base if isinstance(argument, Descriptor) else value)
            arguments.append(argument)
            operand_number += 1
    if aliases:
        raise TypeError(f"triton_call: input_output_aliases has {aliases}, but these operands of {name} are no arrays.")
    if unclaimed:
        raise TypeError(f"triton_call: kernel {name} has no parameter left for result {unclaimed[0]} of out_shape.")

    results = triton_call_p.bind(
        *arrays,
        kernel=kernel,
        arguments=tuple(arguments),
        types=tuple(types[i] for i in order),
        grid=_grid(grid(constants) if callable(grid) else grid, name),
        aliases=tuple(array_aliases.items()),
        options=(
            ("num_warps", num_warps),
            ("num_stages", num_stages),
            ("num_ctas", num_ctas),
            ("maxnreg", max_registers),
        ),
    )
    return jax.tree.unflatten(out_tree, [results[order.index(i)] for i in range(len(types))])


def _argument(value, parameter, where) -> "Argument":
    if value is None:
        return Constant.of(None)
    if _is_descriptor(value):
        return Descriptor.of(value, where)
    if _is_array(value):
        if hasattr(jax.typeof(value), "inner_aval"):
            raise TypeError(
                f"{where} got a Ref. Pass its array, and name the result that replaces it in input_output_aliases."
            )
        return Array(value.dtype)
    return _number(value, parameter, where)


def _number(value, parameter, where) -> "Scalar | Constant":
    """A number, in the type that the kernel's annotation names, or the first of Triton's that holds it."""
    value = value.item() if isinstance(value, np.generic) else value
    declared = parameter.annotation_type.replace("u1", "i1")
    if declared and isinstance(value, int | float):
        if declared not in ("i1", "i32", "u32", "i64", "u64", "fp32", "fp64"):
            raise TypeError(
                f"{where} is declared {declared}, a scalar that JAX's launcher cannot pass. Declare it int32, int64, "
                "float32 or float64."
            )
        return Scalar.of(float(value) if declared.startswith("fp") else value, declared)
    if isinstance(value, bool):
        return Scalar.of(value, "i1")
    if isinstance(value, float):
        return Scalar.of(value, "fp32")
    if isinstance(value, int):
        if value == 1 and not parameter.do_not_specialize:
            return Constant.of(1)
        for kind, low, high in (("i32", -(2**31), 2**31), ("i64", -(2**63), 2**63), ("u64", 0, 2**64)):
            if low <= value < high:
                return Scalar.of(value, kind)
    raise TypeError(f"{where} takes an array, a TensorDescriptor, a number of at most 64 bits or None; got {value!r}.")


def _grid(grid: Grid, name: str) -> tuple[int, int, int]:
    sizes = (grid,) if isinstance(grid, int) else tuple(grid)
    limits = (2**31 - 1, 65535, 65535)
    if not 1 <= len(sizes) <= 3 or not all(0 <= size <= limit for size, limit in zip(sizes, limits, strict=False)):
        raise ValueError(
            f"triton_call: kernel {name} has the grid {sizes}; CUDA launches up to {limits} programs along x, y and z. "
            "Flatten it, and decode the program's number in the kernel."
        )
    x, y, z = (*map(int, sizes), 1, 1)[:3]
    return x, y, z


def _check_results(what: str, numbers: Sequence[int], count: int) -> None:
    if len(set(numbers)) != len(numbers) or not all(0 <= n < count for n in numbers):
        raise TypeError(f"triton_call: {what} names results {list(numbers)}; out_shape has {count}, each named once.")


def _is_array(value) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, np.generic)


def _is_descriptor(value) -> bool:
    """A `jax_triton.TensorDescriptor`, known by its fields: to import jax_triton would change the environment."""
    return all(hasattr(value, field) for field in ("base", "strides", "block_shape", "round_f32_to_tf32"))


def _nth(types, number):
    return "missing" if number is None else types[number]


def _bytes(array_type) -> int:
    return math.prod(array_type.shape) * np.dtype(array_type.dtype).itemsize


def _listed(parameters) -> str:
    return ", ".join(p.name for p in parameters)


# The primitive


triton_call_p = Primitive("triton_call")
triton_call_p.multiple_results = True
triton_call_p.def_impl(lambda *operands, **params: borrowed.apply_primitive(triton_call_p, *operands, **params))


@triton_call_p.def_abstract_eval
def _abstract_eval(*operands, kernel, types, **_):
    split = [a for a in operands if any(axis is not None for axis in a.sharding.spec)]
    if borrowed.explicit_mesh(operands) is not None and split:
        raise NotImplementedError(
            f"triton_call cannot split kernel {kernel.fn.__name__} over devices; an operand is {split[0]}. Call it "
            "inside jax.shard_map, or make it the kernel of a jtile.TileOp."
        )
    return [borrowed.make_aval(t.shape, t.dtype, like=operands, spec=None) for t in types]


def _lower_for_cuda(ctx, *operands, kernel, arguments, types, grid, aliases, options):
    del types  # in `ctx` too
    if 0 in grid:
        return launch.no_programs(ctx, operands, dict(aliases))
    given = list(zip(kernel.params, arguments, strict=True))
    compiled = build_function(
        kernel,
        signature={p.name: a.triton_type for p, a in given},
        constants={p.name: a.value for p, a in given if isinstance(a, Constant)},
        attributes={(p.num,): [["tt.divisibility", ALIGNMENT]] for p, a in given if a.aligned(p)},
        options=dict(options),
        target=Target.of_lowering(ctx),
    )
    launched = launch.Launch(compiled, grid, first_line=_first_line(kernel))
    return launch.launch(ctx, operands, launched, arguments, dict(aliases))


def _first_line(kernel) -> int:
    """The line of the kernel's `def` in its file."""
    lines, first = inspect.getsourcelines(kernel.fn)
    return first + next(i for i, line in enumerate(lines) if line.lstrip().startswith("def "))


def _lower_elsewhere(ctx, *operands, kernel, **_):
    raise NotImplementedError(
        f"triton_call: kernel {kernel.fn.__name__} runs on NVIDIA GPUs, and this is lowered for "
        f"{'/'.join(ctx.module_context.platforms)}. As the kernel of a jtile.TileOp it has a reference for other "
        'platforms; jtile.inspect(fn, *args, target="NVIDIA H200") compiles it without a GPU.'
    )


mlir.register_lowering(triton_call_p, _lower_elsewhere)
mlir.register_lowering(triton_call_p, _lower_for_cuda, platform="cuda")


def _jvp(primals, tangents, *, kernel, **_):
    raise NotImplementedError(
        f"triton_call: nothing says what the derivative of kernel {kernel.fn.__name__} is. Make it the kernel of a "
        "jtile.TileOp and give that a transpose, or wrap the call in jax.custom_vjp."
    )


ad.primitive_jvps[triton_call_p] = _jvp


def _batch(operands, axes, **params):
    """One launch for each element: only the kernel's author can add an axis to its grid."""
    split = [jnp.moveaxis(x, axis, 0) for x, axis in zip(operands, axes, strict=True) if axis is not None]

    def one(elements):
        elements = iter(elements)
        given = (x if axis is None else next(elements) for x, axis in zip(operands, axes, strict=True))
        return triton_call_p.bind(*given, **params)

    results = jax.lax.map(one, split)
    return results, [0] * len(results)


batching.primitive_batchers[triton_call_p] = _batch
