"""`quant_method: gptq` (AutoGPTQ, GPTQModel): 4 or 8 bits in groups, with or without activation order.

`dynamic` has rules by regular expression: `-:` leaves modules in floats, `+:` (or nothing) gives them other settings.
"""

from collections.abc import Mapping
from typing import Any

from vllm_ms_models.checkpoint.errors import quote
from vllm_ms_models.quantization.formats.common import Format, Settings, compiled, in_block, mentions
from vllm_ms_models.quantization.specs import FloatWeight, GptqWeight, Spec

WHERE = "quantization_config of config.json (gptq)"
OVERRIDABLE = {"bits", "group_size", "sym", "desc_act"}
SETTINGS = OVERRIDABLE | {
    "quant_method",
    "checkpoint_format",
    "format",
    "dynamic",
    "lm_head",
    "modules_in_block_to_quantize",
    "modules_to_not_convert",
    "pack_dtype",
    "is_marlin_format",
    # How the numbers were found, and how other programs run them.
    "backend",
    "batch_size",
    "block_name_to_quantize",
    "cache_block_outputs",
    "damp_percent",
    "dataset",
    "disable_exllama",
    "exllama_config",
    "damp_auto_increment",
    "act_group_aware",
    "max_input_length",
    "meta",
    "model_file_base_name",
    "model_name_or_path",
    "model_seqlen",
    "module_name_preceding_first_block",
    "mse",
    "pad_token_id",
    "static_groups",
    "tokenizer",
    "true_sequential",
    "use_cuda_fp16",
    "use_exllama",
}
VERSIONS = {"gptq": 1, "gptq_v2": 2}


class Gptq(Format):
    """Linears of the blocks are quantized unless a rule says otherwise; the head only with `lm_head`."""

    name = "gptq"

    def __init__(self, config: Mapping[str, Any], requantize: bool = False) -> None:
        settings = Settings(WHERE, config, SETTINGS)
        settings.absent("is_marlin_format")
        settings.one_of("pack_dtype", ("int32",), "int32")
        name = "format" if settings.get("checkpoint_format") is None else "checkpoint_format"
        self.version = VERSIONS[settings.one_of(name, tuple(VERSIONS), "gptq")]
        self.quantized = self._spec(settings)
        self.head = settings.one_of("lm_head", (True, False), False)
        self.ignored = settings.names("modules_to_not_convert")
        inside = settings.get("modules_in_block_to_quantize", [])
        if not isinstance(inside, list):
            raise settings.refusal("modules_in_block_to_quantize", "a list of names is expected")
        names = [name for item in inside for name in (item if isinstance(item, list) else [item])]
        self.chosen = Settings(WHERE, {"modules_in_block_to_quantize": names}, SETTINGS).names(
            "modules_in_block_to_quantize"
        )
        self.rules = []
        rules = settings.get("dynamic", {})
        if not isinstance(rules, Mapping):
            raise settings.refusal("dynamic", "rules by regular expression are expected")
        for pattern, values in rules.items():
            where = f"Rule {quote(pattern)} of dynamic in {WHERE}"
            skipped = pattern.startswith("-:")
            expression = compiled(pattern.removeprefix("-:").removeprefix("+:"), WHERE)
            changes = Settings(where, {} if skipped else values, OVERRIDABLE)
            merged = Settings(where, {**settings.values, **changes.values}, SETTINGS)
            self.rules.append((expression, FloatWeight() if skipped else self._spec(merged)))

    def spec(self, module: str) -> Spec:
        if not in_block(module) and not self.head:
            return FloatWeight()
        if any(mentions(module, name) for name in self.ignored):
            return FloatWeight()
        for expression, spec in self.rules:
            if expression.match(module):
                return spec
        if in_block(module) and self.chosen and not any(module.endswith(f".{name}") for name in self.chosen):
            return FloatWeight()
        return self.quantized

    def _spec(self, settings: Settings) -> GptqWeight:
        bits = settings.one_of("bits", (4, 8))
        symmetric = settings.one_of("sym", (True, False), True)
        ordered = settings.one_of("desc_act", (True, False), False)
        spec = GptqWeight(bits, settings.group_size(), symmetric, ordered, self.version)
        if ordered and not spec.group_size:  # one group: the order of its inputs changes nothing
            return GptqWeight(bits, 0, symmetric, False, self.version)
        return spec
