"""A model as graphs that MindSpore compiles, one for each kind of steps.

The kinds are steps in which every sequence has one token, steps in which none has context, and all others
(kernels/ascend/graph/sequences.py); layers with a window may be of another kind than the rest. The graphs' inputs are
tensors of any size: tokens, or what is in their place, positions, what each cache group's layers are told of the
sequences, and what mixtures of experts are told of data-parallel ranks.
**Not run on hardware.**
"""

import logging
from collections.abc import Sequence
from typing import Any, Literal

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from vllm_ms_models.distributed.rows import DataParallel
from vllm_ms_models.kernels import Kernels, Weight
from vllm_ms_models.kernels.ascend.graph import AscendGraphKernels, sequences
from vllm_ms_models.kernels.ascend.graph.latent_attention import padded_size
from vllm_ms_models.layers.attention import Attention
from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.mla import LatentAttention, LatentHeads
from vllm_ms_models.layers.moe import MoE
from vllm_ms_models.layers.rotary import RotaryEmbedding, SectionedRows

logger = logging.getLogger("vllm.ms_models")

Group = tuple[str, int | None, bool]
"""Layers that are told the same of a step: its kind, their window, and whether they are causal."""

Takes = Literal["ids", "embeds", "stream"]
"""What a Cell computes with: tokens, their embeddings, or what the stage before it in a pipeline gives."""


