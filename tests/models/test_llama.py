"""models/llama.py: shapes and dtypes, rotary frequencies, generation, and Hugging Face checkpoints."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx
from jax.sharding import SingleDeviceSharding

import jtile
from jtile.compiler.target import Target
from models import llama
from tests import small_llama

SMALL = dataclasses.replace(small_llama.SMALL, vocab_size=97, num_hidden_layers=2, tie_word_embeddings=False)
SCALED = llama.RopeScaling(factor=8.0, original_max_position_embeddings=32)


def make(**changes) -> llama.Llama:
    return llama.Llama(dataclasses.replace(SMALL, **changes), rngs=nnx.Rngs(0))


def some_tokens(*shape):
    return jax.random.randint(jax.random.key(1), shape, 0, SMALL.vocab_size)


# The model.


@pytest.mark.parametrize(("size", "millions"), [("tiny", 0.82), ("125m", 124.7), ("1b", 1235.8), ("8b", 8030.3)])
def test_sizes_have_the_parameters_they_are_named_for(size, millions):
    model = nnx.eval_shape(lambda: llama.Llama(llama.SIZES[size], rngs=nnx.Rngs(0)))
    count = sum(np.prod(parameter.shape, dtype=int) for _, parameter, _ in llama.named_parameters(model))
    assert count / 1e6 == pytest.approx(millions, abs=0.05)
    assert count == sum(np.prod(leaf.shape, dtype=int) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_have_the_dtype_of_the_activations(dtype, param_dtype, tied):
    model = make(dtype=dtype, param_dtype=param_dtype, tie_word_embeddings=tied)
    tokens = some_tokens(3, 11)
    logits = jax.jit(lambda tokens: model(tokens))(tokens)
    assert logits.shape == (3, 11, SMALL.vocab_size) and logits.dtype == dtype
    loss, gradients = nnx.jit(nnx.value_and_grad(llama.loss))(model, tokens)
    assert loss.shape == () and loss.dtype == jnp.float32
    assert all(leaf.dtype == param_dtype and jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_a_token_changes_no_logits_before_it():
    model, tokens = make(), some_tokens(2, 12)
    other = tokens.at[:, 7].set((tokens[:, 7] + 1) % SMALL.vocab_size)
    before, after = model(tokens), model(other)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (jnp.abs(before[:, 7:] - after[:, 7:]).max(-1) > 1e-4).all()


@pytest.mark.parametrize("remat", ["selective", "full"])
def test_remat_changes_no_gradient(remat):
    tokens = some_tokens(2, 12)
    plain, recomputed = (nnx.jit(nnx.grad(llama.loss))(make(remat=remat), tokens) for remat in ("none", remat))
    # The same operations in float32, fused otherwise.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), plain, recomputed)


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_of_hidden_states_is_that_of_logits(tied):
    tokens, ids = some_tokens(2, 12), jnp.array([[1] * 5 + [2] * 7, [1] * 8 + [0] * 4])
    found = [
        nnx.jit(nnx.value_and_grad(llama.loss))(make(linear_loss=linear, tie_word_embeddings=tied), tokens, ids)
        for linear in (True, False)
    ]
    # The same products in float32, summed in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *found)


def test_a_training_step_keeps_no_logits():
    """In the program for an H200, where logits of 16384 tokens take 1 GiB in bfloat16."""
    config = dataclasses.replace(SMALL, vocab_size=32768, dtype="bfloat16", num_hidden_layers=1)
    lean, full = planned_memory(config), planned_memory(dataclasses.replace(config, linear_loss=False))
    assert full > 16384 * 32768 * 2 and lean < full / 2


def test_remat_saves_memory():
    """In the program for an H200, whose layers keep 19 times tokens × hidden size in all."""
    layers, unit = 4, 16 * 1024 * 256 * 2  # bytes of tokens × hidden size
    config = dataclasses.replace(
        SMALL,
        dtype="bfloat16",
        num_hidden_layers=layers,
        hidden_size=256,
        intermediate_size=1024,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    none, selective = (planned_memory(dataclasses.replace(config, remat=remat)) for remat in ("none", "selective"))
    # Queries, keys and values, two norms and the activation are 8 of the 19. Those of one layer are there again.
    assert none - selective > (layers - 1) * 8 * unit


def planned_memory(config):
    """Of a training step of 16 × 1024 tokens, beside parameters and gradients."""
    [device] = Target.named("NVIDIA H200").topology().devices
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device))  # noqa: E731
    graph, params = nnx.split(nnx.eval_shape(lambda: llama.Llama(config, rngs=nnx.Rngs(0))), nnx.Param)
    step = jax.value_and_grad(lambda params, tokens: llama.loss(nnx.merge(graph, params), tokens))
    tokens = place(jax.ShapeDtypeStruct((16, 1025), jnp.int32))
    compiled = jax.jit(step).lower(jax.tree.map(place, params), tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("implementation", ["triton", None])
def test_implementation_reaches_every_op(monkeypatch, implementation):
    asked = {}

    def record(name, op, *operands, **options):
        asked.setdefault(name, set()).add(options.pop("implementation"))
        return op(*operands, **options)

    ops = ("rms_norm", "rope", "dot_product_attention", "gated_activation", "linear_cross_entropy")
    for name in ops:
        monkeypatch.setattr(jtile, name, functools.partial(record, name, getattr(jtile, name)))
    llama.loss(make(implementation=implementation), some_tokens(1, 9))
    assert asked == dict.fromkeys(ops, {implementation})


def test_on_a_gpu_a_training_step_is_made_of_kernels():
    model = nnx.eval_shape(lambda: make(dtype="bfloat16", num_hidden_layers=1))
    graph, params = nnx.split(model, nnx.Param)
    tokens = jax.ShapeDtypeStruct((2, 65), jnp.int32)
    step = jax.value_and_grad(lambda params, tokens: llama.loss(nnx.merge(graph, params), tokens))
    kernels = {kernel.name for kernel in jtile.inspect(step, params, tokens, target="NVIDIA H200")}
    # Rotating back is rotating by the opposite angle: rope has no backward kernel.
    assert kernels == {
        *("rms_norm", "rope", "attention", "gated_activation", "linear_cross_entropy"),
        *("rms_norm_backward", "rms_norm_backward_sums", "gated_activation_backward"),
        *("attention_dquery", "attention_dkey_dvalue"),
        "softmax_cross_entropy_backward",  # of some tokens' logits
    }


def test_llama3_frequencies():
    """Llama 3.1 8B's, by the three cases of its definition (arXiv:2407.21783 and its reference implementation)."""
    config = llama.SIZES["8b"]
    plain = 500_000.0 ** (-np.arange(0, 128, 2) / 128)
    expected = []
    for frequency in plain:
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            expected.append(frequency)
        elif wavelength > 8192 / 1:
            expected.append(frequency / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * frequency / 8 + smooth * frequency)
    np.testing.assert_allclose(llama.rope_frequencies(config), expected, rtol=1e-14)
    np.testing.assert_allclose(
        llama.rope_frequencies(dataclasses.replace(config, rope_scaling=None)), plain, rtol=1e-14
    )


