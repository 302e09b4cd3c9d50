"""Attention with scores and masks of your own, in the kernels: `python examples/4_flex_attention.py`.

Each part is a function of one score and its place, and is compared with the whole score matrix in plain JAX.
"""

import jax
import jax.numpy as jnp

import jtile

BATCH, SEQUENCE, HEADS, HEAD_DIM = 2, 64, 4, 32


# Scores. `score_mod` changes one; batch, head, query and key are its place.


def alibi(slopes):
    """A penalty that grows with the distance (Press et al., 2021, arXiv:2108.12409)."""
    return lambda score, batch, head, query, key: score - slopes[head] * (query - key)


def soft_cap(cap):
    """No score beyond a cap (Gemma 2, 2024, arXiv:2408.00118)."""
    return lambda score, batch, head, query, key: cap * jnp.tanh(score / cap)


def relative(table):
    """A learned number for each distance and head (Shaw et al., 2018, arXiv:1803.02155, without its vectors)."""
    return lambda score, batch, head, query, key: score + table[head, query - key + SEQUENCE - 1]


# Masks. `mask_mod` tells whether a query sees a key. Of it `create_block_mask` makes the blocks that are visited.


def causal(batch, head, query, key):
    return query >= key


def sliding_window(size):
    return lambda batch, head, query, key: (query >= key) & (query - key < size)


def prefix_lm(length):
    """All see the prefix; after it each sees what came before."""
    return lambda batch, head, query, key: (key < length) | (query >= key)


def documents(ids):
    """Several documents in a sequence, each of which sees itself."""
    return lambda batch, head, query, key: (ids[batch, query] == ids[batch, key]) & (query >= key)


def plain(query, key, value, score_mod, mask_mod):
    """The same with the whole score matrix."""
    scores = jnp.einsum("bshd,bthd->bhst", query, key) * HEAD_DIM**-0.5
    places = jnp.meshgrid(*map(jnp.arange, scores.shape), indexing="ij")
    scores = scores if score_mod is None else score_mod(scores, *places)
    visible = True if mask_mod is None else mask_mod(*places)
    return jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)), value)


def main() -> None:
    query, key, value = jax.random.normal(jax.random.key(0), (3, BATCH, SEQUENCE, HEADS, HEAD_DIM))
    slopes = 2.0 ** -jnp.arange(1, HEADS + 1)
    table = jax.random.normal(jax.random.key(1), (HEADS, 2 * SEQUENCE - 1))
    ids = jnp.sort(jax.random.randint(jax.random.key(2), (BATCH, SEQUENCE), 0, 4), axis=1)
    cases = {
        "ALiBi": (alibi(slopes), causal),
        "soft cap": (soft_cap(2.0), None),
        "relative positions": (relative(table), None),
        "sliding window": (None, sliding_window(16)),
        "prefix LM": (None, prefix_lm(24)),
        "documents": (None, documents(ids)),
    }
    for name, (score_mod, mask_mod) in cases.items():
        blocks = mask_mod and jtile.create_block_mask(mask_mod, BATCH, None, SEQUENCE, SEQUENCE, block_size=16)
        out = jtile.flex_attention(query, key, value, score_mod=score_mod, block_mask=blocks)
        error = jnp.abs(out - plain(query, key, value, score_mod, mask_mod)).max()
        skipped = f", {blocks.sparsity:.0%} of blocks skipped" if blocks else ""
        print(f"{name}: as the whole matrix but for {error:.1e}{skipped}")
        assert error < 1e-5

    # Arrays that a score_mod closes over have gradients, from a kernel too.
    def loss(slopes, table):
        both = lambda score, *place: relative(table)(alibi(slopes)(score, *place), *place)  # noqa: E731
        return jnp.mean(jtile.flex_attention(query, key, value, score_mod=both, mask_mod=causal) ** 2)

    by_slopes, by_table = jax.jit(jax.grad(loss, argnums=(0, 1)))(slopes, table)
    print(f"gradients of {by_slopes.shape[0]} slopes, {by_slopes}, and of a table of {by_table.size}")
    assert not by_table[:, : SEQUENCE - 1].any()  # the mask hides distances below 0


if __name__ == "__main__":
    main()
