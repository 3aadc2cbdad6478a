"""What turns a language model into one that reads images or video: encoders before it, its decoder unchanged."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from mindspore import Tensor

from vllm_ms_models import kernels
from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.causal_lm import CausalLM
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.decoder import Stream
from vllm_ms_models.layers.layer import Layer


@dataclass(frozen=True)
class PlacedItem:
    """An image or a video of a prompt: its modality, the position of its first placeholder, what its processor says.

    `data` has the processor's small outputs, such as the grid of patches, by their names.
    """

    modality: str
    offset: int
    data: dict[str, np.ndarray]


class MultimodalLM(Layer):
    """A language model, whose input embeddings are in part those of images or video; subclasses add the encoders.

    The decoder names its tensors as if it were alone, so `renamed` (pairs of prefixes, `checkpoint.renamed`) takes away
    what the checkpoint puts before them. Encoders are on the first stage of a pipeline only: `encoders` are the
    prefixes of their tensors, which the other stages do not read.
    """

    renamed: tuple[tuple[str, str], ...] = ()
    encoders: tuple[str, ...] = ()

    def __init__(self, language_model: CausalLM, context: ModelContext) -> None:
        super().__init__()
        self.language_model = language_model
        self.elsewhere = list(language_model.elsewhere)
        self.ignored: list[Any] = list(getattr(language_model, "ignored", ()))
        if not context.pipeline.is_first:
            self.elsewhere += [f"{prefix}*" for prefix in self.encoders]

    @staticmethod
    def making_encoders() -> AbstractContextManager[None]:
        """Subclasses make theirs in this block: a decoder may be compiled, its encoders are not."""
        return kernels.making_uncompiled()

    def construct(
        self,
        input_ids: Tensor | None,
        batch: Batch,
        inputs_embeds: Tensor | None = None,
        stream: Stream | None = None,
    ) -> Tensor | Stream:
        return self.language_model(input_ids, batch, inputs_embeds, stream)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Input embeddings of text `[tokens, hidden]`."""
        return self.language_model.embed(input_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits `[rows, vocab]` of hidden states `[rows, hidden]`."""
        return self.language_model.logits(hidden)
