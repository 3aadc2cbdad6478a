"""DeepSeek-V3's layer that predicts the token after next (MTP, arXiv:2412.19437, section 2.2), as a draft."""

import re
from dataclasses import replace
from typing import Any

from mindspore import Tensor, mint

from vllm_ms_models.deepseek_v3 import config as entries
from vllm_ms_models.deepseek_v3.model import DeepseekV3DecoderLayer, rotary
from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.embedding import ParallelLMHead
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.linear import ReplicatedLinear
from vllm_ms_models.layers.logits import LogitsProcessor
from vllm_ms_models.layers.norm import AddRMSNorm, RMSNorm
from vllm_ms_models.quantization.base import Unquantized
from vllm_ms_models.registry import register_model


@register_model("DeepSeekMTPModel")
class DeepseekV3MTP(Layer):
    """The first layer after the model's own; `config` is the model's, as vLLM rewrites it.

    From the model's last hidden state h_i at a position (normalised, as its head sees it) and the embedding of the
    next token t_(i+1), both behind a norm of their own and joined by `eh_proj`, a decoder layer predicts t_(i+2).
    """

    def __init__(self, config: Any, context: ModelContext) -> None:
        super().__init__()
        entries.check(config)
        layer, hidden, eps = config.num_hidden_layers, config.hidden_size, config.rms_norm_eps
        prefix = f"model.layers.{layer}"
        self.enorm = RMSNorm(f"{prefix}.enorm", hidden, eps)
        self.hnorm = RMSNorm(f"{prefix}.hnorm", hidden, eps)
        in_floats = replace(context, quantization=Unquantized())  # it is in every published checkpoint
        self.eh_proj = ReplicatedLinear(f"{prefix}.eh_proj", 2 * hidden, hidden, in_floats)
        self.layer = DeepseekV3DecoderLayer(config, layer, rotary(config, context), context, prefix)
        self.norm = AddRMSNorm(f"{prefix}.shared_head.norm", hidden, eps)
        self.logits_processor = LogitsProcessor()
        # The model has read all other layers, and its own copies of the embedding and of the head.
        self.ignored = [
            re.compile(rf"(?!{re.escape(prefix)}\.).*"),
            f"{prefix}.embed_tokens.*",
            f"{prefix}.shared_head.head.*",
        ]

    def construct(self, embeds: Tensor, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """`[tokens, hidden]` each: hidden states before and after the last norm."""
        joined = self.eh_proj(mint.cat((self.enorm(embeds), self.hnorm(hidden)), 1), batch)
        hidden, residual = self.layer(joined, None, batch)
        normed, residual = self.norm(hidden, residual)
        return residual, normed

    def logits(self, hidden: Tensor, head: ParallelLMHead) -> Tensor:
        """Float32 logits `[rows, vocab]` of hidden states before the last norm, by the model's `head`."""
        return self.logits_processor(head, self.norm(hidden, None)[0])
