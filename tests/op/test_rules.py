import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jtile import CompilerParams, TileOp
from jtile.compiler.rewrite import equations
from jtile.op import lowering
from jtile.op.primitive import TilePrimitive

# y = w · x + shift, dw = Σ dy · x over rows.
forward = TileOp("scale", "x: ... d, w: d, shift?: ... d -> y: ... d; kept: ..., unused: ...")
backward = TileOp("scale_backward", "x: ... d, w: d, kept: ..., dy: ... d -> dx: ... d, dw: d")


@forward.reference
def forward_reference(x, w, shift):
    y = x * w
    return y if shift is None else y + shift, jnp.sum(x, -1, dtype=jnp.float32), jnp.sum(x, -1)


@forward.kernel
def forward_kernel(x, w, shift):
    def scale(x_ref, w_ref, y_ref, kept_ref):
        y_ref[...] = x_ref[...] * w_ref[...]
        kept_ref[...] = jnp.sum(x_ref[...], axis=1)

    row = pl.BlockSpec((2, x.shape[1]), lambda i: (i, 0))
    y, kept = pl.pallas_call(
        scale,
        [x, jax.ShapeDtypeStruct(x.shape[:1], jnp.float32)],
        grid=(pl.cdiv(x.shape[0], 2),),
        in_specs=[row, pl.BlockSpec(w.shape, lambda i: (0,))],
        out_specs=[row, pl.BlockSpec((2,), lambda i: (i,))],
        compiler_params=CompilerParams(),
    )(x, w)
    return y if shift is None else y + shift, kept, kept


@backward.reference
def backward_reference(x, w, kept, dy):
    return dy * w, jnp.sum(dy * x, axis=range(x.ndim - 1), dtype=jnp.float32)


seen = []  # what the transpose rule was given


@forward.transpose
def forward_transpose(operands, results, cotangents, **options):
    seen.append((operands, results, cotangents, options))
    x, w, shift = operands
    dx, dw = backward(x, w, results[1], cotangents[0], **options)
    return dx, dw, None if shift is None else cotangents[0]


def scale(x, w, shift=None, **options):
    return forward(x, w, shift, **options)[0]


def calls(function, *operands):
    """The equations of tile primitives in a program."""
    program = equations(jax.make_jaxpr(function)(*operands).jaxpr)
    return [e for e in program if isinstance(e.primitive, TilePrimitive)]


X = jax.random.normal(jax.random.key(0), (5, 3, 4))
W = jax.random.normal(jax.random.key(1), (4,))
XS, WS = jnp.stack([X, X + 1]), jnp.stack([W, W + 1])


# Batching


def test_a_mapped_leading_operand_joins_the_rows():
    [call] = calls(jax.vmap(lambda x, shift: scale(x, W, shift)[0], in_axes=1), X, X)
    x, w, shift = (v.aval.shape for v in call.invars)
    assert (x, w, shift) == ((3, 5, 4), (4,), (3, 5, 4))
    assert not any(map(any, call.params["call"].groups))


@pytest.mark.parametrize(
    "axes, groups, shapes",
    [
        ((0, 0), [(True,), (True,)], [(2, 5, 3, 4), (2, 4)]),
        ((None, 0), [(False,), (True,)], [(5, 3, 4), (2, 4)]),
    ],
)
def test_other_mapped_operands_form_groups_and_none_is_broadcast(axes, groups, shapes):
    operands = [XS if axes[0] == 0 else X, WS]
    mapped = jax.vmap(scale, in_axes=axes)
    [call] = calls(mapped, *operands)
    assert list(call.params["call"].groups) == groups
    assert [v.aval.shape for v in call.invars] == shapes
    assert not any(e.primitive.name == "broadcast_in_dim" for e in equations(jax.make_jaxpr(mapped)(*operands).jaxpr))


def test_one_of_two_leading_operands_forms_a_group():
    [call] = calls(jax.vmap(lambda x, shift: scale(x, W, shift), in_axes=(0, None)), XS, X)
    assert list(call.params["call"].groups) == [(True,), (False,), (False,)]


def test_gradients_of_weights_are_not_summed_over_a_mapped_axis():
    [call] = calls(jax.vmap(lambda x: backward(x, W, x[..., 0], x)), XS)
    assert list(call.params["call"].groups) == [(True,), (False,), (True,), (True,)]


def test_groups_are_one_launch():
    mapped = jax.vmap(jax.vmap(scale, in_axes=(None, 0)), in_axes=(0, None))
    [call] = calls(mapped, XS, WS)
    run = jax.make_jaxpr(lambda *operands: lowering.execute(forward, call.params["call"], "cuda", *operands))(XS, WS)
    [launch] = [e for e in equations(run.jaxpr) if e.primitive.name == "pallas_call"]
    assert launch.params["grid_mapping"].grid == (2, 15)  # 2 groups, 30 rows in blocks of 2
    assert [v.aval.shape for v in launch.invars] == [(30, 4), (2, 4)]
    np.testing.assert_allclose(mapped(XS, WS), XS[:, None] * WS[:, None, None], rtol=1e-6)


