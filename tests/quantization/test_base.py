"""The scheme interface: what a linear asks of it, and that it is enough for a scheme that is not in the package."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import mindspore as ms
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mindspore import Tensor, mint

from tests.layer_testing import (
    assert_close,
    back_end,  # noqa: F401 (autouse)
    call,
    context,
    examples,
    linear,
    load,
    normal,
    on_ranks,
    seeds,
    token_counts,
)
from vllm_ms_models.checkpoint.slots import Slot
from vllm_ms_models.distributed.group import Group
from vllm_ms_models.kernels import Addend
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm_ms_models.layers.mlp import GatedMLP
from vllm_ms_models.quantization.base import Float, LinearScheme, Part, Quantization, Unquantized


class PerRow(LinearScheme):
    """int8 rows `{name}.weight` with a float32 scale each, `{name}.scale`; multiplied in float."""

    def __init__(self, parts: Sequence[Part], bias: bool, dtype: ms.Type) -> None:
        super().__init__(parts, bias, dtype)
        self.rows = np.zeros((sum(self.sizes), self.in_features), np.float32)
        self.float = Float([replace(part, name="unused") for part in parts], False, dtype)

    def slots(self) -> Iterator[Slot]:
        first = 0
        for part in self.parts:
            target = self.rows[first : first + part.out_features]
            first += part.out_features
            matrix, column = (part.rows, part.columns), (part.rows, slice(0, 1))
            yield Slot(f"{part.name}.weight", part.shape, self._adder(target), matrix, ("I8",))
            yield Slot(f"{part.name}.scale", (part.shape[0], 1), self._scaler(target), column, ("F32",))
        yield from self.bias_slots()

    @staticmethod
    def _adder(target: np.ndarray) -> Any:
        return lambda source: np.add(target, source, out=target)

    @staticmethod
    def _scaler(target: np.ndarray) -> Any:
        return lambda source: np.multiply(target, source, out=target)

    def finish(self) -> None:
        cuts = np.cumsum(self.sizes)[:-1]
        for slot, rows in zip(self.float.slots(), np.split(self.rows, cuts), strict=True):
            slot.load(rows)

    def multiply(self, x: Tensor, dtype: ms.Type | None = None, addend: Addend | None = None) -> Tensor:
        product = self.float.multiply(x, dtype)
        return product if self.bias is None else product + self.bias

    def multiply_split(self, x: Tensor, addend: Addend | None = None) -> tuple[Tensor, ...]:
        return tuple(part.contiguous() for part in mint.split(self.multiply(x), list(self.sizes), 1))


class Recorder(Quantization):
    """Notes what is asked for; `kind` is the scheme of all."""

    def __init__(self, kind: type[LinearScheme]) -> None:
        self.kind = kind
        self.asked: list[tuple[list[str], bool]] = []

    def linear(self, parts: Sequence[Part], bias: bool, dtype: ms.Type) -> LinearScheme:
        self.asked.append(([part.name for part in parts], bias))
        return self.kind(parts, bias, dtype)


def quantized(group: Group | None = None, kind: type[LinearScheme] = PerRow) -> tuple[ModelContext, Recorder]:
    recorder = Recorder(kind)
    return replace(context(group=group), quantization=recorder), recorder


def test_parts_know_their_size() -> None:
    part = Part("proj", (12, 30), slice(4, 8), slice(10, 20))
    assert (part.out_features, part.in_features) == (4, 10)


def test_linears_ask_by_the_exact_names_of_the_checkpoint() -> None:
    """A fused layer asks once, with the names of all its matrices in their order."""
    given, recorder = quantized(kind=Float)
    QKVParallelLinear([f"layers.1.attn.{name}_proj" for name in "qkv"], 8, 4, 2, 4, given, bias=True)
    GatedMLP("layers.1.mlp", 8, 24, "silu", given)
    assert recorder.asked == [
        (["layers.1.attn.q_proj", "layers.1.attn.k_proj", "layers.1.attn.v_proj"], True),
        (["layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"], False),
        (["layers.1.mlp.down_proj"], False),
    ]


def test_a_scheme_that_refuses_is_heard() -> None:
    """No linear falls back to float when its scheme is unknown."""

    class Refusing(Quantization):
        def linear(self, parts: Sequence[Part], bias: bool, dtype: ms.Type) -> LinearScheme:
            raise ValueError(f"{parts[0].name} has an unknown scheme")

    with pytest.raises(ValueError, match=r"^layers\.0\.o_proj has an unknown scheme$"):
        RowParallelLinear("layers.0.o_proj", 8, 8, replace(context(), quantization=Refusing()))


def test_unquantized_is_the_default() -> None:
    scheme = context().quantization.linear([Part("proj", (3, 5), slice(0, 3), slice(0, 5))], False, ms.float32)
    assert isinstance(context().quantization, Unquantized)
    assert isinstance(scheme, Float)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_biases_keep_their_digits(dtype: torch.dtype) -> None:
    """They are added in float32, before the one rounding: a bias that the model's dtype cannot hold counts whole."""
    bias = torch.tensor([1 + 2.0**-13, 1 / 3, -1e-7])
    scheme = Float([Part("proj", (3, 4), slice(0, 3), slice(0, 4))], True, context(dtype).dtype)
    load(scheme, {"proj.weight": torch.zeros(3, 4), "proj.bias": bias})
    x = torch.ones(2, 4, dtype=dtype)

    def multiply(x: Tensor, wide: bool) -> Tensor:
        return scheme.multiply(x, ms.float32) if wide else scheme.multiply(x)

    assert torch.equal(call(multiply, x, wide=True), bias.expand(2, 3))
    assert torch.equal(call(multiply, x, wide=False), bias.to(dtype).expand(2, 3))


