"""The torch-facing shell round a layer that predicts further tokens (MTP): what vLLM's proposer sees of a draft."""

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.forward_context import get_forward_context

from vllm_ms_models.bridge.model import CausalLMShell


class DraftShell(CausalLMShell):
    """A draft that reads the model's hidden states, and has the model's embedding and head.

    Its Cell offers `construct(embeds, hidden, batch)` -> hidden states before and after the last norm, and
    `logits(hidden, head)` of those before. vLLM's proposer sets `model.embed_tokens` and `lm_head` after loading.
    """

    architecture: ClassVar[str]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.model = SimpleNamespace()

    @staticmethod
    def model_config(vllm_config: VllmConfig) -> ModelConfig:
        """vLLM makes drafts in the configuration of the model that they belong to."""
        assert vllm_config.speculative_config is not None
        return vllm_config.speculative_config.draft_model_config

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        from vllm_ms_models.bridge.tensors import download, upload

        return download(self.model.embed_tokens(upload(input_ids)))

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states `[tokens, hidden]` for `compute_logits`, and those for the draft's next step.

        `hidden_states` are the model's own at `positions`, or the draft's of its step before; `input_ids` the tokens
        after `positions`.
        """
        from vllm_ms_models.bridge.tensors import download, upload
        from vllm_ms_models.layers.batch import Batch

        caches = get_forward_context().attn_metadata
        if caches is None:
            return hidden_states, hidden_states
        embeds = self.model.embed_tokens(upload(input_ids))
        batch = Batch(upload(positions), caches)
        before, after = self.cell(embeds, upload(hidden_states), batch)
        return download(before), download(after)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        from vllm_ms_models.bridge.tensors import download

        return download(self.cell.logits(self.staging.upload(hidden_states), self.lm_head))


def draft_shell(architecture: str) -> type[DraftShell]:
    """The class that vLLM knows the draft `architecture` by."""
    return type(architecture, (DraftShell,), {"architecture": architecture, "__module__": __name__})