# Reverse mode


def test_transpose_rule_gets_operands_results_and_cotangents():
    seen.clear()
    _, vjp = jax.vjp(lambda x, w: scale(x, w, implementation="xla"), X, W)
    dx, dw = vjp(X)
    (operands, results, cotangents, options) = seen[-1]
    assert operands[2] is None and options == {"implementation": "xla"}
    assert [r is not None for r in results] == [False, True, False], "only what the rule reads is kept"
    assert [c is not None for c in cotangents] == [True, False, False]
    np.testing.assert_allclose(dx, X * W, rtol=1e-6)
    np.testing.assert_allclose(dw, jnp.sum(X * X, (0, 1)), rtol=1e-5)


def test_first_cotangent_is_always_an_array():
    op, given = TileOp("two", "x: ... -> a: ..., b: ..."), []
    op.reference(lambda x: (x, 2 * x))

    @op.transpose
    def transpose(operands, results, cotangents, **options):
        given.append(cotangents)
        a, b = cotangents
        return (a + 2 * b,) if b is not None else (a,)

    np.testing.assert_array_equal(jax.grad(lambda x: op(x)[1].sum())(W), jnp.full(4, 2.0))
    np.testing.assert_array_equal(given[-1][0], jnp.zeros(4))
    np.testing.assert_array_equal(jax.grad(lambda x: op(x)[0].sum())(W), jnp.ones(4))
    assert given[-1][1] is None


def test_without_a_transpose_rule_the_reference_is_differentiated():
    op = TileOp("cube", "x: ... -> y: ...")
    op.reference(lambda x: (x**3,))
    np.testing.assert_allclose(jax.grad(lambda x: op(x)[0].sum())(X), 3 * X**2, rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(lambda x: op(x)[0], [X], [X])[1], 3 * X**3, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(jax.grad(lambda x: op(x)[0])))(W), 6 * W, rtol=1e-6)


def test_hessian():
    x, w = X[0, :2], W
    loss = lambda x, w: jnp.sum(jnp.sin(scale(x, w)))  # noqa: E731
    plain = lambda x, w: jnp.sum(jnp.sin(x * w))  # noqa: E731
    found, expected = (jax.hessian(f, argnums=(0, 1))(x, w) for f in (loss, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_cotangents_are_cast_to_the_operands_dtype():
    dx, dw = jax.grad(lambda x, w: scale(x, w).sum(), argnums=(0, 1))(X.astype(jnp.bfloat16), W)
    assert dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32


def test_a_gradient_summed_over_a_mapped_axis_is_summed_in_float32():
    ones = jnp.ones((1000, 1, 4), jnp.bfloat16)
    grad = jax.grad(lambda w: jax.vmap(lambda x: scale(x, w))(ones).sum())(W.astype(jnp.bfloat16))
    np.testing.assert_array_equal(grad.astype(jnp.float32), jnp.full(4, 1000.0))


def test_residuals_carry_names():
    program = equations(jax.make_jaxpr(lambda x: jax.vjp(lambda x: scale(x, W), x)[0])(X).jaxpr)
    names = [e.params["name"] for e in program if e.primitive.name == "name"]
    assert names == ["scale_y", "scale_kept", "scale_unused"]


# Forward mode and integers


def test_integer_operands_have_no_derivative():
    op = TileOp("pick", "x: ... d, index: ... -> y: ..., found: ...")
    op.reference(lambda x, i: (jnp.take_along_axis(x, i[..., None], axis=-1)[..., 0], i + 1))
    index = jnp.array([[1, 0, 3]] * 5)
    zero = np.zeros(index.shape, jax.dtypes.float0)
    (y, found), (y_dot, found_dot) = jax.jvp(lambda x, i: op(x, i), (X, index), (X, zero))
    np.testing.assert_array_equal(y_dot, y)
    assert found_dot.dtype == jax.dtypes.float0
    dx, di = jax.vjp(lambda x, i: op(x, i), X, index)[1]((y, np.zeros(found.shape, jax.dtypes.float0)))
    assert di.dtype == jax.dtypes.float0 and dx.shape == X.shape
    np.testing.assert_array_equal(dx.sum(-1), y)
    np.testing.assert_array_equal(jax.vmap(op, in_axes=(None, 0))(X[0], index)[0].shape, (5, 3))


def test_tangents_that_are_zero_cost_nothing():
    [_, call] = calls(lambda x: jax.jvp(lambda x: scale(x, W), [x], [x]), X)
    assert [v.aval.shape for v in call.invars].count(W.shape) == 1  # the operand, and no tangent


# Errors


def test_errors_under_vmap_name_the_op_and_the_operand():
    message = "scale: dimension `d` must agree: it is 4 in `x` and 3 in `w`"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        jax.vmap(scale)(XS, WS[:, :3])
