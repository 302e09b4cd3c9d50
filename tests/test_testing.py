"""The laws find what is wrong: ops that break one each."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jtile import CompilerParams, TileOp
from jtile.testing import Case, Trial, check_op
from jtile.testing.programs import only_references

CASE = Case("x: rows d, w: d -> y: rows d", {"rows": 8, "d": 20}, split="rows d")
CASE_OF_ROWS = dataclasses.replace(CASE, split="rows")


def normalised(x_ref, w_ref, y_ref):
    """y = w · x / Σ|x|"""
    x = x_ref[...]
    y_ref[...] = (w_ref[...] * x / jnp.sum(jnp.abs(x.astype(jnp.float32)), axis=1, keepdims=True)).astype(y_ref.dtype)


def make_op(kernel=normalised, transpose=None, block=4):
    op = TileOp("normalise", "x: ... d, w: d -> y: ... d", whole="d")

    @op.reference
    def reference(x, w):
        return ((w * x / jnp.sum(jnp.abs(x.astype(jnp.float32)), axis=-1, keepdims=True)).astype(x.dtype),)

    @op.kernel
    def call(x, w):
        row = pl.BlockSpec((block, x.shape[1]), lambda i: (i, 0))
        return pl.pallas_call(
            kernel,
            [x],
            grid=(pl.cdiv(x.shape[0], block),),
            in_specs=[row, pl.BlockSpec(w.shape, lambda i: (0,))],
            out_specs=[row],
            compiler_params=CompilerParams(),
        )(x, w)

    if transpose:
        op.transpose(transpose)
    return op


def breaks(law, op, message="", case=CASE):
    failure = Trial(op, case).failure(law)
    assert isinstance(failure, AssertionError), failure
    assert re.search(message, str(failure)), failure
    return failure


def off_by(error, where=slice(None)):
    def kernel(x_ref, w_ref, y_ref):
        normalised(x_ref, w_ref, y_ref)
        y_ref[where] = (y_ref[where] * (1 + error)).astype(y_ref.dtype)

    return kernel


def test_kernel_that_is_wrong():
    failure = breaks("kernel", make_op(off_by(1e-3)))
    assert re.fullmatch(
        r"value of y, shape \(8, 20\): 1\d\d of 160 values are wrong\. The worst, at \(\d, \d+\), is -?0\.\d+ instead "
        r"of -?0\.\d+: the error is 0\.\d+, and \S+e-0[567] is allowed",
        str(failure),
    )
    assert failure.__notes__ == [
        "normalise breaks the law `kernel` in the case [x: rows d, w: d -> y: rows d] rows=8 d=20 float32"
    ]


def test_one_value_of_a_few_units_in_the_last_place():
    breaks("kernel", make_op(off_by(1e-4, (0, 4))), r": 2 of 160 values are wrong")  # of each of the two blocks


def test_values_that_are_not_a_number():
    def kernel(x_ref, w_ref, y_ref):
        normalised(x_ref, w_ref, y_ref)
        y_ref[1, 1] = jnp.nan

    breaks("kernel", make_op(kernel), "is nan instead of")


def test_gradient_that_is_wrong():
    def transpose(operands, results, cotangents, **options):
        x, w = operands
        return cotangents[0] * w, jnp.sum(cotangents[0] * x, axis=0)

    op = make_op(transpose=transpose)
    Trial(op, CASE).check("kernel")
    breaks("gradient", op, r"gradient of [xw], shape")


def test_a_kernel_that_sums_in_16_bits():
    def kernel(x_ref, w_ref, y_ref):
        x = x_ref[...]
        total = jnp.zeros(x.shape[:1], x.dtype)
        for i in range(x.shape[1]):
            total += jnp.abs(x[:, i])
        y_ref[...] = w_ref[...] * x / total[:, None]

    op = make_op(kernel)
    Trial(op, CASE).check("gradient")
    breaks("dtypes", op, "value of y", dataclasses.replace(CASE, sizes={"rows": 8, "d": 300}))


def test_a_result_whose_dtype_follows_the_mode():
    def function(x, w, implementation):
        return x * w * jnp.arange(x.shape[0], dtype=float)[:, None]

    breaks("x64", function, re.escape("value of y is float64[8, 20], and the reference's is float32[8, 20]"))


def test_a_kernel_that_counts_what_lies_past_the_edge():
    def kernel(x_ref, w_ref, y_ref):
        normalised(x_ref, w_ref, y_ref)
        y_ref[...] += (jnp.sum(jnp.cos(x_ref[...])) - jnp.sum(jnp.cos(x_ref[...]))) + jnp.sum(x_ref[:, 0] == 0)

    op = make_op(kernel)
    Trial(op, CASE).check("gradient")
    breaks("shapes", op, "value of y")


def with_vmap(op, rule):
    """The op's first result, as a function whose `vmap` is `rule(itself, the same under JAX's own vmap, ...)`."""

    def function(x, w, implementation):
        def one(x, w):
            return op(x, w, implementation=implementation)[0]

        call = jax.custom_batching.custom_vmap(one)
        call.def_vmap(lambda count, batched, x, w: (rule(call, one, (x, w), batched, count), True))
        return call(x, w)

    return function


def test_vmap_that_loops_over_launches():
    def loop(call, one, operands, batched, count):
        xs, ws = ([v[i] if b else v for i in range(count)] for v, b in zip(operands, batched, strict=True))
        return jnp.stack(list(map(call, xs, ws)))

    breaks("vmap", with_vmap(make_op(), loop), "vmap over x launches 3 kernels instead of 1")


def test_vmap_that_repeats_operands():
    def repeat(call, one, operands, batched, count):
        repeated = (v if b else jnp.broadcast_to(v, (count, *v.shape)) for v, b in zip(operands, batched, strict=True))
        return jax.vmap(one)(*repeated)

    message = "vmap over x repeats operands that it does not map: kernels read [(3, 20)]"
    breaks("vmap", with_vmap(make_op(), repeat), re.escape(message))


def test_a_batching_rule_that_is_wrong():
    @jax.custom_batching.custom_vmap
    def shifted(x):
        return x + 1

    @shifted.def_vmap
    def wrong(count, batched, x):
        return x + jnp.arange(count, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1)), True

    failure = Trial(lambda x, w, implementation: shifted(x) * w, CASE).failure("nested_vmap")
    assert failure is not None


def test_a_forward_kernel_that_checkpoint_runs_twice():
    op = make_op()

    def function(x, w, implementation):
        return op(op(x, w, implementation=implementation)[0] ** 2, w, implementation=implementation)[0]

    # Without a transpose rule residuals have no names.
    breaks("checkpoint", function, "checkpoint runs")


def test_values_that_change_from_run_to_run():
    count = itertools.count()

    def function(x, w, implementation):
        noise = jax.pure_callback(lambda: np.float32(next(count)), jax.ShapeDtypeStruct((), jnp.float32))
        return x * w + noise

    breaks("repeats", function, "Arrays are not equal")


def test_data_moved_needlessly():
    def function(x, w, implementation):
        return x * w + jnp.sum(x)

    found = (
        "the forward and backward pass with `rows` split over 4 devices, Auto, exchanges 22 numbers by "
        "{'all-reduce': 2}, and needs 20"
    )
    breaks("exchanges", function, re.escape(found))


def test_a_value_of_the_whole_that_a_part_cannot_know():
    def function(x, w, implementation):
        return x * w / x.shape[0]

    for law in "shard_map", "pmap":
        breaks(law, function, "value of y")


def test_registers_that_spill():
    case = dataclasses.replace(CASE, typical={"rows": 8, "d": 16384})  # 4 blocks of 128 values a thread
    breaks("compiles", make_op(), r"normalised spills \d+ bytes of registers on NVIDIA A100", case)


def test_a_program_without_kernels():
    def function(x, w, implementation):
        return x * w

    breaks("compiles", function, "no kernel is launched on NVIDIA A100")
    breaks("export", function, "the program for CUDA has no kernel")


def test_check_op_reports_every_failure():
    lines = []
    with pytest.raises(ExceptionGroup, match="2 checks failed") as caught:
        check_op(make_op(off_by(1e-3)), [CASE, CASE], laws=["kernel", "repeats"], report=lines.append)
    assert [line.split()[:2] for line in lines] == [["✗", "kernel"], ["✓", "repeats"]] * 2
    assert len(caught.value.exceptions) == 2


def test_names_that_the_op_does_not_have():
    with pytest.raises(ValueError, match="^normalise has no `z`, which the case names; it has y$"):
        Trial(make_op(), Case("x: rows d, w: d -> z: rows d", {"rows": 8, "d": 20}))


def test_results_that_the_case_does_not_name():
    failure = Trial(lambda x, w, implementation: (x, w), CASE).failure("kernel")
    assert str(failure).splitlines()[0] == "<lambda> returns 2 arrays, and the case names y"


def test_size_that_devices_do_not_share():
    case = Case("x: rows d, w: d -> y: rows d", {"rows": 7, "d": 20}, split="rows")
    failure = Trial(make_op(), case).failure("pmap")
    assert str(failure) == (
        "the size of `rows`, 7, and the number of devices, 8, need a common divisor; choose another size, or simulate "
        'devices by jax.config.update("jax_num_cpu_devices", 8)'
    )


def test_one_gpu_leaves_sharding_to_simulated_devices():
    check_op(make_op(), [CASE_OF_ROWS], laws=["auto_sharding", "pmap"], implementation="triton")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sizes": {"rows": 8}}, "Case: `sizes` lacks dimension 'd' of 'x: rows d, w: d -> y: rows d'"),
        ({"typical": {"d": 8}}, "Case: `typical` lacks dimension 'rows' of 'x: rows d, w: d -> y: rows d'"),
        ({"split": "rows e"}, "Case: `split` names 'e', which is not in 'x: rows d, w: d -> y: rows d'"),
        ({"integers": {"i": (0, 1)}}, "Case: `integers` names 'i', which is not in 'x: rows d, w: d -> y: rows d'"),
    ],
)
def test_wrong_cases(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        dataclasses.replace(CASE, **changes)


def test_only_references():
    op = make_op(off_by(1.0))
    x, w = CASE.operands().values()

    @jax.jit
    def inner(x):
        return op(x, w, implementation="interpret")[0]

    function = only_references(lambda x: jax.vmap(inner)(x[None])[0])
    np.testing.assert_array_equal(function(x), op(x, w)[0])
    assert not any("jtile" in e.primitive.name for e in jax.make_jaxpr(function)(x).eqns)
