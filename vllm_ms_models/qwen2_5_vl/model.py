"""Qwen2.5-VL (Bai et al., 2025): a Qwen2 decoder that reads images and video, with positions of three dimensions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from mindspore import Tensor

from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.multimodal import MultimodalLM, PlacedItem
from vllm_ms_models.qwen2_5_vl.vision import VisionTower
from vllm_ms_models.registry import lookup, register_model


@register_model("Qwen2_5_VLForConditionalGeneration")
class Qwen2_5_VLForConditionalGeneration(MultimodalLM):  # noqa: N801 (its name in config.json)
    """Qwen2 behind a vision tower; `config` is transformers' Qwen2_5_VLConfig."""

    renamed = (("model.language_model.", "model."), ("model.visual.", "visual."))
    encoders = ("visual.",)

    def __init__(self, config: Any, context: ModelContext) -> None:
        super().__init__(lookup("Qwen2ForCausalLM")(config.text_config, context), context)
        self.merge = config.vision_config.spatial_merge_size
        self.tokens_per_second = config.vision_config.tokens_per_second
        if context.pipeline.is_first:
            with self.making_encoders():
                self.visual = VisionTower(config.vision_config, context, "visual")

    def embed_items(self, **inputs: Tensor) -> tuple[Tensor, list[int]]:
        """Of images or of videos: their patches `[patches, values]` and grids int64 `[items, 3]`."""
        pixels, kind = ("pixel_values", "image") if "pixel_values" in inputs else ("pixel_values_videos", "video")
        grids = [(int(t), int(h), int(w)) for t, h, w in inputs[f"{kind}_grid_thw"].asnumpy()]
        return self.visual(inputs[pixels], grids), [t * h * w // self.merge**2 for t, h, w in grids]

    def item_positions(self, tokens: int, items: Sequence[PlacedItem]) -> np.ndarray:
        """Time, row and column of each token of a prompt, int64 `[3, tokens]`; `items` in the prompt's order.

        All three go up by one with each token of text. An embedding of an item has its own time (of a video in
        `1 / tokens_per_second`), row and column, from the position after the text before; what follows it begins after
        the largest of these. transformers 5 begins after its rows and columns, whatever its time.
        """
        positions = np.empty((3, tokens), np.int64)
        start, value = 0, 0
        for item in items:
            time, rows, columns = (int(n) for n in item.data[f"{item.modality}_grid_thw"])
            places = np.indices((time, rows // self.merge, columns // self.merge)).reshape(3, -1)
            if item.modality == "video":
                seconds = float(item.data.get("second_per_grid_ts", np.ones(1)))
                places[0] = (places[0] * (seconds * self.tokens_per_second)).astype(np.int64)
            value += self._text(positions[:, start : item.offset], value)
            start = item.offset + places.shape[1]
            positions[:, item.offset : start] = places + value
            value += int(places.max()) + 1
        self._text(positions[:, start:], value)
        return positions

    @staticmethod
    def _text(positions: np.ndarray, first: int) -> int:
        """Fill the `positions` of text; how many they are."""
        positions[:] = first + np.arange(positions.shape[1])
        return positions.shape[1]
