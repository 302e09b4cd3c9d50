"""`jax.export` of each op and of a training step, read back and run by a process that has neither jtile nor Triton."""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, use_abstract_mesh
from jax.sharding import PartitionSpec as P

import jtile
from jtile.compiler.target import Target
from models import llama
from tests.small_llama import SMALL

# Of H200s that are not here.
DEVICE = AbstractDevice("NVIDIA H200", 132, "gpu")
ONE = AbstractMesh((), (), abstract_device=DEVICE)
TWO = AbstractMesh((2,), ("data",), (AxisType.Explicit,), abstract_device=DEVICE)


def normal(*shape):
    return jax.random.normal(jax.random.key(len(shape)), shape)


def integers(high, *shape):
    return jax.random.randint(jax.random.key(high), shape, 0, high, jnp.int32)


def relative(score, batch, head, query, key):
    return score + (key - query) / 8


HEADS = normal(4, 8, 4, 32), normal(4, 8, 2, 32), normal(4, 8, 2, 32)
OPS = {
    "rms_norm": (jtile.rms_norm, normal(4, 8, 96), normal(96)),
    "layer_norm": (jtile.layer_norm, normal(4, 8, 96), normal(96), normal(96)),
    "gated_rms_norm": (jtile.gated_rms_norm, normal(4, 8, 96), normal(4, 8, 96), normal(96)),
    "group_norm": (lambda *operands: jtile.group_norm(*operands, groups=3), normal(4, 8, 96), normal(96)),
    "rope": (lambda x: jtile.rope(x, jnp.arange(8)), normal(4, 8, 3, 32)),
    "qk_norm_rope": (lambda q, scale: jtile.qk_norm_rope(q, q, scale, scale, jnp.arange(8))[0], HEADS[0], normal(32)),
    "softmax": (jtile.softmax, normal(4, 8, 96)),
    "log_softmax": (jtile.log_softmax, normal(4, 8, 96)),
    "dropout": (lambda x: jtile.dropout(x, 0.3, jax.random.key(0)), normal(4, 8, 96)),
    "gated_activation": (jtile.gated_activation, normal(4, 8, 96), normal(4, 8, 96)),
    "softmax_cross_entropy": (jtile.softmax_cross_entropy, normal(4, 8, 300), integers(300, 4, 8)),
    "linear_cross_entropy": (jtile.linear_cross_entropy, normal(4, 8, 32), normal(32, 300), integers(300, 4, 8)),
    "sum_of_losses": (
        lambda x, weight, labels: jtile.linear_cross_entropy(x, weight, labels, token_weights=jnp.ones((4, 8)) / 32),
        *(normal(4, 8, 32), normal(32, 300), integers(300, 4, 8)),
    ),
    "attention": (jtile.dot_product_attention, *HEADS),
    "attention_with_features": (
        lambda *qkv: jtile.dot_product_attention(*qkv, local_window_size=3, logits_soft_cap=5.0, is_causal=True),
        *HEADS,
    ),
    "flex_attention": (lambda *qkv: jtile.flex_attention(*qkv, score_mod=relative), *HEADS),
}


def with_gradients(op):
    """The op and its gradients by its floating operands."""

    def function(*operands):
        floating = [i for i, x in enumerate(operands) if jnp.issubdtype(x.dtype, jnp.floating)]
        loss = lambda *operands: jnp.sum(jnp.sin(op(*operands)), dtype=jnp.float32)  # noqa: E731
        return op(*operands), *jax.grad(loss, floating)(*operands)

    return function


@functools.cache
def training():
    """A step of training as a function of flat lists, since Flax's containers are no part of an exported program."""
    graph, params = nnx.split(llama.Llama(SMALL, rngs=nnx.Rngs(0)), nnx.Param)
    optimizer = optax.adamw(1e-3)
    leaves, tree = jax.tree.flatten((params, optimizer.init(params)))

    def step(leaves, tokens, mean):
        params, state = jax.tree.unflatten(tree, leaves)
        loss, gradients = jax.value_and_grad(lambda params: mean(llama.loss(nnx.merge(graph, params), tokens)))(params)
        updates, state = optimizer.update(gradients, state, params)
        return jax.tree.leaves((optax.apply_updates(params, updates), state)), loss

    return step, leaves, integers(128, 4, 17)


def train(leaves, tokens):
    return training()[0](leaves, tokens, lambda loss: loss)


