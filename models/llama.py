"""Llama, on jtile's ops: a decoder with RMSNorm, rotary positions, grouped-query attention and SwiGLU.

The architecture of Touvron et al. 2023 (arXiv:2302.13971) with the grouped-query attention of Llama 2
(arXiv:2307.09288) and the stretched rotary frequencies of Llama 3.1 (arXiv:2407.21783). `load` and `save` read and
write Hugging Face checkpoints.

    model = llama.Llama(llama.SIZES["tiny"], rngs=nnx.Rngs(0))
    loss = llama.loss(model, tokens)
    more = llama.generate(model, tokens, 100, temperature=0.8, top_k=40, key=jax.random.key(0))
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

import jtile


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretched rotary frequencies ("llama3" in a checkpoint), for sequences longer than it first saw."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class Config:
    """A model's shape, under the names of Hugging Face's config.json, and how it computes.

    `dtype` is what activations are computed in, `param_dtype` what parameters are kept in. `remat` tells what the
    backward pass computes again rather than finds kept: "none"; "selective", all but attention and the two products of
    the MLP that its activation reads; or "full", each block from its input. `linear_loss` takes the loss from hidden
    states, some thousand tokens at a time; without it, all logits are there at once. `implementation` goes to every op
    of jtile; "cudnn" is "xla" with the attention of `jax.nn` on cuDNN, to compare with.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    sliding_window: int | None = None  # how many tokens each one sees, itself included
    attn_logit_softcapping: float | None = None  # Gemma 2's cap on attention's scores

    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: Literal["none", "selective", "full"] = "none"
    linear_loss: bool = True
    implementation: Literal["triton", "xla", "cudnn"] | None = None

    @property
    def op_implementation(self) -> Literal["triton", "xla"] | None:
        return "xla" if self.implementation == "cudnn" else self.implementation


SIZES = {
    "tiny": Config(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
    ),
    "125m": Config(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
    ),
    # Llama 3.2 1B
    "1b": Config(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(factor=32.0),
        max_position_embeddings=131_072,
        tie_word_embeddings=True,
        bos_token_id=128_000,
        eos_token_id=128_001,
    ),
    # Llama 3.1 8B
    "8b": Config(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(factor=8.0),
        max_position_embeddings=131_072,
        bos_token_id=128_000,
        eos_token_id=128_001,
    ),
}


# The model.

# What remat="selective" keeps: the rest takes passes over memory, or small products (queries, keys, values and out).
KEPT = ("residual", "dot_product_attention_out", "dot_product_attention_lse", "gate", "up")


class RMSNorm(nnx.Module):
    def __init__(self, config: Config):
        self.scale = nnx.Param(jnp.ones(config.hidden_size, config.param_dtype))
        self.config = config

    def __call__(self, x, residual=None):
        """Normalises x + residual; returns that and the sum, which the next block adds to."""
        options: Any = dict(epsilon=self.config.rms_norm_eps, implementation=self.config.op_implementation)
        if self.config.remat == "selective":
            x = checkpoint_name(x if residual is None else x + residual, "residual")
            return jtile.rms_norm(x, self.scale[...], **options), x
        if residual is None:
            return jtile.rms_norm(x, self.scale[...], **options), x
        return jtile.rms_norm(x, self.scale[...], residual=residual, **options)


class Embed(nnx.Embed):
    def __call__(self, inputs, out_sharding=None):
        """Takes rows, then casts them: flax casts all rows first, and sums their gradients in `dtype`."""
        return self.embedding[...].at[inputs].get(out_sharding=out_sharding).astype(self.dtype)


def linear(in_features: int, out_features: int, config: Config, rngs: nnx.Rngs, gain: float = 1.0) -> nnx.Linear:
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=False,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=nnx.initializers.normal(gain / math.sqrt(in_features)),
        dot_general=jax.lax.dot_general if config.op_implementation == "xla" else product,
        rngs=rngs,
    )


def product(x, kernel, *dimensions, **options):
    """`jax.lax.dot_general`, kept from being rearranged by XLA with others.

    It would make queries, keys and values one product, and then copy each out of the result, since kernels read whole
    arrays. And it would put off the gradients of kernels to the end, all that they are formed from being kept till
    then: behind a barrier that of `x` is only there together with that of its kernel.
    """
    x, kernel = jax.lax.optimization_barrier((x, kernel))
    return jax.lax.dot_general(x, kernel, *dimensions, **options)


