"""MXFP4 as gpt-oss has it: all experts in blocks of 4 bits, everything else in floats."""

from collections.abc import Mapping
from typing import Any

from vllm_ms_models.quantization.formats.common import Format, Settings
from vllm_ms_models.quantization.specs import FloatWeight, Spec

# Known, and without meaning for a reader: which modules are in floats follows from their tensors.
SETTINGS = ("quant_method", "modules_to_not_convert", "dequantize")


class Mxfp4(Format):
    """`config` is config.json's `quantization_config`."""

    name = "mxfp4"
    other_name = "gpt-oss-mxfp4"  # vLLM's for these models, which it writes into the config

    def __init__(self, config: Mapping[str, Any], requantize_fp8: bool = False) -> None:
        Settings("quantization_config", config, SETTINGS).absent("dequantize")

    def spec(self, module: str) -> Spec:
        """Of linears; experts are not among them (`Quantization.stacked`)."""
        return FloatWeight()
