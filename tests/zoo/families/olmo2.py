"""OLMo 2: no norm before a block, one behind it, and norms of queries and keys over all heads."""

from transformers import Olmo2Config

from tests.zoo.family import Family

FAMILY = Family(
    ("Olmo2ForCausalLM",),
    Olmo2Config,
    {
        "grouped heads": {},
        "one KV head, biases": {"num_key_value_heads": 1, "attention_bias": True},
        "wide heads, tied": {"head_dim": 32, "tie_word_embeddings": True},
    },
)
