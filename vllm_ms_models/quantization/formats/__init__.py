"""Quantized checkpoints by the format they are in: what each says about a module. No MindSpore here."""

from collections.abc import Callable, Mapping
from typing import Any

from vllm_ms_models.checkpoint.errors import CheckpointError, quote
from vllm_ms_models.quantization.formats.awq import Awq
from vllm_ms_models.quantization.formats.common import Format
from vllm_ms_models.quantization.formats.compressed_tensors import CompressedTensors
from vllm_ms_models.quantization.formats.descriptions import Description
from vllm_ms_models.quantization.formats.fp8 import Fp8
from vllm_ms_models.quantization.formats.golden_stick import GoldenStick
from vllm_ms_models.quantization.formats.gptq import Gptq
from vllm_ms_models.quantization.formats.modelslim import ModelSlim
from vllm_ms_models.quantization.formats.mxfp4 import Mxfp4

METHODS: dict[str, Callable[[Mapping[str, Any], bool], Format]] = {
    format.name: format for format in (CompressedTensors, Fp8, Awq, Gptq, Mxfp4)
}
"""By `quant_method` of `quantization_config`; the second argument is whether FP8 becomes int8."""

DESCRIPTIONS: dict[str, Callable[[Any], Description]] = {format.file: format for format in (ModelSlim, GoldenStick)}
"""By the name of a file beside the weights."""

DESCRIPTION_OF = {ModelSlim.name: ModelSlim.file, GoldenStick.name: GoldenStick.file}
"""That name by the format's."""


def from_config(config: Mapping[str, Any], requantize_fp8: bool = False) -> Format:
    """The format that `quantization_config` describes. Raises CheckpointError."""
    if not isinstance(config, Mapping):
        raise CheckpointError(
            f"config.json has quantization_config {quote(config)}, where a dictionary of settings is expected; "
            "correct it."
        )
    method = str(config.get("quant_method", "")).lower().replace("_", "-")
    method = Mxfp4.name if method == Mxfp4.other_name else method
    if method not in METHODS:
        raise CheckpointError(
            f"config.json has quantization_config with quant_method {quote(config.get('quant_method'))}, which is not "
            f"supported; supported are {', '.join(METHODS)} and the description files {', '.join(DESCRIPTIONS)}."
        )
    return METHODS[method](config, requantize_fp8)


__all__ = ["DESCRIPTIONS", "DESCRIPTION_OF", "METHODS", "Format", "from_config"]
