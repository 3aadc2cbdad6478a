"""ModelSlim, Ascend's quantizer: `quant_model_description.json` beside the weights.

A linear's own bias may be in the file; with static activations it is part of `quant_bias` as well.
"""

from typing import Any

from vllm_ms_models.checkpoint.errors import CheckpointError, quote
from vllm_ms_models.quantization.formats.descriptions import Description
from vllm_ms_models.quantization.specs import Int8Product, Int8Weight


class ModelSlim(Description):
    """W8A8 (static), W8A8_DYNAMIC and W8A16, mixed at will with FLOAT."""

    name = "ascend"
    file = "quant_model_description.json"

    def __init__(self, content: Any) -> None:
        group_size = content.get("group_size") if isinstance(content, dict) else 0
        if group_size is not None and (type(group_size) is not int or group_size % 16 or group_size < 0):
            raise CheckpointError(
                f"{self.file} has group_size {quote(group_size)}; 0 (a scale for each row) and multiples of 16 are "
                "supported."
            )
        words = {
            "W8A8": Int8Product(),
            "W8A8_DYNAMIC": Int8Weight("dynamic", zero="weight_offset"),
            "W8A16": Int8Weight("float", zero="weight_offset", group_size=group_size or 0),
        }
        super().__init__(content, words)
        free = ("model_quant_type", "version", "group_size")
        used = ("kv_quant_type", "kv_cache_type", "fa_quant_type", "reduce_quant_type", "metadata", "optional")
        self.known_settings(*free, *used)
        self.unset(*used)
