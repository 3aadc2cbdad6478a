"""FP8 weights (e4m3), for hosts that multiply none: dequantized to the model's dtype, or requantized to int8 rows."""

from collections.abc import Callable, Iterator, Sequence

import mindspore as ms
import numpy as np

from vllm_ms_models.checkpoint.slots import FLOATS, Slot, pieces
from vllm_ms_models.kernels.interface import Integers
from vllm_ms_models.quantization import examples
from vllm_ms_models.quantization.base import KernelScheme, Part
from vllm_ms_models.quantization.integers import Factors, IntegerScheme, finite, into, unread
from vllm_ms_models.quantization.specs import Fp8Weight

ROWS = 512  # widened to float32 at a time
SCALE = examples.WEIGHT / 170  # of example weights, whose values have that standard deviation


def fp8_slots(part: Part, spec: Fp8Weight, store: Callable[[int, np.ndarray], None], itemsize: int) -> Iterator[Slot]:
    """The tensors of one part. `store(first_row, values)` gets float32 rows over this rank's columns.

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
            for first in range(start, start + len(source), ROWS):
                chunk = source[first - start : first - start + ROWS].astype(np.float32)
                if not np.isfinite(chunk).all():
                    raise ValueError("it has values that are not numbers")
                store(first, chunk * rows_of(scales, part, spec, first, len(chunk)))

        yield Slot(
            f"{part.name}.weight",
            part.shape,
            load,
            (taken, part.columns),
            ("F8_E4M3",),
            itemsize=itemsize,
            example=examples.float8,
        )
    yield unread(f"{part.name}.input_scale", (1,), FLOATS, shapes=((), (1, 1)))


def rows_of(scales: np.ndarray, part: Part, spec: Fp8Weight, first: int, count: int) -> np.ndarray:
    """The scales of `count` of this rank's rows, to be broadcast over its columns."""
    begin = part.rows.start + first
    if spec.block is not None:
        height, width = spec.block
        rows = np.arange(begin, begin + count) // height
        columns = np.arange(part.columns.start, part.columns.stop) // width
        return scales[rows][:, columns]
    return scales[begin : begin + count] if spec.per_channel else scales


class Fp8AsFloat(KernelScheme):
    """`Fp8Weight` as a matrix in the model's dtype."""

    def __init__(self, parts: Sequence[Part], bias: bool, dtype: ms.Type, spec: Fp8Weight) -> None:
        super().__init__(parts, bias, dtype)
        self.spec = spec
        self.weight = self.kernels.new_weight(self.sizes, self.in_features, dtype)

    def slots(self) -> Iterator[Slot]:
        itemsize = 4 if self.dtype == ms.float32 else 2
        for index, part in enumerate(self.parts):

            def store(first_row: int, values: np.ndarray, index: int = index) -> None:
                self.kernels.load_rows(self.weight, index, first_row, values)

            yield from fp8_slots(part, self.spec, store, itemsize)
        yield from self.bias_slots()


class Fp8AsInt8(IntegerScheme):
    """`Fp8Weight` rounded to int8, with a scale for each row, and multiplied with activations rounded by token."""

    def __init__(self, parts: Sequence[Part], bias: bool, dtype: ms.Type, spec: Fp8Weight) -> None:
        super().__init__(parts, bias, dtype, Integers(8, 0, "dynamic"))
        self.spec = spec

    def part_slots(self, index: int, part: Part, factors: Factors) -> Iterator[Slot]:
        def store(first_row: int, values: np.ndarray) -> None:
            scales = np.abs(values).max(1, keepdims=True, initial=0) / np.float32(127)
            factors.scales[first_row : first_row + len(values)] = scales
            scales[scales == 0] = 1
            self.store(index, first_row, np.rint(values / scales).astype(np.int8))

        yield from fp8_slots(part, self.spec, store, 1)


def fp8_scheme(parts: Sequence[Part], bias: bool, dtype: ms.Type, spec: Fp8Weight) -> KernelScheme:
    return (Fp8AsInt8 if spec.requantized else Fp8AsFloat)(parts, bias, dtype, spec)
