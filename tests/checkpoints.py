"""Small checkpoints with random weights, written by transformers itself.

Each differs from what transformers initialises in two ways, or a parity test would be blind: biases are not zero and
norm weights are not one; and the weights are large, so that logits are well apart and attention is far from uniform.
"""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

_CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "deepseek_v2": DeepseekV2Config,
    "deepseek_v3": DeepseekV3Config,
    "qwen2": Qwen2Config,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "mixtral": MixtralConfig,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
}

# A tiny decoder; 211 is odd and prime, and no token ends a generation.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

# What a tiny DeepSeek has besides.
DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "num_nextn_predict_layers": 0,
}


@functools.cache
def _root() -> Path:
    folder = tempfile.mkdtemp(prefix="vllm_ms_models_checkpoints_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def config(family: str, **options: Any) -> PreTrainedConfig:
    """The config of a tiny model; `options` go over the defaults."""
    from tests.zoo.family import families  # its modules import this one

    make = _CONFIGS[family] if family in _CONFIGS else families()[family].config
    return make(**(_DEFAULTS | options))


def random_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> torch.nn.Module:
    """A model with reproducible random weights: the same ones in each dtype, but for rounding."""
    return randomized(AutoModelForCausalLM.from_config(config(family, **options), dtype=torch.float32), seed).to(dtype)


def randomized(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """`model` with reproducible random weights, those of matrices as large as its config's `initializer_range` says."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(noise * 0.5 if name.endswith(".bias") else 1 + noise * 0.2)
            else:
                weight.copy_(noise * model.config.initializer_range)
        for name, bias in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # a DeepSeek router's, about as far apart as its scores
                bias.copy_(torch.randn(bias.shape, generator=generator) * 0.2)
    return model.eval()


def checkpoint(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Folder of a checkpoint of `random_model`, written once in this process and removed at its end.

    `family` is one of _CONFIGS, or of tests/zoo; `options` are those of its config. Sharded with `max_shard_size`.
    """
    return _write(family, seed, dtype, json.dumps(options, sort_keys=True))


@functools.cache
def _write(family: str, seed: int, dtype: torch.dtype, options: str) -> Path:
    settings = json.loads(options)
    shard = settings.pop("max_shard_size", "5GB")
    folder = Path(tempfile.mkdtemp(prefix=f"{family}_", dir=_root()))
    model = random_model(family, seed, dtype, **settings)
    # Modules of no size (no shared experts) are not in published checkpoints.
    tensors = {name: tensor for name, tensor in model.state_dict().items() if tensor.numel()}
    model.save_pretrained(folder, max_shard_size=shard, state_dict=tensors)
    return folder


def random_prompts(lengths: Sequence[int], vocab_size: int = _DEFAULTS["vocab_size"], seed: int = 0) -> list[list[int]]:
    """One prompt of random token ids for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]
