"""AWQ, GPTQ, FP8, ModelSlim and Golden Stick, each from the definition of its format."""

from typing import Any

import ml_dtypes
import numpy as np

from tests.quantization.writers import (
    Layer,
    Scheme,
    Written,
    dequantized,
    of_floats,
    of_rounded_inputs,
    of_rounded_tokens,
    packed,
    rounded,
)
from tests.quantization.writers_compressed import config

# --- 4 and 8 bits in words ---------------------------------------------------------------------------------------

AWQ_FIELDS = (0, 2, 4, 6, 1, 3, 5, 7)  # column of each field, from the lowest


def awq(size: int) -> Any:
    def write(layer: Layer, rng: np.random.Generator) -> Written:
        integers, scales, zeros = rounded(layer.weight, 4, size, False, np.float16)
        tensors = {
            "qweight": packed((integers + 8).T, 4, AWQ_FIELDS),
            "qzeros": packed((zeros + 8).T, 4, AWQ_FIELDS),
            "scales": scales.T,
        }
        return Written(tensors, of_floats(dequantized(integers, scales, zeros, size), layer.bias))

    return write


def gptq(bits: int, size: int, symmetric: bool, version: int = 1, ordered: bool = False) -> Any:
    def write(layer: Layer, rng: np.random.Generator) -> Written:
        width = layer.weight.shape[1]
        order = rng.permutation(width) if ordered else np.arange(width)
        integers, scales, zeros = rounded(layer.weight[:, order], bits, size, symmetric, np.float16)
        matrix, stored = np.empty(layer.weight.shape), np.empty(layer.weight.shape, np.int64)
        matrix[:, order] = dequantized(integers, scales, zeros, size)
        stored[:, order] = integers
        half = 1 << (bits - 1)
        words = packed((zeros + half).T, bits).view(np.uint32)
        if version == 1:  # GPTQModel subtracts from whole words
            words = words - np.uint32(sum(1 << (bits * i) for i in range(32 // bits)))
        groups = np.empty(width, np.int32)
        groups[order] = np.arange(width) // (size or width)
        tensors = {
            "qweight": packed(stored + half, bits).T,
            "qzeros": words.view(np.int32),
            "scales": scales.T,
            "g_idx": groups,
        }
        return Written(tensors, of_floats(matrix, layer.bias))

    return write


def gptq_config(bits: int, size: int, symmetric: bool, version: int = 1, ordered: bool = False) -> dict[str, Any]:
    return {
        "bits": bits,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "desc_act": ordered,
        "group_size": size or -1,
        "lm_head": False,
        "meta": {"quantizer": ["gptqmodel:2.0.0"], "damp_percent": 0.05, "mse": 0.0},
        "pack_dtype": "int32",
        "quant_method": "gptq",
        "sym": symmetric,
    }


def gptq_scheme(*arguments: Any, **options: Any) -> Scheme:
    return Scheme(gptq(*arguments, **options), gptq_config(*arguments, **options))


AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
WORDS = {
    "awq": Scheme(awq(16), AWQ_CONFIG | {"modules_to_not_convert": None}),
    "gptq": gptq_scheme(4, 16, True),
    "gptq, asymmetric": gptq_scheme(4, 16, False),
    "gptq, version 2": gptq_scheme(4, 16, False, version=2),
    "gptq, activation order": gptq_scheme(4, 16, True, ordered=True),
    "gptq, by channel, activation order": gptq_scheme(4, 0, False, version=2, ordered=True),
    "gptq, 8 bits": gptq_scheme(8, 16, True),
    "gptq, 8 bits, asymmetric": gptq_scheme(8, 0, False),
}

# --- FP8 ---------------------------------------------------------------------------------------------------------

FP8_MAX = 448.0


def fp8(block: tuple[int, int], name: str, requantized: bool = False, flat: bool = False, static: bool = False) -> Any:
    """A scale for each block, which may be wider than the matrix; `flat`: [1] instead of [1, 1]."""

    def write(layer: Layer, rng: np.random.Generator) -> Written:
        rows, columns = layer.weight.shape
        height, width = block[0] or rows, block[1] or columns
        scales = np.empty((-(-rows // height), -(-columns // width)), np.float32)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                part = layer.weight[i * height : (i + 1) * height, j * width : (j + 1) * width]
                scales[i, j] = np.abs(part).max() / FP8_MAX
        full = np.repeat(np.repeat(scales, height, 0), width, 1)[:rows, :columns]
        values = (layer.weight / full).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
        matrix = values.astype(np.float32) * full
        tensors = {"weight": values, name: scales.reshape(-1) if flat else scales}
        if static:
            tensors["input_scale"] = np.array([0.02], np.float32)
        if not requantized:
            return Written(tensors, of_floats(matrix.astype(np.float64), layer.bias))
        steps = np.abs(matrix).max(1, keepdims=True) / np.float32(127)
        integers = np.rint(matrix / steps).astype(np.int64)
        return Written(tensors, of_rounded_tokens(integers, steps.astype(np.float64), layer.bias))

    return write


FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 24]}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
FP8_TOKEN = FLOAT8 | {"strategy": "token", "dynamic": True}
FP8 = {
    "fp8 in blocks": Scheme(fp8((32, 24), "weight_scale_inv"), FP8_CONFIG),
    "fp8": Scheme(
        fp8((0, 0), "weight_scale", flat=True, static=True), {"quant_method": "fp8", "activation_scheme": "static"}
    ),
    "compressed-tensors fp8": Scheme(
        fp8((0, 0), "weight_scale", flat=True, static=True),
        config("float-quantized", FLOAT8 | {"strategy": "tensor"}, FLOAT8 | {"strategy": "tensor", "dynamic": False}),
    ),
    "compressed-tensors fp8, by channel": Scheme(
        fp8((1, 0), "weight_scale"), config("float-quantized", FLOAT8 | {"strategy": "channel"}, FP8_TOKEN)
    ),
    "compressed-tensors fp8 in blocks": Scheme(
        fp8((32, 24), "weight_scale"),
        config(
            "float-quantized",
            FLOAT8 | {"strategy": "block", "block_structure": [32, 24]},
            FLOAT8 | {"strategy": "group", "group_size": 24, "dynamic": True},
        ),
    ),
}
FP8_AS_INT8 = {
    "fp8 in blocks": Scheme(fp8((32, 24), "weight_scale_inv", True), FP8_CONFIG, int8_inputs=True),
    "compressed-tensors fp8, by channel": Scheme(
        fp8((1, 0), "weight_scale", True),
        config("float-quantized", FLOAT8 | {"strategy": "channel"}, FP8_TOKEN),
        int8_inputs=True,
    ),
}

# --- description files -------------------------------------------------------------------------------------------


def product(bits64: bool = False, channels: bool = False) -> Any:
    """Static W8A8: scale of the product, and a correction of sums that holds the layer's own bias.

    ModelSlim also writes the bias, for information. `channels`: scale and offset of each input (Golden Stick), the
    scales as smoothing leaves them; the weight has been multiplied by what they are divided by.
    """

    def write(layer: Layer, rng: np.random.Generator) -> Written:
        width = layer.weight.shape[1]
        step = np.float32((layer.highest - layer.lowest) / 255)
        offset = int(np.rint(-128 - layer.lowest / step))
        smooth = rng.choice([0.5, 1.0, 2.0], width).astype(np.float32) if channels else np.ones(width, np.float32)
        integers, scales, _ = rounded(layer.weight * smooth, 8, 0, True, np.float32)
        scale = (scales * step).reshape(-1)
        bias = np.zeros(len(scale)) if layer.bias is None else layer.bias
        addend = np.rint(bias / scale - offset * integers.sum(1)).astype(np.int64)
        steps = step * smooth if channels else np.array([step])
        tensors = {
            "weight": integers.astype(np.int8),
            "deq_scale": scale.view(np.int32).astype(np.int64) if bits64 else scale,
            "quant_bias": addend.astype(np.int32),
            "input_scale": steps,
            "input_offset": np.full(len(steps), offset, np.int8 if channels else np.float32),
        }
        if channels:
            tensors["beta"] = np.zeros(width, np.int32)
        return Written(tensors, of_rounded_inputs(integers, addend, scale, steps, offset, None))

    return write


def rows(scale: str, offset: str | None, dynamic: bool = True, size: int = 0, flat: bool = False) -> Any:
    """int8 rows (or groups of `size`) with scale and offset, both float32."""

    def write(layer: Layer, rng: np.random.Generator) -> Written:
        integers, scales, zeros = rounded(layer.weight, 8, size, dynamic, np.float32)
        tensors = {"weight": integers.astype(np.int8), scale: scales.reshape(-1) if flat else scales}
        if offset is not None:
            tensors[offset] = (zeros.reshape(-1) if flat else zeros).astype(np.float32)
        if dynamic:
            return Written(tensors, of_rounded_tokens(integers - zeros, scales.astype(np.float64), layer.bias))
        return Written(tensors, of_floats(dequantized(integers, scales, zeros, size), layer.bias))

    return write


MODELSLIM, GOLDEN_STICK = "quant_model_description.json", "quantization_description.json"
META = {"model_quant_type": "W8A8", "version": "1.0.0", "group_size": 0, "metadata": {}, "optional": {}}
GROUPS = META | {"group_size": 32}
DESCRIBED = {
    "modelslim w8a8": Scheme(product(), None, MODELSLIM, "W8A8", True, META),
    "modelslim w8a8 of float16": Scheme(product(bits64=True), None, MODELSLIM, "W8A8", True, META),
    "modelslim w8a8 dynamic": Scheme(
        rows("weight_scale", "weight_offset"), None, MODELSLIM, "W8A8_DYNAMIC", True, META
    ),
    "modelslim w8a16": Scheme(
        rows("weight_scale", "weight_offset", False, flat=True), None, MODELSLIM, "W8A16", False, META
    ),
    "modelslim w8a16 in groups": Scheme(
        rows("weight_scale", "weight_offset", False, 32), None, MODELSLIM, "W8A16", False, GROUPS
    ),
    "golden stick w8a8": Scheme(product(channels=True), None, GOLDEN_STICK, "W8A8", True),
    "golden stick w8a8 dynamic": Scheme(rows("w_scale", None, flat=True), None, GOLDEN_STICK, "W8A8_DYNAMIC", True),
}

SCHEMES: dict[str, Scheme] = {**WORDS, **FP8, **DESCRIBED}
