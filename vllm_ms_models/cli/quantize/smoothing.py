"""SmoothQuant (Xiao et al., 2022): outliers of a linear's inputs move into its weight, where rows have room for them.

Channel j of the input is divided by `s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)` (equation 4), and column j of the
weight multiplied by it. The division costs nothing: it goes into the weight of the norm that the input comes from, or,
for a product of gate and up, into the rows of up. Every linear that takes the same input shares s.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from vllm_ms_models.cli.quantize.calibration import Statistics
from vllm_ms_models.cli.quantize.modules import Module
from vllm_ms_models.cli.quantize.source import Source

SMALLEST, LARGEST = np.float32(1e-5), np.float32(1e5)


@dataclass
class Smoothing:
    """What becomes of tensors: `columns` [in] multiply a module's weight, `rows` [out] divide weight and bias.

    `norms` are new weights of norms by tensor name, in the dtype they are stored in. `origins` has, of each module that
    is smoothed, the tensor or module that its input's channels were divided in.
    """

    columns: dict[str, np.ndarray] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    norms: dict[str, np.ndarray] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)


def smooth(
    source: Source,
    modules: Mapping[str, Module],
    linears: Mapping[str, Iterable[str]],
    statistics: dict[str, Statistics],
    alpha: float,
) -> Smoothing:
    """Plans the smoothing and divides `statistics` accordingly.

    `linears` has the names of all parts of each linear, by that of the first. An input that goes to a linear in floats
    as well is left alone, and so is one whose up is in floats.
    """
    result = Smoothing()
    sharing: dict[str, list[str]] = {}
    for name, known in statistics.items():
        if origin := known.norm or known.up:
            sharing.setdefault(origin, []).append(name)
    for origin, names in sharing.items():
        parts = [part for name in names for part in linears[name]]
        is_norm = statistics[names[0]].norm is not None
        if not all(part in modules for part in (*parts, *(() if is_norm else (origin,)))):
            continue
        known = statistics[names[0]]
        inputs = np.maximum(-known.low, known.high)
        scales = migration(inputs, _largest(source, [modules[part] for part in parts]), alpha)
        if is_norm:
            scales, result.norms[origin] = into_norm(source.read(origin), scales)
        else:
            result.rows[origin] = scales
        for part in parts:
            result.columns[part] = scales
            result.origins[part] = origin
        for name in names:
            statistics[name] = divided(statistics[name], scales)
    return result


def migration(inputs: np.ndarray, weights: np.ndarray, alpha: float) -> np.ndarray:
    """Equation 4, of the largest magnitudes [in] of inputs and of the weight's columns; 1 where either is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = (inputs ** np.float32(alpha) / weights ** np.float32(1 - alpha)).astype(np.float32)
    usable = (inputs > 0) & (weights > 0) & np.isfinite(scales)
    return np.where(usable, np.clip(scales, SMALLEST, LARGEST), np.float32(1))


def into_norm(weight: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A norm's weight divided by `scales`, in its own dtype; and by what exactly it was divided, after rounding.

    What rounding changes is so taken back by the columns of the linears: the function stays what it was.
    """
    old = weight.astype(np.float32)
    new = (old / scales).astype(weight.dtype)
    with np.errstate(divide="ignore", invalid="ignore"):
        exact = old / new.astype(np.float32)
    usable = np.isfinite(exact) & (exact > 0)
    return np.where(usable, exact, np.float32(1)), np.where(usable, new, weight)


def divided(known: Statistics, scales: np.ndarray) -> Statistics:
    """The statistics of the input divided by `scales` [in]."""
    square = known.square / np.square(scales)
    return replace(known, low=known.low / scales, high=known.high / scales, square=square, sample=known.sample / scales)


def _largest(source: Source, modules: Iterable[Module]) -> np.ndarray:
    """The largest magnitude in each column of weights with the same inputs."""
    return np.max(
        [
            np.abs(source.read(module.weight, rows).astype(np.float32)).max(0)
            for module in modules
            for rows in source.pieces(module.weight)
        ],
        0,
    )