# Generation.


@pytest.mark.parametrize("prompt_length", [1, 2, 13])
@pytest.mark.parametrize("scaling", [None, SCALED])
def test_generating_with_a_cache_is_decoding_greedily_without(prompt_length, scaling):
    model, tokens = make(rope_scaling=scaling), some_tokens(3, prompt_length)
    generated = llama.generate(model, tokens, 10, temperature=0)
    assert generated.dtype == jnp.int32
    forward = jax.jit(lambda tokens: model(tokens).argmax(-1))
    tokens = jnp.pad(tokens, ((0, 0), (0, 10)))
    for i in range(prompt_length, prompt_length + 10):
        tokens = tokens.at[:, i].set(forward(tokens)[:, i - 1])
    np.testing.assert_array_equal(generated, tokens[:, prompt_length:])


def test_cached_hidden_states_are_those_without_a_cache():
    model, tokens = make(), some_tokens(2, 9)
    call = jax.jit(model.hidden)
    whole, _ = call(tokens, jnp.arange(9))
    cache = [(jnp.zeros((2, 16, SMALL.num_key_value_heads, SMALL.head_dim)),) * 2] * SMALL.num_hidden_layers
    prompt, cache = call(tokens[:, :5], jnp.arange(5), cache)
    steps = [prompt]
    for position in range(5, 9):
        hidden, cache = call(tokens[:, position : position + 1], jnp.array([position]), cache)
        steps.append(hidden)
    # float32 sums in another order.
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), whole, rtol=1e-4, atol=1e-5)


