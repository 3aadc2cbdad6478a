"""InternLM2's config, which transformers has only as code in each checkpoint: that code never runs here."""

from transformers import LlamaConfig


class InternLM2Config(LlamaConfig):
    """Llama's; `bias` is that of the attention's projections."""

    model_type = "internlm2"

    bias: bool = True
