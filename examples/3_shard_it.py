"""Trains a Llama on several devices, split in each of the usual ways, to the losses that one device comes to.

    python examples/3_shard_it.py                            # on the devices that are here
    python examples/3_shard_it.py --simulate 8               # on CPU devices that share this machine's cores
    python examples/3_shard_it.py --modes one fsdp tensor    # some of the ways
    srun python examples/3_shard_it.py --distributed         # a process for each node, under Slurm

Each way is written twice: `data`, `fsdp` and `tensor` say how arrays are split and leave the rest to XLA;
`data_shard_map`, `fsdp_shard_map` and `tensor_shard_map` say what each device computes and when devices exchange what.
`pmap` is data parallelism as older programs have it. No op of jtile needs to know.
"""

import argparse
import dataclasses
import functools
import importlib
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# models/ lies beside examples/ and is no part of the package, nor is the first example.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jtile
from models import llama

first_example = importlib.import_module("1_train_a_llama")  # a module's name that no import statement can spell

MODES = ("one", "data", "data_shard_map", "fsdp", "fsdp_shard_map", "tensor", "tensor_shard_map", "pmap")


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--size", choices=llama.SIZES, default="tiny")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16, help="sequences a step, on all devices together")
    parser.add_argument("--sequence", type=int, default=128, help="bytes a sequence")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--simulate", type=int, metavar="N", help="run on N simulated CPU devices a process")
    parser.add_argument("--distributed", action="store_true", help="several processes; clusters tell them all below")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of the process with --process 0")
    parser.add_argument("--processes", type=int, help="how many there are")
    parser.add_argument("--process", type=int, help="which of them this is")
    return parser.parse_args(arguments)


# How parameters are split over the mesh, whose axes are "data" and "model".


