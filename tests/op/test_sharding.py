import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jtile import TileOp
from jtile.testing.programs import collectives

# Rows may be split; `d` is needed whole; `n` is summed over.
op = TileOp("mix", "x: ... d, w: n d -> y: ... d, total: d", whole="d")


@op.reference
def reference(x, w):
    y = x * jnp.sum(w, axis=0)
    return y, jnp.sum(y, axis=range(x.ndim - 1))


heads = TileOp("heads", "q: ... (k g) d, key: ... k d -> y: ... (k g) d", whole="d")


@heads.reference
def heads_reference(q, key):
    group = q.shape[-2] // key.shape[-2]
    return (q * jnp.repeat(key, group, axis=-2),)


X = jax.random.normal(jax.random.key(0), (8, 4, 6))
W = jax.random.normal(jax.random.key(1), (4, 6))
Q, KEY = jax.random.normal(jax.random.key(2), (2, 8, 6)), jax.random.normal(jax.random.key(3), (2, 4, 6))


def make_mesh(kind=AxisType.Auto, **axes):
    count = int(np.prod(list(axes.values())))
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes), devices=jax.devices()[:count]
    )


def run(function, mesh, *placed):
    """Results and collectives of a function of arrays, each given with its spec."""
    with jax.set_mesh(mesh):
        operands = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in placed]
        compiled = jax.jit(function).lower(*operands).compile()
        return compiled(*operands), collectives(compiled)


def split_as(x, spec):
    return x.sharding.is_equivalent_to(NamedSharding(x.sharding.mesh, spec), x.ndim)


def same(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), tuple(actual), tuple(expected))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_rows_over_two_axes(kind):
    mesh = make_mesh(kind, a=2, b=4)
    (y, total), sent = run(lambda x, w: op(x, w), mesh, (X, P("a", "b")), (W, P()))
    same((y, total), reference(X, W))
    assert sent == {"all-reduce": 1}
    assert split_as(y, P("a", "b")) and total.sharding.is_fully_replicated


def test_rows_over_both_axes_at_once():
    mesh = make_mesh(a=2, b=4)
    (y, _), _ = run(lambda x, w: op(x, w), mesh, (X, P(("a", "b"))), (W, P()))
    same([y], reference(X, W)[:1])
    assert split_as(y, P(("a", "b")))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_whole_dimensions_are_gathered(kind):
    mesh = make_mesh(kind, a=2)
    results, sent = run(lambda x, w: op(x, w), mesh, (X, P(None, None, "a")), (W, P(None, "a")))
    same(results, reference(X, W))
    assert sent["all-gather"] >= 2


@pytest.mark.parametrize("shape", [(8,), (2, 4)])
def test_types_that_tell_the_split_leave_no_choice_to_the_compiler(shape):
    """So that the program holds no Python, and lowers for devices that are not here."""
    names = ("a", "b")[: len(shape)]
    mesh = AbstractMesh(shape, names, (AxisType.Explicit,) * len(shape))
    x, w = (
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))
        for a, spec in ((X, P(*names)), (W, P()))
    )
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(lambda x, w: op(x, w)).trace(x, w).lower(lowering_platforms=("cpu",))
    assert "sdy.manual_computation" in lowered.as_text() and "CustomSPMDPartitioning" not in lowered.as_text()


def test_sizes_that_devices_do_not_divide_are_gathered():
    mesh = make_mesh(AxisType.Auto, a=8)  # 8 devices and 4 rows of w
    with jax.set_mesh(mesh):
        spread = lambda x, w: op(x, jax.lax.with_sharding_constraint(w, P("a")))  # noqa: E731
        same(jax.jit(spread)(X, W), reference(X, W))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_compound_dimensions_are_split_by_their_outer_factor(kind):
    mesh = make_mesh(kind, a=4)
    (y,), sent = run(lambda q, key: heads(q, key), mesh, (Q, P(None, "a")), (KEY, P(None, "a")))
    same([y], heads_reference(Q, KEY))
    assert not sent and split_as(y, P(None, "a"))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_compound_dimension_with_a_factor_of_one(kind):
    mesh = make_mesh(kind, a=4)
    for key, spec in (KEY[:, :1], P()), (Q, P(None, "a")):  # one head for all, and one head for each
        (y,), sent = run(lambda q, key: heads(q, key), mesh, (Q, P(None, "a")), (key, spec))
        same([y], heads_reference(Q, key))
        assert not sent and split_as(y, P(None, "a"))


def test_compound_dimension_split_finer_than_its_outer_factor():
    mesh = make_mesh(a=8)
    (y,), _ = run(lambda q, key: heads(q, key), mesh, (Q, P(None, "a")), (KEY, P()))
    same([y], heads_reference(Q, KEY))


