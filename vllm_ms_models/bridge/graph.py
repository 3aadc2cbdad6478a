"""A model as graphs that MindSpore compiles, one for each kind of steps.

The kinds are steps in which every sequence has one token, steps in which none has context, and all others
(kernels/ascend/graph/sequences.py); layers with a window may be of another kind than the rest. The graphs' inputs are
tensors of any size: tokens, positions, and what each cache group's layers are told of the sequences.
**Not run on hardware.**
"""

import logging
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn

from vllm_ms_models.kernels import Kernels, Weight
from vllm_ms_models.kernels.ascend.graph import AscendGraphKernels, sequences
from vllm_ms_models.kernels.ascend.graph.latent_attention import padded_size
from vllm_ms_models.layers.attention import Attention
from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.mla import LatentAttention, LatentHeads
from vllm_ms_models.layers.moe import MoE

logger = logging.getLogger("vllm.ms_models")

Group = tuple[str, int | None, bool]
"""Layers that are told the same of a step: its kind, their window, and whether they are causal."""


class _Graph(nn.Cell):
    """`of_layers`: for each of the attention layers with `names`, which of `groups` it belongs to."""

    def __init__(
        self, cell: Any, names: tuple[str, ...], of_layers: tuple[int, ...], groups: tuple[Group, ...], dtype: ms.Type
    ) -> None:
        super().__init__(auto_prefix=False)
        self.cell = cell
        self.names = names
        self.of_layers = of_layers
        self.groups = groups
        self.dtype = dtype

    def construct(self, ids: Tensor, positions: Tensor, inputs: Any) -> Tensor:
        views: tuple[Any, ...] = ()
        for i in range(len(self.groups)):
            kind, window, causal = self.groups[i]
            slots = inputs[i][0]
            found = sequences.taken(kind, slots, inputs[i][1:], window, causal, self.dtype)
            views = (*views, {"slots": slots, "sequences": found})
        caches = {}
        for i in range(len(self.names)):
            caches[self.names[i]] = views[self.of_layers[i]]
        return self.cell.construct(ids, {"positions": positions, "caches": caches})


class GraphedCell:
    """In place of a model's Cell: its `construct(ids, batch)` by graphs, each compiled at its first use.

    `dtype` is that of activations; `start` is called once, when all is loaded. What no graph can hold runs operator by
    operator, in the same way otherwise.
    """

    def __init__(self, cell: Any, active: Kernels, dtype: ms.Type) -> None:
        assert isinstance(active, AscendGraphKernels)
        self.cell = cell
        self.kernels = active
        self.dtype = dtype
        parts = [part for _, part in cell.cells_and_names()]
        self.layers: list[Any] = [part for part in parts if isinstance(part, Attention | LatentAttention)]
        self.traits = [_traits(layer) for layer in self.layers]
        self.compiles = True
        self.graphs: dict[tuple[Group, ...], Any] = {}

    def __call__(self, ids: Tensor, batch: Batch, inputs_embeds: Tensor | None = None) -> Tensor:
        """`inputs_embeds` are of models that read images, which are not compiled."""
        assert inputs_embeds is None
        numbers: dict[Any, int] = {}
        groups: list[Group] = []
        inputs: list[tuple[Tensor, ...]] = []
        of_layers: list[int] = []
        for layer, traits in zip(self.layers, self.traits, strict=True):
            view = batch.caches[layer.name]
            number = numbers.setdefault((id(view), traits), len(groups))
            if number == len(groups):
                window, causal, heads, size = traits
                kind, given = self.kernels.kind_of(view.sequences, layer.cache[0].shape[1], window, heads, size)
                groups.append((kind, window, causal))
                inputs.append((view.slots.astype(ms.int32), *given))
            of_layers.append(number)
        key = tuple(groups)
        if key not in self.graphs:
            self.graphs[key] = self._make(tuple(of_layers), key, ids, batch.positions, inputs)
        return self.graphs[key](ids, batch.positions, ms.mutable(tuple(inputs)))

    def _make(
        self, of_layers: tuple[int, ...], groups: tuple[Group, ...], ids: Tensor, positions: Tensor, inputs: Any
    ) -> Any:
        graph = self.as_written(of_layers, groups)
        if self.compiles:
            sizes = tuple(tuple(map(_any_size, group)) for group in inputs)
            graph.set_inputs(_any_size(ids), _any_size(positions), ms.mutable(sizes))
            graph.construct = ms.jit(graph.construct)
        return graph

    def as_written(self, of_layers: tuple[int, ...], groups: tuple[Group, ...]) -> Any:
        """What a graph is compiled of, which gives the same operator by operator."""
        names = tuple(layer.name for layer in self.layers)
        return _Graph(self.cell, names, of_layers, groups, self.dtype)

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


def _any_size(x: Tensor) -> Tensor:
    return Tensor(shape=[None] * x.ndim, dtype=x.dtype)
