"""models/llama.py against Hugging Face transformers' Llama in PyTorch, in both directions, on a GPU."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from models import llama

pytestmark = pytest.mark.gpu

CONFIGS = {
    "default": dataclasses.replace(llama.SIZES["tiny"], tie_word_embeddings=False),
    "tied": llama.SIZES["tiny"],
    # Positions up to 256 pass the original 64: each of the three cases of the frequencies is used.
    "llama3": dataclasses.replace(
        llama.SIZES["tiny"],
        rope_theta=500_000.0,
        rope_scaling=llama.RopeScaling(factor=8.0, original_max_position_embeddings=64),
    ),
}


@pytest.fixture
def transformers():
    import transformers

    return transformers


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("implementation", ["triton", "xla"])
@pytest.mark.parametrize("saved_by", ["jtile", "transformers"])
def test_logits(tmp_path, transformers, name, implementation, saved_by):
    import torch

    config = CONFIGS[name]
    if saved_by == "jtile":
        llama.save(llama.Llama(config, rngs=nnx.Rngs(0)), tmp_path)
    else:
        torch.manual_seed(0)
        options = llama.write_config(config)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).save_pretrained(tmp_path)

    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 256))
    torch.backends.cuda.matmul.allow_tf32 = False
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).cuda().eval()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens).cuda()).logits.cpu().numpy()
    model = llama.load(tmp_path, implementation=implementation)
    with jax.default_matmul_precision("highest"):
        logits = model(tokens)
    # Four layers in float32 on both sides, summed in different orders.
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())

    continued = theirs.generate(
        torch.from_numpy(tokens[:, :16]).cuda(), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    with jax.default_matmul_precision("highest"):
        generated = llama.generate(model, tokens[:, :16], 16, temperature=0)
    np.testing.assert_array_equal(generated, continued[:, 16:].cpu().numpy())
