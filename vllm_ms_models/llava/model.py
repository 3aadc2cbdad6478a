"""LLaVA 1.5 (Liu et al., 2023): a vision tower's features, projected to embeddings of a language model."""

from typing import Any

from mindspore import Tensor

from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.mlp import MLP
from vllm_ms_models.layers.multimodal import MultimodalLM
from vllm_ms_models.llava.vision import VisionTower
from vllm_ms_models.registry import lookup, register_model

# The decoder of a text_config that does not name its architecture.
DECODERS = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def decoder_of(config: Any) -> str:
    """The architecture of `text_config`."""
    named = getattr(config, "architectures", None)
    if named:
        return named[0]
    if config.model_type not in DECODERS:
        raise ValueError(
            f'text_config in config.json has model_type {config.model_type!r} and no "architectures", which names the '
            "language model; add it."
        )
    return DECODERS[config.model_type]


@register_model("LlavaForConditionalGeneration")
class LlavaForConditionalGeneration(MultimodalLM):
    """LLaVA with any decoder that is registered; `config` is transformers' LlavaConfig."""

    renamed = (
        ("model.language_model.", "model."),
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("vision_tower.vision_model.", "vision_tower."),
    )
    encoders = ("vision_tower.", "multi_modal_projector.")

    def __init__(self, config: Any, context: ModelContext) -> None:
        text, vision = config.text_config, config.vision_config
        super().__init__(lookup(decoder_of(text))(text, context), context)
        if not context.pipeline.is_first:
            return
        layers = config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else list(layers)
        names = "multi_modal_projector.linear_1", "multi_modal_projector.linear_2"
        features, bias = vision.hidden_size * len(layers), config.multimodal_projector_bias
        with self.making_encoders():
            self.vision_tower = VisionTower(vision, layers, context, "vision_tower")
            self.projector = MLP(
                names, features, text.hidden_size, config.projector_hidden_act, context, bias, text.hidden_size
            )
        self.ignored += self.vision_tower.ignored
        self.skipped = 1 if config.vision_feature_select_strategy == "default" else 0

    def embed_items(self, pixel_values: Tensor) -> tuple[Tensor, list[int]]:
        """Of images `[images, channels, size, size]`: the tower's rows, or all but the first (CLIP's class token)."""
        images = len(pixel_values)
        features = self.vision_tower(pixel_values).reshape(images, self.vision_tower.rows, -1)
        kept = features[:, self.skipped :].reshape(images * (self.vision_tower.rows - self.skipped), -1).contiguous()
        return self.projector(kept), [self.vision_tower.rows - self.skipped] * images
