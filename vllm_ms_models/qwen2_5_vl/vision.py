"""The vision tower of Qwen2.5-VL (Bai et al., 2025): patches of any grid, attention within windows in most layers.

Patches come in units of `spatial_merge_size` squared, row by row of units, frame by frame; each unit becomes one
embedding. A window is a square of units. Inside the tower, units are in the order of their windows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mindspore import Tensor, nn

from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.layer import Layer
from vllm_ms_models.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm_ms_models.layers.mlp import MLP, GatedMLP
from vllm_ms_models.layers.norm import AddRMSNorm
from vllm_ms_models.layers.ragged_attention import RaggedAttention, RaggedSequences
from vllm_ms_models.layers.rotary import AxialRotary
from vllm_ms_models.layers.vision import PatchEmbedding, take_rows

EPS = 1e-6  # of all norms, whatever config.json says (transformers' Qwen2_5_VLVisionBlock)

Grid = tuple[int, int, int]
"""Frames (two of a video are one, as is an image), rows and columns of patches."""


@dataclass(frozen=True)
class Arrangement:
    """How the patches of some images or videos go through the tower.

    `order` are the units' numbers in the order of windows; `places` the row and column of each patch, in that order,
    int64 `[2, patches]`; `windows` and `frames` how many patches each has.
    """

    order: np.ndarray
    places: np.ndarray
    windows: list[int]
    frames: list[int]


def arrange(grids: Sequence[Grid], merge: int, window: int) -> Arrangement:
    """Units are `merge` patches wide and high, windows `window` units; those at the right and below may be smaller."""
    orders, places = [], []
    windows: list[int] = []
    frames: list[int] = []
    before = 0
    inner = np.indices((merge, merge)).reshape(2, -1)
    for time, rows, columns in grids:
        frame, row, column = np.indices((time, rows // merge, columns // merge)).reshape(3, -1)
        down, across = -(-rows // merge // window), -(-columns // merge // window)
        number = (frame * down + row // window) * across + column // window
        order = np.argsort(number, kind="stable")
        windows += (np.bincount(number, minlength=1) * merge**2).tolist()
        frames += [rows * columns] * time
        unit = np.stack((row, column))[:, order]
        places.append((unit[:, :, None] * merge + inner[:, None, :]).reshape(2, -1))
        orders.append(order + before)
        before += len(order)
    return Arrangement(np.concatenate(orders), np.concatenate(places, 1), windows, frames)


class VisionAttention(Layer):
    """Each patch attends to its window, or to its frame."""

    def __init__(self, config: Any, rotary: AxialRotary, context: ModelContext, prefix: str) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.num_heads
        self.rotary = rotary
        self.qkv = QKVParallelLinear(f"{prefix}.qkv", hidden, heads, heads, rotary.head_size, context, bias=True)
        self.proj = RowParallelLinear(f"{prefix}.proj", hidden, hidden, context, bias=True)
        self.attention = RaggedAttention(self.qkv.num_heads, self.qkv.num_heads, rotary.head_size)

    def construct(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], sequences: RaggedSequences) -> Tensor:
        query, key, value = self.qkv(hidden)
        query, key = self.rotary(query, key, rotation)
        return self.proj(self.attention(query, key, value, sequences))


class VisionBlock(Layer):
    """Attention and MLP, each behind a norm, each added to the residual stream by the next norm."""

    def __init__(self, config: Any, rotary: AxialRotary, context: ModelContext, prefix: str) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.norm1 = AddRMSNorm(f"{prefix}.norm1", hidden, EPS)
        self.attn = VisionAttention(config, rotary, context, f"{prefix}.attn")
        self.norm2 = AddRMSNorm(f"{prefix}.norm2", hidden, EPS)
        self.mlp = GatedMLP(f"{prefix}.mlp", hidden, config.intermediate_size, config.hidden_act, context, bias=True)

    def construct(
        self, hidden: Tensor, residual: Tensor | None, rotation: tuple[Tensor, Tensor], sequences: RaggedSequences
    ) -> tuple[Tensor, Tensor]:
        hidden, residual = self.norm1(hidden, residual)
        hidden, residual = self.norm2(self.attn(hidden, rotation, sequences), residual)
        return self.mlp(hidden), residual


class VisionTower(Layer):
    """Patches `[patches, channels * frames * height * width]` to embeddings `[units, out_hidden_size]`."""

    def __init__(self, config: Any, context: ModelContext, prefix: str) -> None:
        super().__init__()
        hidden, size = config.hidden_size, config.patch_size
        head_size = hidden // config.num_heads
        if head_size % 4:
            raise ValueError(
                f"hidden_size / num_heads of vision_config must be a multiple of 4, but config.json has {head_size}."
            )
        self.merge = config.spatial_merge_size
        self.window = config.window_size // self.merge // size
        self.full = set(config.fullatt_block_indexes)
        kernel = (config.in_channels, config.temporal_patch_size, size, size)
        self.patch_embed = PatchEmbedding(f"{prefix}.patch_embed.proj", hidden, kernel, context.dtype, bias=False)
        rope = getattr(config, "rope_parameters", None) or {}
        self.rotary = AxialRotary(head_size, rope.get("rope_theta", 10000.0))
        self.blocks = nn.CellList(
            [VisionBlock(config, self.rotary, context, f"{prefix}.blocks.{i}") for i in range(config.depth)]
        )
        self.norm = AddRMSNorm(f"{prefix}.merger.ln_q", hidden, EPS)
        names, merged = (f"{prefix}.merger.mlp.0", f"{prefix}.merger.mlp.2"), hidden * self.merge**2
        self.merger = MLP(names, merged, merged, "gelu", context, out_size=config.out_hidden_size)

    def construct(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        arrangement = arrange(grids, self.merge, self.window)
        units, values = len(arrangement.order), patches.shape[-1]
        ordered = take_rows(patches.reshape(units, -1), arrangement.order).reshape(-1, values)
        rotation = self.rotary.rotation(arrangement.places)
        windows, frames = RaggedSequences.of(arrangement.windows), RaggedSequences.of(arrangement.frames)
        hidden, residual = self.patch_embed(ordered), None
        for number, block in enumerate(self.blocks):
            hidden, residual = block(hidden, residual, rotation, frames if number in self.full else windows)
        hidden, _ = self.norm(hidden, residual)
        return take_rows(self.merger(hidden.reshape(units, -1)), np.argsort(arrangement.order))
