"""One forward pass through our own model that needs one linear's weight at a time, and notes what linears get.

The linears of a model are those that it asks its `Quantization` for, with the exact names of their parts: what is
fused with what, and what exists, is known from the model and from nowhere else.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
import torch
from mindspore import Tensor

from vllm_ms_models import checkpoint, registry
from vllm_ms_models.bridge.tensors import to_mindspore, to_torch
from vllm_ms_models.checkpoint.slots import Slot
from vllm_ms_models.cli.quantize.source import Source
from vllm_ms_models.kernels import Addend, PagedSequences
from vllm_ms_models.layers.attention import Attention
from vllm_ms_models.layers.batch import Batch, CacheView
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from vllm_ms_models.layers.moe import MoE
from vllm_ms_models.layers.norm import AddRMSNorm, RMSNorm
from vllm_ms_models.layers.ragged_attention import RaggedSequences
from vllm_ms_models.quantization.base import Float, LinearScheme, Part, Quantization

DTYPES = {"F32": (ms.float32, torch.float32), "BF16": (ms.bfloat16, torch.bfloat16), "F16": (ms.float16, torch.float16)}
BLOCK = 16  # tokens in a block of the cache
SAMPLED = 64  # rows that are kept of each input
ROWS = 512  # widened to float32 at a time


@dataclass(frozen=True)
class Statistics:
    """Of a linear's input: least and greatest value and mean square of each channel, and some rows, all float32.

    `norm` is the name of the norm's weight that the input is multiplied by, `up` that of the linear whose outputs the
    input's channels are multiples of (down's input is activation(gate) * up); None if it is neither.
    """

    low: np.ndarray
    high: np.ndarray
    square: np.ndarray
    sample: np.ndarray
    norm: str | None = None
    up: str | None = None


class Observed(LinearScheme):
    """A linear without storage: each multiplication loads the weight in floats, and drops it."""

    def __init__(self, parts: Sequence[Part], bias: bool, dtype: ms.Type, observer: "Observer") -> None:
        super().__init__(parts, False, dtype)
        self.has_bias = bias
        self.observer = observer

    def slots(self) -> Iterator[Slot]:
        return iter(())

    def multiply(self, x: Tensor, dtype: ms.Type | None = None, addend: Addend | None = None) -> Tensor:
        return self._with_weight(x, lambda scheme: scheme.multiply(x, dtype, addend))

    def multiply_split(self, x: Tensor, addend: Addend | None = None) -> tuple[Tensor, ...]:
        return self._with_weight(x, lambda scheme: scheme.multiply_split(x, addend))

    def multiply_gated(self, x: Tensor, activation: str, addend: Addend | None = None) -> Tensor:
        result = self._with_weight(x, lambda scheme: scheme.multiply_gated(x, activation, addend))
        self.observer.latest = (result, None, self.parts[1].name)
        return result

    def _with_weight(self, x: Tensor, use: Callable[[LinearScheme], Any]) -> Any:
        self.observer.note(self.parts[0].name, x)
        scheme = Float(self.parts, self.has_bias, self.dtype)
        checkpoint.load(self.observer.source.checkpoint, scheme.slots(), ignored=["*"], progress=False)
        scheme.finish()
        return use(scheme)


class Observer(Quantization):
    """Gives a model its `Observed` linears, in the order in which it asks; `statistics` by the first part's name."""

    def __init__(self, source: Source, advance: Callable[[], object] = lambda: None) -> None:
        self.source = source
        self.advance = advance
        self.linears: list[Observed] = []
        self.statistics: dict[str, Statistics] = {}
        self.latest: tuple[Tensor | None, str | None, str | None] = (None, None, None)
        """The last result that linears may be smoothed by, the norm it comes from, the linear it is a multiple of."""

    def linear(self, parts: Sequence[Part], bias: bool, dtype: ms.Type) -> LinearScheme:
        self.linears.append(Observed(parts, bias, dtype, self))
        return self.linears[-1]

    def note(self, name: str, x: Tensor) -> None:
        _, norm, up = self.latest if self.latest[0] is x else (None, None, None)
        self.statistics[name] = statistics(to_torch(x), norm, up)
        self.advance()


def statistics(x: torch.Tensor, norm: str | None = None, up: str | None = None) -> Statistics:
    """Of an input `[tokens, in]`; rows of the sample lie evenly spread. ValueError for values that are not finite."""
    low, high = (part.float().numpy() for part in (x.amin(0), x.amax(0)))
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError(
            "Activations are not finite while calibrating, so the model does not work in its dtype; try other prompts, "
            "or another dtype in config.json."
        )
    total = sum(part.float().square().sum(0) for part in x.split(ROWS))
    chosen = torch.linspace(0, len(x) - 1, min(SAMPLED, len(x))).round().long()
    return Statistics(low, high, (total / len(x)).numpy(), x[chosen].float().numpy(), norm, up)