def rope_frequencies(config: Config) -> Float[np.ndarray, " pairs"]:
    """theta^(-2i/dim), divided by `rope_scaling.factor` where a turn is longer than the original sequence."""
    frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    if (scaling := config.rope_scaling) is not None:
        # Of a frequency, `kept` is the share that is not divided: 1 from `high_freq_factor` turns in the original
        # sequence up, 0 below `low_freq_factor`.
        turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = np.clip(kept, 0, 1)
        frequencies *= kept + (1 - kept) / scaling.factor
    return frequencies


class Attention(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.query = linear(config.hidden_size, queries, config, rngs)
        self.key = linear(config.hidden_size, keys, config, rngs)
        self.value = linear(config.hidden_size, keys, config, rngs)
        self.out = linear(queries, config.hidden_size, config, rngs, gain=1 / math.sqrt(2 * config.num_hidden_layers))
        self.config = config

    def __call__(self, x, positions, cache=None, segment_ids=None):
        implementation, window = self.config.op_implementation, self.config.sliding_window
        heads = (*x.shape[:-1], -1, self.config.head_dim)
        rotate = functools.partial(
            jtile.rope, positions=positions, frequencies=rope_frequencies(self.config), implementation=implementation
        )
        query = rotate(self.query(x).reshape(heads))
        key = rotate(self.key(x).reshape(heads))
        value = self.value(x).reshape(heads)
        if cache is not None:
            start = (0, positions[0], 0, 0)
            cache = tuple(
                jax.lax.dynamic_update_slice(old, new, start) for old, new in zip(cache, (key, value), strict=True)
            )
        attend = functools.partial(
            jtile.dot_product_attention,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, None),
            logits_soft_cap=self.config.attn_logit_softcapping,
            implementation=implementation,
        )
        if self.config.implementation == "cudnn" and cache is None:
            if segment_ids is not None or window or self.config.attn_logit_softcapping:
                raise ValueError("llama: implementation='cudnn' has no segments, windows or soft caps; leave it None")
            out = jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")
        elif cache is None or x.shape[1] > 1:
            out = attend(query, key, value, query_segment_ids=segment_ids)
        elif window or self.config.attn_logit_softcapping:
            out = attend(query, *cache, query_offset=jnp.broadcast_to(positions, x.shape[:1]))
        else:
            # One query against the part of the cache that is filled: the product of a matrix with a vector, which
            # jtile's attention does not speed up.
            filled = jnp.broadcast_to(positions + 1, x.shape[:1])
            out = jax.nn.dot_product_attention(query, *cache, key_value_seq_lengths=filled)
        return self.out(out.reshape(*x.shape[:-1], -1)), cache