def test_sampling():
    model, prompt = make(), some_tokens(64, 4)
    greedy = llama.generate(model, prompt, 1, temperature=0)[:, 0]
    sampled = [llama.generate(model, prompt, 1, top_k=2, key=jax.random.key(seed))[:, 0] for seed in range(8)]
    two_likeliest = jax.lax.top_k(model(prompt)[:, -1], 2)[1]
    assert all((tokens[:, None] == two_likeliest).any(1).all() for tokens in sampled)
    assert len({tuple(tokens.tolist()) for tokens in sampled}) == 8
    np.testing.assert_array_equal(llama.generate(model, prompt, 1, top_k=1, key=jax.random.key(0))[:, 0], greedy)
    again = llama.generate(model, prompt, 1, top_k=2, key=jax.random.key(0))[:, 0]
    np.testing.assert_array_equal(again, sampled[0])


@pytest.mark.parametrize("as_tuple", [False, True])
def test_nothing_follows_the_end_of_a_sequence(as_tuple):
    tokens = some_tokens(4, 6)
    free = np.asarray(llama.generate(make(), tokens, 8, temperature=0))
    eos = int(free[0, 3])
    ended = llama.generate(make(eos_token_id=(eos, 96) if as_tuple else eos), tokens, 8, temperature=0)
    for row, ended_row in zip(free.tolist(), ended.tolist(), strict=True):
        ends = [i for i, token in enumerate(row) if token in ((eos, 96) if as_tuple else (eos,))]
        expected = row[: ends[0]] + [row[ends[0]]] * (8 - ends[0]) if ends else row
        assert ended_row == expected


@pytest.mark.parametrize(
    ("prompt_length", "options", "message"),
    [
        (0, dict(temperature=0), "at least one token"),
        (3, dict(temperature=-1.0), "temperature must be at least 0, got -1.0"),
        (3, dict(temperature=0, top_k=98), "from 1 to the vocabulary's size, 97, got 98"),
        (3, dict(temperature=0, top_k=0), "from 1 to the vocabulary's size, 97, got 0"),
        (3, dict(), "pass key=jax.random.key"),
    ],
)
def test_generate_refuses(prompt_length, options, message):
    with pytest.raises(ValueError, match=message):
        llama.generate(make(), jnp.zeros((1, prompt_length), jnp.int32), 2, **options)


# Hugging Face checkpoints.


def hugging_face_checkpoint(dtype, *, tied) -> tuple[dict, dict[str, np.ndarray]]:
    """config.json and tensors as transformers writes them: matrices are (out, in)."""
    config = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        hidden_act="silu",
        attention_bias=False,
        mlp_bias=False,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=[2, 3],
        torch_dtype=np.dtype(dtype).name,
    )
    shapes = {"model.embed_tokens.weight": (97, 48), "model.norm.weight": (48,)}
    if not tied:
        shapes["lm_head.weight"] = (97, 48)
    for i in range(2):
        shapes |= {
            f"model.layers.{i}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (48,),
                "self_attn.q_proj": (64, 48),
                "self_attn.k_proj": (32, 48),
                "self_attn.v_proj": (32, 48),
                "self_attn.o_proj": (48, 64),
                "post_attention_layernorm": (48,),
                "mlp.gate_proj": (80, 48),
                "mlp.up_proj": (80, 48),
                "mlp.down_proj": (48, 80),
            }.items()
        }
    random = np.random.default_rng(0)
    return config, {name: random.normal(size=shape, scale=0.1).astype(dtype) for name, shape in shapes.items()}


