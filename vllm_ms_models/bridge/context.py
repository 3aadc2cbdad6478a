"""vLLM's configuration -> the `ModelContext` that layers are built with."""

from vllm.config import VllmConfig

from vllm_ms_models.bridge.tensors import DTYPES
from vllm_ms_models.layers.context import ModelContext


def model_context(vllm_config: VllmConfig) -> ModelContext:
    model_config = vllm_config.model_config
    return ModelContext(dtype=DTYPES[model_config.dtype], max_model_len=model_config.max_model_len)