class MLP(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.gate = linear(config.hidden_size, config.intermediate_size, config, rngs)
        self.up = linear(config.hidden_size, config.intermediate_size, config, rngs)
        gain = 1 / math.sqrt(2 * config.num_hidden_layers)
        self.down = linear(config.intermediate_size, config.hidden_size, config, rngs, gain=gain)
        self.implementation = config.op_implementation

    def __call__(self, x):
        gate, up = checkpoint_name(self.gate(x), "gate"), checkpoint_name(self.up(x), "up")
        return self.down(jtile.gated_activation(gate, up, implementation=self.implementation))


class Block(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x, residual, positions, cache=None, segment_ids=None):
        """`x` is what the last layer adds to the residual stream; each norm does that addition in its own pass."""
        x, residual = self.attention_norm(x, residual)
        x, cache = self.attention(x, positions, cache, segment_ids)
        x, residual = self.mlp_norm(x, residual)
        return self.mlp(x), residual, cache


REMAT: dict[str, Callable] = {
    "none": lambda call: call,
    "selective": functools.partial(nnx.remat, policy=jax.checkpoint_policies.save_only_these_names(*KEPT)),
    "full": nnx.remat,
}


class Llama(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.embed = Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config)
        self.head = None if config.tie_word_embeddings else linear(config.hidden_size, config.vocab_size, config, rngs)
        self.config = config

    def __call__(
        self, tokens: Int[Array, "batch seq"], segment_ids: Int[Array, "batch seq"] | None = None
    ) -> Float[Array, "batch seq vocab"]:
        """The logits of the token after each one, in `config.dtype`.

        With `segment_ids`, several documents are packed in each row, and each sees itself alone. Positions need not
        begin anew with them, since rotary ones tell how far apart two tokens are and nothing else.
        """
        return self.logits(self.hidden(tokens, jnp.arange(tokens.shape[1]), segment_ids=segment_ids)[0])

    def hidden(self, tokens, positions, cache=None, segment_ids=None):
        """The normalised last hidden states, and the cache with these tokens in it.

        `positions`, (seq,), are those of the tokens in every row. With a cache, `tokens` is either a whole prompt or
        the next token of each row.
        """
        call = REMAT[self.config.remat](Block.__call__)
        x, residual, filled = self.embed(tokens), None, []
        for i, block in enumerate(self.blocks):
            x, residual, block_cache = call(
                block, x, residual, positions, None if cache is None else cache[i], segment_ids
            )
            filled.append(block_cache)
        return self.norm(x, residual)[0], filled

    def logits(self, hidden):
        return self.embed.attend(hidden) if self.head is None else self.head(hidden)

    def head_matrix(self) -> Float[Array, "hidden vocab"]:
        """What `logits` multiplies by, in `config.dtype`."""
        matrix = self.embed.embedding[...].T if self.head is None else self.head.kernel[...]
        return matrix.astype(self.config.dtype)


IGNORED = -1  # a label that does not count


def loss(
    model: Llama, tokens: Int[Array, "batch seq"], segment_ids: Int[Array, "batch seq"] | None = None
) -> Float[Array, ""]:
    """The mean cross-entropy in nats of each token but the first of a document, given those of it before.

    Each row is a document, or with `segment_ids` several and padding of id 0, which does not count.
    """
    labels = tokens[:, 1:]
    if segment_ids is not None:
        ids, segment_ids = segment_ids, segment_ids[:, :-1]
        labels = jnp.where((ids[:, 1:] == segment_ids) & (segment_ids != 0), labels, IGNORED)
    counted, config = (labels != IGNORED).astype(jnp.float32), model.config
    options: Any = dict(ignore_index=IGNORED, implementation=config.op_implementation)
    count = jnp.maximum(1.0, jnp.sum(counted))
    if config.linear_loss:
        hidden, _ = model.hidden(tokens[:, :-1], jnp.arange(labels.shape[1]), segment_ids=segment_ids)
        # With the weights of tokens known, gradients are formed together with the loss.
        return jtile.linear_cross_entropy(hidden, model.head_matrix(), labels, token_weights=counted / count, **options)
    return jtile.softmax_cross_entropy(model(tokens[:, :-1], segment_ids), labels, **options).sum() / count


def example(size: str, batch: int, sequence: int) -> tuple[Callable, tuple[Any, Any]]:
    """A training step's loss and gradient as a function of parameters and tokens, and the shapes of those. It is what
    `python -m jtile tune --model llama:SIZE` tunes."""
    config = dataclasses.replace(SIZES[size], dtype="bfloat16")
    graph, params = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))), nnx.Param)

    def value_and_gradient(params, tokens):
        return jax.value_and_grad(lambda params: loss(nnx.merge(graph, params), tokens))(params)

    return value_and_gradient, (params, jax.ShapeDtypeStruct((batch, sequence + 1), jnp.int32))


# Generation.


def generate(
    model: Llama,
    prompt: Int[Array, "batch seq"],
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    key: Array | None = None,
) -> Int[Array, "batch length"]:
    """Continues each row of `prompt`, all of one length, by `length` tokens.

    Args:
        temperature: divides the logits before sampling; 0 takes the likeliest token always.
        top_k: samples among the `top_k` likeliest tokens only; None among all.
        key: the random key to sample with, as from `jax.random.key(0)`; needed unless `temperature` is 0.

    Returns:
        The new tokens. After a row's `config.eos_token_id` the rest of it repeats that.

    Raises:
        ValueError: an empty prompt, a negative temperature, a `top_k` that isn't from 1 to the vocabulary's size, a
            key missing.
    """
    vocab_size = model.config.vocab_size
    if prompt.shape[1] == 0:
        raise ValueError("generate: prompt must hold at least one token a row, got none; begin with bos_token_id.")
    if temperature < 0:
        raise ValueError(f"generate: temperature must be at least 0, got {temperature}.")
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(f"generate: top_k must be from 1 to the vocabulary's size, {vocab_size}, got {top_k}.")
    if temperature > 0 and key is None:
        raise ValueError(f"generate: temperature {temperature} samples and needs a key; pass key=jax.random.key(0).")
    key = jax.random.key(0) if key is None else key
    return _generate(*nnx.split(model), prompt, key, length=length, temperature=temperature, top_k=top_k)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("length", "temperature", "top_k"))
