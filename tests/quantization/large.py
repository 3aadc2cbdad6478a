"""A checkpoint of DeepSeek-V3's structure with billions of random weights, written as its publishers write theirs.

A tensor's bytes are cut from one pool of random ones, at a new place for each, and go to disk at
once. Neither writing nor reading a weight here needs the package under test.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from transformers import DeepseekV3Config

from tests.checkpoint.checkpoint_files import save_index
from tests.quantization.writers import Multiply, of_floats, of_rounded_tokens
from tests.quantization.writers_compressed import SCHEMES

BLOCK = 128
SHARD_BYTES = 400 << 20
WEIGHT = 0.02  # standard deviation
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I8": np.dtype(np.int8),
}
# Deviations of random bits that are numbers: e4m3 from -448 to 448, and int8.
DEVIATION = {"F8_E4M3": 100.0, "I8": 74.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "F8_E4M3": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    },
    "I8": dict(SCHEMES["w8a8 dynamic"].config or {}),
}


@dataclass(frozen=True)
class Entry:
    """A tensor; `weight`: of a linear that is quantized."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    weight: bool = False

    @property
    def count(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * DTYPES[self.dtype].itemsize


def linears(config: DeepseekV3Config, layer: int) -> dict[str, tuple[int, int]]:
    """The linears of a layer that are quantized, without its prefix: `[out, in]`."""
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    shapes = {
        "self_attn.q_a_proj": (config.q_lora_rank, hidden),
        "self_attn.q_b_proj": (heads * (nope + rope), config.q_lora_rank),
        "self_attn.kv_a_proj_with_mqa": (rank + rope, hidden),
        "self_attn.kv_b_proj": (heads * (nope + value), rank),
        "self_attn.o_proj": (hidden, heads * value),
    }
    blocks = {"mlp": config.intermediate_size}
    if layer >= config.first_k_dense_replace:
        blocks = {f"mlp.experts.{expert}": config.moe_intermediate_size for expert in range(config.n_routed_experts)}
        blocks["mlp.shared_experts"] = config.moe_intermediate_size * config.n_shared_experts
    for block, size in blocks.items():
        shapes |= {f"{block}.{name}": (size, hidden) for name in ("gate_proj", "up_proj")}
        shapes[f"{block}.down_proj"] = (hidden, size)
    return shapes


def entries(config: DeepseekV3Config, dtype: str) -> Iterator[Entry]:
    """Everything in the checkpoint, in order; linears are of `dtype`."""
    hidden = config.hidden_size
    yield Entry("model.embed_tokens.weight", "BF16", (config.vocab_size, hidden))
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        norms = {"input": hidden, "post_attention": hidden, "self_attn.q_a_": config.q_lora_rank}
        norms["self_attn.kv_a_"] = config.kv_lora_rank
        for norm, size in norms.items():
            name = f"{norm}layernorm" if norm.endswith("_") else f"{norm}_layernorm"
            yield Entry(f"{prefix}.{name}.weight", "BF16", (size,))
        for name, shape in linears(config, layer).items():
            yield Entry(f"{prefix}.{name}.weight", dtype, shape, True)
            if dtype == "F8_E4M3":
                blocks = (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))
                yield Entry(f"{prefix}.{name}.weight_scale_inv", "F32", blocks)
            else:
                yield Entry(f"{prefix}.{name}.weight_scale", "BF16", (shape[0], 1))
        if layer >= config.first_k_dense_replace:
            yield Entry(f"{prefix}.mlp.gate.weight", "BF16", (config.n_routed_experts, hidden))
            yield Entry(f"{prefix}.mlp.gate.e_score_correction_bias", "F32", (config.n_routed_experts,))
    yield Entry("model.norm.weight", "BF16", (hidden,))
    yield Entry("lm_head.weight", "BF16", (config.vocab_size, hidden))


