"""A safetensors checkpoint of Qwen2 or Llama as a GGUF of the same weights: bf16 matrices, f32 norms and biases.

    python write_gguf.py CHECKPOINT TARGET

It has no tokenizer: llama.cpp is given token ids.
"""

import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np


def tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and bf16 bits (uint16) of every tensor."""
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
        header.pop("__metadata__", None)
        bits = np.memmap(file, np.uint8, "r", offset=8 + size)
        for name, entry in header.items():
            if entry["dtype"] != "BF16":
                raise ValueError(f"{name} is {entry['dtype']}; only bf16 checkpoints are converted.")
            begin, end = entry["data_offsets"]
            yield name, bits[begin:end].view(np.uint16).reshape(entry["shape"])


def paired_rope(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a Llama query or key matrix in GGUF's order: rotated pairs side by side."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def llama3_factors(config: dict[str, Any], head_dim: int) -> np.ndarray:
    """What each rope frequency is divided by in Llama 3.1 and later."""
    rope = config.get("rope_parameters") or config["rope_scaling"]
    base = rope.get("rope_theta") or config["rope_theta"]
    lengths = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    old, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((old / lengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def describe(writer: gguf.GGUFWriter, config: dict[str, Any], head_dim: int) -> None:
    writer.add_name("benchmark")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(rope.get("rope_theta") or config["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")


def write(folder: Path, target: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    llama = config["model_type"] == "llama"
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    arch = gguf.MODEL_ARCH.LLAMA if llama else gguf.MODEL_ARCH.QWEN2
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    partial = target.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[arch])
    describe(writer, config, head_dim)
    if llama and (config.get("rope_parameters") or config.get("rope_scaling") or {}).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config, head_dim))
    for name, bits in tensors(folder):
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new_name is None:
            raise ValueError(f"{name} has no counterpart in a GGUF of {gguf.MODEL_ARCH_NAMES[arch]}.")
        if llama and name.endswith(("q_proj.weight", "k_proj.weight")):
            bits = paired_rope(bits, heads if "q_proj" in name else kv_heads)
        if bits.ndim == 1:
            writer.add_tensor(new_name, (bits.astype(np.uint32) << 16).view(np.float32))
        else:
            data = np.ascontiguousarray(bits).view(np.uint8)
            writer.add_tensor(new_name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, target)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
