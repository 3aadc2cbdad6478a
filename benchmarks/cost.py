"""What a step must move and compute at least, from a model's config; and the time that takes at the machine's limits.

Bytes are those of bf16 weights and KV cache that must be read from memory (activations and writes are left out);
a multiply-add counts as two operations. Both are lower bounds, so that "of limit" never flatters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH = 2  # bytes of a bf16 number


@dataclass(frozen=True)
class Cost:
    """Bytes read and floating-point operations done, at least."""

    bytes: float
    flops: float

    def seconds(self, limits: Mapping[str, float]) -> float:
        """Least time at `limits` (read_gb_s; bf16_gflop_s, or f32_gflop_s where there are no bf16 instructions)."""
        peak = limits["bf16_gflop_s"] or limits["f32_gflop_s"]
        return max(self.bytes / (limits["read_gb_s"] * 1e9), self.flops / (peak * 1e9) if peak else 0.0)


@dataclass(frozen=True)
class Shape:
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

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Shape":
        """From a config.json of Qwen2 or Llama."""
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
            tied=config["tie_word_embeddings"],
        )

    @property
    def layer_matrices(self) -> int:
        """Parameters of all layers' matrices."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

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
    def weight_bytes(self) -> int:
        return WIDTH * self.parameters

    @property
    def kv_bytes_per_token(self) -> int:
        return WIDTH * 2 * self.layers * self.kv_heads * self.head_dim

    def _attention_flops(self, pairs: float) -> float:
        """Scores and weighted sums of `pairs` of a query and a key, in every layer."""
        return 4.0 * pairs * self.heads * self.head_dim * self.layers

    def decode_step(self, contexts: Sequence[float]) -> Cost:
        """One token for each sequence, attending to `contexts` positions (its own one among them)."""
        batch, total = len(contexts), sum(contexts)
        weights = self.layer_matrices + self.vectors + self.head
        own_rows = 0 if self.tied else batch * self.hidden  # of the embedding
        read = WIDTH * (weights + own_rows) + (total - batch) * self.kv_bytes_per_token
        return Cost(read, 2.0 * batch * (self.layer_matrices + self.head) + self._attention_flops(total))

    def prefill(self, prompt: int) -> Cost:
        """A prompt of `prompt` tokens from nothing, up to its first token: causal attention, one sampled row."""
        weights = self.layer_matrices + self.vectors + self.head
        own_rows = 0 if self.tied else prompt * self.hidden
        pairs = prompt * (prompt + 1) / 2
        flops = 2.0 * (prompt * self.layer_matrices + self.head) + self._attention_flops(pairs)
        return Cost(WIDTH * (weights + own_rows), flops)
