"""The shapes and dtypes in the public signatures are true: every op is called with them checked at run time."""

import subprocess
import sys

CALLS = """
import jaxtyping

with jaxtyping.install_import_hook(["jtile.ops", "jtile.losses", "models"], "beartype.beartype"):
    import jtile
    from models import llama

import jax
import jax.numpy as jnp
from flax import nnx

x, scale, tokens = jnp.ones((2, 3, 4, 16)), jnp.ones(16), jnp.zeros((2, 3), jnp.int32)
jtile.rms_norm(x, scale)
jtile.rms_norm(x, scale, residual=x)
jtile.layer_norm(x, scale, residual=x)
jtile.layer_norm(x, scale, scale)
jtile.gated_rms_norm(x, x, scale, norm_before_gate=True)
jtile.group_norm(x, scale, scale, groups=4)
jtile.group_norm(x[0, 0], scale, groups=2)
jtile.rope(x, tokens, theta=500.0, rotary_dim=8)
jtile.gated_activation(x, x, activation="gelu")
jtile.softmax(x, mask=tokens[:, :, None, None] == 0, is_causal=True)
jtile.log_softmax(x[0, 0, 0], scale=2.0)
jtile.dropout(x, 0.1, jax.random.key(0), residual=x)
jtile.dropout(x, 0.1, jax.random.PRNGKey(0))
jtile.softmax_cross_entropy(x[..., 0, :], tokens, ignore_index=0)
hidden, weight, weights = x[..., 0, :], jnp.ones((16, 9)), jnp.ones((2, 3))
jtile.linear_cross_entropy(hidden, weight, tokens, bias=jnp.ones(9))
jtile.linear_cross_entropy(hidden, weight, tokens, token_weights=weights)
jtile.losses.kl_divergence(hidden, weight, hidden, weight)
jtile.losses.jensen_shannon_divergence(hidden, weight, hidden[..., :3], weight[:3], beta=0.1)
jtile.losses.dpo(hidden, weight, tokens, jnp.ones(2))
jtile.losses.orpo(hidden, weight, tokens)
jtile.losses.kto(hidden, weight, tokens, jnp.ones(2), jnp.ones(2, bool), reference_point=0.0)
jtile.losses.grpo(hidden, weight, tokens, jnp.ones(2), mask=tokens == 0)
jtile.dot_product_attention(x, x, x, is_causal=True)
jtile.dot_product_attention(x, x, x, return_lse=True)
lengths, ids = jnp.ones(2, jnp.int32), jnp.zeros(3, jnp.int32)
jtile.dot_product_attention(
    x, x, x, jnp.ones((4, 3, 1)), jnp.ones((3, 3), bool), query_seq_lengths=lengths, query_segment_ids=ids,
    query_offset=lengths, local_window_size=(1, None), logits_soft_cap=3.0, sinks=jnp.ones(4),
    dropout_rate=0.1, dropout_key=jax.random.key(0),
)
blocks = jtile.create_block_mask(lambda b, h, q, k: q >= k, None, None, 3, 3, block_size=16)
jtile.flex_attention(x, x, x, score_mod=lambda s, b, h, q, k: s * scale[q], block_mask=blocks)
llama.loss(llama.Llama(llama.SIZES["tiny"], rngs=nnx.Rngs(0)), tokens)

for wrong in (lambda: jtile.rms_norm(x, scale[:3]), lambda: jtile.gated_activation(x, x[0])):
    try:
        wrong()
    except jaxtyping.TypeCheckError:
        continue
    raise AssertionError("the annotations are not checked")
"""


def test_calls_agree_with_their_annotations():
    done = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
