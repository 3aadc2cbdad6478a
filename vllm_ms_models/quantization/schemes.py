"""The scheme of each module of a checkpoint, from the spec that the checkpoint's format has for it."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import mindspore as ms

from vllm_ms_models.checkpoint.errors import CheckpointError
from vllm_ms_models.quantization.base import Float, LinearScheme, Part, Quantization
from vllm_ms_models.quantization.formats.common import Format
from vllm_ms_models.quantization.formats.mxfp4 import Mxfp4
from vllm_ms_models.quantization.fp8 import Fp8Scheme
from vllm_ms_models.quantization.integers import Int8ProductScheme, Int8Scheme
from vllm_ms_models.quantization.packed import AwqScheme, CompressedScheme, GptqScheme
from vllm_ms_models.quantization.specs import (
    AwqWeight,
    FloatWeight,
    Fp8Weight,
    GptqWeight,
    Int8Product,
    Int8Weight,
    PackedWeight,
    Spec,
)
from vllm_ms_models.quantization.stacked import StackedMxfp4

SCHEMES: dict[type[Spec], Callable[..., LinearScheme]] = {
    AwqWeight: AwqScheme,
    FloatWeight: lambda parts, bias, dtype, spec: Float(parts, bias, dtype),
    Fp8Weight: Fp8Scheme,
    GptqWeight: GptqScheme,
    Int8Product: Int8ProductScheme,
    Int8Weight: Int8Scheme,
    PackedWeight: CompressedScheme,
}


class FromCheckpoint(Quantization):
    """Every linear as the checkpoint's format says, by the exact names of its parts, which it has without `prefix`."""

    def __init__(self, format: Format, prefix: str = "") -> None:
        self.format = format
        self.prefix = prefix

    def linear(self, parts: Sequence[Part], bias: bool, dtype: ms.Type) -> LinearScheme:
        specs = [self.format.spec(part.name.removeprefix(self.prefix)) for part in parts]
        for part, spec in zip(parts, specs, strict=True):
            if spec != specs[0]:
                raise CheckpointError(
                    f"{parts[0].name} and {part.name} are multiplied at once and must be quantized alike, but the "
                    f"checkpoint has {describe(specs[0], spec)} for the one and {describe(spec, specs[0])} for the "
                    "other; quantize the model with one scheme for both."
                )
        try:
            return SCHEMES[type(specs[0])](parts, bias, dtype, specs[0])
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{parts[0].name} cannot be loaded as {describe(specs[0])}: {error}") from error

    def stacked(self, name: str, parts: Sequence[Part], expert: int, experts: int, dtype: ms.Type) -> LinearScheme:
        """In floats unless the format is for experts: what others quantize are linears."""
        if isinstance(self.format, Mxfp4):
            return StackedMxfp4(name, parts, expert, experts, dtype)
        return super().stacked(name, parts, expert, experts, dtype)


def describe(spec: Spec, other: Spec | None = None) -> str:
    """The kind of a spec; with another of the same kind, only what differs from it."""
    kind = type(spec).__name__
    values: dict[str, Any] = {field.name: getattr(spec, field.name) for field in fields(spec)}
    if type(other) is type(spec):
        values = {name: value for name, value in values.items() if getattr(other, name) != value}
    return f"{kind}({', '.join(f'{name}={value!r}' for name, value in values.items())})"
