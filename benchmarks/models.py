"""The models that are timed: exact shapes of published ones, with random bf16 weights made here, or these quantized.

`python -m benchmarks.models NAME` writes the checkpoint of one, with a tokenizer that knows one word a token. A name
such as `qwen2.5-0.5b-w8a8` is that shape quantized by `vllm-ms quantize`, as compressed-tensors.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHECKPOINTS = Path(__file__).with_name(".checkpoints")
ROOT = Path(__file__).parents[1]
SHARD_BYTES = 1 << 30
CORRECTION = "e_score_correction_bias"  # of DeepSeek-V3's routers, float32

_QWEN2: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        **_QWEN2,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
    },
    "qwen2.5-1.5b": {
        **_QWEN2,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
    },
    # Too slow here for every case; shows what quantization needs of memory.
    "qwen2.5-7b": {
        **_QWEN2,
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    # DeepSeek-V3's structure, attention sizes and routing, with fewer, smaller and thinner layers: 2.1 B parameters.
    "deepseek-v3-2b": {
        "model_type": "deepseek_v3",
        "hidden_act": "silu",
        "vocab_size": 32768,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 384,
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "topk_method": "noaux_tc",  # these two for vLLM, as the released config has them
        "scoring_func": "sigmoid",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    # For trying the benchmark itself: seconds instead of minutes.
    "tiny": {
        **_QWEN2,
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "max_window_layers": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}
# The trained model of examples/demo, whose answers are right or wrong.
DEMO = "demo"
DEMO_FOLDER = ROOT / "examples" / "demo"
CONFIGS[DEMO] = json.loads((DEMO_FOLDER / "checkpoint" / "config.json").read_text())

# Options of `vllm-ms quantize`.
SCHEMES: dict[str, list[str]] = {
    "w8a8": ["--scheme", "w8a8-dynamic"],
    "w8a8-head": ["--scheme", "w8a8-dynamic", "--lm-head"],
    "w8a8-static": ["--scheme", "w8a8-static", "--calibration", str(DEMO_FOLDER / "calibration.jsonl")],
    "w4a16": ["--scheme", "w4a16"],
}


def _schemes(shape: str) -> list[str]:
    """What `shape` is quantized to: `vllm-ms quantize` refuses experts, and only the demo can be calibrated."""
    if "n_routed_experts" in CONFIGS[shape]:
        return []
    return [scheme for scheme in SCHEMES if shape == DEMO or scheme != "w8a8-static"]


NAMES = [name for shape in CONFIGS for name in (shape, *(f"{shape}-{scheme}" for scheme in _schemes(shape)))]


def split(name: str) -> tuple[str, str | None]:
    """The name of the shape, and that of the scheme if it is quantized."""
    shape = max((shape for shape in CONFIGS if name.startswith(shape)), key=len)
    return shape, name.removeprefix(shape).removeprefix("-") or None


def checkpoint(name: str) -> Path:
    """The folder of `name`'s checkpoint, made if missing (in a process of its own: torch takes memory)."""
    if name == DEMO:
        return DEMO_FOLDER / "checkpoint"
    folder = CHECKPOINTS / name
    shape, scheme = split(name)
    source = json.dumps({"config": CONFIGS[shape], "scheme": scheme and SCHEMES[scheme]}, sort_keys=True)
    done = folder / "made_from.json"
    if not done.exists() or done.read_text() != source:
        if scheme is None:
            command = [sys.executable, "-m", "benchmarks.models", name]
        else:
            command = [str(Path(sys.executable).with_name("vllm-ms")), "quantize", str(checkpoint(shape)), str(folder)]
            command += SCHEMES[scheme]
        print(f"making the checkpoint of {name}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run(command, cwd=ROOT, check=True)
        done.write_text(source)
    return folder


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer of the words t0, t1, ...: what HTTP clients that send text need."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{token}": token for token in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", eos_token="t1").save_pretrained(folder)


def _released(model: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a checkpoint's tensors: tied ones once, experts one by one (transformers stacks them)."""
    stored = [*model.named_parameters(), *((name, b) for name, b in model.named_buffers() if name.endswith(CORRECTION))]
    for name, tensor in stored:
        if tensor.ndim < 3:
            yield name, tuple(tensor.shape)
            continue
        experts, rows, columns = tensor.shape
        block, _, matrix = name.rpartition(".")
        for expert in range(experts):
            if matrix == "gate_up_proj":
                yield f"{block}.{expert}.gate_proj.weight", (rows // 2, columns)
                yield f"{block}.{expert}.up_proj.weight", (rows // 2, columns)
            else:
                yield f"{block}.{expert}.{matrix}.weight", (rows, columns)


def write(name: str) -> None:
    """Make the checkpoint of `name`: values as transformers initialises them, seed 0, bf16, one shard at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(CONFIGS[name])
    config = AutoConfig.for_model(values.pop("model_type"), dtype="bfloat16", **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder = CHECKPOINTS / name
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, Any] = {}
    weight_map: dict[str, str] = {}

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for part, shape in _released(model):
        if len(shape) == 1:
            shard[part] = torch.zeros(shape) if part.endswith("bias") else torch.ones(shape)
        else:
            shard[part] = torch.empty(shape).normal_(0, config.initializer_range, generator=generator)
        if not part.endswith(CORRECTION):
            shard[part] = shard[part].to(torch.bfloat16)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)


if __name__ == "__main__":
    write(sys.argv[1])
