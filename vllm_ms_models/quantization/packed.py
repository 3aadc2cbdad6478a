"""Integers packed in int32 words, multiplied with activations in floats: compressed-tensors, GPTQ and AWQ."""

from collections.abc import Iterator, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from vllm_ms_models.checkpoint.errors import CheckpointError
from vllm_ms_models.checkpoint.slots import Slot, pieces
from vllm_ms_models.kernels.weight import Integers, Weight
from vllm_ms_models.quantization import examples
from vllm_ms_models.quantization.base import Part
from vllm_ms_models.quantization.integers import Factors, IntegerScheme, groups_of, into
from vllm_ms_models.quantization.packing import centred, unpack, unpack_awq, words_of
from vllm_ms_models.quantization.specs import AwqWeight, GptqWeight, PackedWeight

ROWS = 512  # unpacked at a time
SCALE = {4: examples.WEIGHT / 4.6, 8: examples.WEIGHT / 74}  # of example weights
MIDDLE = {4: -0x77777778, 8: -0x7F7F7F80}  # a word of fields 2 ** (bits - 1), as int32
BELOW_MIDDLE = {4: 0x77777777, 8: 0x7F7F7F7F}
ONES = {4: np.uint32(0x11111111), 8: np.uint32(0x01010101)}


class PackedScheme(IntegerScheme):
    """What packed formats share: groups, and inputs taken in the order of their groups."""

    def __init__(self, parts: Sequence[Part], bias: bool, dtype: ms.Type, bits: int, group_size: int) -> None:
        super().__init__(parts, bias, dtype, Integers(bits, group_size, "float"))
        self.bits, self.group_size = bits, group_size
        self.per_word = 32 // bits
        self.order: Tensor | None = None

    def groups(self, part: Part) -> int:
        """Groups of a whole row."""
        return -(-part.shape[1] // self.group_size) if self.group_size else 1

    def store_fields(self, index: int, first_row: int, fields: np.ndarray) -> None:
        """Unsigned values of some rows, in the order of the checkpoint."""
        order = self.factors[index].order
        self.store(index, first_row, centred(fields if order is None else fields[:, order], self.bits))

    def order_slot(self, name: str, part: Part, factors: Factors, ordered: bool, optional: bool) -> Slot:
        """The group of each input; unless `ordered`, inputs must lie in the order of their groups."""
        size = self.group_size or part.shape[1]

        def load(source: np.ndarray) -> None:
            groups = np.arange(part.shape[1]) // size
            if np.array_equal(source, groups):
                return
            if not ordered:
                raise ValueError("inputs are not in the order of their groups, though no activation order is described")
            order = np.argsort(source, kind="stable")
            if not np.array_equal(source[order], groups):
                raise ValueError(f"it does not have {size} inputs in each group")
            if part.in_features != part.shape[1]:
                raise ValueError(
                    "inputs in activation order cannot be split between ranks; use --tensor-parallel-size 1"
                )
            factors.order = order

        return Slot(
            f"{part.name}.{name}",
            part.shape[1:],
            load,
            dtypes=("I32", "I64"),
            optional=optional,
            early=True,
            itemsize=4,
            example=lambda shape: np.arange(shape[0], dtype=np.int32) // size,
        )

    def finish(self) -> None:
        order = self.factors[0].order
        for part, factors in zip(self.parts, self.factors, strict=True):
            if not np.array_equal(factors.order, order):  # type: ignore[arg-type] # both may be None
                raise CheckpointError(
                    f"{part.name} and {self.parts[0].name} are multiplied at once, but their inputs are in different "
                    "activation orders; such a checkpoint cannot be served."
                )
        if order is not None:
            self.order = Tensor(order.astype(np.int32))
        super().finish()

    def operand(self, x: Tensor) -> Tensor:
        """The columns of `x` in the order of the weight's."""
        if self.order is None:
            return x
        if x.dtype == ms.bfloat16 and not self.kernels.own_memory:  # not registered on CPU
            return ops.gather(x.view(ms.int16), self.order, 1).view(ms.bfloat16)
        return ops.gather(x, self.order, 1)

    def kernel_weight(self) -> Weight:
        if self.order is not None:
            raise CheckpointError(
                f"{self.parts[0].name} has its inputs in activation order, which is not supported for experts; "
                "quantize the model without it (desc_act false, actorder null)."
            )
        return super().kernel_weight()

    def scale_slot(self, name: str, part: Part, factors: Factors, transposed: bool) -> Slot:
        """Scales `[out, groups]`, or `[groups, out]` if transposed."""
        shape, where = (part.shape[0], self.groups(part)), (part.rows, groups_of(part, self.group_size))
        if transposed:
            shape, where = shape[::-1], where[::-1]
        example = examples.constant(SCALE[self.bits])
        name = f"{part.name}.{name}"
        return Slot(name, shape, into(factors.scales, transposed), where, early=True, itemsize=4, example=example)


class CompressedScheme(PackedScheme):
    """`PackedWeight`."""

    def __init__(self, parts: Sequence[Part], bias: bool, dtype: ms.Type, spec: PackedWeight) -> None:
        super().__init__(parts, bias, dtype, spec.bits, spec.group_size)
        self.spec = spec

    def part_slots(self, index: int, part: Part, factors: Factors) -> Iterator[Slot]:
        rows, columns = part.shape
        words, cut = words_of(part.columns, self.per_word)

        def load_shape(source: np.ndarray) -> None:
            if tuple(source) != part.shape:
                raise ValueError(f"it says that the matrix is {source.tolist()}, where {list(part.shape)} is expected")

        yield self.scale_slot("weight_scale", part, factors, False)
        yield Slot(
            f"{part.name}.weight_shape",
            (2,),
            load_shape,
            dtypes=("I64", "I32"),
            early=True,
            itemsize=1,
            example=lambda _: np.array(part.shape),
        )
        if self.spec.zeros:
            yield self._zero_slot(part, factors)
        if self.spec.ordered:
            yield self.order_slot("weight_g_idx", part, factors, True, False)
        for start, taken in pieces(part.rows, part.in_features):

            def load(source: np.ndarray, start: int = start) -> None:
                for first in range(0, len(source), ROWS):
                    fields = unpack(source[first : first + ROWS], self.bits)[:, cut]
                    self.store_fields(index, start + first, fields)

            yield Slot(
                f"{part.name}.weight_packed",
                (rows, -(-columns // self.per_word)),
                load,
                (taken, words),
                ("I32",),
                itemsize=4,
                example=examples.noise(np.int32),
            )

    def _zero_slot(self, part: Part, factors: Factors) -> Slot:
        words, cut = words_of(part.rows, self.per_word)

        def load(source: np.ndarray) -> None:
            factors.zeros = np.ascontiguousarray(centred(unpack(source.T, self.bits), self.bits)[:, cut].T)

        return Slot(
            f"{part.name}.weight_zero_point",
            (-(-part.shape[0] // self.per_word), self.groups(part)),
            load,
            (words, groups_of(part, self.group_size)),
            ("I32",),
            early=True,
            itemsize=4,
            example=examples.constant(MIDDLE[self.bits], np.int32),
        )


class GptqScheme(PackedScheme):
    """`GptqWeight`."""

    def __init__(self, parts: Sequence[Part], bias: bool, dtype: ms.Type, spec: GptqWeight) -> None:
        super().__init__(parts, bias, dtype, spec.bits, spec.group_size)
        self.spec = spec
        for part in parts:
            require_multiples(part, self.per_word, part.shape)

    def part_slots(self, index: int, part: Part, factors: Factors) -> Iterator[Slot]:
        words, cut = words_of(part.columns, self.per_word)

        def load(source: np.ndarray) -> None:
            for first in range(0, part.out_features, ROWS):
                self.store_fields(index, first, unpack(source[:, first : first + ROWS].T, self.bits)[:, cut])

        yield self.scale_slot("scales", part, factors, True)
        yield self._zero_slot(part, factors)
        yield self.order_slot("g_idx", part, factors, self.spec.ordered, not self.spec.ordered)
        yield Slot(
            f"{part.name}.qweight",
            (part.shape[1] // self.per_word, part.shape[0]),
            load,
            (words, part.rows),
            ("I32",),
            itemsize=4,
            example=examples.noise(np.int32),
        )

    def _zero_slot(self, part: Part, factors: Factors) -> Slot:
        words, cut = words_of(part.rows, self.per_word)

        def load(source: np.ndarray) -> None:
            if self.spec.version == 1:
                # One was subtracted from each word as a whole: a field of 0 has borrowed from the next.
                source = (source.view(np.uint32) + ONES[self.bits]).view(np.int32)
            zeros = centred(unpack(source, self.bits), self.bits)[:, cut].T
            if self.spec.symmetric and zeros.any():
                raise ValueError("its zero points are not in the middle, though the weights are said to be symmetric")
            factors.zeros = np.ascontiguousarray(zeros)

        middle = MIDDLE if self.spec.version == 2 else BELOW_MIDDLE
        return Slot(
            f"{part.name}.qzeros",
            (self.groups(part), part.shape[0] // self.per_word),
            load,
            (groups_of(part, self.group_size), words),
            ("I32",),
            early=True,
            itemsize=4,
            example=examples.constant(middle[self.bits], np.int32),
        )


class AwqScheme(PackedScheme):
    """`AwqWeight`."""

    def __init__(self, parts: Sequence[Part], bias: bool, dtype: ms.Type, spec: AwqWeight) -> None:
        super().__init__(parts, bias, dtype, 4, spec.group_size)
        for part in parts:
            require_multiples(part, self.per_word, part.shape[:1])

    def part_slots(self, index: int, part: Part, factors: Factors) -> Iterator[Slot]:
        words, cut = words_of(part.rows, self.per_word)

        def load(source: np.ndarray) -> None:
            fields = unpack_awq(source)[:, cut]
            for first in range(0, part.out_features, ROWS):
                self.store_fields(index, first, np.ascontiguousarray(fields[:, first : first + ROWS].T))

        def load_zeros(source: np.ndarray) -> None:
            factors.zeros = np.ascontiguousarray(centred(unpack_awq(source), 4)[:, cut].T)

        yield self.scale_slot("scales", part, factors, True)
        yield Slot(
            f"{part.name}.qzeros",
            (self.groups(part), part.shape[0] // self.per_word),
            load_zeros,
            (groups_of(part, self.group_size), words),
            ("I32",),
            early=True,
            itemsize=4,
            example=examples.constant(MIDDLE[4], np.int32),
        )
        yield Slot(
            f"{part.name}.qweight",
            (part.shape[1], part.shape[0] // self.per_word),
            load,
            (part.columns, words),
            ("I32",),
            itemsize=4,
            example=examples.noise(np.int32),
        )


def require_multiples(part: Part, per_word: int, sizes: Sequence[int]) -> None:
    if any(size % per_word for size in sizes):
        raise ValueError(f"The sizes of {part.name}, {list(part.shape)}, must be multiples of {per_word}.")
