"""Weights of int8: what they have in common with packed ones, and W8A8 and W8A16 from plain int8 tensors."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor

from vllm_ms_models.checkpoint.errors import CheckpointError
from vllm_ms_models.checkpoint.slots import FLOATS, Slot, pieces
from vllm_ms_models.kernels.weight import Integers, Weight
from vllm_ms_models.quantization import examples
from vllm_ms_models.quantization.base import KernelScheme, Part
from vllm_ms_models.quantization.specs import Int8Product, Int8Weight

INT8_SCALE = examples.WEIGHT / 74  # of example weights: random int8 have a standard deviation of 74


@dataclass
class Factors:
    """What belongs to the integers of one part: float32 scales and int8 zero points `[rows, groups]`, and the rest."""

    scales: np.ndarray
    zeros: np.ndarray | None = None
    addends: np.ndarray | None = None  # int32 [rows]
    sums: np.ndarray | None = None  # of each row's integers
    input_scale: np.ndarray | None = None  # float32 [1], or of each input
    input_offset: int = 0
    order: np.ndarray | None = None  # in which the stored integers are taken along the input


class IntegerScheme(KernelScheme):
    """A matrix of small integers; a subclass says in `part_slots` which tensors they and their scales come from."""

    def __init__(self, parts: Sequence[Part], bias: bool, dtype: ms.Type, integers: Integers) -> None:
        super().__init__(parts, bias, dtype)
        for part in parts:
            check_groups(part, integers.group_size)
        self.integers = integers
        self.weight = self.kernels.new_integer_weight(self.sizes, self.in_features, integers)
        groups = integers.groups(self.in_features)
        self.factors = [Factors(np.zeros((part.out_features, groups), np.float32)) for part in parts]

    @abstractmethod
    def part_slots(self, index: int, part: Part, factors: Factors) -> Iterator[Slot]:
        """The checkpoint tensors of part number `index`, whose bias excepted."""

    def slots(self) -> Iterator[Slot]:
        for index, (part, factors) in enumerate(zip(self.parts, self.factors, strict=True)):
            yield from self.part_slots(index, part, factors)
        yield from self.bias_slots()

    def finish(self) -> None:
        for (output, first), factors in zip(self.places, self.factors, strict=True):
            self.kernels.load_scales(self.weight, output, first, factors.scales, factors.zeros, factors.addends)
        self.factors = []  # the weight has them now

    def store(self, index: int, first_row: int, values: np.ndarray) -> None:
        """Rows of part number `index` in int8, over this rank's columns."""
        output, first = self.places[index]
        self.kernels.load_integers(self.weight, output, first + first_row, values)

    def int8_slots(self, index: int, part: Part, factors: Factors) -> Iterator[Slot]:
        """The slots of an int8 tensor `weight` [out, in]."""
        static = self.integers.activations == "static"
        if static:
            factors.sums = np.zeros(part.out_features, np.int64)
        for first, rows in pieces(part.rows, part.in_features):

            def load(source: np.ndarray, first: int = first) -> None:
                self.store(index, first, source)
                if static:
                    factors.sums[first : first + len(source)] = source.sum(1, dtype=np.int64)  # type: ignore[index]

            yield Slot(
                f"{part.name}.weight",
                part.shape,
                load,
                (rows, part.columns),
                ("I8",),
                itemsize=1,
                example=examples.noise(np.int8),
            )


def check_groups(part: Part, group_size: int) -> None:
    """ValueError if a group of inputs with one scale is split between ranks."""
    first, last = part.columns.start, part.columns.stop
    if group_size and (first % group_size or (last % group_size and last != part.shape[1])):
        raise ValueError(
            f"This rank's inputs {first} to {last} of {part.name} begin or end inside a group of {group_size} with a "
            "common scale; use a smaller --tensor-parallel-size."
        )