def _generate(graph, state, prompt, key, *, length, temperature, top_k):
    model = nnx.merge(graph, state)
    config = model.config
    batch, prompt_length = prompt.shape
    eos_ids = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
    eos = jnp.array([token for token in eos_ids if token is not None], jnp.int32)

    def sample(hidden, key):
        logits = model.logits(hidden[:, -1]).astype(jnp.float32)
        if temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if top_k is not None:
            smallest = jax.lax.top_k(logits, top_k)[0][:, -1:]
            logits = jnp.where(logits < smallest, -jnp.inf, logits)
        return jax.random.categorical(key, logits / temperature).astype(jnp.int32)

    def step(carry, key):
        token, position, cache = carry
        hidden, cache = model.hidden(token[:, None], position[None], cache)
        token = jnp.where(jnp.isin(token, eos), token, sample(hidden, key))
        return (token, position + 1, cache), token

    keys = jax.random.split(key, length)
    shape = (batch, prompt_length + length, config.num_key_value_heads, config.head_dim)
    empty = [(jnp.zeros(shape, config.dtype),) * 2] * config.num_hidden_layers
    hidden, cache = model.hidden(prompt, jnp.arange(prompt_length), empty)
    first = sample(hidden, keys[0])
    _, rest = jax.lax.scan(step, (first, jnp.int32(prompt_length), cache), keys[1:])
    return jnp.concatenate([first[:, None], rest.T], axis=1)


# Hugging Face checkpoints: config.json beside model.safetensors, or beside several files and their index.


def load(folder: str | Path, **options: Any) -> Llama:
    """The Llama in a folder that Hugging Face transformers, or `save`, wrote.

    Args:
        options: fields of `Config` that the checkpoint doesn't decide: `dtype`, `param_dtype` (both by default the
            checkpoint's), `remat`, `implementation`.

    Raises:
        FileNotFoundError: no config.json, or no model.safetensors and no index of several.
        NotImplementedError: config.json asks for something that this model doesn't have.
        ValueError: the files lack a tensor, hold one too many, or one of another shape.
    """
    folder = Path(folder)
    config = dataclasses.replace(read_config(json.loads((folder / "config.json").read_text())), **options)
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    parameters = {name: (parameter, transposed) for name, parameter, transposed in named_parameters(model)}

    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for file in files:
        with safetensors.safe_open(folder / file, framework="numpy") as tensors:
            for name in tensors.keys():
                # Old checkpoints hold the rotary frequencies, some with tied embeddings hold these twice.
                if name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight"):
                    continue
                if name not in parameters:
                    raise ValueError(f"{folder / file} holds {name}, which a Llama of its config.json doesn't have.")
                parameter, transposed = parameters.pop(name)
                array = tensors.get_tensor(name)
                array = array.T if transposed else array
                if array.shape != parameter.shape:
                    raise ValueError(
                        f"{name} in {folder / file} must have shape {parameter.shape[:: -1 if transposed else 1]} by "
                        f"config.json, got {array.shape[:: -1 if transposed else 1]}."
                    )
                parameter.set_value(jnp.asarray(array, config.param_dtype))
    if parameters:
        raise ValueError(f"{folder} lacks the tensors {', '.join(parameters)}, which its config.json asks for.")
    return model


