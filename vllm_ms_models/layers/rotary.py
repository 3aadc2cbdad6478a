"""Rotary position embedding (Su et al., 2021) of queries and keys."""

from typing import Any

from mindspore import Tensor

from vllm_ms_models import kernels
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.rope import RopeParameters, cos_sin_table, covered_positions


class RotaryEmbedding(Layer):
    """One table of angles for all layers; `rope.py` knows the scaling types. Rotates in place.

    `before` features of each query head, which come first, do not rotate, and keys do not have them (DeepSeek).
    `softmax_factor` is what the scaling type asks the softmax scale to be multiplied by. `layer_type` is which layers
    the table is for, where a config has an entry for each type.
    """

    def __init__(
        self,
        config: Any,
        context: ModelContext,
        interleaved: bool = False,
        before: int = 0,
        layer_type: str | None = None,
    ) -> None:
        super().__init__()
        parameters = RopeParameters.from_config(config, layer_type)
        covered = covered_positions(parameters, config)
        if context.max_model_len > covered:
            raise ValueError(
                f"--max-model-len {context.max_model_len} is beyond the {covered} positions that the model's rotary "
                f"embedding ({parameters.rope_type}) covers; use {covered} or less."
            )
        self.head_size = before + parameters.head_dim
        self.before = before
        self.softmax_factor = parameters.softmax_factor
        self.interleaved = interleaved
        self.kernels = kernels.get()
        self.cos_sin = Tensor.from_numpy(cos_sin_table(parameters, context.max_model_len))

    def construct(self, query: Tensor, key: Tensor, positions: Tensor) -> None:
        self.kernels.rotary(query, key, positions, self.cos_sin, self.head_size, self.interleaved, self.before)