def write(folder, config, *files):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if len(files) == 1:
        safetensors.numpy.save_file(files[0], folder / "model.safetensors")
        return
    weight_map = {}
    for i, tensors in enumerate(files):
        safetensors.numpy.save_file(tensors, folder / f"model-{i + 1:05}-of-{len(files):05}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"model-{i + 1:05}-of-{len(files):05}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safetensors.safe_open(file, framework="numpy") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
    return tensors


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
def test_a_checkpoint_survives_loading_and_saving(tmp_path, dtype, tied, sharded):
    config, tensors = hugging_face_checkpoint(dtype, tied=tied)
    names = sorted(tensors)
    parts = [names[:5], names[5:]] if sharded else [names]
    write(tmp_path / "from", config, *({name: tensors[name] for name in part} for part in parts))
    model = llama.load(tmp_path / "from")
    llama.save(model, tmp_path / "to", max_file_bytes=20_000 if sharded else 10**9)

    assert len(list((tmp_path / "to").glob("*.safetensors"))) > 1 if sharded else not list(tmp_path.glob("to/*index*"))
    saved = read(tmp_path / "to")
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert saved[name].dtype == tensor.dtype and saved[name].shape == tensor.shape, name
        assert saved[name].tobytes() == tensor.tobytes(), name
    written = json.loads((tmp_path / "to" / "config.json").read_text())
    assert written | config == written  # nothing in it was lost or changed
    again = llama.load(tmp_path / "to")
    assert again.config == model.config
    np.testing.assert_array_equal(model(some_tokens(1, 5)), again(some_tokens(1, 5)))


def test_a_loaded_model_computes_what_its_tensors_say(tmp_path):
    """The forward pass written out in NumPy from the checkpoint's own tensors."""
    config, tensors = hugging_face_checkpoint(np.float32, tied=False)
    write(tmp_path / "checkpoint", config, tensors)
    tokens = np.asarray(some_tokens(7))
    t = {name.removesuffix(".weight"): tensor.astype(np.float64) for name, tensor in tensors.items()}

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

    angles = np.arange(7)[:, None] * 500000.0 ** (-np.arange(0, 16, 2) / 16)
    cos, sin = (np.tile(f(angles), 2)[:, None] for f in (np.cos, np.sin))

    def rotate(x):  # transformers' rotate_half
        return x * cos + np.concatenate([-x[..., 8:], x[..., :8]], -1) * sin

    x = t["model.embed_tokens"][tokens]
    for i in range(2):
        layer = {name.removeprefix(f"model.layers.{i}."): tensor for name, tensor in t.items()}
        h = norm(x, layer["input_layernorm"])
        q, k, v = ((h @ layer[f"self_attn.{n}_proj"].T).reshape(7, -1, 16) for n in "qkv")
        k, v = np.repeat(rotate(k), 2, axis=1), np.repeat(v, 2, axis=1)
        scores = np.einsum("shd,thd->hst", rotate(q), k) / 4
        weights = np.exp(np.where(np.tri(7, dtype=bool), scores, -np.inf))
        out = np.einsum("hst,thd->shd", weights / weights.sum(-1, keepdims=True), v)
        x = x + out.reshape(7, 64) @ layer["self_attn.o_proj"].T
        h = norm(x, layer["post_attention_layernorm"])
        gate = h @ layer["mlp.gate_proj"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["mlp.up_proj"].T)) @ layer["mlp.down_proj"].T
    expected = norm(x, t["model.norm"]) @ t["lm_head"].T

    logits = llama.load(tmp_path / "checkpoint")(jnp.asarray(tokens)[None])[0]
    # Two layers in float32 against float64.
    np.testing.assert_allclose(logits, expected, rtol=2e-5, atol=2e-6)


def test_rope_settings_of_transformers_4_and_5():
    config, _ = hugging_face_checkpoint(np.float32, tied=True)
    scaling = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
    expected = llama.RopeScaling(**scaling)
    four = llama.read_config(config | dict(rope_scaling=scaling | dict(rope_type="llama3")))
    del config["rope_theta"]
    five = llama.read_config(config | dict(rope_parameters=scaling | dict(rope_type="llama3", rope_theta=500000.0)))
    assert four == five and four.rope_scaling == expected and four.rope_theta == 500000.0
    assert llama.read_config(json.loads(json.dumps(llama.write_config(four)))) == four


