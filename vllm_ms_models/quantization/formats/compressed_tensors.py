"""compressed-tensors (`quantization_config` of llm-compressor's models): int8, packed int4 and int8, FP8.

Groups of modules are named by targets: exact names, `re:` patterns that match from a name's beginning, or the class
`Linear`. A name counts more than the class; what is ignored or nobody's target is stored in floats.
"""

from collections.abc import Mapping
from typing import Any

from vllm_ms_models.checkpoint.errors import CheckpointError, quote
from vllm_ms_models.quantization.formats.common import Format, Settings, compiled
from vllm_ms_models.quantization.specs import FloatWeight, Fp8Weight, Int8Weight, PackedWeight, Spec

WHERE = "quantization_config of config.json (compressed-tensors)"
LINEAR = "Linear"

SETTINGS = {
    "quant_method",
    "format",
    "config_groups",
    "ignore",
    "kv_cache_scheme",
    "sparsity_config",
    "transform_config",
    # These say nothing about the tensors.
    "quantization_status",
    "global_compression_ratio",
    "version",
    "run_compressed",
    "total_num_heads",  # the two that vLLM adds
    "total_num_kv_heads",
}
GROUP_SETTINGS = {"targets", "weights", "input_activations", "output_activations", "format"}
ARGUMENTS = {
    "num_bits",
    "type",
    "symmetric",
    "group_size",
    "strategy",
    "block_structure",
    "dynamic",
    "actorder",
    # How the numbers were found.
    "observer",
    "observer_kwargs",
    "scale_dtype",
    "zp_dtype",
}
PLAIN = ("int-quantized", "naive-quantized", "float-quantized")
FORMATS = (*PLAIN, "pack-quantized", "mixed-precision")
# Whether inputs are ordered by group, by what `actorder` says; "weight" and "static" do not change what is stored.
ACTORDER = {None: False, False: False, True: True, "weight": False, "static": False, "group": True, "dynamic": True}


