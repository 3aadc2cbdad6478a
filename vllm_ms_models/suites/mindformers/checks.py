"""What mindformers' networks cannot do, or leave out without a word: one sentence each. Imports no MindSpore."""

import os
from collections.abc import Iterator
from typing import Any

# Rope types that its networks know, by transformers' names, and what they read of a rope's entries.
ROPE_TYPES = ("default", "yarn")
ROPE_ENTRIES = {
    "beta_fast",
    "beta_slow",
    "factor",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_theta",
    "rope_type",
    "type",
}
LATENT_EPS = 1e-6  # of the norms within latent attention, whatever rms_norm_eps says
LATENT_RANK = 512
CPU_DTYPES = ("float32", "float16")


def rope_entries(hf_config: Any) -> dict[str, Any]:
    """Those of a configuration of transformers 5."""
    return dict(getattr(hf_config, "rope_parameters", None) or {})


def problems(architecture: str, hf_config: Any, dtype: str, device: str) -> Iterator[str]:
    """Sentences about a configuration that is served in `dtype` (float32 and so on) on `device` (cpu, ascend)."""
    mine = "leave out model_source"
    if device == "cpu" and dtype not in CPU_DTYPES:
        yield (
            f"mindformers multiplies matrices by MindSpore's MatMul, which has no {dtype} on a CPU; "
            f"add --dtype {CPU_DTYPES[0]}, or {mine}."
        )
    if device == "cpu" and os.environ.get("VLLM_BATCH_INVARIANT", "").strip().lower() in ("1", "true"):
        yield f"VLLM_BATCH_INVARIANT asks mindformers for operators of Ascend; unset it, or {mine}."
    if "sliding_attention" in (getattr(hf_config, "layer_types", None) or ()):
        yield f"{architecture} has layers with a sliding window, which mindformers would leave out; {mine}."
    if hf_config.hidden_act != "silu":
        yield f"{architecture} with hidden_act {hf_config.hidden_act!r} is not served from mindformers; {mine}."
    if getattr(hf_config, "mlp_only_layers", None) or getattr(hf_config, "decoder_sparse_step", 1) != 1:
        yield f"{architecture} with layers that have no experts is not served from mindformers; {mine}."
    if architecture == "DeepseekV3ForCausalLM":
        yield from _deepseek_problems(architecture, hf_config, mine)
        if device == "ascend" and hf_config.kv_lora_rank != LATENT_RANK:
            yield f"{architecture} has kv_lora_rank other than {LATENT_RANK}, the only one of mindformers; {mine}."
    groups, chosen = getattr(hf_config, "n_group", None) or 1, getattr(hf_config, "topk_group", None) or 1
    if device == "ascend" and groups > 1 and hf_config.num_experts_per_tok // chosen != 2:
        yield f"{architecture} ranks groups by other than two experts, which mindformers would not; {mine}."
    yield from _rope_problems(architecture, rope_entries(hf_config), mine)


def _deepseek_problems(architecture: str, hf_config: Any, mine: str) -> Iterator[str]:
    for entry, only in (("moe_layer_freq", 1), ("scoring_func", "sigmoid")):
        if (found := getattr(hf_config, entry, only)) not in (only, None):
            yield f"{architecture} with {entry} {found!r} is not served from mindformers ({only!r} is); {mine}."
    if hf_config.q_lora_rank is None:
        yield f"{architecture} without q_lora_rank is not served from mindformers; {mine}."
    if not getattr(hf_config, "rope_interleave", True):
        yield f"{architecture} with rope_interleave false is not served from mindformers; {mine}."
    if hf_config.rms_norm_eps != LATENT_EPS:
        yield (
            f"{architecture} has rms_norm_eps {hf_config.rms_norm_eps}, which mindformers would use within latent "
            f"attention too, instead of {LATENT_EPS}; {mine}."
        )


def _rope_problems(architecture: str, rope: dict[str, Any], mine: str) -> Iterator[str]:
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        yield f"{architecture} with rope type {kind!r} is not served from mindformers ({_or(ROPE_TYPES)} is); {mine}."
    elif kind != "default" and rope.get("factor") is None:
        yield f"{architecture} has rope type {kind!r} without a factor; add it to config.json, or {mine}."
    elif unknown := sorted(key for key in set(rope) - ROPE_ENTRIES if rope[key] is not None):
        yield f"{architecture} has rope entries that mindformers does not read ({', '.join(unknown)}); {mine}."
    elif rope.get("mscale", 1) != rope.get("mscale_all_dim", rope.get("mscale", 1)):
        yield f"{architecture} has mscale other than mscale_all_dim, which mindformers takes for the same; {mine}."


def _or(names: tuple[str, ...]) -> str:
    return " or ".join(names)
