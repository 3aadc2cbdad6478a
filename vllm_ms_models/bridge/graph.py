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

    `dtype` is that of activations. What no graph can hold runs operator by operator, in the same way otherwise.
    """

    def __init__(self, cell: Any, active: Kernels, dtype: ms.Type) -> None:
        assert isinstance(active, AscendGraphKernels)
        self.cell = cell
        self.kernels = active
        self.dtype = dtype
        parts = [part for _, part in cell.cells_and_names()]
        self.layers: list[Any] = [part for part in parts if isinstance(part, Attention | LatentAttention)]
        self.started = False
        self.compiles = True
        self.graphs: dict[tuple[Group, ...], Any] = {}

    def __call__(self, ids: Tensor, batch: Batch, inputs_embeds: Tensor | None = None) -> Tensor:
        """`inputs_embeds` are of models that read images, which are not compiled."""
        assert inputs_embeds is None
        self.start()
        numbers: dict[Any, int] = {}
        groups: list[Group] = []
        inputs: list[tuple[Tensor, ...]] = []
        of_layers: list[int] = []
        for layer in self.layers:
            view = batch.caches[layer.name]
            window, causal, heads, size = _traits(layer)
            key = id(view), window, causal, heads, size
            if key not in numbers:
                numbers[key] = len(groups)
                block_size = layer.cache[0].shape[1]
                kind, given = self.kernels.kind_of(view.sequences, block_size, window, heads, size)
                groups.append((kind, window, causal))
                inputs.append((view.slots.astype(ms.int32), *given))
            of_layers.append(numbers[key])
        arguments = ids, batch.positions, tuple(inputs)
        if tuple(groups) not in self.graphs:
            self.graphs[tuple(groups)] = self._make(tuple(of_layers), tuple(groups), *arguments)
        return self.graphs[tuple(groups)](ids, batch.positions, ms.mutable(tuple(inputs)))

    def _make(
        self, of_layers: tuple[int, ...], groups: tuple[Group, ...], ids: Tensor, positions: Tensor, inputs: Any
    ) -> Any:
        names = tuple(layer.name for layer in self.layers)
        graph: Any = _Graph(self.cell, names, of_layers, groups, self.dtype)
        if self.compiles:
            sizes = tuple(tuple(map(_any_size, group)) for group in inputs)
            graph.set_inputs(_any_size(ids), _any_size(positions), ms.mutable(sizes))
            graph.construct = ms.jit(graph.construct)
        return graph

    def start(self) -> None:
        """What was loaded into layers, as parameters: other tensors that they have would be constants of the graphs.

        Once is enough.
        """
        if self.started:
            return
        made: dict[int, tuple[Weight, Weight]] = {}  # a tied one is the same in both places
        for _, part in self.cell.cells_and_names():
            if isinstance(part, LatentHeads):
                for name in ("keys", "values"):
                    matrices = self.kernels.stacked(getattr(part, name))
                    delattr(part, name)
                    setattr(part, name, matrices)
                part.absorbing = []
            elif isinstance(part, MoE):
                self._start_experts(part)
            for owner in (part, getattr(part, "scheme", None)):
                for name, value in list(vars(owner).items()) if owner is not None else ():
                    if isinstance(value, Weight):
                        if id(value) not in made:
                            made[id(value)] = value, self.kernels.graph_weight(value, self.dtype)
                        setattr(owner, name, made[id(value)][1])
                    elif isinstance(value, Tensor) and not isinstance(value, ms.Parameter):
                        delattr(owner, name)
                        setattr(owner, name, self._parameter(value, name))
        self.kernels.start_graphs(self.dtype)
        self.started = True

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
