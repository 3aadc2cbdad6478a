"""What turns a decoder into a language model: the head over its last hidden states."""

from typing import Any

from mindspore import Tensor

from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.decoder import Decoder, Stream
from vllm_ms_models.layers.embedding import ParallelLMHead
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.logits import LogitsProcessor


class CausalLM(Layer):
    """A decoder and its language-model head, as vLLM calls them (docs/add_a_model.md).

    `model` maps `(input_ids, batch, inputs_embeds, stream)` to hidden states `[tokens, hidden]` and has the embedding
    `embed_tokens`, whose matrix is also the head's if `config.tie_word_embeddings`. In a pipeline, all stages but the
    last have no head and give what the next one takes as `stream` (layers/decoder.py). Without `context.head` there is
    none, whatever the checkpoint has. `logits_processor` scales or caps the logits; `head_size` is the width of the
    last hidden states (default: the hidden size), `head_name` what the checkpoint calls the head.
    """

    def __init__(
        self,
        model: Decoder,
        config: Any,
        context: ModelContext,
        logits_processor: LogitsProcessor | None = None,
        head_size: int | None = None,
        head_name: str = "lm_head",
    ) -> None:
        super().__init__()
        self.model = model
        self.elsewhere = list(model.elsewhere)
        if context.head and context.pipeline.is_last:
            tied_to = model.embed_tokens if config.tie_word_embeddings else None
            width = head_size or config.hidden_size
            self.lm_head = ParallelLMHead(head_name, config.vocab_size, width, context, tied_to)
        else:
            self.elsewhere.append(f"{head_name}.*")
        self.logits_processor = logits_processor or LogitsProcessor()

    def construct(
        self,
        input_ids: Tensor | None,
        batch: Batch,
        inputs_embeds: Tensor | None = None,
        stream: Stream | None = None,
    ) -> Tensor | Stream:
        return self.model(input_ids, batch, inputs_embeds, stream)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Input embeddings `[tokens, hidden]`."""
        return self.model.embed_tokens(input_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits `[rows, vocab]` of hidden states `[rows, hidden]`."""
        return self.logits_processor(self.lm_head, hidden)
