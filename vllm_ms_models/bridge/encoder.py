"""The torch-facing shell round an encoder, which embeds or classifies and keeps no KV cache."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context

from vllm_ms_models import registry
from vllm_ms_models.bridge.model import Shell

if TYPE_CHECKING:
    from vllm_ms_models.checkpoint.index import Checkpoint

LAYERS = "encoder"  # vLLM's name for all attention layers together


class EncoderShell(Shell):
    """A pooling model to vLLM, whose attention is in both directions.

    The Cell offers `construct(input_ids, batch)` -> hidden states `[tokens, hidden]`, `embed(input_ids)`, the `prefix`
    of its tensors' names and, if it classifies, a static `head(config, labels, dtype)`. It finds the batch's sequences
    in `batch.ragged`.
    """

    is_pooling_model: ClassVar[Literal[True]] = True
    attn_type: ClassVar[str] = "encoder_only"
    default_seq_pooling_type: ClassVar[str] = "CLS"
    default_tok_pooling_type: ClassVar[str] = "ALL"
    score_type: ClassVar[str]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        from vllm_ms_models.bridge.attention_backend import UncachedLayer
        from vllm_ms_models.bridge.context import model_context
        from vllm_ms_models.bridge.pooling import make_encoder_pooler

        model_config = vllm_config.model_config
        self.hidden_size = model_config.get_hidden_size()
        self.dtype = model_config.dtype
        self.cell = registry.lookup(self.architecture)(
            model_config.hf_text_config, model_context(vllm_config, model_config)
        )
        self.cell.set_train(False)
        self.pooler, self.score = make_encoder_pooler(model_config, self.cell)
        vllm_config.compilation_config.static_forward_context[LAYERS] = UncachedLayer()

    def named(self, weights: "Checkpoint") -> "Checkpoint":
        from vllm_ms_models import checkpoint

        return checkpoint.of_encoder(weights, self.cell.prefix)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states `[tokens, hidden]`; zeros in vLLM's dummy runs.

        vLLM gives `token_type_ids` if a request of the batch is a pair of texts whose tokenizer tells them apart.
        """
        from vllm_ms_models.bridge.tensors import to_mindspore, to_torch
        from vllm_ms_models.layers.batch import Batch

        groups = get_forward_context().attn_metadata
        if groups is None:
            return torch.zeros(len(positions), self.hidden_size, dtype=self.dtype)
        types = None if token_type_ids is None else to_mindspore(token_type_ids)
        batch = Batch(to_mindspore(positions), {}, ragged=groups[LAYERS], token_types=types)
        return to_torch(self.cell(to_mindspore(input_ids), batch))


def encoder_shell(architecture: str) -> type[EncoderShell]:
    """The class that vLLM knows the encoder `architecture` by."""
    pairs = architecture.endswith("ForSequenceClassification")
    attributes = {
        "architecture": architecture,
        "score_type": "cross-encoder" if pairs else "bi-encoder",
        "__module__": __name__,
    }
    return type(architecture, (EncoderShell,), attributes)
