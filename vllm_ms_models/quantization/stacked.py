"""Experts whose matrices lie in one tensor of the checkpoint (gpt-oss): one expert's part of it, in floats or MXFP4.

The tensors of a projection called `name`, with `n` fused parts (gate and up) whose outputs take turns, 0 of the first,
0 of the second, 1 of the first ...:

    {name}           [experts, inputs, n * outputs]             floats; or, in MXFP4,
    {name}_blocks    [experts, n * outputs, inputs / 32, 16]    bytes of two values each, the lower bits first
    {name}_scales    [experts, n * outputs, inputs / 32]        bytes: powers of two, plus 127
    {name}_bias      [experts, n * outputs]
"""

from collections.abc import Iterator, Sequence

import mindspore as ms
import numpy as np

from vllm_ms_models.checkpoint.slots import Slot
from vllm_ms_models.quantization.base import KernelScheme, Part

BLOCK = 32  # inputs that share a scale (OCP Microscaling Formats, version 1.0)
# The values of 4 bits (e2m1), and those of the two in a byte.
FOUR_BITS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
BYTES = np.stack((np.tile(FOUR_BITS, 16), np.repeat(FOUR_BITS, 16)), 1)


class StackedFloat(KernelScheme):
    """The weight of expert number `expert` of `experts`, with a bias."""

    def __init__(self, name: str, parts: Sequence[Part], expert: int, experts: int, dtype: ms.Type) -> None:
        super().__init__(parts, True, dtype)
        self.name = name
        self.leading = slice(expert, expert + 1)
        self.experts = experts
        self.weight = self.kernels.new_weight(self.sizes, self.in_features, dtype)
        fused, part = len(self.parts), self.parts[0]
        self.outputs, self.inputs = fused * part.shape[0], part.shape[1]
        self.rows = slice(fused * part.rows.start, fused * part.rows.stop)
        self.columns = part.columns

    def slots(self) -> Iterator[Slot]:
        shape = self.experts, self.inputs, self.outputs
        index = self.leading, self.columns, self.rows
        yield Slot(self.name, shape, lambda source: self.load(source[0].T), index)
        yield from self.bias_slots()

    def load(self, matrix: np.ndarray) -> None:
        """`matrix` is `[n * outputs, inputs]` of this rank."""
        fused = len(self.parts)
        for index in range(fused):
            self.kernels.load_rows(self.weight, index, 0, np.ascontiguousarray(matrix[index::fused]))

    def bias_slots(self) -> Iterator[Slot]:
        def load(source: np.ndarray) -> None:
            assert self.bias is not None
            fused = len(self.parts)
            self.bias.asnumpy()[...] = source[0].reshape(-1, fused).T.reshape(-1)  # shares memory with the tensor

        yield Slot(f"{self.name}_bias", (self.experts, self.outputs), load, (self.leading, self.rows), itemsize=4)


class StackedMxfp4(StackedFloat):
    """The same from 4 bits a weight, which become the model's dtype; every one of them is a bfloat16 number."""

    def __init__(self, name: str, parts: Sequence[Part], expert: int, experts: int, dtype: ms.Type) -> None:
        super().__init__(name, parts, expert, experts, dtype)
        if self.columns.start % BLOCK or self.columns.stop % BLOCK or self.inputs % BLOCK:
            raise ValueError(
                f"{name} is in MXFP4, blocks of {BLOCK} inputs, which cannot be divided at {self.columns.stop} of "
                f"{self.inputs}; use another --tensor-parallel-size, or --enable-expert-parallel."
            )
        self.blocks = slice(self.columns.start // BLOCK, self.columns.stop // BLOCK)
        self.scales = np.zeros((0, 0), np.float32)

    def slots(self) -> Iterator[Slot]:
        shape = self.experts, self.outputs, self.inputs // BLOCK
        index, itemsize = (self.leading, self.rows, self.blocks), 4 if self.dtype == ms.float32 else 2
        yield Slot(
            f"{self.name}_scales",
            shape,
            self.load_scales,
            index,
            ("U8",),
            early=True,
            itemsize=1,
            example=lambda shape: np.full(shape, 121, np.uint8),
        )
        yield Slot(
            f"{self.name}_blocks",
            (*shape, BLOCK // 2),
            self.load_blocks,
            (*index, slice(0, BLOCK // 2)),
            ("U8",),
            itemsize=2 * itemsize,
            example=lambda shape: np.random.default_rng(0).integers(0, 256, shape, np.uint8),
        )
        yield from self.bias_slots()

    def load_scales(self, source: np.ndarray) -> None:
        if (source == 255).any():
            raise ValueError("a scale is not a number")
        self.scales = np.ldexp(np.float32(1), source[0].astype(np.int32) - 127)

    def load_blocks(self, source: np.ndarray) -> None:
        rows, blocks = self.scales.shape
        values = BYTES[source[0]].reshape(rows, blocks, BLOCK) * self.scales[..., None]
        self.load(values.reshape(rows, blocks * BLOCK))

    def finish(self) -> None:
        self.scales = np.zeros((0, 0), np.float32)