def test_operands_split_differently_follow_the_first_under_auto():
    mesh = make_mesh(a=2, b=2)
    (y,), _ = run(lambda q, key: heads(q, key), mesh, (Q, P("a")), (KEY, P("b")))
    same([y], heads_reference(Q, KEY))


def test_operands_split_differently_are_refused_under_an_explicit_mesh():
    mesh = make_mesh(AxisType.Explicit, a=2, b=2)
    message = (
        "heads: leading dimension 0 is split over mesh axes ('a',) in `q`, and leading dimension 0 over ('b',) in "
        "`key`; bring them together with jax.sharding.reshard"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        run(lambda q, key: heads(q, key), mesh, (Q, P("a")), (KEY, P("b")))


def test_a_group_axis_may_be_split():
    mesh = make_mesh(AxisType.Explicit, a=2)
    stacked = jnp.stack([W, 2 * W])
    mapped = jax.vmap(lambda x, w: op(x, w), in_axes=(None, 0))
    (y, total), sent = run(mapped, mesh, (X, P()), (stacked, P("a")))
    same((y, total), jax.vmap(reference, in_axes=(None, 0))(X, stacked))
    assert not sent and split_as(y, P("a"))


def test_partial_gradients_of_a_narrow_weight_are_summed_in_float32():
    """In bfloat16 256 + 1 is 256: a sum of partial sums must not be rounded before it is complete."""
    x = jnp.ones((8, 6), jnp.bfloat16).at[0].set(256)
    w = jnp.ones((1, 6), jnp.bfloat16)

    def loss(w, x):
        return op(x, w)[0].astype(jnp.float32).sum()

    mapped = jax.shard_map(
        lambda w, x: jax.lax.psum(loss(w, x), "a"), mesh=make_mesh(a=8), in_specs=(P(), P("a")), out_specs=P()
    )
    np.testing.assert_array_equal(jax.grad(mapped)(w, x), 264)  # 256 + 7 to the nearest bfloat16


def test_cotangents_are_split_as_their_operands_are():
    mesh = make_mesh(AxisType.Explicit, a=2)
    grad = jax.grad(lambda x, w: op(x, w)[0].sum(), argnums=(0, 1))
    (dx, dw), _ = run(grad, mesh, (X, P("a")), (W, P()))
    same((dx, dw), jax.grad(lambda x, w: reference(x, w)[0].sum(), argnums=(0, 1))(X, W))
    assert split_as(dx, P("a")) and split_as(dw, P())


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("kinds", [*itertools.product([AxisType.Auto, AxisType.Explicit], repeat=2)], ids=str)
def test_axes_of_every_kind_beside_a_manual_one(kinds, check_vma):
    """Over one axis by hand, and over the others as their kinds have it."""
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), (AxisType.Auto, *kinds))

    def gradients(f):
        return jax.grad(lambda x, w: jnp.sum(jnp.sin(f(x, w)[0])), argnums=(0, 1))

    mapped = jax.shard_map(
        lambda x, w: tuple(op(x, w))[:1],
        mesh=mesh,
        axis_names={"a"},
        in_specs=(P("a"), P()),
        out_specs=P("a"),
        check_vma=check_vma,
    )
    (dx, dw), _ = run(gradients(mapped), mesh, (X, P("a", ("b", "c"))), (W, P()))
    same((dx, dw), gradients(reference)(X, W))


# Results that are more than a sum, and operands of positions.

softmax = TileOp("softmax", "x: ... v, index[v]: ... -> logsumexp lse: ..., picked: ...")


@softmax.reference
def softmax_reference(x, index):
    inside = (index >= 0) & (index < x.shape[-1])
    picked = jnp.take_along_axis(x, index[..., None], axis=-1, mode="clip")[..., 0]
    return jax.nn.logsumexp(x, axis=-1), jnp.where(inside, picked, 0)


LOGITS = jax.random.normal(jax.random.key(4), (6, 16)).at[1, :4].set(-jnp.inf).at[2].set(-jnp.inf)
INDEX = jnp.array([0, 5, 7, 8, 15, 99])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_reductions_and_positions(kind):
    mesh = make_mesh(kind, a=2, b=2)
    results, sent = run(lambda x, i: softmax(x, i), mesh, (LOGITS, P(None, ("a", "b"))), (INDEX, P()))
    same(results, softmax_reference(LOGITS, INDEX))
    assert sent == {"all-gather": 1, "all-reduce": 1}


