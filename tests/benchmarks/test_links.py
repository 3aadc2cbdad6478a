"""The formulas for what ranks send each other, against the calls of real models."""

from collections import Counter
from dataclasses import dataclass, field

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, mint

from benchmarks.links import Layout, Shape, traffic
from tests.checkpoints import DEEPSEEK, config
from vllm_ms_models import kernels, registry
from vllm_ms_models.distributed.group import Group
from vllm_ms_models.distributed.rows import DataParallel
from vllm_ms_models.kernels.reference import ReferenceKernels
from vllm_ms_models.layers.attention import Attention
from vllm_ms_models.layers.batch import Batch
from vllm_ms_models.layers.context import ModelContext
from vllm_ms_models.layers.mla import LatentAttention

TOKENS = 5
Calls = Counter[tuple[str, int, int]]


@dataclass(frozen=True)
class CountingGroup(Group):
    """Rank 0 of `size` whose others have the same tensors: counts calls by collective, ranks and bytes given."""

    calls: Calls = field(default_factory=Counter)

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._count("all_reduce", x)

    def all_gather(self, x: Tensor) -> Tensor:
        return mint.cat([self._count("all_gather", x)] * self.size, -1)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return self._count("reduce_scatter", x)[: x.shape[0] // self.size]

    def _count(self, collective: str, x: Tensor) -> Tensor:
        self.calls[collective, self.size, x.nbytes] += 1
        return x


@pytest.mark.parametrize(("family", "tensor", "data"), [("qwen2", 2, 1), ("deepseek_v3", 2, 1), ("deepseek_v3", 2, 2)])
def test_formulas(family: str, tensor: int, data: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention, which needs a cache, is left out: no collective is in it."""

    def latent(self: LatentAttention, query: Tensor, *_: object) -> Tensor:
        return mint.zeros((len(query), self.num_heads * self.heads.value_size), dtype=query.dtype)

    monkeypatch.setattr(Attention, "__call__", lambda self, query, *_: query)
    monkeypatch.setattr(LatentAttention, "__call__", latent)
    kernels.use(ReferenceKernels())
    settings = config(family, **(DEEPSEEK if family == "deepseek_v3" else {}))
    calls: Calls = Counter()
    ranks = DataParallel(CountingGroup(0, data, calls), lambda: [TOKENS] * data) if data > 1 else DataParallel()
    context = ModelContext(ms.float32, 64, CountingGroup(0, tensor, calls), data_parallel=ranks)
    model = registry.lookup({"qwen2": "Qwen2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}[family])(
        settings, context
    )
    for _, cell in model.cells_and_names():
        if hasattr(cell, "finish_loading"):
            cell.finish_loading()
    hidden = model(Tensor(np.zeros(TOKENS, np.int32)), Batch(Tensor(np.arange(TOKENS)), {}))
    model.logits(hidden[:2].contiguous())
    shape = Shape(64, 3, 211, 2 if family == "deepseek_v3" else 0)
    expected = traffic(shape, Layout(tensor, 1, data), TOKENS, 2, 4)
    assert calls == Counter({(part.collective, part.ranks, part.given): part.calls for part in expected})
