"""How a scheme is stored in a format: the tensors of a module, and what the integers in them stand for.

compressed-tensors is what llm-compressor writes and vLLM's own `compressed_tensors.py` reads, but for scales of W8A8,
which are float32, the dtype that vLLM keeps them in. ModelSlim is Ascend's, as in docs/quantization.md.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from vllm_ms_models.checkpoint.header import DTYPES
from vllm_ms_models.cli.quantize import rounding
from vllm_ms_models.cli.quantize.calibration import Statistics
from vllm_ms_models.cli.quantize.modules import Module

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""safetensors' dtype name and shape of each tensor of a module, by the end of its name."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a quantized module: their part of each tensor, and the matrix that the integers stand for."""

    tensors: dict[str, np.ndarray]
    matrix: np.ndarray


class Layout(ABC):
    """One scheme in one format."""

    keeps_bias: ClassVar[bool] = True

    @abstractmethod
    def tensors(self, module: Module) -> Tensors:
        """What is stored for `module`, its own bias excepted."""

    def constants(self, module: Module, known: Statistics | None) -> dict[str, np.ndarray]:
        """The tensors that are not cut by rows."""
        return {}

    @abstractmethod
    def rows(self, weight: np.ndarray, bias: np.ndarray | None, known: Statistics | None) -> Rows:
        """Quantizes float32 rows `[rows, in]`; `bias` is float32 `[rows]`."""

    @abstractmethod
    def inputs(self, x: np.ndarray, known: Statistics) -> np.ndarray:
        """Float32 inputs `[tokens, in]` with the rounding that they have in this scheme."""


class DynamicInt8(Layout):
    """int8 rows; activations are rounded by token when they come."""

    def tensors(self, module: Module) -> Tensors:
        return {"weight": ("I8", module.shape), "weight_scale": ("F32", (module.shape[0], 1))}

    def rows(self, weight: np.ndarray, bias: np.ndarray | None, known: Statistics | None) -> Rows:
        integers, scales = rounding.int8_rows(weight)
        return Rows({"weight": integers, "weight_scale": scales}, integers * scales)

    def inputs(self, x: np.ndarray, known: Statistics) -> np.ndarray:
        return rounding.round_tokens(x)


class StaticInt8(DynamicInt8):
    """int8 rows; activations are rounded by one scale, the same for all parts of a linear."""

    def tensors(self, module: Module) -> Tensors:
        return super().tensors(module) | {"input_scale": ("F32", (1,))}

    def constants(self, module: Module, known: Statistics | None) -> dict[str, np.ndarray]:
        return {"input_scale": np.array([self._scale(known)], np.float32)}

    def inputs(self, x: np.ndarray, known: Statistics) -> np.ndarray:
        return rounding.round_inputs(x, self._scale(known), 0)

    def _scale(self, known: Statistics | None) -> np.float32:
        assert known is not None
        return rounding.symmetric_input(float(known.low.min()), float(known.high.max()))


