"""Errors name the op and the argument, whatever transformation they arise under."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jtile

X, SCALE, HEADS = jnp.ones((2, 8)), jnp.ones(8), jnp.ones((2, 4, 2, 16))
OPS = {
    "rms_norm": lambda **options: jtile.rms_norm(X, SCALE, **options),
    "layer_norm": lambda **options: jtile.layer_norm(X, SCALE, **options),
    "gated_rms_norm": lambda **options: jtile.gated_rms_norm(X, X, SCALE, **options),
    "group_norm": lambda groups=2, **options: jtile.group_norm(X, SCALE, groups=groups, **options),
    "rope": lambda **options: jtile.rope(HEADS, jnp.arange(4), **options),
    "qk_norm_rope": lambda **options: jtile.qk_norm_rope(HEADS, HEADS, *[jnp.ones(16)] * 2, jnp.arange(4), **options),
    "gated_activation": lambda **options: jtile.gated_activation(X, X, **options),
    "softmax_cross_entropy": lambda **options: jtile.softmax_cross_entropy(X, jnp.zeros(2, int), **options),
    "linear_cross_entropy": lambda **options: jtile.linear_cross_entropy(X, X.T, jnp.zeros(2, int), **options),
    "softmax": lambda **options: jtile.softmax(X, **options),
    "log_softmax": lambda **options: jtile.log_softmax(X, **options),
    "dropout": lambda rate: jtile.dropout(X, rate, jax.random.key(0)),
    "dot_product_attention": lambda **options: jtile.dot_product_attention(HEADS, HEADS, HEADS, **options),
    "flex_attention": lambda **options: jtile.flex_attention(HEADS, HEADS, HEADS, **options),
}
KNOWN = {
    "rms_norm": ["epsilon"],
    "layer_norm": ["epsilon"],
    "gated_rms_norm": ["epsilon", "norm_before_gate"],
    "group_norm": ["epsilon", "groups"],
    "rope": ["theta", "interleaved", "rotary_dim"],
    "qk_norm_rope": ["epsilon", "theta", "interleaved", "rotary_dim"],
    "gated_activation": ["activation"],
    "softmax_cross_entropy": ["ignore_index", "label_smoothing", "z_loss", "logits_soft_cap", "axis_name"],
    "linear_cross_entropy": ["ignore_index", "label_smoothing", "z_loss", "logits_soft_cap", "axis_name"],
    "softmax": ["scale", "is_causal"],
    "log_softmax": ["scale", "is_causal"],
    "dropout": ["rate"],
    "dot_product_attention": [
        *("scale", "is_causal", "local_window_size", "logits_soft_cap", "dropout_rate", "return_lse", "axis_name"),
    ],
    "flex_attention": ["scale", "return_lse", "axis_name"],
}
UNDER = {
    "jit": lambda f: jax.jit(f)(1.0),
    "vmap": lambda f: jax.vmap(f)(jnp.ones(3)),
    "grad": lambda f: jax.grad(lambda v: jnp.sum(f(v)))(1.0),
}


def over_two_devices(function, **specs):
    return jax.shard_map(function, mesh=jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,)), **specs)


@pytest.mark.parametrize("transformation", UNDER)
@pytest.mark.parametrize("name, argument", [(name, argument) for name in KNOWN for argument in KNOWN[name]])
def test_traced_arguments_that_must_be_known(name, argument, transformation):
    with pytest.raises(ValueError, match=f"^{name}: `{argument}` must be .*known when tracing"):
        UNDER[transformation](lambda v: OPS[name](**{argument: v}))


@pytest.mark.parametrize(
    "function, message",
    [
        (
            lambda: jax.vmap(jtile.rms_norm)(jnp.ones((3, 2, 8)), jnp.ones((3, 7))),
            "rms_norm: dimension `d` must agree: it is 8 in `x` and 7 in `scale`",
        ),
        (
            lambda: jax.jit(jax.grad(lambda x: jtile.gated_activation(x, X[:1]).sum()))(X),
            "gated_activation: leading dimensions must agree: they are (2, 8) in `gate` and (1, 8) in `up`",
        ),
        (
            lambda: jax.checkpoint(jtile.dot_product_attention)(HEADS, HEADS[..., :8], HEADS),
            "dot_product_attention: dimension `d` must agree: it is 16 in `query` and 8 in `key`",
        ),
        (
            lambda: jax.lax.scan(lambda c, x: (c, jtile.softmax_cross_entropy(x, c)), jnp.zeros(3, int), X[None]),
            "softmax_cross_entropy: leading dimensions must agree: they are (2,) in `logits` and (3,) in `labels`",
        ),
        (
            lambda: over_two_devices(jtile.rms_norm, in_specs=(P("i"), P("i")), out_specs=P("i"))(X, SCALE),
            "rms_norm: dimension `d` must agree: it is 8 in `x` and 4 in `scale`",
        ),
        (
            lambda: jax.pmap(jtile.rms_norm, in_axes=(0, None))(X[:, None], SCALE[:7]),
            "rms_norm: dimension `d` must agree: it is 8 in `x` and 7 in `scale`",
        ),
    ],
    ids=["vmap", "grad", "checkpoint", "scan", "shard_map", "pmap"],
)
def test_shapes_that_do_not_match(function, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        function()


def test_a_split_that_types_do_not_agree_on():
    """Also in the gradient, where the cotangent comes from elsewhere."""
    x, mesh = X.reshape(4, 4), jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    gate, up = (jax.device_put(x, NamedSharding(mesh, P(axis))) for axis in ("a", "b"))
    message = (
        "gated_activation: leading dimension 0 is split over mesh axes ('a',) in `gate`, and leading dimension 0 over "
        "('b',) in `up`; bring them together with jax.sharding.reshard"
    )
    for function in jtile.gated_activation, jax.jit(jax.grad(lambda *x: jtile.gated_activation(*x).sum())):
        with jax.set_mesh(mesh), pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            function(gate, up)


def test_one_mesh_axis_for_two_dimensions_that_operands_share():
    x, mesh = X[None].repeat(2, 0), jax.make_mesh((2,), ("a",), axis_types=(AxisType.Explicit,))
    x, residual = (jax.device_put(x, NamedSharding(mesh, spec)) for spec in (P("a"), P(None, "a")))
    message = (
        "rms_norm: leading dimension 0 is split over mesh axes ('a',) in `x`, and leading dimension 1 over ('a',) in "
        "`residual`; bring them together with jax.sharding.reshard"
    )
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        jtile.rms_norm(x, SCALE, residual=residual)


def test_a_mesh_axis_that_is_not_there():
    for options in {"axis_name": "i"}, {"axis_name": ("i", "j")}:
        with pytest.raises(ValueError, match=r"^softmax_cross_entropy: mesh axes \('i',.* are to split dimension 'v'"):
            jtile.softmax_cross_entropy(X, jnp.zeros(2, int), **options)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_an_implementation_that_cannot_serve(kind):
    """Under sharding the choice is made when XLA has split the operands: the error is the op's all the same."""
    mesh = jax.make_mesh((2,), ("a",), axis_types=(kind,))
    x = jax.device_put(X, NamedSharding(mesh, P("a")))
    with jax.set_mesh(mesh), pytest.raises(Exception, match="rms_norm: implementation='triton' cannot serve this call"):
        jax.jit(lambda x: jtile.rms_norm(x, SCALE, implementation="triton"))(x)


def test_errors_of_a_reference_or_kernel_tell_the_op_and_its_operands():
    op = jtile.TileOp("shifted", "x: ... d, shift: d -> y: ... d")
    op.reference(lambda x, shift: (x & shift,))
    with pytest.raises(TypeError) as caught:
        jax.vmap(lambda x: op(x, SCALE))(X)
    assert caught.value.__notes__[0] == "This is shifted of `x` float32[8], `shift` float32[8]."

    op.reference(lambda x, shift: (x + shift,))

    @op.kernel
    def kernel(x, shift):
        raise RuntimeError("no tile fits")

    with pytest.raises(RuntimeError, match="no tile fits") as caught:
        jax.jit(jax.value_and_grad(lambda x: op(x, SCALE, implementation="interpret")[0].sum()))(X)
    assert caught.value.__notes__[0] == "This is shifted of `x` float32[2, 8], `shift` float32[8]."
