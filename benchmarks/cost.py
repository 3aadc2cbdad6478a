"""What a step must move and compute at least, from a model's config; and the time that takes at the machine's limits.

Bytes are those of weights, their scales and the KV cache that must be read from memory (activations and writes are left
out); a multiply-add counts as two operations, of int8 or of floats. All are lower bounds, so that "of limit" never
flatters.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH = 2  # bytes of a bf16 number


@dataclass(frozen=True)
class Cost:
    """Bytes read, operations on floats and on int8 done, at least."""

    bytes: float
    flops: float
    int8_ops: float = 0.0

    def seconds(self, limits: Mapping[str, float]) -> float:
        """Least time at `limits`: read_gb_s; bf16_gflop_s and int8_gop_s, or f32_gflop_s without such instructions."""
        floats = limits["bf16_gflop_s"] or limits["f32_gflop_s"]
        integers = limits.get("int8_gop_s") or limits["f32_gflop_s"]
        computing = self.flops / floats + self.int8_ops / integers if floats else 0.0
        return max(self.bytes / limits["read_gb_s"], computing) / 1e9


@dataclass(frozen=True)
class Storage:
    """How a matrix is kept and multiplied: bits of a weight, inputs that share a scale (0: a row's), and with what."""

    bits: int = 16
    group: int = 0
    scale_bytes: int = 0
    int8: bool = False

    def bytes(self, rows: float, columns: float) -> float:
        scales = columns / self.group if self.group else 1
        return rows * (columns * self.bits / 8 + scales * self.scale_bytes)


FLOATS, W8A8, W4A16 = Storage(), Storage(8, 0, 4, True), Storage(4, 128, 2)
# Of the layers' matrices, and of the head.
SCHEMES = {
    None: (FLOATS, FLOATS),
    "w8a8": (W8A8, FLOATS),
    "w8a8-static": (W8A8, FLOATS),
    "w8a8-head": (W8A8, W8A8),
    "w4a16": (W4A16, FLOATS),
}


class Decoder(ABC):
    """What decoding and prefill cost, given the cost of a step."""

    @property
    @abstractmethod
    def weight_bytes(self) -> float:
        """Bytes of all weights with their scales."""

    @abstractmethod
    def _step(self, rows: int, sampled: int, cached: float, pairs: float) -> Cost:
        """`rows` go through the layers, `sampled` of them through the head; `cached` positions are read.

        `pairs` of a query and a key are multiplied in each layer.
        """

    def decode_step(self, contexts: Sequence[float]) -> Cost:
        """One token for each sequence, attending to `contexts` positions (its own one among them)."""
        batch, total = len(contexts), sum(contexts)
        return self._step(batch, batch, total - batch, total)

    def prefill(self, prompt: int) -> Cost:
        """A prompt of `prompt` tokens from nothing, up to its first token: causal attention, one sampled row."""
        return self._step(prompt, 1, 0, prompt * (prompt + 1) / 2)


@dataclass(frozen=True)
class Shape(Decoder):
    """The sizes that matter of a dense decoder with gated MLP and grouped-query attention."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    qkv_bias: bool
    tied: bool
    storage: Storage = FLOATS
    head_storage: Storage = FLOATS

    @classmethod
    def of(cls, config: Mapping[str, Any], scheme: str | None = None) -> "Shape":
        """From a config.json of Qwen2 or Llama; `scheme` is one of SCHEMES."""
        storage, head_storage = SCHEMES[scheme]
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            heads=heads,
            kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab=config["vocab_size"],
            qkv_bias=config["model_type"] == "qwen2",
            tied=config["tie_word_embeddings"] and head_storage == FLOATS,
            storage=storage,
            head_storage=head_storage,
        )

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of one layer's: fused q, k and v, o, fused gate and up, down."""
        heads, all_heads = self.heads * self.head_dim, (self.heads + 2 * self.kv_heads) * self.head_dim
        mlp = [(2 * self.intermediate, self.hidden), (self.hidden, self.intermediate)]
        return [(all_heads, self.hidden), (self.hidden, heads), *mlp]

    @property
    def layer_matrices(self) -> int:
        """Parameters of all layers' matrices."""
        return self.layers * sum(rows * columns for rows, columns in self.matrices)

    @property
    def layer_bytes(self) -> float:
        """Bytes of all layers' matrices with their scales."""
        return self.layers * sum(self.storage.bytes(rows, columns) for rows, columns in self.matrices)

    @property
    def head_bytes(self) -> float:
        return self.head_storage.bytes(self.vocab, self.hidden)

    @property
    def vectors(self) -> int:
        """Parameters of norms and biases."""
        bias = (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        return self.layers * (2 * self.hidden + bias) + self.hidden

    @property
    def head(self) -> int:
        """Parameters of the language-model head (the embedding, when they are tied)."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        return self.layer_matrices + self.vectors + self.head * (1 if self.tied else 2)

    @property
    def weight_bytes(self) -> float:
        embedding = 0 if self.tied else self.head
        return self.layer_bytes + self.head_bytes + WIDTH * (self.vectors + embedding)

    @property
    def kv_bytes_per_token(self) -> int:
        return WIDTH * 2 * self.layers * self.kv_heads * self.head_dim

    def _attention_flops(self, pairs: float) -> float:
        """Scores and weighted sums of `pairs` of a query and a key, in every layer."""
        return 4.0 * pairs * self.heads * self.head_dim * self.layers

    def _step(self, rows: int, sampled: int, cached: float, pairs: float) -> Cost:
        own_rows = 0 if self.tied else rows * self.hidden  # of the embedding
        read = self.layer_bytes + self.head_bytes + WIDTH * (self.vectors + own_rows) + cached * self.kv_bytes_per_token
        flops, int8_ops = self._attention_flops(pairs), 0.0
        for count, parameters, storage in (
            (rows, self.layer_matrices, self.storage),
            (sampled, self.head, self.head_storage),
        ):
            if storage.int8:
                int8_ops += 2.0 * count * parameters
            else:
                flops += 2.0 * count * parameters
        return Cost(read, flops, int8_ops)
