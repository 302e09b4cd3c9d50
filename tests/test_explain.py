"""`jtile.explain`: what runs and why, without running anything."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jtile

X, SCALE = jax.ShapeDtypeStruct((4, 8), jnp.bfloat16), jax.ShapeDtypeStruct((8,), jnp.float32)


def loss(x, scale):
    return jtile.rms_norm(x, scale).sum() + jtile.rms_norm(x, scale, implementation="xla").sum()


def test_lists_each_op_with_its_implementation_and_the_reason():
    on_gpu = jtile.explain(loss, X, SCALE, target="NVIDIA H200")
    assert [(r.name, r.runs, r.why) for r in on_gpu] == [
        ("rms_norm", "kernel", "lowered for an NVIDIA GPU"),
        ("rms_norm", "reference", "implementation='xla'"),
    ]
    assert on_gpu[0].operands == "bfloat16[4,8], float32[8]"
    assert all(r.runs == "reference" for r in jtile.explain(loss, X, SCALE))


def test_looks_inside_control_flow_and_transformations():
    def layers(x, scale):
        return jax.lax.scan(lambda x, _: (jax.checkpoint(jtile.rms_norm)(x, scale), None), x, None, length=3)[0].sum()

    names = {r.name for r in jtile.explain(jax.jit(jax.grad(layers)), X, SCALE, target="NVIDIA H200")}
    assert names == {"rms_norm", "rms_norm_backward"}


def test_counts_equal_calls_together():
    [report] = jtile.explain(lambda x, s: jtile.rms_norm(jtile.rms_norm(x, s), s), X, SCALE)
    assert report.count == 2 and "rms_norm ×2" in str(
        jtile.explain(lambda x, s: jtile.rms_norm(jtile.rms_norm(x, s), s), X, SCALE)
    )


def test_says_why_a_kernel_cannot_serve():
    with jax.enable_x64(True):
        [report] = jtile.explain(jtile.rms_norm, X.update(dtype=jnp.float64), SCALE, target="NVIDIA H200")
    assert report.runs == "reference" and "`x` is float64" in report.why


def test_says_by_which_schedule_attention_runs_and_why():
    x = jax.ShapeDtypeStruct((1, 256, 4, 64), jnp.bfloat16)

    def whys(target, **options):
        loss = lambda q: jtile.dot_product_attention(q, q, q, is_causal=True, **options).sum()  # noqa: E731
        return [r.why.partition(", ")[2] for r in jtile.explain(jax.grad(loss), x, target=target)]

    assert whys("NVIDIA H200") == ["on the schedule for Hopper"] * 2
    assert whys("NVIDIA A100") == ["on the portable schedule: the chip is no Hopper"] * 2
    dropped = whys("NVIDIA H200", dropout_rate=0.1, dropout_key=jax.random.key(0))
    assert dropped == ["on the portable schedule: it has no dropout"] * 2


def test_a_function_without_ops_and_an_unknown_target():
    assert str(jtile.explain(jnp.sin, X)) == "no ops"
    with pytest.raises(ValueError, match="NVIDIA H200"):
        jtile.explain(loss, X, SCALE, target="NVIDIA H2000")


@pytest.mark.parametrize(
    "kind, forward, backward",
    [
        (AxisType.Explicit, "all of dimension `d` of `x`", "all of dimension `d` of `x`, the sum of `dscale`"),
        (AxisType.Auto, *["all of dimension `d` where it is split"] * 2),
    ],
)
def test_notes_what_devices_exchange(kind, forward, backward):
    mesh = AbstractMesh((2, 2), ("a", "b"), (kind,) * 2)
    x = X.update(sharding=NamedSharding(mesh, P("a", "b")))
    scale = SCALE.update(sharding=NamedSharding(mesh, P()))

    def loss(x, scale):
        return jnp.sum(jnp.square(jtile.rms_norm(x, scale)) * x)

    found = jtile.explain(jax.grad(loss, 1), x, scale)
    assert [(r.name, r.moves) for r in found] == [("rms_norm", forward), ("rms_norm_backward", backward)]
    assert "devices exchange" in str(found) and "devices exchange" not in str(jtile.explain(jtile.rms_norm, X, SCALE))


def test_notes_reductions_along_a_split_vocabulary():
    mesh = AbstractMesh((2,), ("model",), (AxisType.Explicit,))
    logits = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=NamedSharding(mesh, P(None, "model")))
    labels = jax.ShapeDtypeStruct((4,), jnp.int32, sharding=NamedSharding(mesh, P()))
    [found] = jtile.explain(jtile.softmax_cross_entropy, logits, labels)
    assert found.moves == "the logsumexp of `lse`, the sum of `picked`"
