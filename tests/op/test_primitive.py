import re

import jax
import jax.numpy as jnp
import pytest

from jtile import TileOp

op = TileOp("scale", "x: ... d, w: d, shift?: ... d -> y: ... d")


@op.reference
def reference(x, w, shift, *, power, offset=0.0):
    y = x * w**power + offset
    return (y if shift is None else y + shift,)


X, W = jnp.ones((2, 3)), jnp.ones(3)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: op(X, W, power=2), TypeError, "scale takes 3 operands (x, w, shift), got 2"),
        (lambda: op(X, None, X, power=2), TypeError, "scale: `w` is required, got None"),
        (lambda: op(X, W, None), TypeError, "scale needs the argument `power`"),
        (lambda: op(X, W, None, power=2, axis=1), TypeError, "scale has no argument `axis`; it takes power, offset"),
        (
            lambda: op(X, W, None, power=jnp.ones(())),
            TypeError,
            "scale: `power` must be a static, hashable Python value, got an array; under jit, mark it with "
            "static_argnames or close over it",
        ),
        (
            lambda: jax.jit(lambda p: op(X, W, None, power=p))(2),
            TypeError,
            "scale: `power` must be a static, hashable Python value, got an array; under jit, mark it with "
            "static_argnames or close over it",
        ),
        (
            lambda: op(X, W, None, power=[2]),
            TypeError,
            "scale: `power` must be a static, hashable Python value, got list; under jit, mark it with "
            "static_argnames or close over it",
        ),
        (
            lambda: op(X, W, None, power=2, implementation="cuda"),
            ValueError,
            "scale: `implementation` must be one of None, 'triton', 'xla', 'interpret', got 'cuda'",
        ),
        (
            lambda: op(X, jnp.ones(4), None, power=2),
            ValueError,
            "scale: dimension `d` must agree: it is 3 in `x` and 4 in `w`, whose dimensions are (d) and shape is (4,)",
        ),
        (
            lambda: TileOp("empty", "x: d -> y: d")(X[0]),
            TypeError,
            "empty has no reference: decorate the function that says what it means with @op.reference",
        ),
    ],
)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=rf"^{re.escape(message)}(\n|$)"):
        call()


def test_optional_operand():
    assert jnp.array_equal(op(X, W, None, power=2)[0], X)
    assert jnp.array_equal(op(X, W, X, power=2)[0], 2 * X)


def test_default_and_explicit_argument_are_one_call():
    def call(**static):
        return str(jax.make_jaxpr(lambda x: op(x, W, None, power=2, **static))(X))

    assert call() == call(offset=0.0) != call(offset=1.0)


def test_runs_eagerly_with_jit_disabled():
    with jax.disable_jit():
        assert jnp.array_equal(op(X, W, None, power=2)[0], X)
        assert jnp.array_equal(jax.grad(lambda x: op(x, W, None, power=2)[0].sum())(X), X)
        assert jnp.array_equal(jax.vmap(lambda w: op(X, w, None, power=2)[0])(jnp.stack([W, 2 * W]))[1], 4 * X)


def test_accepts_what_jax_numpy_accepts():
    assert jnp.array_equal(op([[1.0, 2.0]], [3.0, 4.0], None, power=1)[0], jnp.array([[3.0, 8.0]]))


@pytest.mark.parametrize(
    "result, message",
    [
        (lambda x: x, "bad: the reference must return a tuple of 2 (y, z), got no tuple"),
        (lambda x: (x,), "bad: the reference must return a tuple of 2 (y, z), got a tuple of 1"),
        (lambda x: (x, x, x), "bad: the reference must return a tuple of 2 (y, z), got a tuple of 3"),
        (lambda x: (None, x), "bad: the reference returned None for `y`, which is not marked optional"),
        (
            lambda x: (x.T, x),
            "bad: the reference returned shape (3, 2) for `y`, whose dimensions (... d) make it (2, 3)",
        ),
    ],
)
def test_wrong_references(result, message):
    bad = TileOp("bad", "x: ... d -> y: ... d, z?: ... d")
    bad.reference(result)
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        bad(X)
