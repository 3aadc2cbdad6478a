"""InternLM2: Llama by other names; one matrix has each KV head's queries, key and value."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from tests.zoo.family import Family
from tests.zoo.publishing import source_config, tensors_of, write

NAMES = {
    "model.embed_tokens.": "model.tok_embeddings.",
    "lm_head.": "output.",
    ".self_attn.o_proj.": ".attention.wo.",
    ".mlp.gate_proj.": ".feed_forward.w1.",
    ".mlp.up_proj.": ".feed_forward.w3.",
    ".mlp.down_proj.": ".feed_forward.w2.",
    ".input_layernorm.": ".attention_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
}
PARTS = ("q_proj", "k_proj", "v_proj")


def publish(source: Path, target: Path) -> None:
    config, tensors = source_config(source), tensors_of(source)
    published = {}
    for name, tensor in tensors.items():
        if ".self_attn.q_proj." in name:
            stem, _, end = name.partition(".self_attn.q_proj.")
            parts = [tensors[f"{stem}.self_attn.{part}.{end}"] for part in PARTS]
            published[f"{stem}.attention.wqkv.{end}"] = by_heads(parts, config["num_key_value_heads"])
        elif not any(f".self_attn.{part}." in name for part in PARTS):
            for ours, theirs in NAMES.items():
                name = name.replace(ours, theirs)
            published[name] = tensor
    write(target, published, "InternLM2ForCausalLM", "internlm2", entries(config))


def by_heads(parts: list[torch.Tensor], kv_heads: int) -> torch.Tensor:
    """Rows of all heads of a KV head, then those of the next; tensors may be weights, scales of rows, or biases."""
    rows = [part.reshape(kv_heads, -1, *part.shape[1:]) for part in parts]
    return torch.cat(rows, 1).flatten(0, 1).contiguous()


def entries(config: dict[str, Any]) -> dict[str, Any]:
    """What Llama's config says otherwise; a quantized checkpoint names the modules that it leaves alone."""
    found = {"bias": config["attention_bias"]}
    if "quantization_config" in config:
        ignored = ["output" if name == "lm_head" else name for name in config["quantization_config"]["ignore"]]
        found["quantization_config"] = config["quantization_config"] | {"ignore": ignored}
    return found


FAMILY = Family(
    ("InternLM2ForCausalLM",),
    LlamaConfig,
    {
        "grouped heads": {},
        "one KV head, biases": {"num_key_value_heads": 1, "attention_bias": True},
        "no groups, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    },
    publish,
)
