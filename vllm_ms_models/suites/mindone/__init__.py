"""MindSpore One (mindone) as a source of models: its modelling code round our linears, embeddings and paged attention.

What its package is asked for, and how it is reached beside vLLM's transformers, is in the modules of this folder; this
one imports neither mindone nor MindSpore.
"""

from collections.abc import Collection
from typing import Any

from vllm_ms_models import suites

VERSIONS = ("0.5.0",)
TENSOR_PARALLEL = False

# Architecture -> the module of mindone that has it.
MODELS = {
    "LlamaForCausalLM": "mindone.transformers.models.llama.modeling_llama",
    "Qwen2ForCausalLM": "mindone.transformers.models.qwen2.modeling_qwen2",
    "Qwen3ForCausalLM": "mindone.transformers.models.qwen3.modeling_qwen3",
}


def check() -> None:
    """SuiteError unless a version of mindone that works here is installed."""
    suites.require("mindone", "mindone", VERSIONS)


def architectures() -> Collection[str]:
    return MODELS


def build(architecture: str, hf_config: Any, context: Any) -> Any:
    """The Cell of `architecture`, as `bridge/model.py` wants it."""
    from vllm_ms_models.suites.mindone.model import MindOneModel

    return MindOneModel(architecture, hf_config, context)