class PackedInt4(Layout):
    """int4 in groups, eight in a word; activations stay in floats. Scales are in the model's dtype."""

    def __init__(self, group_size: int, dtype: str) -> None:
        self.group_size, self.dtype = group_size, dtype

    def tensors(self, module: Module) -> Tensors:
        rows, width = module.shape
        return {
            "weight_packed": ("I32", (rows, width // 8)),
            "weight_scale": (self.dtype, (rows, width // self.group_size)),
            "weight_shape": ("I64", (2,)),
        }

    def constants(self, module: Module, known: Statistics | None) -> dict[str, np.ndarray]:
        return {"weight_shape": np.array(module.shape, np.int64)}

    def rows(self, weight: np.ndarray, bias: np.ndarray | None, known: Statistics | None) -> Rows:
        importance = None if known is None else known.square
        integers, scales = rounding.int4_groups(weight, self.group_size, importance, DTYPES[self.dtype])
        matrix = integers * np.repeat(scales.astype(np.float32), self.group_size, 1)
        return Rows({"weight_packed": rounding.pack_int4(integers), "weight_scale": scales}, matrix)

    def inputs(self, x: np.ndarray, known: Statistics) -> np.ndarray:
        return x


class ModelSlimDynamic(DynamicInt8):
    """`W8A8_DYNAMIC`: as compressed-tensors', with offsets, which are 0."""

    def tensors(self, module: Module) -> Tensors:
        return super().tensors(module) | {"weight_offset": ("F32", (module.shape[0], 1))}

    def rows(self, weight: np.ndarray, bias: np.ndarray | None, known: Statistics | None) -> Rows:
        found = super().rows(weight, bias, known)
        zeros = np.zeros((len(weight), 1), np.float32)
        return Rows(found.tensors | {"weight_offset": zeros}, found.matrix)


class ModelSlimStatic(Layout):
    """`W8A8`: `(round(x / input_scale) + input_offset) . weight + quant_bias`, times `deq_scale`.

    `deq_scale` is input_scale * weight_scale, as the bits of the float32 in int64 for float16 models; `quant_bias` is
    `-input_offset * sum_k weight_k`, and the layer's own bias over deq_scale.
    """

    keeps_bias = False

    def __init__(self, dtype: str) -> None:
        self.bits = dtype == "F16"

    def tensors(self, module: Module) -> Tensors:
        rows = module.shape[:1]
        return {
            "weight": ("I8", module.shape),
            "deq_scale": ("I64" if self.bits else "F32", rows),
            "quant_bias": ("I32", rows),
            "input_scale": ("F32", (1,)),
            "input_offset": ("F32", (1,)),
        }

    def constants(self, module: Module, known: Statistics | None) -> dict[str, np.ndarray]:
        scale, offset = self._input(known)
        return {"input_scale": np.array([scale], np.float32), "input_offset": np.array([offset], np.float32)}

    def rows(self, weight: np.ndarray, bias: np.ndarray | None, known: Statistics | None) -> Rows:
        step, offset = self._input(known)
        integers, scales = rounding.int8_rows(weight)
        matrix = integers * scales
        product = scales[:, 0] * step
        addend = -offset * integers.sum(1, dtype=np.int64)
        if bias is not None:
            if not np.isfinite(bias).all():
                raise ValueError("its bias has values that are not finite")
            # Of a row of zeros only the bias is left: its scale is chosen for that.
            product = np.where(integers.any(1), product, np.maximum(np.abs(bias), 1) * np.float32(2**-23))
            addend = addend + np.rint(bias / product.astype(np.float64)).astype(np.int64)
        if addend.size and np.abs(addend).max() >= 2**31:
            raise ValueError(
                "its bias is too large for 32 bits in units of its scale; leave it in floats with --ignore"
            )
        stored = product.view(np.int32).astype(np.int64) if self.bits else product
        return Rows({"weight": integers, "deq_scale": stored, "quant_bias": addend.astype(np.int32)}, matrix)

    def inputs(self, x: np.ndarray, known: Statistics) -> np.ndarray:
        return rounding.round_inputs(x, *self._input(known))

    def _input(self, known: Statistics | None) -> tuple[np.float32, int]:
        assert known is not None
        return rounding.asymmetric_input(float(known.low.min()), float(known.high.max()))


def layout(scheme: str, format: str, dtype: str, group_size: int) -> Layout:
    """Of the names on the command line; `dtype` is safetensors' name of the model's."""
    if scheme == "w4a16":
        return PackedInt4(group_size, dtype)
    if format == "modelslim":
        return ModelSlimStatic(dtype) if scheme == "w8a8-static" else ModelSlimDynamic()
    return StaticInt8() if scheme == "w8a8-static" else DynamicInt8()


# --- what says so --------------------------------------------------------------------------------------------------


def quantization_config(scheme: str, group_size: int, ignored: list[str], head: str | None) -> dict[str, Any]:
    """`quantization_config` of config.json in compressed-tensors; `head` is named if it is quantized.

    vLLM's class of heads is none of the target "Linear", so that a head needs its name.
    """
    packed = scheme == "w4a16"
    weights = _arguments(4 if packed else 8, "group" if packed else "channel", group_size if packed else None)
    inputs = None
    if scheme == "w8a8-dynamic":
        inputs = _arguments(8, "token", None) | {"dynamic": True, "observer": None}
    elif scheme == "w8a8-static":
        inputs = _arguments(8, "tensor", None)
    format = "pack-quantized" if packed else "int-quantized"
    group = {
        "format": format,
        "input_activations": inputs,
        "output_activations": None,
        "targets": ["Linear"] if head is None else ["Linear", head],
        "weights": weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": format,
        "global_compression_ratio": None,
        "ignore": ignored,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _arguments(bits: int, strategy: str, group_size: int | None) -> dict[str, Any]:
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": group_size,
        "num_bits": bits,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": strategy,
        "symmetric": True,
        "type": "int",
    }


WORDS = {"w8a8-dynamic": "W8A8_DYNAMIC", "w8a8-static": "W8A8"}


def description(scheme: str, tensors: dict[str, bool]) -> dict[str, Any]:
    """`quant_model_description.json`: the scheme of each tensor, by whether it belongs to a quantized weight."""
    word = WORDS[scheme]
    words = {name: word if quantized else "FLOAT" for name, quantized in tensors.items()}
    return {"model_quant_type": word, "version": "1.0.0", "group_size": 0, **words}
