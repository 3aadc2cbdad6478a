"""`quant_method: fp8`: DeepSeek's and Qwen's own FP8 releases (blocks), and AutoFP8's (one scale a matrix).

Activations stay in floats, whatever `activation_scheme` says: that loses nothing.
"""

from collections.abc import Mapping
from typing import Any

from vllm_ms_models.quantization.formats.common import Format, Settings, in_block, mentions
from vllm_ms_models.quantization.specs import FloatWeight, Fp8Weight, Spec

WHERE = "quantization_config of config.json (fp8)"
SETTINGS = {
    "quant_method",
    "fmt",
    "weight_block_size",
    "activation_scheme",
    "ignored_layers",
    "modules_to_not_convert",
    "kv_cache_scheme",
    "scale_fmt",  # "ue8m0": scales are powers of two, stored as floats all the same
    "dequantize",
}


class Fp8(Format):
    """Linears of the blocks are FP8 unless they are listed; the head is in floats. `requantize`: FP8 becomes int8."""

    name = "fp8"

    def __init__(self, config: Mapping[str, Any], requantize: bool = False) -> None:
        settings = Settings(WHERE, config, SETTINGS)
        settings.absent("kv_cache_scheme")
        settings.one_of("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
        settings.one_of("activation_scheme", ("dynamic", "static"), "dynamic")
        settings.one_of("scale_fmt", ("ue8m0", "float"), "float")
        block = settings.get("weight_block_size")
        if block is None:
            self.quantized = Fp8Weight(requantized=requantize)
        else:
            sizes = list(block) if isinstance(block, list | tuple) else []
            if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
                raise settings.refusal("weight_block_size", "two sizes, of rows and of columns, are expected")
            self.quantized = Fp8Weight("weight_scale_inv", (sizes[0], sizes[1]), requantized=requantize)
        self.ignored = settings.names("ignored_layers") + settings.names("modules_to_not_convert")

    def spec(self, module: str) -> Spec:
        if not in_block(module) or any(mentions(module, name) for name in self.ignored):
            return FloatWeight()
        return self.quantized