class Pool:
    """Random bytes for tensors."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        bits = self.rng.integers(0, 256, (1 << 24) + 3, np.uint8)
        self.bytes = {"I8": bits, "F8_E4M3": np.where(bits & 0x7F == 0x7F, bits - 1, bits)}  # 0x7F and 0xFF: no numbers
        noise = self.rng.standard_normal((1 << 23) + 3, np.float32) * WEIGHT
        self.bytes["BF16"] = noise.astype(ml_dtypes.bfloat16).view(np.uint8)
        self.start = 0

    def write(self, entry: Entry, weights: str, file: Any) -> None:
        if "scale" in entry.name:
            scales = self.rng.uniform(0.5, 1.5, entry.shape) * (WEIGHT / DEVIATION[weights])
            file.write(scales.astype(DTYPES[entry.dtype]).tobytes())
        elif len(entry.shape) == 1:  # norms, and what is added to the scores of experts
            base, spread = (0.0, 0.1) if entry.name.endswith("bias") else (1.0, 0.2)
            values = base + spread * self.rng.standard_normal(entry.shape)
            file.write(values.astype(DTYPES[entry.dtype]).tobytes())
        else:
            self._cut(self.bytes[entry.dtype], entry.nbytes, file)

    def _cut(self, pool: np.ndarray, left: int, file: Any) -> None:
        while left:
            part = pool[self.start : self.start + left]
            file.write(part.data)
            left -= len(part)
            self.start = (self.start + len(part)) % len(pool) // 2 * 2  # even: whole bfloat16


@dataclass(frozen=True)
class Large:
    """A checkpoint on disk: what its linears are, and how many values it has, of which `weights` in them."""

    folder: Path
    config: DeepseekV3Config
    dtype: str
    where: dict[str, str]
    values: int
    weights: int
    absorbed: int
    """Of `weights`, those of kv_b_proj."""


def write(folder: Path, config: DeepseekV3Config, dtype: str) -> Large:
    """All tensors in shards of about SHARD_BYTES, their index and config.json; linears of `dtype`."""
    shards: list[list[Entry]] = [[]]
    for entry in entries(config, dtype):
        if sum(other.nbytes for other in shards[-1]) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(entry)
    pool = Pool()
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        header, end = {}, 0
        for entry in shard:
            offsets = [end, end := end + entry.nbytes]
            header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
        raw = json.dumps(header).encode()
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with open(folder / name, "wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            for entry in shard:
                pool.write(entry, dtype, file)
        where |= dict.fromkeys(header, name)
    save_index(folder, where)
    content = config.to_dict() | {"architectures": ["DeepseekV3ForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(content | {"quantization_config": CONFIGS[dtype]}))
    every = [entry for shard in shards for entry in shard]
    weights = sum(entry.count for entry in every if entry.weight)
    values = weights + sum(entry.count for entry in every if not entry.weight and "scale" not in entry.name)
    absorbed = sum(entry.count for entry in every if entry.name.endswith("kv_b_proj.weight"))
    return Large(folder, config, dtype, where, values, weights, absorbed)


class Tensors:
    """A large checkpoint's tensors, read one by one."""

    def __init__(self, large: Large) -> None:
        self.large = large
        self.headers: dict[str, dict[str, Any]] = {}
        self.starts: dict[str, int] = {}
        for name in dict.fromkeys(large.where.values()):
            with open(large.folder / name, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                self.headers[name] = json.loads(file.read(length))
                self.starts[name] = 8 + length

    def read(self, name: str) -> np.ndarray:
        file = self.large.where[name]
        entry = self.headers[file][name]
        dtype, begin = DTYPES[entry["dtype"]], self.starts[file] + entry["data_offsets"][0]
        values = np.fromfile(self.large.folder / file, dtype, prod(entry["shape"]), offset=begin)
        return values.reshape(entry["shape"])

    def matrix(self, name: str) -> np.ndarray:
        """A linear's weight dequantized to float32, by the format's definition."""
        values = self.read(f"{name}.weight").astype(np.float32)
        if self.large.dtype == "I8":
            return values * self.read(f"{name}.weight_scale").astype(np.float32)
        scales = self.read(f"{name}.weight_scale_inv")
        rows, columns = values.shape
        return values * scales.repeat(BLOCK, 0)[:rows].repeat(BLOCK, 1)[:, :columns]

    def multiply(self, name: str) -> Multiply:
        """What int8 weights and int8 activations give; FP8 is rounded to int8 rows. kv_b_proj is absorbed in floats."""
        if name.endswith("kv_b_proj"):
            if self.large.dtype == "I8":
                return of_floats(self.matrix(name).astype(np.float64), None)
            integers, scales = _as_int8(self.matrix(name))
            return of_floats(integers * scales.astype(np.float64), None)
        if self.large.dtype == "I8":
            integers, scales = self.read(f"{name}.weight"), self.read(f"{name}.weight_scale").astype(np.float32)
        else:
            integers, scales = _as_int8(self.matrix(name))
        return of_rounded_tokens(integers.astype(np.float64), scales.astype(np.float64), None)  # exact up to 2**53


def _as_int8(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    steps = np.abs(matrix).max(1, keepdims=True) / np.float32(127)
    return np.rint(matrix / steps), steps
