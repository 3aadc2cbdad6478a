"""The vision towers of LLaVA: CLIP's (Radford et al., 2021) and SigLIP's (Zhai et al., 2023), pre-norm encoders both.

They differ in their ends only: CLIP has a class token before the patches, whose embedding has no bias, and a norm
before the first layer.
"""

from collections.abc import Sequence
from typing import Any

from mindspore import Tensor, mint, nn

from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm_ms_models.layers.mlp import MLP
from vllm_ms_models.layers.norm import LayerNorm
from vllm_ms_models.layers.ragged_attention import RaggedAttention, RaggedSequences
from vllm_ms_models.layers.vision import Parameter, PatchEmbedding, patches

CLASS_TOKEN = {"clip_vision_model": True, "siglip_vision_model": False}


class VisionEmbeddings(Layer):
    """Pixels `[images, channels, size, size]` -> `[images * rows, hidden]`, positions added."""

    def __init__(self, config: Any, context: ModelContext, prefix: str, class_token: bool) -> None:
        super().__init__()
        hidden, size, dtype = config.hidden_size, config.patch_size, context.dtype
        self.patch_size = size
        self.rows = (config.image_size // size) ** 2 + class_token
        kernel = (config.num_channels, size, size)
        self.patch_embedding = PatchEmbedding(f"{prefix}.patch_embedding", hidden, kernel, dtype, not class_token)
        self.class_embedding = Parameter(f"{prefix}.class_embedding", (hidden,), dtype) if class_token else None
        self.positions = Parameter(f"{prefix}.position_embedding.weight", (self.rows, hidden), dtype)

    def construct(self, pixels: Tensor) -> Tensor:
        images = len(pixels)
        hidden = self.patch_embedding(patches(pixels, self.patch_size))
        hidden = hidden.reshape(images, -1, hidden.shape[-1])
        if self.class_embedding is not None:
            first = mint.broadcast_to(self.class_embedding.value, (images, 1, hidden.shape[-1]))
            hidden = mint.cat((first, hidden), 1)
        return (hidden + self.positions.value).reshape(images * self.rows, -1)


class VisionAttention(Layer):
    """Each row attends to all rows of its image."""

    def __init__(self, config: Any, context: ModelContext, prefix: str) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.num_attention_heads
        head_size = hidden // heads
        names = [f"{prefix}.{name}" for name in ("q_proj", "k_proj", "v_proj")]
        self.qkv_proj = QKVParallelLinear(names, hidden, heads, heads, head_size, context, bias=True)
        self.out_proj = RowParallelLinear(f"{prefix}.out_proj", hidden, hidden, context, bias=True)
        self.attention = RaggedAttention(self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads, head_size)

    def construct(self, hidden: Tensor, images: RaggedSequences) -> Tensor:
        return self.out_proj(self.attention(*self.qkv_proj(hidden), images))


class VisionLayer(Layer):
    """Attention and MLP, each behind a norm and added to its input."""

    def __init__(self, config: Any, context: ModelContext, prefix: str) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = LayerNorm(f"{prefix}.layer_norm1", hidden, eps)
        self.self_attn = VisionAttention(config, context, f"{prefix}.self_attn")
        self.layer_norm2 = LayerNorm(f"{prefix}.layer_norm2", hidden, eps)
        names = f"{prefix}.mlp.fc1", f"{prefix}.mlp.fc2"
        self.mlp = MLP(names, hidden, config.intermediate_size, config.hidden_act, context)

    def construct(self, hidden: Tensor, images: RaggedSequences) -> Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden), images)
        return hidden + self.mlp(self.layer_norm2(hidden))


class VisionTower(Layer):
    """Pixels to the hidden states that `feature_layers` name, side by side: `[images * rows, hidden * features]`.

    Layer 0 is the embeddings, layer i what the i-th layer gives; negative numbers count from the last. Layers beyond
    the last that is asked for are not read from the checkpoint, nor is what follows them: see `ignored`.
    """

    def __init__(self, config: Any, feature_layers: Sequence[int], context: ModelContext, prefix: str) -> None:
        super().__init__()
        class_token = CLASS_TOKEN.get(config.model_type)
        if class_token is None:
            raise ValueError(
                f"vision_config.model_type {config.model_type!r} in config.json is not supported for LLaVA; supported "
                f"are {' and '.join(CLASS_TOKEN)}."
            )
        depth = config.num_hidden_layers
        self.features = [number if number >= 0 else depth + 1 + number for number in feature_layers]
        if not self.features or min(self.features) < 0 or max(self.features) > depth:
            raise ValueError(
                f"vision_feature_layer {list(feature_layers)} in config.json must name some of the {depth} layers of "
                "the vision tower; correct config.json."
            )
        self.embeddings = VisionEmbeddings(config, context, f"{prefix}.embeddings", class_token)
        self.rows = self.embeddings.rows
        self.pre_norm = None
        if class_token:
            self.pre_norm = LayerNorm(f"{prefix}.pre_layrnorm", config.hidden_size, config.layer_norm_eps)
        last = max(self.features)
        self.layers = nn.CellList([VisionLayer(config, context, f"{prefix}.encoder.layers.{i}") for i in range(last)])
        self.ignored = [f"{prefix}.encoder.layers.{i}.*" for i in range(last, depth)]
        self.ignored += [f"{prefix}.post_layernorm.*", f"{prefix}.head.*", f"{prefix}.embeddings.position_ids"]

    def construct(self, pixels: Tensor) -> Tensor:
        hidden = self.embeddings(pixels)
        if self.pre_norm is not None:
            hidden = self.pre_norm(hidden)
        images = RaggedSequences.of([self.rows] * len(pixels))
        states = [hidden]
        for layer in self.layers:
            states.append(hidden := layer(hidden, images))
        wanted = [states[number] for number in self.features]
        return wanted[0] if len(wanted) == 1 else mint.cat(wanted, -1)
