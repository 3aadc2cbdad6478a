"""How a linear stores its weight and multiplies by it: the one door through which quantization enters a model."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor

from vllm_ms_models import kernels
from vllm_ms_models.checkpoint.slots import Slot, pieces
from vllm_ms_models.kernels import Addend, Weight


@dataclass(frozen=True)
class Part:
    """One checkpoint matrix of a (maybe fused) linear, and what this rank owns of it.

    `name` is the module's name in the checkpoint, such as `model.layers.0.self_attn.q_proj`; `shape` the whole
    matrix (out, in); `rows` and `columns` select this rank's part. One that `continues` adds rows to the output of the
    part before it, where an output is more than one stretch of a matrix.
    """

    name: str
    shape: tuple[int, int]
    rows: slice
    columns: slice
    continues: bool = False

    @property
    def out_features(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def in_features(self) -> int:
        return self.columns.stop - self.columns.start


def outputs_of(parts: Sequence[Part]) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """The sizes of the outputs that `parts` make up, and where each part is: its output, its first row there."""
    sizes: list[int] = []
    places = []
    for part in parts:
        if not part.continues:
            sizes.append(0)
        places.append((len(sizes) - 1, sizes[-1]))
        sizes[-1] += part.out_features
    return tuple(sizes), tuple(places)


class LinearScheme(ABC):
    """The weight of one linear. `parts` are stacked along the output; `bias` says whether the checkpoint has one.

    A scheme creates storage in its constructor, says in `slots` what it reads from the checkpoint, and multiplies.
    """

    def __init__(self, parts: Sequence[Part], bias: bool, dtype: ms.Type) -> None:
        self.parts = tuple(parts)
        self.in_features = parts[0].in_features
        self.sizes, self.places = outputs_of(parts)
        self.dtype = dtype
        self.bias = Tensor.from_numpy(np.zeros(sum(self.sizes), np.float32)) if bias else None

    @abstractmethod
    def slots(self) -> Iterator[Slot]:
        """The checkpoint tensors that make up this weight."""

    def finish(self) -> None:  # noqa: B027 (most schemes have nothing to do)
        """Called once after loading."""

    @abstractmethod
    def multiply(self, x: Tensor, dtype: ms.Type | None = None, addend: Addend | None = None) -> Tensor:
        """`[tokens, in_features]` -> `[tokens, out_features]`, bias added, in `dtype` (default: that of `x`).

        `addend` is what adapters add to the products (`Kernels.reduce`).
        """

    @abstractmethod
    def multiply_split(self, x: Tensor, addend: Addend | None = None) -> tuple[Tensor, ...]:
        """As `multiply`, one tensor for each output (a part, or several)."""

    def multiply_gated(self, x: Tensor, activation: str, addend: Addend | None = None) -> Tensor:
        """`activation(gate) * up` of the two parts gate and up; `activation` as in `Kernels.linear_gated`."""
        gate, up = self.multiply_split(x, addend)
        if activation == "silu":
            return kernels.get().silu_and_mul(gate, up)
        return kernels.get().gelu_and_mul(gate, up, activation == "gelu_tanh")

    def kernel_weight(self) -> Weight:
        """After loading: the weight, if products with it and `bias` are all that `multiply` does; else ValueError.

        For kernels that multiply many weights in one call (experts).
        """
        raise ValueError(
            f"{self.parts[0].name} is stored in a way ({type(self).__name__}) that is not supported for experts."
        )

    def bias_slots(self) -> Iterator[Slot]:
        """Slots of the parts' biases, kept in float32."""
        if self.bias is None:
            return
        target = self.bias.asnumpy()  # shares memory with the tensor
        first = 0
        for part in self.parts:
            view = target[first : first + part.out_features]
            yield Slot(f"{part.name}.bias", part.shape[:1], _store(view), (part.rows,))
            first += part.out_features


def _store(target: np.ndarray) -> Callable[[np.ndarray], None]:
    def load(source: np.ndarray) -> None:
        target[...] = source

    return load


class KernelScheme(LinearScheme):
    """A scheme whose weight is one matrix that the kernels multiply."""

    weight: Weight

    def __init__(self, parts: Sequence[Part], bias: bool, dtype: ms.Type) -> None:
        super().__init__(parts, bias, dtype)
        self.kernels = kernels.get()
        self.keeps_dtype = True

    def kernel_weight(self) -> Weight:
        return self.weight

    def operand(self, x: Tensor) -> Tensor:
        """What the weight multiplies: `x`, or what a subclass makes of it, of another dtype unless `keeps_dtype`."""
        return x

    def multiply(self, x: Tensor, dtype: ms.Type | None = None, addend: Addend | None = None) -> Tensor:
        dtype = x.dtype if dtype is None and not self.keeps_dtype else dtype
        return self.kernels.linear(self.operand(x), self.weight, self.bias, dtype, addend)

    def multiply_split(self, x: Tensor, addend: Addend | None = None) -> tuple[Tensor, ...]:
        parts = self.kernels.linear_split(self.operand(x), self.weight, self.bias, addend)
        return parts if self.keeps_dtype else tuple(part.astype(x.dtype) for part in parts)

    def multiply_gated(self, x: Tensor, activation: str, addend: Addend | None = None) -> Tensor:
        product = self.kernels.linear_gated(self.operand(x), self.weight, activation, self.bias, addend)
        return product if self.keeps_dtype else product.astype(x.dtype)


class Float(KernelScheme):
    """The weight as it is, in the model's dtype."""

    def __init__(self, parts: Sequence[Part], bias: bool, dtype: ms.Type) -> None:
        super().__init__(parts, bias, dtype)
        self.weight = self.kernels.new_weight(self.sizes, self.in_features, dtype)

    def slots(self) -> Iterator[Slot]:
        for part, (output, begin) in zip(self.parts, self.places, strict=True):
            for first, rows in pieces(part.rows, part.in_features):

                def load(source: np.ndarray, output: int = output, first: int = begin + first) -> None:
                    self.kernels.load_rows(self.weight, output, first, source)

                yield Slot(f"{part.name}.weight", part.shape, load, (rows, part.columns))
        yield from self.bias_slots()


class Quantization(ABC):
    """What a checkpoint says about the schemes of its modules."""

    @abstractmethod
    def linear(self, parts: Sequence[Part], bias: bool, dtype: ms.Type) -> LinearScheme:
        """The scheme of the linear made of `parts`, by their exact names; ValueError naming a part if unknown."""

    def stacked(self, name: str, parts: Sequence[Part], expert: int, experts: int, dtype: ms.Type) -> LinearScheme:
        """That of one expert whose matrix is a part of the tensor `name` of all of them (quantization/stacked.py)."""
        from vllm_ms_models.quantization.stacked import StackedFloat

        return StackedFloat(name, parts, expert, experts, dtype)


class Unquantized(Quantization):
    """Every linear in the model's dtype."""

    def linear(self, parts: Sequence[Part], bias: bool, dtype: ms.Type) -> LinearScheme:
        return Float(parts, bias, dtype)
