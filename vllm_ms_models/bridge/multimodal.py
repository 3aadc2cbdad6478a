"""The torch-facing shell of models that read images and video: what vLLM's registry, processors and runner see of one.

Inputs are prepared by the processor that vLLM has for the architecture (on the CPU, in the API server): it puts
placeholders into the prompt and makes tensors of pixels. The Cell maps these to embeddings, which vLLM keeps in its
encoder cache, and which take the placeholders' place here.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.registry import _MULTIMODAL_MODELS

from vllm_ms_models import runtime
from vllm_ms_models.bridge.model import CausalLMShell

if TYPE_CHECKING:
    from vllm_ms_models.layers.multimodal import PlacedItem


@cache
def vllm_model(architecture: str) -> Any:
    """vLLM's torch class of `architecture`, which knows its processor. It is never made.

    Its module is large and imports torchvision, so that only processes which serve such a model import it.
    """
    runtime.require_torchvision()
    module, name = _MULTIMODAL_MODELS[architecture]
    return getattr(import_module(f"vllm.model_executor.models.{module}"), name)


class _Processor:
    """What `MULTIMODAL_REGISTRY.register_processor` leaves at a class, looked up when vLLM asks for it."""

    def __get__(self, instance: object, owner: type["MultimodalShell"]) -> Any:
        return vllm_model(owner.architecture)._processor_factory


class MultimodalShell(CausalLMShell, SupportsMultiModal):
    """As `CausalLMShell`, for a Cell that also offers `embed_items(**inputs)`.

    `inputs` are the processor's outputs for some images, or for some videos, by their names, as MindSpore tensors; the
    result is `(rows [n, hidden], sizes)`: the items' embeddings, one after another, and how many of the rows each has.
    With positions of several dimensions (M-RoPE) it offers `item_positions(tokens, items)` as well, which gives int64
    `[3, tokens]`. `renamed` are pairs of prefixes, by which loaded names become those of the Cell.
    """

    supports_mrope = True  # vLLM asks only if the model's config has sections of the rotary embedding
    _processor_factory = _Processor()

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        # vLLM and transformers read it from the whole model's config; the decoder's may leave it out.
        model = vllm_config.model_config
        model.hf_text_config.tie_word_embeddings = model.hf_config.tie_word_embeddings
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    @staticmethod
    def cell_config(model_config: Any) -> Any:
        return model_config.hf_config

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return vllm_model(cls.architecture).get_placeholder_str(modality, i)

    def get_language_model(self) -> torch.nn.Module:
        return self

    def embed_multimodal(self, **inputs: Any) -> list[torch.Tensor]:
        """One tensor `[placeholders, hidden]` for each image or video."""
        from vllm_ms_models.bridge.tensors import download, to_mindspore, upload

        if not inputs:
            return []
        # Grids stay on the host, which counts with them.
        given = {name: (upload if x.is_floating_point() else to_mindspore)(x) for name, x in inputs.items()}
        rows, sizes = self.cell.embed_items(**given)
        return list(download(rows).split(sizes))

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: Sequence[torch.Tensor] | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings `[tokens, hidden]`; those of images and video where `is_multimodal` (bool `[tokens]`) says so.

        A placeholder's id may be outside the vocabulary: its embedding is zeros.
        """
        embeddings = super().embed_input_ids(input_ids)
        if multimodal_embeddings is not None and len(multimodal_embeddings):
            assert is_multimodal is not None
            embeddings[is_multimodal] = torch.cat(list(multimodal_embeddings)).to(embeddings.dtype)
        return embeddings

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: Sequence[Any]
    ) -> tuple[torch.Tensor, int]:
        """int64 `[3, tokens]`, and what the next token's position is more than its number."""
        items = [_placed(feature) for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset)]
        positions = self.cell.item_positions(len(input_tokens), items)
        return torch.from_numpy(positions), int(positions.max()) + 1 - len(input_tokens)


def _placed(feature: Any) -> "PlacedItem":
    from vllm_ms_models.layers.multimodal import PlacedItem

    host = {
        name: (element.data.double() if element.data.is_floating_point() else element.data).numpy()
        for name, element in feature.data.items()
        if isinstance(element.data, torch.Tensor) and element.field.keep_on_cpu
    }
    return PlacedItem(feature.modality, feature.mm_position.offset, host)


def multimodal_shell(architecture: str) -> type[MultimodalShell]:
    """The class that vLLM knows `architecture` by."""
    return type(architecture, (MultimodalShell,), {"architecture": architecture, "__module__": __name__})