def groups_of(part: Part, group_size: int) -> slice:
    """The groups of a row that this rank has."""
    if not group_size:
        return slice(0, 1)
    return slice(part.columns.start // group_size, -(-part.columns.stop // group_size))


def into(target: np.ndarray, transposed: bool = False) -> Callable[[np.ndarray], None]:
    """A loader of scales `[rows, groups]`, or one for each row, or one in all."""

    def load(source: np.ndarray) -> None:
        values = finite(source)
        if transposed:
            values = values.T
        target[...] = values.reshape(-1, 1) if values.ndim < 2 else values

    return load


def finite(source: np.ndarray) -> np.ndarray:
    """As float32; ValueError for infinities and NaN."""
    values = source.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("it has values that are not finite numbers")
    return values


def positive(source: np.ndarray) -> np.ndarray:
    """As float32 vector; ValueError unless all are above 0."""
    values = finite(source).reshape(-1)
    if not (values > 0).all():
        raise ValueError("it has values that are not above 0, by which activations would be divided")
    return values


def as_int8(source: np.ndarray) -> np.ndarray:
    """ValueError unless the values are whole numbers from -128 to 127."""
    values = source.astype(np.float32)
    if not ((values == np.rint(values)) & (values >= -128) & (values <= 127)).all():
        raise ValueError("it has values that are not whole numbers from -128 to 127")
    return values.astype(np.int8)


def scalar(source: np.ndarray) -> int:
    """The value that all of `source` has, as whole number of int8."""
    values = as_int8(source)
    if values.size and (values != values.flat[0]).any():
        raise ValueError("it has an offset of its own for each input, which is not supported")
    return int(values.flat[0]) if values.size else 0


class Int8Scheme(IntegerScheme):
    """`Int8Weight`: W8A8 with dynamic or static activations, or W8A16."""

    def __init__(self, parts: Sequence[Part], bias: bool, dtype: ms.Type, spec: Int8Weight) -> None:
        super().__init__(parts, bias, dtype, Integers(8, spec.group_size, spec.activations))
        self.spec = spec

    def part_slots(self, index: int, part: Part, factors: Factors) -> Iterator[Slot]:
        spec, rows = self.spec, part.shape[0]
        shape: tuple[int, ...] = (rows, 1)
        shapes: tuple[tuple[int, ...], ...] = ((rows,),)
        where: tuple[slice, ...] = (part.rows,)
        if spec.per_tensor:
            shape, shapes, where = (1,), ((), (1, 1)), ()
        elif spec.group_size:
            shape, shapes = (rows, -(-part.shape[1] // spec.group_size)), ()
            where = (part.rows, groups_of(part, spec.group_size))
        scale = examples.constant(INT8_SCALE)
        yield Slot(
            f"{part.name}.{spec.scale}",
            shape,
            into(factors.scales),
            where,
            shapes=shapes,
            early=True,
            itemsize=4,
            example=scale,
        )
        if spec.zero is not None:

            def load_zero(source: np.ndarray) -> None:
                zeros = as_int8(source)
                factors.zeros = np.empty(factors.scales.shape, np.int8)
                factors.zeros[...] = zeros.reshape(-1, 1) if zeros.ndim < 2 else zeros

            yield Slot(
                f"{part.name}.{spec.zero}",
                shape,
                load_zero,
                where,
                ("I8", *FLOATS),
                shapes=shapes,
                early=True,
                itemsize=1,
                example=examples.constant(0, np.int8),
            )
        if spec.activations == "static":
            yield from input_slots(part, factors, "input_zero_point" if spec.input_offset else None, ("I8",))
        yield from self.int8_slots(index, part, factors)

    def finish(self) -> None:
        if self.spec.activations == "static":
            for index, (part, factors) in enumerate(zip(self.parts, self.factors, strict=True)):
                self._use_input(index, part, factors)
        super().finish()

    def _use_input(self, index: int, part: Part, factors: Factors) -> None:
        """Scale and offset of the input go into scales and addends of the product."""
        assert factors.input_scale is not None and factors.sums is not None
        sums = factors.sums
        if factors.zeros is not None:
            sums = sums - self.in_features * factors.zeros[:, 0].astype(np.int64)
        factors.addends = as_int32(-factors.input_offset * sums, part)
        factors.scales *= factors.input_scale
        self.kernels.set_input(self.weight, self.places[index][0], float(factors.input_scale[0]), factors.input_offset)


def as_int32(values: np.ndarray, part: Part) -> np.ndarray:
    if values.size and np.abs(values).max() >= 2**31:
        raise CheckpointError(f"The correction for the input's offset of {part.name} is too large for 32 bits.")
    return values.astype(np.int32)


def input_slots(
    part: Part, factors: Factors, offset: str | None, dtypes: tuple[str, ...], channels: bool = False
) -> Iterator[Slot]:
    """`input_scale`, and a tensor `offset` if there is one; with `channels`, of each input."""

    def load_scale(source: np.ndarray) -> None:
        factors.input_scale = positive(source)

    def load_offset(source: np.ndarray) -> None:
        factors.input_offset = scalar(source)

    shape, shapes, where = ((part.shape[1],), (), (part.columns,)) if channels else ((1,), ((),), ())
    one = examples.constant(0.1)
    yield Slot(f"{part.name}.input_scale", shape, load_scale, where, shapes=shapes, early=True, example=one)
    if offset is not None:
        zero = examples.constant(0, np.int8)
        name = f"{part.name}.{offset}"
        yield Slot(name, shape, load_offset, where, dtypes, shapes=shapes, early=True, example=zero)


class Int8ProductScheme(IntegerScheme):
    """`Int8Product`: static W8A8 as ModelSlim and Golden Stick write it.

    The layer's own bias is part of `quant_bias`. Inputs with a scale each are multiplied by its reciprocal first.
    """

    def __init__(self, parts: Sequence[Part], bias: bool, dtype: ms.Type, spec: Int8Product) -> None:
        super().__init__(parts, False, dtype, Integers(8, 0, "static"))
        self.spec = spec
        self.reciprocals: Tensor | None = None

    def part_slots(self, index: int, part: Part, factors: Factors) -> Iterator[Slot]:
        rows = part.shape[:1]

        def load_scale(source: np.ndarray) -> None:
            if source.dtype == np.int64:  # the bits of a float32, for an operator that takes them so
                if not ((source >= -(2**31)) & (source < 2**32)).all():
                    raise ValueError("it has values that are not the bits of a float32")
                source = (source & 0xFFFFFFFF).astype(np.uint32).view(np.float32)
            into(factors.scales)(source)

        def load_bias(source: np.ndarray) -> None:
            factors.addends = source.copy()

        scale = examples.constant(INT8_SCALE / 10)
        dtypes = ("F32", "I64")
        yield Slot(f"{part.name}.deq_scale", rows, load_scale, (part.rows,), dtypes, early=True, example=scale)
        offsets = ("I8",) if self.spec.input_channels else FLOATS
        yield from input_slots(part, factors, "input_offset", offsets, self.spec.input_channels)
        # A sum over ranks has the correction once: in the rank that has the first columns.
        name, zero = f"{part.name}.quant_bias", examples.constant(0, np.int32)
        if part.columns.start == 0:
            yield Slot(name, rows, load_bias, (part.rows,), ("I32",), early=True, itemsize=4, example=zero)
        else:
            yield unread(name, rows, ("I32",), optional=False)
        yield from self.int8_slots(index, part, factors)
        yield unread(f"{part.name}.bias", rows)  # in quant_bias already
        if self.spec.input_channels:
            yield Slot(f"{part.name}.beta", part.shape[1:], refuse_nonzero, optional=True, dtypes=("I32", *FLOATS))
        else:  # redundant: deq_scale is input_scale * weight_scale
            for name in ("weight_scale", "weight_offset"):
                yield unread(f"{part.name}.{name}", (*rows, 1), shapes=(rows,))

    def finish(self) -> None:
        scales = [factors.input_scale for factors in self.factors]
        if any(scale.min() != scale.max() for scale in scales if scale is not None):
            self.reciprocals = Tensor(1 / self._common(scales))
            self.keeps_dtype = False
        for index, factors in enumerate(self.factors):
            assert factors.input_scale is not None
            scale = 1.0 if self.reciprocals is not None else float(factors.input_scale[0])
            self.kernels.set_input(self.weight, self.places[index][0], scale, factors.input_offset)
        super().finish()

    def _common(self, scales: list[np.ndarray | None]) -> np.ndarray:
        first = scales[0]
        assert first is not None
        for part, scale in zip(self.parts, scales, strict=True):
            if scale is None or not np.array_equal(scale, first):
                raise CheckpointError(
                    f"input_scale of {part.name} differs from that of {self.parts[0].name}, with which it is "
                    "multiplied; parts of one layer must share the scales of their inputs when each input has its own."
                )
        return first

    def kernel_weight(self) -> Weight:
        if self.reciprocals is not None:
            raise CheckpointError(
                f"{self.parts[0].name} has an input_scale for each input, which is not supported for experts; quantize "
                "them with one for all inputs, or with dynamic activations."
            )
        return super().kernel_weight()

    def operand(self, x: Tensor) -> Tensor:
        if self.reciprocals is None:
            return x
        product = x * self.reciprocals  # in float32, which products of Ascend do not take
        return product.astype(x.dtype) if self.kernels.own_memory else product


def unread(
    name: str,
    shape: tuple[int, ...],
    dtypes: tuple[str, ...] = FLOATS,
    optional: bool = True,
    shapes: tuple[tuple[int, ...], ...] = (),
) -> Slot:
    """A tensor that may (or must) be there and is not used."""
    return Slot(name, shape, lambda _: None, (slice(0, 0),), dtypes, shapes, optional)


def refuse_nonzero(source: np.ndarray) -> None:
    if source.astype(np.float32).any():
        raise ValueError("inputs that are shifted (outlier suppression) are not supported")
