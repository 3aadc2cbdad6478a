"""Decoders that multiply the embedding, and what each block adds, by fixed numbers (Granite, MiniCPM: muP).

The hidden states of a layer are x + m * block(norm(x)), twice. Here the residual stream is s = x / m, to which a
block's result is added as it is: s + block(norm(x)). A norm does not see the factor but for its eps:

    x / sqrt(mean(x^2) + eps) = s / sqrt(mean(s^2) + eps / m^2)

So no layer multiplies, and fewer sums are rounded. The stream is larger by 1 / m (4 to 5 in published models).
"""

from collections.abc import Callable
from typing import Any

from mindspore import Tensor

from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.decoder import Decoder
from vllm_ms_models.layers.embedding import ParallelLMHead
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.logits import LogitsProcessor
from vllm_ms_models.layers.norm import AddRMSNorm
from vllm_ms_models.layers.scale import Scale


class ScaledDecoder(Decoder):
    """Embeddings times `embedding`, what each block adds times `residual`.

    `make_layer(number, prefix, eps)` makes a layer whose norms have that eps. ValueError unless `residual` is above 0.
    """

    def __init__(
        self,
        config: Any,
        context: ModelContext,
        make_layer: Callable[[int, str, float], Layer],
        embedding: float,
        residual: float,
    ) -> None:
        if not residual > 0:
            raise ValueError(
                f"What a block adds is multiplied by {residual} in config.json; only factors above 0 work."
            )
        eps = config.rms_norm_eps / residual**2
        super().__init__(
            config,
            context,
            lambda layer, prefix: make_layer(layer, prefix, eps),
            make_norm=lambda name: AddRMSNorm(name, config.hidden_size, eps),
        )
        self.scale = Scale(embedding / residual, config.hidden_size)
        self.stream_factor = 1 / residual

    def start(self, embeds: Tensor, batch: Batch) -> Tensor:
        return self.scale(embeds)


class ScaledLogits(LogitsProcessor):
    """Logits times `factor`, which the last hidden states are multiplied by: they are fewer."""

    def __init__(self, factor: float, hidden_size: int) -> None:
        super().__init__()
        self.hidden_scale = Scale(factor, hidden_size)

    def construct(self, head: ParallelLMHead, hidden: Tensor) -> Tensor:
        return super().construct(head, self.hidden_scale(hidden))
