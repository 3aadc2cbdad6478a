"""FP8 weights (e4m3), for hosts that multiply none: dequantized to the model's dtype, or requantized to int8 rows."""

from collections.abc import Iterator, Sequence

import mindspore as ms
import numpy as np

from vllm_ms_models.checkpoint.slots import FLOATS, Slot, pieces
from vllm_ms_models.kernels.interface import Integers, Kernels, Weight
from vllm_ms_models.quantization import examples
from vllm_ms_models.quantization.base import KernelScheme, Part
from vllm_ms_models.quantization.integers import finite, into, unread
from vllm_ms_models.quantization.specs import Fp8Weight

SCALE = examples.WEIGHT / 170  # of example weights, whose values have that standard deviation


def fp8_slots(kernels: Kernels, weight: Weight, place: tuple[int, int], part: Part, spec: Fp8Weight) -> Iterator[Slot]:
    """The tensors of `part`, which is at `place` (number of the output, first row there) in `weight`.

    An `input_scale` for activations in FP8 is not needed: activations stay in floats.
    """
    rows, columns = part.shape
    shape: tuple[int, ...] = (1,)
    shapes: tuple[tuple[int, ...], ...] = ((), (1, 1))
    if spec.block is not None:
        shape, shapes = (-(-rows // spec.block[0]), -(-columns // spec.block[1])), ()
    elif spec.per_channel:
        shape, shapes = (rows, 1), ((rows,),)
    scales = np.zeros(shape, np.float32)

    yield Slot(
        f"{part.name}.{spec.scale}",
        shape,
        into(scales) if spec.per_channel else lambda source: np.copyto(scales, finite(source).reshape(scales.shape)),
        shapes=shapes,
        early=True,
        itemsize=4,
        example=examples.constant(SCALE),
    )
    for start, taken in pieces(part.rows, part.in_features):

        def load(source: np.ndarray, start: int = start) -> None:
            rows = scales_of(scales, part, spec, start, len(source))
            width = spec.block[1] if spec.block is not None else part.shape[1]
            kernels.load_float8(weight, place[0], place[1] + start, source, rows, width, part.columns.start)

        yield Slot(
            f"{part.name}.weight",
            part.shape,
            load,
            (taken, part.columns),
            ("F8_E4M3",),
            itemsize={ms.int8: 1, ms.float32: 4}.get(weight.dtype, 2),
            example=examples.float8,
        )
    yield unread(f"{part.name}.input_scale", (1,), FLOATS, shapes=((), (1, 1)))


def scales_of(scales: np.ndarray, part: Part, spec: Fp8Weight, first: int, count: int) -> np.ndarray:
    """The scales of `count` of this rank's rows, over all columns."""
    begin = part.rows.start + first
    if spec.block is not None:
        return scales[np.arange(begin, begin + count) // spec.block[0]]
    return scales[begin : begin + count] if spec.per_channel else np.broadcast_to(scales.reshape(1, 1), (count, 1))


class Fp8Scheme(KernelScheme):
    """`Fp8Weight` as a matrix in the model's dtype, or requantized: int8 rows, and activations rounded by token."""

    def __init__(self, parts: Sequence[Part], bias: bool, dtype: ms.Type, spec: Fp8Weight) -> None:
        super().__init__(parts, bias, dtype)
        self.spec = spec
        if spec.requantized:
            self.weight = self.kernels.new_integer_weight(self.sizes, self.in_features, Integers(8, 0, "dynamic"))
        else:
            self.weight = self.kernels.new_weight(self.sizes, self.in_features, dtype)

    def slots(self) -> Iterator[Slot]:
        for part, place in zip(self.parts, self.places, strict=True):
            yield from fp8_slots(self.kernels, self.weight, place, part, self.spec)
        yield from self.bias_slots()
