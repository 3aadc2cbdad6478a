"""A model as graphs that MindSpore compiles: one for steps in which every sequence has one token, one for the others.

Their inputs are tensors of any size: tokens, positions, and what each cache group's layers are told of the sequences.
**Not run on hardware.**
"""

from typing import Any

import mindspore as ms
from mindspore import Tensor, mint, nn

from vllm_ms_models.kernels import Kernels, Weight
from vllm_ms_models.kernels.ascend.graph import AscendGraphKernels
from vllm_ms_models.layers.attention import Attention
from vllm_ms_models.layers.batch import Batch, CacheView


class _Graph(nn.Cell):
    """`decoding`: a row for each sequence, which is its last, so that there is no mask."""

    def __init__(self, cell: Any, names: tuple[str, ...], groups: tuple[int, ...], decoding: bool) -> None:
        super().__init__(auto_prefix=False)
        self.cell = cell
        self.names = names
        self.groups = groups
        self.decoding = decoding

    def construct(self, ids: Tensor, positions: Tensor, groups: Any) -> Tensor:
        caches = {}
        for i in range(len(self.names)):
            slots, tables, lengths, query_lens, mask = groups[self.groups[i]]
            sequences = {"tables": tables, "lengths": lengths}
            if not self.decoding:
                sequences = {"tables": tables, "lengths": lengths, "query_lens": query_lens, "mask": mask}
            caches[self.names[i]] = {"slots": slots, "sequences": sequences}
        return self.cell.construct(ids, {"positions": positions, "caches": caches})


class GraphedCell:
    """In place of a model's Cell: its `construct(ids, batch)` by one of two graphs, each compiled at first use."""

    def __init__(self, cell: Any, active: Kernels) -> None:
        assert isinstance(active, AscendGraphKernels)
        self.cell = cell
        self.kernels = active
        self.layers = [part for _, part in cell.cells_and_names() if isinstance(part, Attention)]
        self.graphs: dict[bool, Any] = {}

    def __call__(self, ids: Tensor, batch: Batch, inputs_embeds: Tensor | None = None) -> Tensor:
        """`inputs_embeds` are of models that read images, which are not compiled."""
        assert inputs_embeds is None
        groups: dict[tuple[int, Any, bool], int] = {}
        steps: list[tuple[Any, ...]] = []
        of_layers: list[int] = []
        for layer in self.layers:
            view = batch.caches[layer.name]
            key = id(view), layer.window, layer.causal
            if key not in groups:
                groups[key] = len(steps)
                steps.append(self._step(view, layer))
            of_layers.append(groups[key])
        decoding = all(mask is None for *_, mask in steps)
        nothing = mint.zeros((1, 1), dtype=ms.float32)
        given = tuple((*rest, nothing if mask is None else mask) for *rest, mask in steps)
        if not self.graphs:
            self._start()
        if decoding not in self.graphs:
            names = tuple(layer.name for layer in self.layers)
            graph: Any = _Graph(self.cell, names, tuple(of_layers), decoding)
            sizes = tuple(tuple(map(_any_size, group)) for group in given)
            graph.set_inputs(_any_size(ids), _any_size(batch.positions), ms.mutable(sizes))
            graph.construct = ms.jit(graph.construct)
            self.graphs[decoding] = graph
        return self.graphs[decoding](ids, batch.positions, ms.mutable(given))

    def _start(self) -> None:
        """What was loaded into layers, as parameters: other tensors that they have would be constants of the graphs."""
        made: dict[int, tuple[Weight, Weight]] = {}  # a tied one is the same in both places
        for _, part in self.cell.cells_and_names():
            for owner in (part, getattr(part, "scheme", None)):
                for name, value in list(vars(owner).items()) if owner is not None else ():
                    if isinstance(value, Weight):
                        if id(value) not in made:
                            dtype = getattr(owner, "dtype", value.dtype)
                            made[id(value)] = value, self.kernels.graph_weight(value, dtype)
                        setattr(owner, name, made[id(value)][1])
                    elif isinstance(value, Tensor) and not isinstance(value, ms.Parameter):
                        delattr(owner, name)
                        setattr(owner, name, self.kernels.parameter(self.kernels.place(value), name))
        self.kernels.start_graphs()

    @staticmethod
    def _keys(layer: Attention) -> Tensor:
        cache: Any = layer.cache
        return cache[0]

    def _step(self, view: CacheView, layer: Attention) -> tuple[Any, ...]:
        keys = self._keys(layer)
        found = self.kernels.sequences_of(view.sequences, keys.shape[1], layer.window, layer.causal)
        return view.slots.astype(ms.int32), *found


def _any_size(x: Tensor) -> Tensor:
    return Tensor(shape=[None] * x.ndim, dtype=x.dtype)
