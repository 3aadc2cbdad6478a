"""Which models run as compiled graphs on Ascend (bridge/graph.py); the others run operator by operator."""

from vllm.config import VllmConfig

from vllm_ms_models import suites
from vllm_ms_models.bridge.refusals import INT8_CACHE

# Of their layers, all that a graph has to do is known to compile (tests/ascend/test_graph_models.py).
COMPILED = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}


def problem(vllm_config: VllmConfig) -> str | None:
    """Why a model is not compiled, without the full stop; None if it is."""
    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config.cache_dtype
    reasons = {
        "--enforce-eager": model.enforce_eager,
        f"graphs of {model.architecture} are not supported yet": model.architecture not in COMPILED,
        "graphs of quantized checkpoints are not supported yet": model.quantization is not None,
        "a model of a suite is not compiled": suites.source(vllm_config) != suites.NATIVE,
        "what embeds or classifies is not compiled yet": model.runner_type == "pooling",
        "adapters are not compiled yet": vllm_config.lora_config is not None,
        "--speculative-config": vllm_config.speculative_config is not None,
        "several ranks are not compiled yet": parallel.world_size_across_dp > 1,
        f"--kv-cache-dtype {cache}": cache == INT8_CACHE,
        "heads are not of a multiple of 16": model.get_head_size() % 16 != 0,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