class _Graph(nn.Cell):
    """`of_layers`: for each of the attention layers with `names`, which of `groups` it belongs to."""

    def __init__(
        self,
        cell: Any,
        takes: Takes,
        names: tuple[str, ...],
        of_layers: tuple[int, ...],
        groups: tuple[Group, ...],
        dtype: ms.Type,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.cell = cell
        self.takes = takes
        self.names = names
        self.of_layers = of_layers
        self.groups = groups
        self.dtype = dtype

    def construct(self, given: Any, positions: Any, inputs: Any) -> Any:
        views: tuple[Any, ...] = ()
        for i in range(len(self.groups)):
            kind, window, causal = self.groups[i]
            slots = inputs[i][0]
            found = sequences.taken(kind, slots, inputs[i][1:], window, causal, self.dtype)
            views = (*views, {"slots": slots, "sequences": found})
        caches = {}
        for i in range(len(self.names)):
            caches[self.names[i]] = views[self.of_layers[i]]
        ranks = inputs[len(self.groups)] if len(inputs) > len(self.groups) else None
        batch = {"positions": positions, "caches": caches, "ranks": ranks}
        if self.takes == "ids":
            return self.cell.construct(given[0], batch)
        if self.takes == "embeds":
            return self.cell.construct(None, batch, given[0])
        return self.cell.construct(None, batch, None, given)


class GraphedCell:
    """In place of a model's Cell: its `construct` by graphs, each compiled at its first use.

    `dtype` is that of activations, `width` the features of what is taken in the place of tokens; `start` is called
    once, when all is loaded. What no graph can hold runs operator by operator, in the same way otherwise.
    """

    def __init__(self, cell: Any, active: Kernels, dtype: ms.Type, takes: Takes = "ids", width: int = 0) -> None:
        assert isinstance(active, AscendGraphKernels)
        self.cell = cell
        self.kernels = active
        self.dtype = dtype
        self.takes: Takes = takes
        self.width = width
        parts = [part for _, part in cell.cells_and_names()]
        self.layers: list[Any] = [part for part in parts if isinstance(part, Attention | LatentAttention)]
        self.traits = [_traits(layer) for layer in self.layers]
        rotaries = [part.sectioned for part in parts if isinstance(part, RotaryEmbedding)]
        self.sectioned: SectionedRows | None = next((each for each in rotaries if each is not None), None)
        self.ranks: DataParallel | None = next((part.data_parallel for part in parts if _shares(part)), None)
        self.compiles = True
        self.graphs: dict[tuple[Group, ...], Any] = {}

    def __call__(
        self,
        ids: Tensor | None,
        batch: Batch,
        inputs_embeds: Tensor | None = None,
        stream: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        given: Any = {"ids": (ids,), "embeds": (inputs_embeds,), "stream": stream}[self.takes]
        positions: Any = batch.positions
        if self.sectioned is not None:
            own, rows = self.sectioned.of(positions)
            positions = own, self.kernels.place(rows)
        groups, inputs, of_layers = self._grouped(batch)
        if self.ranks is not None:
            inputs = (*inputs, batch.ranks or self.places())
        if groups not in self.graphs:
            self.graphs[groups] = self._make(of_layers, groups, given, positions, inputs)
        positions = ms.mutable(positions) if isinstance(positions, tuple) else positions
        return self.graphs[groups](ms.mutable(given), positions, ms.mutable(inputs))

    def _grouped(self, batch: Batch) -> tuple[tuple[Group, ...], tuple[tuple[Tensor, ...], ...], tuple[int, ...]]:
        """Which groups of layers are told the same, and what; and which of these each of the layers belongs to."""
        numbers: dict[Any, int] = {}
        groups: list[Group] = []
        inputs: list[tuple[Tensor, ...]] = []
        of_layers: list[int] = []
        for layer, traits in zip(self.layers, self.traits, strict=True):
            view = batch.caches[layer.name]
            number = numbers.setdefault((id(view), traits), len(groups))
            if number == len(groups):
                window, causal, heads, size = traits
                kind, found = self.kernels.kind_of(view.sequences, layer.cache[0].shape[1], window, heads, size)
                groups.append((kind, window, causal))
                inputs.append((view.slots.astype(ms.int32), *found))
            of_layers.append(number)
        return tuple(groups), tuple(inputs), tuple(of_layers)

    def places(self, counts: Sequence[int] | None = None) -> tuple[Tensor, ...]:
        """Of data-parallel ranks that have so many tokens; None: as vLLM says of the step."""
        assert self.ranks is not None and self.ranks.counts is not None
        found = self.ranks.places(self.ranks.counts() if counts is None else counts)
        return tuple(self.kernels.place(Tensor(numbers)) for numbers in found)

    def nothing(self, rows: int) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, Tensor] | None]:
        """Tokens, embeddings and what a stage gives, of nobody: one of them, of so many rows."""
        place = self.kernels.place
        if self.takes == "ids":
            return place(Tensor(np.zeros(rows, np.int32))), None, None
        features = place(Tensor(np.zeros((rows, self.width), np.float32))).astype(self.dtype)
        return (None, features, None) if self.takes == "embeds" else (None, None, (features, features.copy()))

    def _make(
        self, of_layers: tuple[int, ...], groups: tuple[Group, ...], given: Any, positions: Any, inputs: Any
    ) -> Any:
        graph = self.as_written(of_layers, groups)
        if self.compiles:
            rows = tuple(map(_any_rows, given))
            several = isinstance(positions, tuple)
            places = ms.mutable(tuple(map(_any_rows, positions))) if several else _any_rows(positions)
            sizes = tuple(tuple(_any_rows(x, x.ndim) for x in group) for group in inputs)
            graph.set_inputs(ms.mutable(rows), places, ms.mutable(sizes))
            graph.construct = ms.jit(graph.construct)
        return graph

    def as_written(self, of_layers: tuple[int, ...], groups: tuple[Group, ...]) -> Any:
        """What a graph is compiled of, which gives the same operator by operator."""
        names = tuple(layer.name for layer in self.layers)
        return _Graph(self.cell, self.takes, names, of_layers, groups, self.dtype)

    def start(self) -> None:
        """What was loaded into layers, as parameters: other tensors that they have would be constants of the graphs."""
        made: dict[int, tuple[Weight, Weight]] = {}  # a tied one is the same in both places
        for _, part in self.cell.cells_and_names():
            if isinstance(part, LatentHeads):
                self._start_heads(part)
            elif isinstance(part, MoE):
                self._start_experts(part)
            self._start_tensors(part, made)
            if getattr(part, "scheme", None) is not None:
                self._start_tensors(part.scheme, made)
        self.kernels.start_graphs(self.dtype)

    def _start_tensors(self, owner: Any, made: dict[int, tuple[Weight, Weight]]) -> None:
        """Those that are attributes of a layer, or of how it stores its weight."""
        for name, value in list(vars(owner).items()):
            if isinstance(value, Weight):
                if id(value) not in made:
                    made[id(value)] = value, self.kernels.graph_weight(value, self.dtype)
                setattr(owner, name, made[id(value)][1])
            elif isinstance(value, Tensor) and not isinstance(value, ms.Parameter):
                delattr(owner, name)
                setattr(owner, name, self._parameter(value, name))

    def _start_heads(self, heads: Any) -> None:
        heads.absorbing = []
        for name in ("keys", "values"):
            matrices = self.kernels.stacked(getattr(heads, name))
            delattr(heads, name)
            setattr(heads, name, matrices)

    def _start_experts(self, moe: MoE) -> None:
        gate_up_bias, down_bias = moe.biases
        biased = gate_up_bias is not None, down_bias is not None
        whole = len(moe.owned) == sum(moe.gate.scheme.sizes)
        stacks = self.kernels.graph_experts(moe.gate_up, moe.down, biased, whole, self.dtype)
        weights: Any = stacks
        if stacks is None:
            if self.compiles:
                logger.warning("The model runs operator by operator: its experts are multiplied one after the other.")
            self.compiles = False
            lists = moe.gate_up, moe.down
            weights = ([self.kernels.graph_weight(each, self.dtype) for each in one] for one in lists)
        moe.gate_up, moe.down = weights
        own, second = (None if bias is None else self._parameter(bias, "bias") for bias in moe.biases)
        moe.biases = own, second

    def _parameter(self, value: Tensor, name: str) -> ms.Parameter:
        return self.kernels.parameter(self.kernels.place(value), name)


def _traits(layer: Any) -> tuple[int | None, bool, int, int]:
    """Window, whether it is causal, heads, and the size of a head to FlashAttentionScore."""
    if isinstance(layer, LatentAttention):
        heads = layer.heads
        return None, True, layer.num_heads, padded_size(heads.nope_size + layer.rope_size, heads.value_size)
    return layer.window, layer.causal, layer.num_heads, layer.head_size


def _shares(part: Any) -> bool:
    """Whether it computes for the tokens of several data-parallel ranks."""
    return isinstance(part, MoE) and part.data_parallel.size > 1


def _any_rows(x: Tensor, axes: int = 1) -> Tensor:
    """What a graph is compiled for: tensors like `x`, whose first `axes` are of any size."""
    return Tensor(shape=[None] * axes + list(x.shape[axes:]), dtype=x.dtype)
