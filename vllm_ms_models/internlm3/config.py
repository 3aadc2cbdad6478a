"""InternLM3's config, which transformers has only as code in each checkpoint: that code never runs here."""

from transformers import LlamaConfig


class InternLM3Config(LlamaConfig):
    """Llama's; `qkv_bias` is that of queries, keys and values, `bias` that of all other projections."""

    model_type = "internlm3"

    qkv_bias: bool = False
    bias: bool = False
