"""vLLM's configuration -> the `ModelContext` that layers are built with."""

from collections.abc import Sequence

from vllm.config import ModelConfig, VllmConfig

from vllm_ms_models.bridge.data_parallel import data_parallel_ranks
from vllm_ms_models.bridge.quantization import checkpoint_format
from vllm_ms_models.bridge.ranks import pipeline_stage, tensor_parallel_group
from vllm_ms_models.bridge.tensors import DTYPES
from vllm_ms_models.checkpoint.names import PREFIX
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.quantization.base import Quantization, Unquantized
from vllm_ms_models.quantization.formats.common import Renamed
from vllm_ms_models.quantization.schemes import FromCheckpoint


def unnamed_prefix(model_config: ModelConfig) -> str:
    """What the modules of this model have before the names that its checkpoint's description has for them."""
    # A decoder saved without a head calls its modules and tensors so (checkpoint/names.py).
    return PREFIX if model_config.architectures[0].endswith("Model") else ""


def model_context(
    vllm_config: VllmConfig, model_config: ModelConfig, renamed: Sequence[tuple[str, str]] = ()
) -> ModelContext:
    """For `model_config`, which is that of `vllm_config` or of its draft; `renamed` is the Cell's (`MultimodalLM`)."""
    format = checkpoint_format(vllm_config, model_config)
    if format is not None and renamed:
        format = Renamed(format, renamed)
    prefix = unnamed_prefix(model_config)
    quantization: Quantization = Unquantized() if format is None else FromCheckpoint(format, prefix)
    return ModelContext(
        dtype=DTYPES[model_config.dtype],
        max_model_len=model_config.max_model_len,
        tensor_parallel=tensor_parallel_group(vllm_config.parallel_config),
        quantization=quantization,
        data_parallel=data_parallel_ranks(vllm_config),
        expert_parallel=vllm_config.parallel_config.enable_expert_parallel,
        pipeline=pipeline_stage(vllm_config.parallel_config, model_config.hf_text_config.num_hidden_layers),
        head=model_config.runner_type != "pooling",
    )
