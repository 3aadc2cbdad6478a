"""Quantized checkpoints by the format they are in: what each says about a module. No MindSpore here."""

from collections.abc import Callable, Mapping
from typing import Any

from vllm_ms_models.checkpoint.errors import CheckpointError, quote
from vllm_ms_models.quantization.formats.common import Format
from vllm_ms_models.quantization.formats.compressed_tensors import CompressedTensors

METHODS: dict[str, Callable[[Mapping[str, Any], bool], Format]] = {
    "compressed-tensors": CompressedTensors,
}
"""By `quant_method` of `quantization_config`; the second argument is whether FP8 becomes int8."""

DESCRIPTIONS: dict[str, type[Format]] = {}
"""By the name of a file beside the weights."""


def from_config(config: Mapping[str, Any], requantize_fp8: bool = False) -> Format:
    """The format that `quantization_config` describes. Raises CheckpointError."""
    method = str(config.get("quant_method", "")).lower().replace("_", "-")
    if method not in METHODS:
        raise CheckpointError(
            f"config.json has quantization_config with quant_method {quote(config.get('quant_method'))}, which is not "
            f"supported; supported are {', '.join(METHODS)} and the description files {', '.join(DESCRIPTIONS)}."
        )
    return METHODS[method](config, requantize_fp8)


__all__ = ["DESCRIPTIONS", "METHODS", "Format", "from_config"]
