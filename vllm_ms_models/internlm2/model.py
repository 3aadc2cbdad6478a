"""InternLM2 and InternLM2.5 (Cai et al., 2024): Llama by other names, with queries, keys and values in one matrix."""

from typing import Any

from vllm_ms_models.layers.causal_lm import CausalLM
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.decoder import Decoder
from vllm_ms_models.layers.mlp import GatedMLP
from vllm_ms_models.layers.pre_norm import PreNormLayer
from vllm_ms_models.layers.rotary import RotaryEmbedding
from vllm_ms_models.layers.self_attention import SelfAttention
from vllm_ms_models.registry import register_model

NORMS = ("attention_norm", "ffn_norm")
PROJECTIONS = ("w1", "w3", "w2")  # gate, up, down


@register_model("InternLM2ForCausalLM")
class InternLM2ForCausalLM(CausalLM):
    """InternLM2 with its language-model head; `config` is an InternLM2Config."""

    def __init__(self, config: Any, context: ModelContext) -> None:
        hidden, size, act, bias = config.hidden_size, config.intermediate_size, config.hidden_act, config.bias
        rotary = RotaryEmbedding(config, context)

        def layer(_: int, prefix: str) -> PreNormLayer:
            name = f"{prefix}.attention"
            attention = SelfAttention(
                config, rotary, context, name, qkv="wqkv", by_heads=True, out="wo", bias=bias, out_bias=bias
            )
            mlp = GatedMLP(f"{prefix}.feed_forward", hidden, size, act, context, names=PROJECTIONS)
            return PreNormLayer(prefix, hidden, config.rms_norm_eps, attention, mlp, NORMS)

        model = Decoder(config, context, layer, embedding_name="tok_embeddings")
        super().__init__(model, config, context, head_name="output")
        self.ignored = ["output.weight"] if config.tie_word_embeddings else []