class CompressedTensors(Format):
    """`quantization_config` with quant_method compressed-tensors; `requantize`: FP8 becomes int8."""

    name = "compressed-tensors"

    def __init__(self, config: Mapping[str, Any], requantize: bool = False) -> None:
        settings = Settings(WHERE, config, SETTINGS)
        settings.absent("kv_cache_scheme", "transform_config")
        sparsity = settings.get("sparsity_config", {})
        if sparsity and sparsity != {"format": "dense"}:
            raise settings.refusal("sparsity_config", "only dense weights are supported")
        format = settings.one_of("format", FORMATS)
        self.requantize = requantize
        self.ignored = _Matcher(settings.names("ignore"))
        self.groups: list[tuple[_Matcher, Spec]] = []
        groups = settings.get("config_groups", {})
        if not isinstance(groups, Mapping) or not groups:
            raise settings.refusal("config_groups", "groups of quantized modules are expected")
        for name, group in groups.items():
            where = f"Group {quote(name)} in {WHERE}"
            self.groups.append(self._group(Settings(where, group, GROUP_SETTINGS), format))

    def spec(self, module: str) -> Spec:
        if self.ignored.by_name(module) or self.ignored.by_class:
            return FloatWeight()
        specs = [spec for targets, spec in self.groups if targets.by_name(module)]
        specs = specs or [spec for targets, spec in self.groups if targets.by_class]
        if any(spec != specs[0] for spec in specs):
            raise CheckpointError(f"{WHERE} has two groups with different schemes for {module}; keep one of them.")
        return specs[0] if specs else FloatWeight()

    def _group(self, group: Settings, format: str) -> tuple["_Matcher", Spec]:
        group.absent("output_activations")
        targets = group.names("targets")
        if not targets:
            raise group.refusal("targets", "a list of modules is expected")
        format = group.get("format", format)
        if format not in FORMATS[:-1]:
            raise group.refusal("format", f"supported: {', '.join(FORMATS[:-1])}")
        weights = Settings(f"weights of {group.where}", group.get("weights"), ARGUMENTS)
        inputs = group.get("input_activations")
        if inputs is not None:
            inputs = Settings(f"input_activations of {group.where}", inputs, ARGUMENTS)
        if weights.get("dynamic", False) is not False:
            raise weights.refusal("dynamic", "weights must have their scales in the checkpoint")
        if weights.one_of("type", ("int", "float"), "int") == "float":
            spec: Spec = self._fp8(weights, inputs, format)
        elif format == "pack-quantized":
            spec = self._packed(weights, inputs)
        else:
            spec = self._int8(weights, inputs)
        return _Matcher(targets), spec

    def _int8(self, weights: Settings, inputs: Settings | None) -> Int8Weight:
        weights.one_of("num_bits", (8,), 8)
        weights.absent("actorder")
        strategy = _strategy(weights, ("tensor", "channel", "group"))
        zero = None if weights.one_of("symmetric", (True, False), True) else "weight_zero_point"
        group_size = weights.group_size() if strategy == "group" else 0
        per_tensor = strategy == "tensor"
        if inputs is None:
            return Int8Weight("float", zero=zero, group_size=group_size, per_tensor=per_tensor)
        if group_size:
            raise weights.refusal("strategy", "with int8 activations, scales are supported for channels or the tensor")
        inputs.one_of("num_bits", (8,), 8)
        inputs.one_of("type", ("int",), "int")
        symmetric = inputs.one_of("symmetric", (True, False), True)
        if inputs.one_of("dynamic", (True, False), False):
            _strategy(inputs, ("token",))
            if not symmetric:
                raise inputs.refusal("symmetric", "dynamic activations are supported when they are symmetric")
            return Int8Weight("dynamic", zero=zero, per_tensor=per_tensor)
        _strategy(inputs, ("tensor",))
        return Int8Weight("static", zero=zero, per_tensor=per_tensor, input_offset=not symmetric)

    def _packed(self, weights: Settings, inputs: Settings | None) -> PackedWeight:
        bits = weights.one_of("num_bits", (4, 8), 8)
        if inputs is not None:
            raise CheckpointError(
                f"{inputs.where} are quantized though weights are packed (W{bits}A{inputs.get('num_bits')}), which "
                "cannot be served here; packed weights are supported with activations in floats."
            )
        strategy = _strategy(weights, ("channel", "group"))
        actorder = weights.get("actorder")
        if not isinstance(actorder, str | bool | None) or actorder not in ACTORDER:
            raise weights.refusal("actorder", "supported: group, weight, static, dynamic and null")
        return PackedWeight(
            bits,
            weights.group_size() if strategy == "group" else 0,
            zeros=not weights.one_of("symmetric", (True, False), True),
            ordered=ACTORDER[actorder],
        )

    def _fp8(self, weights: Settings, inputs: Settings | None, format: str) -> Fp8Weight:
        """Activations stay in floats, whatever the description has for them: that loses nothing."""
        weights.one_of("num_bits", (8,))
        weights.one_of("symmetric", (True,), True)
        weights.absent("actorder")
        if format not in ("float-quantized", "naive-quantized"):
            raise CheckpointError(f"{weights.where} are FP8 in the format {format}; float-quantized is expected.")
        if inputs is not None:
            inputs.one_of("type", ("float",), "int")
            inputs.one_of("num_bits", (8,), 8)
        strategy = _strategy(weights, ("tensor", "channel", "block"))
        block = _block(weights) if strategy == "block" else None
        return Fp8Weight(block=block, per_channel=strategy == "channel", requantized=self.requantize)


class _Matcher:
    """Targets as names, patterns and whether the class of linears is among them."""

    def __init__(self, targets: list[str]) -> None:
        self.by_class = LINEAR in targets
        self.names = {target for target in targets if not target.startswith("re:")}
        patterns = [target.removeprefix("re:") for target in targets if target.startswith("re:")]
        self.patterns = [compiled(pattern, WHERE) for pattern in patterns]

    def by_name(self, module: str) -> bool:
        return module in self.names or any(pattern.match(module) for pattern in self.patterns)


def _strategy(arguments: Settings, allowed: tuple[str, ...]) -> str:
    group_size = arguments.get("group_size")
    default = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    return arguments.one_of("strategy", allowed, default)


def _block(weights: Settings) -> tuple[int, int]:
    block = weights.get("block_structure")
    if isinstance(block, str):
        block = [int(size) if size.isdecimal() and len(size) < 10 else 0 for size in block.split("x")]
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise weights.refusal("block_structure", "two sizes, of rows and of columns, are expected")
    return block[0], block[1]