def make_mesh(mode: str, config: llama.Config, devices: list[jax.Device]) -> Mesh:
    """All devices along "data"; for tensor parallelism as many along "model" as can share out the key heads."""
    model = math.gcd(config.num_key_value_heads, len(devices)) if mode.startswith("tensor") else 1
    return jax.make_mesh((len(devices) // model, model), ("data", "model"), (AxisType.Auto,) * 2, devices=devices)


def spec(mode: str, mesh: Mesh, path, array) -> P:
    """Which dimension of a parameter, or of the optimizer's state that goes with it, an axis splits."""
    if mode.startswith("fsdp"):  # the first dimension that can be
        dimensions = [i for i, n in enumerate(array.shape) if n % mesh.shape["data"] == 0]
        return P(*[None] * dimensions[0], "data") if dimensions else P()
    if mode.startswith("tensor"):  # heads, hidden units and the vocabulary
        names = {getattr(entry, "key", None) for entry in path}
        if names & {"query", "key", "value", "gate", "up", "head"}:
            return P(None, "model")
        if names & {"out", "down", "embed"}:
            return P("model", None)
    return P()


# Loss and gradients: by annotations, where XLA finds out what to exchange, and by `shard_map`.

Loss = Callable[[Any, jax.Array], jax.Array]  # of parameters and tokens


def by_annotations(mode: str, loss: Loss, mesh: Mesh, specs) -> Callable:
    if mode != "fsdp":
        return jax.value_and_grad(loss)

    def split_gradients(params, tokens):
        # Parameters are whole where they are used; gradients, like the optimizer's state, need never be.
        whole = jax.lax.with_sharding_constraint(params, NamedSharding(mesh, P()))
        value, gradients = jax.value_and_grad(loss)(whole, tokens)
        placed = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
        return value, jax.lax.with_sharding_constraint(gradients, placed)

    return split_gradients


def by_shard_map(mode: str, graph, mesh: Mesh, specs) -> Callable:
    """Gradients of parameters that devices share are summed over these by `shard_map` itself."""

    def gather(part, split):
        return jax.lax.all_gather(part, "data", axis=split.index("data"), tiled=True) if "data" in split else part

    def local_loss(params, tokens):
        if mode == "fsdp_shard_map":  # whose transpose is the gradients' reduce-scatter
            params = jax.tree.map(gather, params, specs)
        model = nnx.merge(graph, params)
        if mode != "tensor_shard_map":
            return jax.lax.pmean(llama.loss(model, tokens), "data")
        model.embed = SplitEmbed(model.embed)
        for block in model.blocks:
            block.attention.out, block.mlp.down = Summed(block.attention.out), Summed(block.mlp.down)
        losses = jtile.softmax_cross_entropy(  # of the vocabulary that each device has
            model(tokens[:, :-1]), tokens[:, 1:], axis_name="model", implementation=model.config.implementation
        )
        return jax.lax.pmean(losses.mean(), "data")

    return jax.shard_map(jax.value_and_grad(local_loss), mesh=mesh, in_specs=(specs, P("data")), out_specs=(P(), specs))


class Summed(nnx.Module):
    """A layer of whose inputs each device has a part: its output is a sum over devices."""

    def __init__(self, layer: nnx.Linear):
        self.layer = layer

    def __call__(self, x):
        return jax.lax.psum(self.layer(x), "model")


class SplitEmbed(nnx.Module):
    """An embedding of which each device has the rows of a part of the vocabulary."""

    def __init__(self, embed: nnx.Embed):
        self.embed = embed

    def __call__(self, tokens):
        rows = self.embed.embedding.shape[0]
        tokens = tokens - jax.lax.axis_index("model") * rows
        mine = (0 <= tokens) & (tokens < rows)
        return jax.lax.psum(jnp.where(mine[..., None], self.embed(jnp.where(mine, tokens, 0)), 0), "model")

    def attend(self, hidden):
        return self.embed.attend(hidden)


# A step of training.


@dataclasses.dataclass
class Training:
    """Parameters and optimizer's state on their devices, and the step that replaces them, both jitted."""

    init: Callable[[], Any]
    step: Callable
    put: Callable[[np.ndarray], Any]  # tokens on their devices
    state: Any = None

    @classmethod
    def start(cls, mode: str, config: llama.Config, options: argparse.Namespace, devices: list[jax.Device]):
        training = cls.plan(mode, config, options, devices)
        training.state = training.init()
        return training

    @classmethod
    def plan(cls, mode: str, config: llama.Config, options: argparse.Namespace, devices: list[jax.Device]):
        """All but the state, which nothing has made yet."""
        optimizer = first_example.make_optimizer(options)
        graph, _ = nnx.split(nnx.eval_shape(lambda: llama.Llama(config, rngs=nnx.Rngs(0))), nnx.Param)

        def fresh():
            _, params = nnx.split(llama.Llama(config, rngs=nnx.Rngs(options.seed)), nnx.Param)
            return params, optimizer.init(params)

        def loss(params, tokens):
            return llama.loss(nnx.merge(graph, params), tokens)

        def update(gradients_of, state, tokens):
            params, optimizer_state = state
            value, gradients = gradients_of(params, tokens)
            updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
            return (optax.apply_updates(params, updates), optimizer_state), value

        mesh = make_mesh(mode, config, devices[:1] if mode == "one" else devices)
        specs = jax.tree.map_with_path(functools.partial(spec, mode, mesh), jax.eval_shape(fresh))
        placed = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
        init = jax.jit(fresh, out_shardings=placed)

        if mode == "pmap":

            def mean_gradients(params, tokens):
                return jax.lax.pmean(jax.value_and_grad(loss)(params, tokens), "data")

            step = jax.pmap(
                functools.partial(update, mean_gradients),
                axis_name="data",
                in_axes=(None, 0),
                out_axes=(None, None),
                donate_argnums=0,
                devices=devices,
            )
            mine = [i for i, device in enumerate(devices) if device.process_index == jax.process_index()]
            return cls(init, step, lambda tokens: tokens.reshape(len(devices), -1, tokens.shape[1])[mine])

        by_hand = mode.endswith("shard_map")
        gradients_of = (
            by_shard_map(mode, graph, mesh, specs[0]) if by_hand else by_annotations(mode, loss, mesh, specs[0])
        )
        step = jax.jit(
            functools.partial(update, gradients_of),
            donate_argnums=0,
            out_shardings=(placed, NamedSharding(mesh, P())),
        )

        def put(tokens):
            # Every process has all tokens, and gives its devices theirs.
            split = NamedSharding(mesh, P("data"))
            return jax.make_array_from_callback(tokens.shape, split, lambda part: tokens[part])

        return cls(init, step, put)

    def train(self, tokens: np.ndarray) -> jax.Array:
        self.state, loss = self.step(self.state, self.put(tokens))
        return loss


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """The losses of each mode."""
    options = parse_options(arguments)
    if options.simulate:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.simulate)
    if options.distributed:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    devices = jax.devices()
    config = dataclasses.replace(
        llama.SIZES[options.size], dtype="bfloat16" if devices[0].platform == "gpu" else "float32"
    )
    text, _ = first_example.read_standard_library()
    losses = {}
    for mode in options.modes:
        # In a program of several processes each of them trains the model of mode "one" for itself.
        training = Training.start(mode, config, options, jax.local_devices() if mode == "one" else devices)
        start = time.perf_counter()
        steps = [training.train(first_example.training_batch(text, options, step)) for step in range(options.steps)]
        losses[mode] = [float(loss) for loss in steps]
        seconds = time.perf_counter() - start
        if jax.process_index() == 0:
            count = 1 if mode == "one" else len(devices)
            print(f"{mode:17} {count} devices, {seconds:5.1f} s, losses", *(f"{x:.4f}" for x in losses[mode]))
    return losses


if __name__ == "__main__":
    main()
