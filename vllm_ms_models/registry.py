"""Which architecture is implemented where.

Nothing is imported until an architecture is used: vLLM's processes ask for names far more often than for models.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import TypeVar

Model = TypeVar("Model", bound=type)

ENTRY_POINT_GROUP = "vllm_ms_models.models"

# Architecture (config.json's "architectures") -> the module whose import registers it.
BUILT_IN = {
    "BertForSequenceClassification": "vllm_ms_models.bert.model",
    "BertForTokenClassification": "vllm_ms_models.bert.model",
    "BertModel": "vllm_ms_models.bert.model",
    "DeepseekV2ForCausalLM": "vllm_ms_models.deepseek_v3.model",
    "DeepseekV3ForCausalLM": "vllm_ms_models.deepseek_v3.model",
    "Gemma2ForCausalLM": "vllm_ms_models.gemma2.model",
    "Gemma3ForCausalLM": "vllm_ms_models.gemma3.model",
    "GemmaForCausalLM": "vllm_ms_models.gemma2.model",
    "Glm4ForCausalLM": "vllm_ms_models.glm4.model",
    "Glm4MoeForCausalLM": "vllm_ms_models.glm4_moe.model",
    "GlmForCausalLM": "vllm_ms_models.glm4.model",
    "GptOssForCausalLM": "vllm_ms_models.gpt_oss.model",
    "GraniteForCausalLM": "vllm_ms_models.granite.model",
    "InternLM2ForCausalLM": "vllm_ms_models.internlm2.model",
    "InternLM3ForCausalLM": "vllm_ms_models.internlm3.model",
    "LlamaForCausalLM": "vllm_ms_models.llama.model",
    "LlavaForConditionalGeneration": "vllm_ms_models.llava.model",
    "MiniCPMForCausalLM": "vllm_ms_models.minicpm.model",
    "MistralForCausalLM": "vllm_ms_models.llama.model",
    "MixtralForCausalLM": "vllm_ms_models.mixtral.model",
    "OPTForCausalLM": "vllm_ms_models.opt.model",
    "Olmo2ForCausalLM": "vllm_ms_models.olmo2.model",
    "Olmo3ForCausalLM": "vllm_ms_models.olmo2.model",
    "Phi3ForCausalLM": "vllm_ms_models.phi3.model",
    "Qwen2ForCausalLM": "vllm_ms_models.qwen2.model",
    "Qwen2_5_VLForConditionalGeneration": "vllm_ms_models.qwen2_5_vl.model",
    "Qwen3ForCausalLM": "vllm_ms_models.qwen3.model",
    "Qwen3MoeForCausalLM": "vllm_ms_models.qwen3_moe.model",
    "RobertaForSequenceClassification": "vllm_ms_models.roberta.model",
    "RobertaForTokenClassification": "vllm_ms_models.roberta.model",
    "RobertaModel": "vllm_ms_models.roberta.model",
    "XLMRobertaForSequenceClassification": "vllm_ms_models.roberta.model",
    "XLMRobertaForTokenClassification": "vllm_ms_models.roberta.model",
    "XLMRobertaModel": "vllm_ms_models.roberta.model",
}

# Model types (config.json's "model_type") that transformers has no config for -> the class that is one. Checkpoints
# bring theirs as code, which never runs.
CONFIGS = {
    "internlm2": "vllm_ms_models.internlm2.config:InternLM2Config",
    "internlm3": "vllm_ms_models.internlm3.config:InternLM3Config",
    "minicpm": "vllm_ms_models.minicpm.config:MiniCPMConfig",
}

# Those of BUILT_IN that embed or classify and generate no text.
ENCODERS: frozenset[str] = frozenset(
    family + end
    for family in ("Bert", "Roberta", "XLMRoberta")
    for end in ("Model", "ForSequenceClassification", "ForTokenClassification")
)

# Those of BUILT_IN that read images or video besides text.
MULTIMODAL = frozenset({"LlavaForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"})

# The same for layers that propose tokens to a model and cannot be served by themselves. The names are vLLM's.
DRAFTS = {"DeepSeekMTPModel": "vllm_ms_models.deepseek_v3.mtp"}

# Ends of the names of architectures that vLLM makes of one for text generation: what embeds or classifies.
CONVERTED = ("ForSequenceClassification", "ForTokenClassification", "Model")

_classes: dict[str, type] = {}


class UnsupportedArchitectureError(ValueError):
    """No model of that architecture is known."""


def register_model(*architectures: str) -> Callable[[Model], Model]:
    """Class decorator: this Cell implements `architectures`.

    A package outside this one also names the class in an entry point, so that it is found without being imported:

        [project.entry-points."vllm_ms_models.models"]
        MyForCausalLM = "my_package.model:MyForCausalLM"
    """

    def register(cls: Model) -> Model:
        for architecture in architectures:
            known = _classes.setdefault(architecture, cls)
            if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(
                    f"Architecture {architecture} is registered twice: by {known.__module__}.{known.__qualname__} "
                    f"and by {cls.__module__}.{cls.__qualname__}; uninstall or rename one of them."
                )
        return cls

    return register


def _third_party() -> dict[str, str]:
    """Architecture -> module, from the entry points of installed packages."""
    return {point.name: point.module for point in entry_points(group=ENTRY_POINT_GROUP)}


def architectures() -> list[str]:
    """Every architecture that can be served, sorted; imports no model."""
    return sorted({*BUILT_IN, *_third_party(), *_classes} - {*DRAFTS})


def unconverted(architecture: str) -> str:
    """The architecture for text generation whose decoder `architecture` has, which may be itself."""
    for end in CONVERTED:
        if architecture not in architectures() and architecture.endswith(end):
            return architecture.removesuffix(end) + "ForCausalLM"
    return architecture


def check(architecture: str) -> None:
    """Raise UnsupportedArchitectureError, listing the supported ones, unless `architecture` is known."""
    known = architectures()
    if architecture not in known:
        raise UnsupportedArchitectureError(
            f"Architecture {architecture} has no MindSpore implementation here; supported are {', '.join(known)}. "
            f"Another package can add one through the entry-point group {ENTRY_POINT_GROUP}."
        )


def lookup(architecture: str) -> type:
    """The Cell class of `architecture`, which may be a draft's, importing its module if need be."""
    if architecture not in DRAFTS:
        check(architecture)
    if architecture not in _classes:
        module = (BUILT_IN | DRAFTS).get(architecture) or _third_party()[architecture]
        import_module(module)
        if architecture not in _classes:
            raise UnsupportedArchitectureError(
                f"{module} is named for {architecture} but registers no class for it: "
                f'decorate the class with @register_model("{architecture}").'
            )
    return _classes[architecture]
