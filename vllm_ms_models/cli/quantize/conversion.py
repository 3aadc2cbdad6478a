"""From the tensors of a model in floats to those of the quantized copy: planned first, then filled piece by piece."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from vllm_ms_models.checkpoint.errors import quote
from vllm_ms_models.cli.quantize.calibration import Statistics
from vllm_ms_models.cli.quantize.layouts import Layout
from vllm_ms_models.cli.quantize.modules import Module
from vllm_ms_models.cli.quantize.smoothing import Smoothing
from vllm_ms_models.cli.quantize.source import Source
from vllm_ms_models.cli.quantize.writing import Tensors, Weights


@dataclass(frozen=True)
class Errors:
    """Relative errors of a quantized module: of its weight, and of its outputs on the sampled inputs (None: none)."""

    weight: float
    output: float | None


@dataclass(frozen=True)
class Item:
    """One step: a tensor that is read, and what is written for it; of a tied head, the embedding once more."""

    source: str
    tensors: Tensors
    module: Module | None = None


@dataclass(frozen=True)
class Conversion:
    """What is needed to turn the tensors of `source` into those of the copy; `statistics` by linear."""

    source: Source
    modules: Mapping[str, Module]
    layout: Layout
    statistics: Mapping[str, Statistics]
    smoothing: Smoothing

    def items(self) -> list[Item]:
        """Every step, in the order in which the tensors lie in the files of the source."""
        weights = {module.weight: module for module in self.modules.values()}
        own = {f"{module.name}.weight" for module in self.modules.values()}
        biases = {module.bias for module in self.modules.values()}
        items = []
        for name, tensor in self.source.checkpoint.tensors.items():
            module = weights.get(name)
            if name not in own and not (name in biases and not self.layout.keeps_bias):
                items.append(Item(name, {name: (tensor.dtype, tensor.shape)}))
            if module is not None:
                outputs = self.layout.tensors(module).items()
                items.append(Item(name, {f"{module.name}.{end}": tensor for end, tensor in outputs}, module))
        return items

    def run(self, items: list[Item], weights: Weights, advance: Callable[[int], object]) -> dict[str, Errors]:
        """Fills all tensors of `weights`; `advance` gets bytes read. Errors by the name of each module."""
        found: dict[str, Errors] = {}
        threads = len(os.sched_getaffinity(0))
        with ThreadPoolExecutor(threads) as pool:
            for item in items:
                if item.module is None:
                    self._copy(item.source, weights)
                else:
                    found[item.module.name] = self._quantize(item.module, weights, pool)
                advance(self.source.checkpoint.tensors[item.source].nbytes)
        return {name: found[name] for name in self.modules}

    def _copy(self, name: str, weights: Weights) -> None:
        """A tensor that stays in floats; smoothing may change norms and biases."""
        if name in self.smoothing.norms:
            weights.write(name, self.smoothing.norms[name])
            return
        divisor = self.smoothing.rows.get(name.removesuffix(".bias")) if name.endswith(".bias") else None
        if not self.source.checkpoint.tensors[name].shape:
            weights.write(name, self.source.read(name))
            return
        for rows in self.source.pieces(name):
            values = self.source.read(name, rows)
            if divisor is not None:
                values = (values.astype(np.float32) / divisor[rows]).astype(values.dtype)
            weights.write(name, values, rows.start)

    def _quantize(self, module: Module, weights: Weights, pool: ThreadPoolExecutor) -> Errors:
        """All tensors of a module. ValueError names it if it cannot be."""
        known = self.statistics.get(module.linear)
        for end, values in self.layout.constants(module, known).items():
            weights.write(f"{module.name}.{end}", values)
        rounded = None if known is None else self.layout.inputs(known.sample, known)

        def one(rows: slice) -> np.ndarray:
            """Sums of squares: of the weight's error, the weight, the outputs' error, the outputs."""
            weight, bias = self.floats(module, rows)
            quantized = self.layout.rows(weight, bias, known)
            for end, values in quantized.tensors.items():
                weights.write(f"{module.name}.{end}", values, rows.start)
            sums = [_square(quantized.matrix - weight), _square(weight), 0.0, 0.0]
            if known is not None and rounded is not None:
                exact = known.sample @ weight.T
                sums[2:] = _square(rounded @ quantized.matrix.T - exact), _square(exact)
            return np.array(sums)

        try:
            total = np.sum(list(pool.map(one, self.source.pieces(module.weight))), 0)
        except ValueError as error:
            raise ValueError(f"{quote(module.weight)} of {self.source.folder} cannot be quantized: {error}.") from error
        ratios = np.sqrt(total[::2] / np.where(total[1::2] > 0, total[1::2], 1))
        return Errors(float(ratios[0]), None if known is None else float(ratios[1]))

    def floats(self, module: Module, rows: slice) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows of the weight as float32 `[rows, in]`, smoothed, and of the bias."""
        weight = self.source.read(module.weight, rows).astype(np.float32)
        bias = None if module.bias is None else self.source.read(module.bias, rows).astype(np.float32)
        if (columns := self.smoothing.columns.get(module.name)) is not None:
            weight *= columns
        if (divisor := self.smoothing.rows.get(module.name)) is not None:
            weight /= divisor[rows, None]
            bias = None if bias is None else bias / divisor[rows]
        return weight, bias


def _square(values: np.ndarray) -> float:
    """Sum of squares, without a copy."""
    flat = values.reshape(-1)
    return float(np.dot(flat, flat))
