"""What the configs of DeepSeek-V2 and V3 leave unsaid, say in different ways, or ask for and do not get here."""

from typing import Any

from vllm_ms_models.layers.moe import Routing, group_limited, noaux_tc

# Attribute, the value that is supported (also if the config does not have it), and what another one would mean.
_FIXED = (
    ("moe_layer_freq", 1, "dense layers between those with experts"),
    ("mlp_bias", False, "biases in the feed-forward blocks"),
    ("is_causal", True, "attention in both directions"),
    ("ep_size", 1, "a checkpoint split by experts"),
)
_SCORES = {2: "softmax", 3: "sigmoid"}


def version(config: Any) -> int:
    """2 or 3; vLLM renames the model type of V3's draft layer."""
    return 2 if config.model_type == "deepseek_v2" else 3


def check(config: Any) -> None:
    """ValueError, naming the entry of config.json, for what is not implemented."""
    for name, supported, meaning in _FIXED:
        if (found := getattr(config, name, supported)) not in (supported, None):
            raise ValueError(f"{name}={found!r} in config.json ({meaning}) is not supported; {supported!r} is.")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if kv_heads not in (None, heads):
        raise ValueError(
            f"num_key_value_heads={kv_heads} in config.json is not supported: latent attention has as many as "
            f"num_attention_heads ({heads})."
        )
    scores = getattr(config, "scoring_func", None)
    if scores not in (None, _SCORES[version(config)]):
        raise ValueError(
            f"scoring_func={scores!r} in config.json is not supported for deepseek_v{version(config)}; "
            f"{_SCORES[version(config)]!r} is."
        )


def interleaved(config: Any) -> bool:
    """Whether features to rotate lie in pairs (2i, 2i + 1): always in V2, unless `rope_interleave` denies it in V3."""
    return version(config) == 2 or bool(getattr(config, "rope_interleave", True))


def has_experts(config: Any, layer: int) -> bool:
    return config.n_routed_experts is not None and layer >= (config.first_k_dense_replace or 0)


def shared_size(config: Any) -> int | None:
    """Intermediate size of the shared experts, which are one block; None without any."""
    return config.moe_intermediate_size * config.n_shared_experts if config.n_shared_experts else None


def has_correction_bias(config: Any) -> bool:
    return version(config) == 3


def routing(config: Any) -> Routing:
    """V3 has one method, without an auxiliary loss; V2 says which in `topk_method`. ValueError for others.

    V2's shares are multiplied by the factor or made to sum to 1, by `norm_topk_prob`; only the former was published,
    and transformers reads nothing else.
    """
    top_k, scale = config.num_experts_per_tok, config.routed_scaling_factor
    groups, top_groups = config.n_group or 1, config.topk_group or 1
    method = getattr(config, "topk_method", None)
    if version(config) == 3 and method in (None, "noaux_tc"):
        return noaux_tc(top_k, groups, top_groups, scale, config.norm_topk_prob)
    if version(config) == 2 and config.norm_topk_prob:
        raise ValueError("norm_topk_prob=true in config.json is not supported for deepseek_v2; false is.")
    if version(config) == 2 and method == "greedy":
        return group_limited(top_k, 1, 1, scale)
    if version(config) == 2 and method == "group_limited_greedy":
        return group_limited(top_k, groups, top_groups, scale)
    raise ValueError(
        f"topk_method={method!r} in config.json is not supported for deepseek_v{version(config)}; deepseek_v2 has "
        "greedy and group_limited_greedy, deepseek_v3 noaux_tc."
    )
