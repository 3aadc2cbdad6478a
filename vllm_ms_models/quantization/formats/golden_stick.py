"""Golden Stick, MindSpore's quantizer: `quantization_description.json` beside the weights.

Scale and offset of static activations are given for each input.
"""

from typing import Any

from vllm_ms_models.quantization.formats.descriptions import Description
from vllm_ms_models.quantization.specs import Int8Product, Int8Weight


class GoldenStick(Description):
    """W8A8 (static) and W8A8_DYNAMIC, mixed at will with FLOAT."""

    name = "golden-stick"
    file = "quantization_description.json"

    def __init__(self, content: Any) -> None:
        super().__init__(
            content,
            {"W8A8": Int8Product(input_channels=True), "W8A8_DYNAMIC": Int8Weight("dynamic", scale="w_scale")},
        )
        self.known_settings("group_size", "version")
