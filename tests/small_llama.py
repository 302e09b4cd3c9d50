"""A Llama that is small and has every part: grouped heads, and more of them than fit its width."""

from models import llama

SMALL = llama.Config(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
)