def train_in_parallel(leaves, tokens):
    step = functools.partial(training()[0], mean=lambda loss: jax.lax.pmean(loss, "data"))
    return jax.shard_map(step, in_specs=(P(), P("data")), out_specs=P())(leaves, tokens)


def sharded(operands):
    """Their shapes: the dimension of size 4, the batch, split over both devices, and the others' whole."""

    def shape(x):
        spec = P("data") if x.shape[:1] == (4,) else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(TWO, spec))

    return jax.tree.map(shape, operands)


# Name: the mesh to export for, the function to export, what it is on one device, and operands.
PROGRAMS = {
    **{name: (ONE, with_gradients(op), with_gradients(op), operands) for name, (op, *operands) in OPS.items()},
    **{f"{name}_x2": (TWO, with_gradients(op), with_gradients(op), o) for name, (op, *o) in OPS.items()},
    "train": (ONE, train, train, training()[1:]),
    "train_x2": (TWO, train_in_parallel, train, training()[1:]),
}

RUN = """
import importlib.abc, pathlib, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("jtile", "jax_triton", "triton"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Absent())
import jax, numpy as np

for path in map(pathlib.Path, sys.argv[1:]):
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    with np.load(path.with_suffix(".operands.npz")) as arrays:
        operands = list(arrays.values())
    # The program says how it wants its operands split; here they only come to as many devices as it was made for.
    mesh = jax.make_mesh((exported.nr_devices,), ("devices",), devices=jax.devices()[:exported.nr_devices])
    operands = jax.device_put(operands, jax.NamedSharding(mesh, jax.P()))
    args, kwargs = jax.tree.unflatten(exported.in_tree, operands)
    results = jax.jit(exported.call)(*args, **kwargs)
    np.savez(path.with_suffix(".results.npz"), *map(np.asarray, jax.tree.leaves(results)))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with every program, for CPU and CUDA at once."""
    folder = tmp_path_factory.mktemp("exported")
    for name, (mesh, function, _, operands) in PROGRAMS.items():
        shapes = sharded(operands) if mesh is TWO else operands
        with use_abstract_mesh(mesh):
            program = jax.export.export(
                jax.jit(function), platforms=("cpu", "cuda"), disabled_checks=jtile.EXPORT_CHECKS
            )(*shapes)
        assert program.nr_devices == (2 if mesh is TWO else 1)
        assert "triton_kernel_call" in program.mlir_module()
        (folder / name).write_bytes(program.serialize())
        np.savez(folder / f"{name}.operands.npz", *jax.tree.leaves(operands))
    return folder


def check(folder, names, **environment):
    """Run programs elsewhere, and compare with what the functions make of the same operands here."""
    run = subprocess.run(
        [sys.executable, "-c", RUN, *(folder / name for name in names)],
        env={**os.environ, **environment, "PYTHONPATH": ""},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    for name in names:
        _, _, function, operands = PROGRAMS[name]
        expected = jax.tree.leaves(jax.jit(function)(*operands))
        with np.load(folder / f"{name}.results.npz") as found:
            for actual, wanted in zip(found.values(), expected, strict=True):
                assert actual.dtype == wanted.dtype
                # Sums of up to a few hundred float32 terms of about 1, in another order.
                np.testing.assert_allclose(actual, wanted, rtol=2e-5, atol=2e-5, err_msg=name)


def test_programs_run_without_jtile_or_triton(exported):
    check(exported, PROGRAMS, JAX_PLATFORMS="cpu")


@pytest.mark.gpu
def test_programs_run_without_jtile_or_triton_on_gpu(exported):
    count = jax.device_count()
    check(exported, [name for name, (mesh, *_) in PROGRAMS.items() if count >= mesh.size])


@pytest.mark.parametrize("where", ["here", "absent"])
def test_shardings_that_xla_chooses_cannot_be_exported(where):
    devices = jax.devices()[:4] if where == "here" else Target.named("NVIDIA H200").topology(4).devices
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    message = (
        "rms_norm: jax.export cannot save a program for 4 devices in which XLA is still to choose how the op is split. "
        "Call the op inside jax.shard_map, or shard its operands over a mesh whose axes are AxisType.Explicit"
    )
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        jax.export.export(jax.jit(lambda x: jtile.rms_norm(x, jnp.ones(16))), platforms=("cpu", "cuda"))(x)