class _ListeningNorm:
    """A norm's kernels; the observer learns what comes out of them."""

    def __init__(self, norm: RMSNorm, observer: Observer) -> None:
        self._kernels, self._name, self._observer = norm.kernels, norm.name, observer

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        result = self._kernels.rms_norm(x, weight, eps)
        self._observer.latest = (result, self._name, None)
        return result

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        result = self._kernels.add_rms_norm(x, residual, weight, eps)
        self._observer.latest = (result[0], self._name, None)
        return result


@dataclass(frozen=True)
class Blueprint:
    """A model that has no weights yet, its linears in order, and the names of head and embedding."""

    model: Any
    observer: Observer
    head: str | None
    embedding: str | None

    @property
    def blocks(self) -> list[Observed]:
        """The linears but for the head."""
        return [linear for linear in self.observer.linears if linear.parts[0].name != self.head]


def blueprint(source: Source, max_model_len: int) -> Blueprint:
    """Builds the model of `source` for sequences of so many tokens; a tied head gets a name of its own.

    ValueError for a mixture of experts, whose experts are not multiplied one by one.
    """
    observer = Observer(source)
    config = source.hf_config()
    config.tie_word_embeddings = False
    context = ModelContext(DTYPES[source.dtype][0], max_model_len, quantization=observer)
    model = registry.lookup(source.architecture)(config, context)
    model.set_train(False)
    cells = [cell for _, cell in model.cells_and_names()]
    if any(isinstance(cell, MoE) for cell in cells):
        raise ValueError(
            f"{source.architecture} is a mixture of experts, which vllm-ms quantize cannot quantize yet; serve it as "
            "it is, or a quantized checkpoint of it."
        )
    heads = [cell.scheme.parts[0].name for cell in cells if isinstance(cell, ParallelLMHead) and cell.scheme]
    embeddings = [cell.name for cell in cells if isinstance(cell, VocabParallelEmbedding)]
    return Blueprint(model, observer, next(iter(heads), None), next(iter(embeddings), None))


def calibrate(
    plan: Blueprint, prompts: Sequence[Sequence[int]], advance: Callable[[], object]
) -> dict[str, Statistics]:
    """Runs all prompts through the model in one batch. Statistics by the name of each linear's first part."""
    model, observer = plan.model, plan.observer
    observer.advance = advance
    cells = [cell for _, cell in model.cells_and_names()]
    slots = [slot for cell in cells if hasattr(cell, "slots") for slot in cell.slots()]
    checkpoint.load(observer.source.checkpoint, slots, ignored=["*"], progress=False)
    for cell in cells:
        if type(cell) in (RMSNorm, AddRMSNorm):  # others may use their weight otherwise
            cell.kernels = _ListeningNorm(cell, observer)
    ids = to_mindspore(torch.tensor([token for prompt in prompts for token in prompt], dtype=torch.int32))
    hidden = model(ids, _batch([cell for cell in cells if isinstance(cell, Attention)], prompts, observer.source.dtype))
    if plan.head is not None:  # not multiplied: its results are not needed, and large
        observer.statistics[plan.head] = statistics(to_torch(hidden))
    return observer.statistics


def _batch(attentions: Sequence[Attention], prompts: Sequence[Sequence[int]], dtype: str) -> Batch:
    """All prompts from their beginnings, in one step; attention layers take turns with one cache of each shape."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32)
    longest = int(lengths.max())
    width = -(-longest // BLOCK)
    firsts = torch.cat([torch.zeros(1, dtype=torch.int32), (lengths + BLOCK - 1) // BLOCK]).cumsum(0)
    tables = (firsts[:-1, None] + torch.arange(width)).clamp(max=int(firsts[-1]) - 1).int()
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
    begins = torch.cat(
        [torch.full((n,), int(first) * BLOCK) for n, first in zip(lengths.tolist(), firsts, strict=False)]
    )
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), lengths]).cumsum(0).int()
    query_start, seq_lens, block_tables = map(to_mindspore, (starts, lengths, tables))
    sequences = PagedSequences(query_start, seq_lens, block_tables, longest, longest)
    view = CacheView(sequences, to_mindspore(begins + positions))
    caches: dict[tuple[int, ...], Tensor] = {}
    for cell in attentions:
        shape = cell.kernels.cache_shape(int(firsts[-1]), BLOCK, cell.num_kv_heads, cell.head_size)
        if shape not in caches:
            caches[shape] = to_mindspore(torch.zeros(shape, dtype=DTYPES[dtype][1]))
        cell.cache = caches[shape]
    ragged = RaggedSequences.of(lengths.tolist())  # of an encoder, which has no caches
    return Batch(to_mindspore(positions), {cell.name: view for cell in attentions}, ragged=ragged)
