"""The same as cost.py for DeepSeek-V3's structure: latent attention and experts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cost import FLOATS, SCHEMES, WIDTH, Cost, Decoder, Storage


@dataclass(frozen=True)
class LatentShape(Decoder):
    """The sizes that matter, taken from a config.json by its names.

    Experts are counted as if tokens chose them independently and evenly, which is exact for one token.
    """

    config: Mapping[str, Any]
    storage: Storage = FLOATS
    head_storage: Storage = FLOATS

    @classmethod
    def of(cls, config: Mapping[str, Any], scheme: str | None = None) -> "LatentShape":
        return cls(config, *SCHEMES[scheme])

    def _mlp(self, intermediate: int) -> list[tuple[int, int]]:
        hidden = self.config["hidden_size"]
        return [(2 * intermediate, hidden), (hidden, intermediate)]

    @property
    def moe_layers(self) -> int:
        return self.config["num_hidden_layers"] - self.config["first_k_dense_replace"]

    @property
    def attention(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of the matrices of one layer's attention, but kv_b_proj."""
        c = self.config
        heads, rope = c["num_attention_heads"], c["qk_rope_head_dim"]
        query = heads * (c["qk_nope_head_dim"] + rope)
        rank = c["q_lora_rank"]
        q = [(rank, c["hidden_size"]), (query, rank)] if rank else [(query, c["hidden_size"])]
        return [*q, (c["kv_lora_rank"] + rope, c["hidden_size"]), (c["hidden_size"], heads * c["v_head_dim"])]

    @property
    def kv_b(self) -> tuple[int, int]:
        c = self.config
        return c["num_attention_heads"] * (c["qk_nope_head_dim"] + c["v_head_dim"]), c["kv_lora_rank"]

    @property
    def expert(self) -> list[tuple[int, int]]:
        return self._mlp(self.config["moe_intermediate_size"])

    @property
    def dense(self) -> list[tuple[int, int]]:
        """All quantizable matrices that every token passes, the shared experts among them."""
        c = self.config
        shared = self._mlp(c["n_shared_experts"] * c["moe_intermediate_size"]) * self.moe_layers
        mlp = self._mlp(c["intermediate_size"]) * c["first_k_dense_replace"]
        return self.attention * c["num_hidden_layers"] + shared + mlp

    @property
    def floats(self) -> list[tuple[int, int]]:
        """Matrices that stay in floats: the routers, and kv_b_proj, which attention absorbs."""
        c = self.config
        return [(c["n_routed_experts"], c["hidden_size"])] * self.moe_layers + [self.kv_b] * c["num_hidden_layers"]

    @property
    def head(self) -> int:
        return self.config["vocab_size"] * self.config["hidden_size"]

    @property
    def vectors(self) -> int:
        """Parameters of norms, and the routers' biases, which are float32."""
        c = self.config
        norms = 2 * c["hidden_size"] + (c["q_lora_rank"] or 0) + c["kv_lora_rank"]
        return c["num_hidden_layers"] * norms + c["hidden_size"] + 2 * self.moe_layers * c["n_routed_experts"]

    @property
    def kv_bytes_per_token(self) -> int:
        c = self.config
        return WIDTH * c["num_hidden_layers"] * (c["kv_lora_rank"] + c["qk_rope_head_dim"])

    def _weights(self, experts: float) -> float:
        """Bytes of all weights but the embedding's, with so many experts in each layer that has some."""
        head = self.head_storage.bytes(self.config["vocab_size"], self.config["hidden_size"])
        quantizable = sum(self.storage.bytes(*matrix) for matrix in self.dense)
        routed = self.moe_layers * experts * sum(self.storage.bytes(*matrix) for matrix in self.expert)
        return head + quantizable + routed + WIDTH * (_parameters(self.floats) + self.vectors)

    @property
    def weight_bytes(self) -> float:
        return self._weights(self.config["n_routed_experts"]) + WIDTH * self.head

    def _step(self, rows: int, sampled: int, cached: float, pairs: float) -> Cost:
        # Keys and values are counted as if expanded for nothing beyond each token's own.
        c = self.config
        top_k, total = c["num_experts_per_tok"], c["n_routed_experts"]
        chosen = total * (1 - (1 - top_k / total) ** rows)
        read = self._weights(chosen) + WIDTH * rows * c["hidden_size"] + cached * self.kv_bytes_per_token
        pair = c["qk_nope_head_dim"] + c["qk_rope_head_dim"] + c["v_head_dim"]
        flops = 2.0 * pairs * pair * c["num_attention_heads"] * c["num_hidden_layers"]
        flops += 2.0 * rows * _parameters(self.floats)
        int8_ops = 0.0
        quantizable = _parameters(self.dense) + self.moe_layers * top_k * _parameters(self.expert)
        for work, storage in ((rows * quantizable, self.storage), (sampled * self.head, self.head_storage)):
            if storage.int8:
                int8_ops += 2.0 * work
            else:
                flops += 2.0 * work
        return Cost(read, flops, int8_ops)


def _parameters(matrices: Sequence[tuple[int, int]]) -> int:
    return sum(rows * columns for rows, columns in matrices)
