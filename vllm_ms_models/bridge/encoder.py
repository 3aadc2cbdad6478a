"""The torch-facing shell round an encoder, which embeds or classifies and keeps no KV cache."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.forward_context import get_forward_context

from vllm_ms_models import registry
from vllm_ms_models.bridge.model import Shell
from vllm_ms_models.roberta.config import first_position

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
        from vllm_ms_models.bridge.tensors import download, upload
        from vllm_ms_models.layers.batch import Batch

        groups = get_forward_context().attn_metadata
        if groups is None:
            return torch.zeros(len(positions), self.hidden_size, dtype=self.dtype)
        types = None if token_type_ids is None else upload(token_type_ids)
        batch = Batch(upload(positions), {}, ragged=groups[LAYERS], token_types=types)
        return download(self.cell(upload(input_ids), batch))


def encoder_shell(architecture: str) -> type[EncoderShell]:
    """The class that vLLM knows the encoder `architecture` by."""
    pairs = architecture.endswith("ForSequenceClassification")
    attributes = {
        "architecture": architecture,
        "score_type": "cross-encoder" if pairs else "bi-encoder",
        "__module__": __name__,
    }
    return type(architecture, (EncoderShell,), attributes)


def learned_positions(architecture: str, config: Any) -> int:
    """How many tokens a sequence of an encoder may have; `config` is transformers'."""
    return config.max_position_embeddings - (first_position(config) if "Roberta" in architecture else 0)


def longest(model: ModelConfig) -> int:
    """The same of vLLM's configuration."""
    return learned_positions(model.architecture, model.hf_text_config)


def refusals(vllm_config: VllmConfig) -> Iterator[str]:
    """One sentence for each thing that was asked for and an encoder has not."""
    model, dtype = vllm_config.model_config, vllm_config.cache_config.cache_dtype
    if model.convert_type != "none":
        yield f"--convert {model.convert_type} is not possible: {model.architecture} pools already; leave it out."
    if dtype != "auto":
        yield f"--kv-cache-dtype {dtype} has no effect on {model.architecture}, which keeps no KV cache; leave it out."
    asked = model.original_max_model_len
    if longest(model) < 1:
        config = model.hf_text_config
        yield (
            f"config.json of {model.model} leaves no position to text: max_position_embeddings is "
            f"{config.max_position_embeddings}, pad_token_id {config.pad_token_id}; correct it."
        )
    elif asked is not None and asked > longest(model):
        yield (
            f"--max-model-len {asked} is more than the {longest(model)} positions that {model.model} has learned; use "
            f"{longest(model)} at most."
        )


def limit_length(model: ModelConfig) -> None:
    """Keep sequences to the learned positions; vLLM counts those of the padding too."""
    model.max_model_len = min(model.max_model_len, longest(model))
