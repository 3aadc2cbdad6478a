"""`quant_method: awq` (AutoAWQ): 4 bits in groups, with zero points, in the layout of its `gemm` version."""

from collections.abc import Mapping
from typing import Any

from vllm_ms_models.quantization.formats.common import Format, Settings, in_block, mentions
from vllm_ms_models.quantization.specs import AwqWeight, FloatWeight, Spec

WHERE = "quantization_config of config.json (awq)"
SETTINGS = {
    "quant_method",
    "bits",
    "w_bit",
    "group_size",
    "q_group_size",
    "zero_point",
    "version",
    "modules_to_not_convert",
    "lm_head",
    # How other programs run it.
    "backend",
    "do_fuse",
    "exllama_config",
    "fuse_max_seq_len",
    "modules_to_fuse",
}


class Awq(Format):
    """Linears of the blocks are quantized unless they are listed; the head is in floats."""

    name = "awq"

    def __init__(self, config: Mapping[str, Any], requantize: bool = False) -> None:
        settings = Settings(WHERE, config, SETTINGS)
        settings.one_of("w_bit" if settings.get("bits") is None else "bits", (4,))
        settings.one_of("zero_point", (True,), True)
        version = settings.get("version", "gemm")
        if str(version).lower() != "gemm":
            raise settings.refusal("version", "supported: gemm")
        settings.absent("lm_head")
        self.quantized = AwqWeight(
            settings.group_size("q_group_size" if settings.get("group_size") is None else "group_size")
        )
        self.ignored = settings.names("modules_to_not_convert")

    def spec(self, module: str) -> Spec:
        if not in_block(module) or any(mentions(module, name) for name in self.ignored):
            return FloatWeight()
        return self.quantized
