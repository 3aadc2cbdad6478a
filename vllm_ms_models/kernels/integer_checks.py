"""What may be loaded into a weight of small integers: checks that the back ends share."""

import math

import numpy as np

from vllm_ms_models.kernels.interface import Integers, Weight


def integers_of(weight: Weight) -> Integers:
    """How the weight is stored; ValueError if it holds floats."""
    if weight.integers is None:
        raise ValueError(f"Integers cannot be loaded into a weight of {weight.dtype}; make it by new_integer_weight.")
    return weight.integers


def check_sizes(sizes: tuple[int, ...], in_features: int) -> None:
    if in_features < 0 or any(size < 0 for size in sizes):
        raise ValueError(f"A weight cannot have the sizes {sizes} and {in_features} inputs.")


def check_values(weight: Weight, part: int, first_row: int, values: np.ndarray) -> None:
    """ValueError unless `values` fit those rows and the weight's bits."""
    bits = integers_of(weight).bits
    _check_rows(weight, part, first_row, values, "values", np.int8, (weight.in_features,))
    if bits == 4 and values.size and (values.min() < -8 or values.max() > 7):
        raise ValueError(f"A value of {values.min()} or {values.max()} does not fit 4 bits: -8 to 7.")


def check_scales(
    weight: Weight, part: int, first_row: int, scales: np.ndarray, zeros: np.ndarray | None, addends: np.ndarray | None
) -> None:
    """ValueError unless the arrays fit those rows."""
    integers = integers_of(weight)
    groups = integers.groups(weight.in_features)
    _check_rows(weight, part, first_row, scales, "scales", np.float32, (groups,))
    if zeros is not None:
        _check_rows(weight, part, first_row, zeros, "zeros", np.int8, (groups,))
        if len(zeros) != len(scales):
            raise ValueError(f"There are zeros for {len(zeros)} rows, and scales for {len(scales)}.")
    if addends is not None:
        if integers.activations == "float":
            raise ValueError("There are addends, but activations are not rounded to integers.")
        _check_rows(weight, part, first_row, addends, "addends", np.int32, ())
        if len(addends) != len(scales):
            raise ValueError(f"There are {len(addends)} addends, and scales for {len(scales)} rows.")


def check_input(weight: Weight, part: int, scale: float, offset: int) -> None:
    """ValueError unless the part has a static input and this can be it."""
    activations = integers_of(weight).activations
    if activations != "static":
        raise ValueError(f"Activations of the weight are {activations}: they have no scale of their own.")
    if not 0 <= part < len(weight.sizes):
        raise ValueError(f"The weight has {len(weight.sizes)} parts, no part {part}.")
    with np.errstate(over="ignore", divide="ignore", under="ignore"):
        inverse = np.float32(1) / np.float32(scale)
    if not (scale > 0 and math.isfinite(inverse) and inverse > 0 and -128 <= offset <= 127 and offset == int(offset)):
        raise ValueError(f"An input cannot have the scale {scale} and the offset {offset}.")


def _check_rows(
    weight: Weight, part: int, first_row: int, array: np.ndarray, name: str, dtype: type, columns: tuple[int, ...]
) -> None:
    if array.dtype != dtype:
        raise ValueError(f"The {name} have dtype {array.dtype}; {np.dtype(dtype)} is expected.")
    if array.ndim != 1 + len(columns) or array.shape[1:] != columns:
        expected = ", ".join(("rows", *map(str, columns)))
        raise ValueError(f"The {name} have shape {array.shape}; [{expected}] is expected.")
    if not 0 <= part < len(weight.sizes):
        raise ValueError(f"The weight has {len(weight.sizes)} parts, no part {part}.")
    if not 0 <= first_row <= weight.sizes[part] - len(array):
        raise ValueError(
            f"{len(array)} rows from row {first_row} do not fit part {part} of a weight of sizes {weight.sizes}."
        )
