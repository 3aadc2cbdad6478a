"""MindSpore One (mindone) as a source of models: its modelling code round our linears, embeddings and paged attention.

What its package is asked for, and how it is reached beside vLLM's transformers, is in the modules of this folder; this
one imports neither mindone nor MindSpore.
"""

from collections.abc import Collection
from typing import Any

from vllm_ms_models import suites
from vllm_ms_models.suites.mindone import config

VERSIONS = ("0.5.0",)
TENSOR_PARALLEL = True  # where transformers has a plan for it

# Architecture -> the module of mindone that has it.
MODELS = {
    "ArceeForCausalLM": "mindone.transformers.models.arcee.modeling_arcee",
    "Ernie4_5ForCausalLM": "mindone.transformers.models.ernie4_5.modeling_ernie4_5",
    "Exaone4ForCausalLM": "mindone.transformers.models.exaone4.modeling_exaone4",
    "Gemma2ForCausalLM": "mindone.transformers.models.gemma2.modeling_gemma2",
    "GemmaForCausalLM": "mindone.transformers.models.gemma.modeling_gemma",
    "Glm4ForCausalLM": "mindone.transformers.models.glm4.modeling_glm4",
    "GlmForCausalLM": "mindone.transformers.models.glm.modeling_glm",
    "GraniteForCausalLM": "mindone.transformers.models.granite.modeling_granite",
    "HeliumForCausalLM": "mindone.transformers.models.helium.modeling_helium",
    "HunYuanDenseV1ForCausalLM": "mindone.transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense",
    "LlamaForCausalLM": "mindone.transformers.models.llama.modeling_llama",
    "MistralForCausalLM": "mindone.transformers.models.mistral.modeling_mistral",
    "MixtralForCausalLM": "mindone.transformers.models.mixtral.modeling_mixtral",
    "Olmo2ForCausalLM": "mindone.transformers.models.olmo2.modeling_olmo2",
    "OlmoForCausalLM": "mindone.transformers.models.olmo.modeling_olmo",
    "Phi3ForCausalLM": "mindone.transformers.models.phi3.modeling_phi3",
    "Qwen2ForCausalLM": "mindone.transformers.models.qwen2.modeling_qwen2",
    "Qwen3ForCausalLM": "mindone.transformers.models.qwen3.modeling_qwen3",
    "Qwen3MoeForCausalLM": "mindone.transformers.models.qwen3_moe.modeling_qwen3_moe",
    "SeedOssForCausalLM": "mindone.transformers.models.seed_oss.modeling_seed_oss",
    "SmolLM3ForCausalLM": "mindone.transformers.models.smollm3.modeling_smollm3",
    "Starcoder2ForCausalLM": "mindone.transformers.models.starcoder2.modeling_starcoder2",
}


def check() -> None:
    """SuiteError unless a version of mindone that works here is installed."""
    suites.require("mindone", "mindone", VERSIONS)


def architectures() -> Collection[str]:
    return MODELS


def check_model(architecture: str, hf_config: Any, dtype: str, ranks: int) -> None:
    """SuiteError for a model that cannot be built for so many tensor-parallel ranks."""
    config.check(architecture, hf_config, ranks)


def build(architecture: str, hf_config: Any, context: Any) -> Any:
    """The Cell of `architecture`, as `bridge/model.py` wants it."""
    from vllm_ms_models.suites.mindone.model import MindOneModel

    return MindOneModel(architecture, hf_config, context)
