"""Quantized checkpoints on vLLM's side: its configuration classes, and which format a model is in. No MindSpore here.

vLLM only needs to let the checkpoint pass; what it says is read by `quantization/formats`.
"""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from vllm_ms_models import suites
from vllm_ms_models.checkpoint.errors import CheckpointError, quote
from vllm_ms_models.checkpoint.files import read_json
from vllm_ms_models.quantization import formats

# What --quantization may be called, by the format's name: vLLM has several names for some.
NAMES: dict[str, tuple[str, ...]] = {
    "compressed-tensors": ("compressed-tensors",),
    "fp8": ("fp8",),
    "awq": ("awq", "auto_awq", "awq_marlin"),
    "gptq": ("gptq", "auto_gptq", "gptq_marlin"),
    "mxfp4": ("mxfp4", "gpt_oss_mxfp4"),
    "ascend": ("ascend",),
    "golden-stick": ("golden-stick",),
}
# --additional-config '{"fp8": "int8"}' makes int8 of FP8 weights; "model" is the model's own dtype.
FP8_OPTION = "fp8"
FP8_CHOICES = ("model", "int8")


class CheckpointQuantization(QuantizationConfig):
    """What vLLM asks of a quantization method before it builds a model; ours takes every dtype and device."""

    method: ClassVar[str]
    filenames: ClassVar[list[str]] = []

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        """Without `config`: --quantization for a model that describes none, which is refused later, in a sentence."""
        super().__init__()
        self.config = config

    def get_name(self) -> str:
        return self.method

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        return cls.filenames

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "CheckpointQuantization":
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Another name of the checkpoint's own method is taken as what it stands for."""
        is_other_name = user_quant != cls.method and user_quant in NAMES[cls.method]
        return user_quant if is_other_name and hf_quant_cfg.get("quant_method") == cls.method else None

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        """Spawned processes get it by the name of its method: the class of a format has no name in a module."""
        return _made, (self.method, self.config)


@functools.cache
def _class_of(method: str) -> type[CheckpointQuantization]:
    file = formats.DESCRIPTION_OF.get(method)
    members = {"method": method, "filenames": [file] if file else []}
    return type("CheckpointQuantization", (CheckpointQuantization,), members)


def _made(method: str, config: Mapping[str, Any] | None) -> CheckpointQuantization:
    return _class_of(method)(config)


def register() -> None:
    """Make vLLM accept each format that is read here, whatever its own classes demand."""
    for method, names in NAMES.items():
        for name in names:
            register_quantization_config(name)(_class_of(method))


def checkpoint_format(vllm_config: VllmConfig, model: ModelConfig | None = None) -> formats.Format | None:
    """The format of a quantized model, None for a model in floats. Raises CheckpointError for what is not read here.

    `model` is another than the configuration's own: a draft.
    """
    model = model or vllm_config.model_config
    config = _quantization_config(model)
    described = [(file, content) for file in formats.DESCRIPTIONS if (content := _file(model, file)) is not None]
    if config is not None:
        if described:
            raise CheckpointError(
                f"{model.model} has both quantization_config in config.json and {described[0][0]}; remove the one "
                "that does not belong to the weights."
            )
        return formats.from_config(config, _option(vllm_config) == "int8")
    if len(described) > 1:
        raise CheckpointError(
            f"{model.model} has both {described[0][0]} and {described[1][0]}; remove the one that does not belong to "
            "the weights."
        )
    for file, content in described:
        return formats.DESCRIPTIONS[file](content)
    return None


def _quantization_config(model: ModelConfig) -> Mapping[str, Any] | None:
    text = getattr(model.hf_config, "text_config", None)
    for config, name in (
        (model.hf_config, "quantization_config"),
        (text, "quantization_config"),
        (model.hf_config, "compression_config"),
    ):
        found = getattr(config, name, None)
        if found is not None:
            return found
    return None


def _file(model: ModelConfig, name: str) -> Any:
    """The content of a JSON file of the model's folder or repository; None if it has no such file."""
    if not os.path.isdir(model.model):
        return get_hf_file_to_dict(name, model.model, model.revision)
    folder = Path(model.model)
    return read_json(folder, name) if os.path.lexists(folder / name) else None


def _option(vllm_config: VllmConfig) -> str:
    options = vllm_config.additional_config
    return options.get(FP8_OPTION, FP8_CHOICES[0]) if isinstance(options, dict) else FP8_CHOICES[0]


def option_problem(vllm_config: VllmConfig) -> str | None:
    """What is wrong with --additional-config, as a sentence."""
    options = vllm_config.additional_config
    if not options:
        return None
    known = {FP8_OPTION, suites.OPTION}
    if not isinstance(options, dict) or set(options) - known or _option(vllm_config) not in FP8_CHOICES:
        return (
            f"--additional-config {quote(options)} is not understood; it may hold {FP8_OPTION!r}, which is one of "
            f"{', '.join(FP8_CHOICES)} (what FP8 weights become), and {suites.OPTION!r}, which is one of "
            f"{', '.join((suites.NATIVE, *suites.SOURCES))}."
        )
    return None