def int8_checkpoint(seed: int, names: Sequence[str], rows: int, columns: int, bias: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in names:
        tensors[f"{name}.weight"] = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)
        tensors[f"{name}.scale"] = torch.rand(rows, 1, generator=generator) / 100
        if bias:
            tensors[f"{name}.bias"] = torch.randn(rows, generator=generator)
    return tensors


def expected(
    x: torch.Tensor, tensors: dict[str, torch.Tensor], name: str = "proj"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the float32 weights that int8 and scale stand for; the bias is added after a rounding to float32."""
    weight = tensors[f"{name}.weight"].float() * tensors[f"{name}.scale"]
    want, error = linear(x, weight, tensors.get(f"{name}.bias"))
    return want, error + (want.abs() + error) * 2.0**-23


@examples
@given(seeds, st.integers(1, 4), token_counts.filter(bool), st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_a_scheme_of_ones_own_is_sliced_like_any_other(
    seed: int, size: int, tokens: int, share: int, outputs: int, bias: bool
) -> None:
    """Rows and columns of the ranks, tensors of other names, shapes and dtypes: the layers know nothing of them."""
    tensors = int8_checkpoint(seed, ["proj"], outputs, size * share, bias)
    x = normal(seed, tokens, size * share)

    def rows(group: Group) -> torch.Tensor:
        cell = RowParallelLinear("proj", size * share, outputs, quantized(group)[0], bias)
        load(cell, tensors)
        cell.scheme.finish()
        return call(cell, x[:, group.rank * share : (group.rank + 1) * share])

    want, error = expected(x, tensors)
    slack = x.double().abs() @ (tensors["proj.weight"].double() * tensors["proj.scale"].double()).abs().T * 2.0**-23
    for result in on_ranks(size, rows):
        assert_close(result, want, error + slack, torch.float32)


def test_a_scheme_of_ones_own_in_a_fused_layer() -> None:
    names = ["gate_proj", "up_proj"]
    tensors = int8_checkpoint(0, names, 12, 10, True)
    x = normal(1, 3, 10)

    def run(group: Group) -> tuple[torch.Tensor, ...]:
        cell = MergedColumnParallelLinear(names, 10, [12, 12], quantized(group)[0], True)
        load(cell, tensors)
        cell.scheme.finish()
        return call(cell, x)

    for name, parts in zip(names, zip(*on_ranks(3, run), strict=True), strict=True):
        want, error = expected(x, tensors, name)
        assert_close(torch.cat(parts, 1), want, error, torch.float32)
