"""Which models run as compiled graphs on Ascend (bridge/graph.py); the others run operator by operator."""

from vllm.config import VllmConfig

from vllm_ms_models import suites
from vllm_ms_models.bridge.refusals import INT8_CACHE

# Of their layers, all that a graph has to do is known to compile (tests/ascend/test_graph_models.py). Of those that
# read images it is the decoder.
COMPILED = {
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GemmaForCausalLM",
    "Glm4ForCausalLM",
    "Glm4MoeForCausalLM",
    "GlmForCausalLM",
    "GraniteForCausalLM",
    "InternLM2ForCausalLM",
    "InternLM3ForCausalLM",
    "LlamaForCausalLM",
    "LlavaForConditionalGeneration",
    "MiniCPMForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "OPTForCausalLM",
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
}


def problem(vllm_config: VllmConfig) -> str | None:
    """Why a model is not compiled, without the full stop; None if it is."""
    model, cache = vllm_config.model_config, vllm_config.cache_config.cache_dtype
    name, text = model.architecture, model.hf_text_config
    if name == "LlavaForConditionalGeneration":  # any decoder's, whose text_config need not name it (llava/model.py)
        name = (getattr(text, "architectures", None) or [name])[0]
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    reasons = {
        "--enforce-eager": model.enforce_eager,
        f"graphs of {name} are not supported yet": name not in COMPILED,
        "attention with soft caps is no fused operator": capped,
        "a model of a suite is not compiled": suites.source(vllm_config) != suites.NATIVE,
        "what embeds or classifies is not compiled yet": model.runner_type == "pooling",
        "adapters are not compiled yet": vllm_config.lora_config is not None,
        "--speculative-config": vllm_config.speculative_config is not None,
        f"--kv-cache-dtype {cache}": cache == INT8_CACHE,
        "heads are not of a multiple of 16": model.get_head_size() % 16 != 0,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
