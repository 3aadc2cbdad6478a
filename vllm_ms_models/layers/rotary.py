"""Rotary position embedding (Su et al., 2021) of queries and keys."""

from typing import Any

import numpy as np
from mindspore import Tensor

from vllm_ms_models import kernels
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.rope import (
    RopeParameters,
    cos_sin_rows,
    cos_sin_table,
    covered_positions,
    inverse_frequencies,
)


class SectionedRows:
    """cos | sin of a step's tokens, each of which has several positions (M-RoPE); made once a step.

    Positions of a video may be far beyond the number of its tokens, so there is no table of them.
    """

    def __init__(self, parameters: RopeParameters, max_model_len: int) -> None:
        self.parameters = parameters
        self.frequencies = inverse_frequencies(parameters, max_model_len)
        self.positions: Tensor | None = None
        self.rows: tuple[Tensor, Tensor]

    def of(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`positions` int64 `[3, tokens]`, or `[tokens]` if all are the same -> numbers of rows, and the rows.

        They are in the host's memory.
        """
        if positions is not self.positions:
            found = positions.asnumpy()
            found = np.broadcast_to(found, (3, found.shape[-1])) if found.ndim == 1 else found
            rows = cos_sin_rows(self.parameters, self.frequencies, found)
            self.positions = positions
            self.rows = _numbered(rows)
        return self.rows


class RotaryEmbedding(Layer):
    """One table of angles for all layers; `rope.py` knows the scaling types. May rotate in place.

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
        self.sectioned = SectionedRows(parameters, context.max_model_len) if parameters.sections else None
        if self.sectioned is None:
            self.cos_sin = Tensor.from_numpy(cos_sin_table(parameters, context.max_model_len))

    def construct(self, query: Tensor, key: Tensor, positions: Any) -> tuple[Tensor, Tensor]:
        """Both rotated, maybe in place; `positions` is int64 `[tokens]`, or `[3, tokens]` with sections.

        A graph has what `sectioned` makes of the latter in place of them.
        """
        if self.sectioned is None:
            numbers, rows = positions, self.cos_sin
        elif isinstance(positions, tuple):
            numbers, rows = positions
        else:
            numbers, rows = self.sectioned.of(positions)
        return self.kernels.rotary(query, key, numbers, rows, self.head_size, self.interleaved, self.before)


class AxialRotary(Layer):
    """Rotation by row and column of an image: the first half of a head's pairs by the row, the others by the column."""

    def __init__(self, head_size: int, theta: float) -> None:
        super().__init__()
        quarter = head_size // 4
        self.head_size = head_size
        self.parameters = RopeParameters("default", head_size, head_size, theta, sections=(quarter, quarter))
        axis = inverse_frequencies(RopeParameters("default", head_size // 2, head_size // 2, theta), 1)
        self.frequencies = np.tile(axis, 2)
        self.kernels = kernels.get()

    def rotation(self, places: np.ndarray) -> tuple[Tensor, Tensor]:
        """For a step's patches, whose rows and columns are int64 `[2, patches]`."""
        rows = cos_sin_rows(self.parameters, self.frequencies, places)
        return _numbered(rows)

    def construct(self, query: Tensor, key: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.kernels.rotary(query, key, *rotation, self.head_size, False)


def _numbered(rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """A table of a step's own, and which row of it each token has: its own."""
    numbers = np.arange(len(rows), dtype=np.int64)
    return kernels.get().place(Tensor.from_numpy(numbers)), Tensor.from_numpy(rows)
