"""InternLM3: Llama with a config that transformers does not have."""

from pathlib import Path

from transformers import LlamaConfig

from tests.zoo.family import Family
from tests.zoo.publishing import source_config, tensors_of, write


def publish(source: Path, target: Path) -> None:
    config = source_config(source)
    entries = {"qkv_bias": config["attention_bias"], "bias": config["mlp_bias"]}
    write(target, tensors_of(source), "InternLM3ForCausalLM", "internlm3", entries)


FAMILY = Family(
    ("InternLM3ForCausalLM",),
    LlamaConfig,
    {
        "wide heads": {"head_dim": 32},
        "all biases": {"attention_bias": True, "mlp_bias": True},
        "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    },
    publish,
    alike=True,
)