@pytest.mark.parametrize("check_vma", [True, False])
def test_reductions_and_positions_in_shard_map(check_vma):
    mapped = jax.shard_map(
        lambda x, i: softmax(x, i, split={"v": ("a", "b")}),
        mesh=make_mesh(a=2, b=2),
        in_specs=(P(None, ("a", "b")), P()),
        out_specs=(P(), P()),
        check_vma=check_vma,
    )
    finite = jnp.where(LOGITS == -jnp.inf, 0, LOGITS)
    same(mapped(LOGITS, INDEX), softmax_reference(LOGITS, INDEX))
    weights = jnp.arange(6.0)

    def loss(f):
        return lambda x: sum(jnp.sum(r * w) for r, w in zip(f(x, INDEX), (weights, weights**2), strict=True))

    for derive in jax.grad, lambda f: lambda x: jax.jvp(f, [x], [jnp.cos(x)])[1:]:
        same([jax.jit(derive(loss(mapped)))(finite)], [derive(loss(softmax_reference))(finite)])


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_result_that_devices_share_and_one_of_them_uses(check_vma):
    """Why cotangents are exchanged without `check_vma`: the others' are zero here."""

    def used_by_the_first(x):
        lse, _ = softmax(x, INDEX, split={"v": "a"})
        return jax.lax.psum(jnp.where(jax.lax.axis_index("a") == 0, jnp.sum(jnp.sin(lse)), 0), "a")

    mapped = jax.shard_map(
        used_by_the_first, mesh=make_mesh(a=4), in_specs=P(None, "a"), out_specs=P(), check_vma=check_vma
    )
    finite = jnp.where(LOGITS == -jnp.inf, 0, LOGITS)
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(softmax_reference(x, INDEX)[0])))(finite)
    same([jax.jit(jax.grad(mapped))(finite)], [expected])


def test_derivatives_of_the_whole_gather():
    """The tangent of a log-sum-exp is no sum of the tangents of parts."""
    x, mesh = jnp.where(LOGITS == -jnp.inf, 0, LOGITS), make_mesh(a=4)
    push = lambda f: lambda x: jax.jvp(lambda x: f(x, INDEX), [x], [jnp.sin(x)])[1]  # noqa: E731
    results, _ = run(push(lambda x, i: tuple(softmax(x, i))), mesh, (x, P(None, "a")))
    same(results, push(softmax_reference)(x))


# A position of 0 along a dimension tells each device where its part begins.

running = TileOp("running", "x: ... s, y: ... t, origin[s]: -> sums: ... s", whole="t")


@running.reference
def running_reference(x, y, origin):
    """x times the sum of y up to the place of x."""
    seen = jnp.arange(y.shape[-1]) <= jnp.arange(x.shape[-1])[:, None] - origin
    return (x * jnp.sum(jnp.where(seen, y[..., None, :], 0), axis=-1),)


def running_sums(x, y, **options):
    return running(x, y, jnp.int32(0), **options)[0]


SIGNAL = jax.random.normal(jax.random.key(5), (3, 16))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_part_knows_where_it_begins(kind):
    mesh = make_mesh(kind, a=2, b=2)
    split = P(None, ("a", "b"))

    def gradient(f):
        return lambda x, y: (f(x, y), *jax.vjp(f, x, y)[1](jnp.cos(x)))

    (sums, *gradients), sent = run(gradient(running_sums), mesh, (SIGNAL, split), (SIGNAL, split))
    expected = gradient(lambda x, y: x * jnp.cumsum(y, axis=-1))(SIGNAL, SIGNAL)
    same([sums, *gradients], expected)
    assert split_as(sums, split)
    assert sent == {"all-gather": 1, "all-reduce": 1}  # of y and of its gradient, which a GPU's compiler scatters


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_part_knows_where_it_begins_in_shard_map(check_vma):
    split = P(None, ("a", "b"))
    mapped = jax.shard_map(
        lambda x, y: running_sums(x, y, split={"s": ("a", "b")}),
        mesh=make_mesh(a=2, b=2),
        in_specs=(split, P()),
        out_specs=split,
        check_vma=check_vma,
    )
    same([mapped(SIGNAL, SIGNAL)], [SIGNAL * jnp.cumsum(SIGNAL, axis=-1)])


@pytest.mark.parametrize(
    "dim, message",
    [
        ("e", "mix: `split` names 'e', and the op can be split along '...', 'n'"),
        ("d", "mix: `split` names 'd', and the op can be split along '...', 'n'; gather 'd' by jax.lax.all_gather"),
    ],
)
def test_dimensions_that_cannot_be_split(dim, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        op(X, W, split={dim: "a"})
