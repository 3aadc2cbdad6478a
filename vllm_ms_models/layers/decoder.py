"""The decoder that all pre-norm models share: embedding, layers that hand on a residual stream, last norm."""

from collections.abc import Callable
from typing import Any

from mindspore import Tensor, nn

from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.embedding import VocabParallelEmbedding
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.norm import AddRMSNorm

Stream = tuple[Tensor, Tensor]
"""What one layer hands to the next, be it in another process: hidden states and residual, `[tokens, hidden]` each."""


class Decoder(Layer):
    """Token ids (or embeddings) to the last hidden states `[tokens, hidden]`, normalised.

    `make_layer(number, prefix)` makes a layer, which maps `(hidden, residual, batch)` to hidden and residual.

    A stage of a pipeline has its own layers only; the first has the embedding, the last the norm, and the embedding too
    where its matrix is also the head's. `elsewhere` are patterns of the checkpoint's tensors that other stages read.

    What differs: `embedding_size` (default: the hidden size) and `embedding_scale` of the embedding, `embedding_name`
    and `norm_name` in the checkpoint, and `make_norm(name)`, which makes the last norm, an AddRMSNorm unless given. A
    subclass may have more to do before the layers (`start`) and after them (`finish`); its residual stream may be
    `stream_factor` times the published model's.
    """

    stream_factor = 1.0

    def __init__(
        self,
        config: Any,
        context: ModelContext,
        make_layer: Callable[[int, str], Layer],
        prefix: str = "model",
        *,
        embedding_size: int | None = None,
        embedding_scale: float = 1.0,
        embedding_name: str = "embed_tokens",
        norm_name: str = "norm",
        make_norm: Callable[[str], Layer | None] | None = None,
    ) -> None:
        super().__init__()
        stage, vocab, hidden = context.pipeline, config.vocab_size, config.hidden_size
        numbers = range(config.num_hidden_layers)
        own = numbers if stage.layers is None else stage.layers
        self.is_last = stage.is_last
        self.elsewhere = [f"{prefix}.layers.{i}.*" for i in numbers if i not in own]
        if stage.is_first or (stage.is_last and context.head and config.tie_word_embeddings):
            width = embedding_size or hidden
            self.embed_tokens = VocabParallelEmbedding(
                f"{prefix}.{embedding_name}", vocab, width, context, embedding_scale
            )
        else:
            self.elsewhere.append(f"{prefix}.{embedding_name}.*")
        self.layers = nn.CellList([make_layer(i, f"{prefix}.layers.{i}") for i in own])
        if stage.is_last:
            name = f"{prefix}.{norm_name}"
            self.norm: Any = AddRMSNorm(name, hidden, config.rms_norm_eps) if make_norm is None else make_norm(name)
        else:
            self.elsewhere.append(f"{prefix}.{norm_name}.*")

    def construct(
        self,
        input_ids: Tensor | None,
        batch: Batch,
        inputs_embeds: Tensor | None = None,
        stream: Stream | None = None,
    ) -> Tensor | Stream:
        """The first stage takes tokens or embeddings, the others `stream`; all but the last give the next one's."""
        hidden, residual = (None, None) if stream is None else stream
        if stream is None:
            hidden = self.start(self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds, batch)
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, batch)
        return self.finish(hidden, residual, batch) if self.is_last else (hidden, residual)

    def start(self, embeds: Tensor, batch: Batch) -> Tensor:
        """What the first layer takes, of the tokens' embeddings."""
        return embeds

    def finish(self, hidden: Tensor, residual: Tensor, batch: Batch) -> Tensor:
        """The last hidden states, of what the last layer gives."""
        return self.norm(hidden, residual)[0]
