"""compressed-tensors, as llm-compressor writes it."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from tests.quantization.writers import (
    Layer,
    Scheme,
    Written,
    bf16,
    dequantized,
    of_floats,
    of_rounded_inputs,
    of_rounded_tokens,
    packed,
    rounded,
)

TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
TENSOR = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}


def config(format: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None, **others: Any) -> dict[str, Any]:
    """`quantization_config` with everything that llm-compressor writes."""
    common: dict[str, Any] = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "observer": "minmax",
        "observer_kwargs": {},
        "type": "int",
    }
    group = {
        "input_activations": None if inputs is None else common | dict(inputs),
        "output_activations": None,
        "targets": ["Linear"],
        "weights": common | dict(weights),
    }
    return {
        "config_groups": {"group_0": group},
        "format": format,
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    } | others


def int8(symmetric: bool = True, per_tensor: bool = False, scale: Any = bf16) -> Any:
    """int8 rows with a scale each (or one in all), activations rounded by token."""

    def write(layer: Layer, rng: np.random.Generator) -> Written:
        weight = layer.weight.reshape(1, -1) if per_tensor else layer.weight
        integers, scales, zeros = rounded(weight, 8, 0, symmetric, ml_dtypes.bfloat16)
        integers = integers.reshape(layer.weight.shape)
        tensors = {"weight": integers.astype(np.int8), "weight_scale": scales.reshape(-1) if per_tensor else scales}
        if not symmetric:
            tensors["weight_zero_point"] = zeros.astype(np.int8)
        return Written(tensors, of_rounded_tokens(integers - zeros, scales.astype(np.float64), layer.bias))

    return write


def int8_static(symmetric: bool) -> Any:
    def write(layer: Layer, rng: np.random.Generator) -> Written:
        integers, scales, _ = rounded(layer.weight, 8, 0, True, np.float32)
        largest = max(-layer.lowest, layer.highest)
        step, offset = np.float32(largest / 127), 0
        if not symmetric:
            step = np.float32((layer.highest - layer.lowest) / 255)
            offset = int(np.rint(-128 - layer.lowest / step))
        tensors = {"weight": integers.astype(np.int8), "weight_scale": scales, "input_scale": np.array([step])}
        if not symmetric:
            tensors["input_zero_point"] = np.array([offset], np.int8)
        addend = -offset * integers.sum(1)
        product = scales * step
        return Written(tensors, of_rounded_inputs(integers, addend, product, np.array([step]), offset, layer.bias))

    return write


def weight_only(size: int) -> Any:
    """int8 as it is, activations in floats."""

    def write(layer: Layer, rng: np.random.Generator) -> Written:
        integers, scales, zeros = rounded(layer.weight, 8, size, True, ml_dtypes.bfloat16)
        tensors = {"weight": integers.astype(np.int8), "weight_scale": scales}
        return Written(tensors, of_floats(dequantized(integers, scales, zeros, size), layer.bias))

    return write


def packed_weight(bits: int, size: int, symmetric: bool = True, ordered: bool = False) -> Any:
    def write(layer: Layer, rng: np.random.Generator) -> Written:
        rows, width = layer.weight.shape
        order = np.arange(width)
        if ordered:
            order = rng.permutation(width)
        integers, scales, zeros = rounded(layer.weight[:, order], bits, size, symmetric, ml_dtypes.bfloat16)
        matrix = np.empty(layer.weight.shape)
        matrix[:, order] = dequantized(integers, scales, zeros, size)
        stored = np.empty_like(integers)
        stored[:, order] = integers
        half = 1 << (bits - 1)
        tensors = {
            "weight_packed": packed(stored + half, bits),
            "weight_scale": scales,
            "weight_shape": np.array([rows, width], np.int64),
        }
        if not symmetric:
            tensors["weight_zero_point"] = packed((zeros + half).T, bits).T
        if ordered:
            groups = np.empty(width, np.int32)
            groups[order] = np.arange(width) // size
            tensors["weight_g_idx"] = groups
        return Written(tensors, of_floats(matrix, layer.bias))

    return write


WEIGHTS = {"num_bits": 8, "symmetric": True, "strategy": "channel"}
SCHEMES: dict[str, Scheme] = {
    "w8a8 dynamic": Scheme(int8(), config("int-quantized", WEIGHTS, TOKEN), int8_inputs=True),
    "w8a8 dynamic, one scale": Scheme(
        int8(per_tensor=True), config("int-quantized", WEIGHTS | {"strategy": "tensor"}, TOKEN), int8_inputs=True
    ),
    "w8a8 dynamic, asymmetric weights": Scheme(
        int8(symmetric=False), config("int-quantized", WEIGHTS | {"symmetric": False}, TOKEN), int8_inputs=True
    ),
    "w8a8 static": Scheme(int8_static(True), config("int-quantized", WEIGHTS, TENSOR), int8_inputs=True),
    "w8a8 static, asymmetric": Scheme(
        int8_static(False), config("int-quantized", WEIGHTS, TENSOR | {"symmetric": False}), int8_inputs=True
    ),
    "w8a16": Scheme(weight_only(0), config("naive-quantized", WEIGHTS, None)),
    "w8a16 in groups": Scheme(
        weight_only(32), config("naive-quantized", WEIGHTS | {"strategy": "group", "group_size": 32}, None)
    ),
    "packed w4a16": Scheme(
        packed_weight(4, 32),
        config("pack-quantized", {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 32}, None),
    ),
    "packed w4a16, asymmetric": Scheme(
        packed_weight(4, 16, symmetric=False),
        config("pack-quantized", {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 16}, None),
    ),
    "packed w4a16, by channel": Scheme(
        packed_weight(4, 0, symmetric=False),
        config("pack-quantized", {"num_bits": 4, "symmetric": False, "strategy": "channel"}, None),
    ),
    "packed w8a16, by channel": Scheme(packed_weight(8, 0), config("pack-quantized", WEIGHTS, None)),
    "packed w4a16, activation order": Scheme(
        packed_weight(4, 16, ordered=True),
        config(
            "pack-quantized",
            {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 16, "actorder": "group"},
            None,
        ),
    ),
}