def save(model: Llama, folder: str | Path, *, max_file_bytes: int = 5 * 10**9) -> None:
    """Writes `model` where Hugging Face transformers, and `load`, can read it, in `param_dtype`.

    Parameters of more than `max_file_bytes` in all are split over several files.

    Raises:
        FileExistsError: the folder holds a checkpoint.
    """
    folder = Path(folder)
    if (folder / "config.json").exists() or any(folder.glob("*.safetensors")):
        raise FileExistsError(f"{folder} holds a checkpoint already; save to an empty folder.")
    folder.mkdir(parents=True, exist_ok=True)

    files: list[list[str]] = [[]]
    sizes: dict[str, int] = {}
    parameters = {name: (parameter, transposed) for name, parameter, transposed in named_parameters(model)}
    for name, (parameter, _) in parameters.items():
        if files[-1] and sum(sizes[other] for other in files[-1]) + parameter.nbytes > max_file_bytes:
            files.append([])
        files[-1].append(name)
        sizes[name] = parameter.nbytes

    weight_map = {}
    for i, names in enumerate(files):
        file = "model.safetensors" if len(files) == 1 else f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        arrays = {}
        for name in names:
            parameter, transposed = parameters[name]
            array = np.asarray(parameter[...])
            arrays[name] = np.ascontiguousarray(array.T if transposed else array)
            weight_map[name] = file
        safetensors.numpy.save_file(arrays, folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(write_config(model.config), indent=2))


def named_parameters(model: Llama) -> Iterator[tuple[str, nnx.Param, bool]]:
    """Each parameter with its name in a checkpoint, and whether it is stored transposed, as (out, in), there."""
    yield "model.embed_tokens.weight", model.embed.embedding, False
    for i, block in enumerate(model.blocks):
        prefix = f"model.layers.{i}"
        yield f"{prefix}.input_layernorm.weight", block.attention_norm.scale, False
        yield f"{prefix}.self_attn.q_proj.weight", block.attention.query.kernel, True
        yield f"{prefix}.self_attn.k_proj.weight", block.attention.key.kernel, True
        yield f"{prefix}.self_attn.v_proj.weight", block.attention.value.kernel, True
        yield f"{prefix}.self_attn.o_proj.weight", block.attention.out.kernel, True
        yield f"{prefix}.post_attention_layernorm.weight", block.mlp_norm.scale, False
        yield f"{prefix}.mlp.gate_proj.weight", block.mlp.gate.kernel, True
        yield f"{prefix}.mlp.up_proj.weight", block.mlp.up.kernel, True
        yield f"{prefix}.mlp.down_proj.weight", block.mlp.down.kernel, True
    yield "model.norm.weight", model.norm.scale, False
    if model.head is not None:
        yield "lm_head.weight", model.head.kernel, True


# What a config.json may leave out, by transformers' LlamaConfig, and what it must be where it is there.
OPTIONAL = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2}
REQUIRED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def read_config(values: dict[str, Any]) -> Config:
    """The `Config` that a checkpoint's config.json describes."""
    for name, wanted in REQUIRED.items():
        if values.get(name, wanted) != wanted:
            raise NotImplementedError(f"This Llama has {name} = {wanted!r} only; config.json says {values[name]!r}.")

    # transformers 5 has the rotary settings in one dictionary, earlier versions in two places.
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise NotImplementedError(
            f"This Llama has the rotary frequencies 'default' and 'llama3' only; config.json says {rope_type!r}."
        )
    scaling = None
    if rope_type == "llama3":
        scaling = RopeScaling(**{field.name: rope[field.name] for field in dataclasses.fields(RopeScaling)})

    same_name: dict[str, Any] = {
        field.name: values[field.name] if field.name in values else OPTIONAL[field.name]
        for field in dataclasses.fields(Config)
        if field.name in values or field.name in OPTIONAL
    }
    dtype = values.get("dtype") or values.get("torch_dtype") or "float32"
    eos = same_name["eos_token_id"]
    return Config(
        **same_name
        | dict(
            head_dim=values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"],
            num_key_value_heads=values.get("num_key_value_heads") or values["num_attention_heads"],
            rope_theta=rope.get("rope_theta", values.get("rope_theta", 10_000.0)),
            rope_scaling=scaling,
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            dtype=dtype,
            param_dtype=dtype,
        )
    )


def write_config(config: Config) -> dict[str, Any]:
    """The config.json that `read_config` reads back, less what only matters while running."""
    values = dataclasses.asdict(config)
    for name in ("dtype", "param_dtype", "remat", "linear_loss", "implementation"):
        del values[name]
    if config.rope_scaling is not None:
        values["rope_scaling"] |= {"rope_type": "llama3"}
    return {"architectures": ["LlamaForCausalLM"], "torch_dtype": config.param_dtype} | REQUIRED | values