def test_options_of_load(tmp_path):
    config, tensors = hugging_face_checkpoint(ml_dtypes.bfloat16, tied=True)
    # A tied checkpoint may hold the embeddings twice, and an old one the rotary frequencies.
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
    }
    write(tmp_path / "checkpoint", config, tensors | extra)
    model = llama.load(tmp_path / "checkpoint", param_dtype="float32", implementation="xla", remat="full")
    assert (model.config.dtype, model.config.param_dtype) == ("bfloat16", "float32")
    assert (model.config.implementation, model.config.remat) == ("xla", "full")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "'yarn'"),
        (dict(rope_scaling=dict(type="linear", factor=4.0)), "'linear'"),
        (dict(attention_bias=True), "attention_bias = False only"),
        (dict(mlp_bias=True), "mlp_bias = False only"),
        (dict(hidden_act="gelu"), "hidden_act = 'silu' only; config.json says 'gelu'"),
        (dict(model_type="mistral"), "'mistral'"),
    ],
)
def test_load_refuses_what_the_model_does_not_have(tmp_path, change, message):
    config, tensors = hugging_face_checkpoint(np.float32, tied=True)
    write(tmp_path / "checkpoint", config | change, tensors)
    with pytest.raises(NotImplementedError, match=message):
        llama.load(tmp_path / "checkpoint")


def test_load_refuses_other_tensors(tmp_path):
    config, tensors = hugging_face_checkpoint(np.float32, tied=True)
    lacking = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    write(tmp_path / "lacking", config, lacking)
    with pytest.raises(ValueError, match="lacks the tensors model.norm.weight"):
        llama.load(tmp_path / "lacking")
    write(tmp_path / "extra", config, tensors | {"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)})
    with pytest.raises(ValueError, match="holds model.layers.0.self_attn.q_proj.bias"):
        llama.load(tmp_path / "extra")
    write(tmp_path / "shape", config | dict(intermediate_size=81), tensors)
    with pytest.raises(ValueError, match=r"must have shape \(48, 81\).*got \(48, 80\)"):
        llama.load(tmp_path / "shape")


def test_save_overwrites_nothing(tmp_path):
    llama.save(make(), tmp_path)
    with pytest.raises(FileExistsError, match="holds a checkpoint already"):
        llama.save(make(), tmp_path)


def test_packed_documents_have_the_loss_of_each_alone():
    """Three documents and padding in one row: the mean over all tokens, each given its own document before it."""
    config = dataclasses.replace(llama.SIZES["tiny"], num_hidden_layers=2)
    model = llama.Llama(config, rngs=nnx.Rngs(0))
    sizes, padding = (5, 9, 2), 4
    tokens = jax.random.randint(jax.random.key(0), (1, sum(sizes) + padding), 0, config.vocab_size)
    ids = jnp.asarray(np.repeat([1, 2, 3, 0], (*sizes, padding)))[None]
    alone = [tokens[:, start : start + n] for start, n in zip(np.cumsum((0, *sizes)), sizes, strict=False)]
    expected = sum(llama.loss(model, t) * (t.size - 1) for t in alone) / sum(n - 1 for n in sizes)
    np.testing.assert_allclose(llama.loss(model, tokens, ids), expected, rtol=1e-5)


def test_windows_and_soft_caps_in_training_and_generation():
    """What a window leaves out changes nothing, and the cache gives what whole sequences do."""
    config = dataclasses.replace(llama.SIZES["tiny"], num_hidden_layers=1, sliding_window=3, attn_logit_softcapping=0.5)
    model = llama.Llama(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (1, 12), 0, config.vocab_size)
    logits = model(tokens)
    changed = model(tokens.at[0, 4].set((tokens[0, 4] + 1) % config.vocab_size))
    same = np.isclose(logits, changed, atol=1e-5).all(axis=-1)[0]
    np.testing.assert_array_equal(same, ~np.isin(np.arange(12), (4, 5, 6)))
    plain = llama.Llama(dataclasses.replace(config, attn_logit_softcapping=None), rngs=nnx.Rngs(0))
    assert not np.allclose(plain(tokens), logits, atol=1e-5)
    more = llama.generate(model, tokens[:, :6], 4, temperature=0)
    for i in range(4):
        so_far = jnp.concatenate([tokens[:, :6], more[:, :i]], axis=1)
        assert jnp.argmax(model(so_far)[0, -1]) == more[0, i]
