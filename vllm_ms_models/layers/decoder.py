"""The decoder that all pre-norm models share: embedding, layers that hand on a residual stream, last norm."""

from collections.abc import Callable
from typing import Any

from mindspore import Tensor, nn

from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.embedding import VocabParallelEmbedding
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.norm import AddRMSNorm


class Decoder(Layer):
    """Token ids (or embeddings) to the last hidden states `[tokens, hidden]`, normalised.

    `make_layer(number, prefix)` makes a layer, which maps `(hidden, residual, batch)` to hidden and residual.
    """

    def __init__(
        self, config: Any, context: ModelContext, make_layer: Callable[[int, str], Layer], prefix: str = "model"
    ) -> None:
        super().__init__()
        vocab, hidden = config.vocab_size, config.hidden_size
        self.embed_tokens = VocabParallelEmbedding(f"{prefix}.embed_tokens", vocab, hidden, context)
        self.layers = nn.CellList([make_layer(i, f"{prefix}.layers.{i}") for i in range(config.num_hidden_layers)])
        self.norm = AddRMSNorm(f"{prefix}.norm", hidden, config.rms_norm_eps)

    def construct(self, input_ids: Tensor | None, batch: Batch, inputs_embeds: Tensor | None = None) -> Tensor:
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        residual = None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, batch)
        return self.norm(hidden, residual)[0]
