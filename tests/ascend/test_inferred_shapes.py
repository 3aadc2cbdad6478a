"""The shapes that the contract says an operator gives are those that MindSpore infers when it compiles a graph."""

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from tests.ascend.inference import Recorder, compared
from tests.ascend.mixtures import ROUTINGS, choices, experts_of, float32, integer_weight
from tests.ascend.steps import BLOCK, STEPS, normal, step_of
from vllm_ms_models.kernels import Integers
from vllm_ms_models.kernels.ascend import AscendKernels


@pytest.mark.parametrize("dtype", (ms.float16, ms.bfloat16), ids=str)
def test_shapes_are_those_that_mindspore_infers(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    kernels = AscendKernels(recorder)
    rng = np.random.default_rng(0)
    for name in ("ragged prefill", "mixed with context"):
        step = step_of(STEPS[name], rng)
        query, key = normal(rng, (step.tokens, 512), dtype), normal(rng, (step.tokens, 128), dtype)
        ones = Tensor(np.ones(512, np.float32))
        cache = Tensor.from_numpy(np.zeros(kernels.cache_shape(step.blocks, BLOCK, 2, 64), np.float16)).astype(dtype)
        kernels.rotary(query, key, step.positions, Tensor(np.zeros((64, 64), np.float32)), 64, False)
        kernels.write_kv(key, key, cache, step.slots)
        kernels.paged_attention(query, cache, step.sequences, 0.125)
    latents = Tensor.from_numpy(np.zeros((step.blocks, BLOCK, 576), np.float16)).astype(dtype)
    kernels.mla_attention(normal(rng, (step.tokens, 4 * 576), dtype), latents, step.sequences, 0.1, 512)
    kernels.add_rms_norm(query, query.copy(), ones, 1e-6)
    kernels.rms_norm(query, ones, 1e-6)
    kernels.layer_norm(query, ones, ones, 1e-6)
    kernels.linear_gated(query, kernels.new_weight([32, 32], 512, dtype), "silu")
    kernels.linear(query, kernels.new_integer_weight([24], 512, Integers(8, 0, "dynamic")))
    kernels.linear(query, kernels.new_integer_weight([24], 512, Integers(8, 0, "static")))
    assert compared(recorder) >= 16


@pytest.mark.parametrize("dtype", (pytest.param(ms.float16, marks=pytest.mark.slow), ms.bfloat16), ids=str)
def test_shapes_of_experts_and_packed_weights(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    kernels = AscendKernels(recorder)
    rng = np.random.default_rng(0)
    for routing, experts, biased, _ in ROUTINGS.values():
        kernels.choose_experts(float32(rng, (7, experts)), routing, float32(rng, (experts,)) if biased else None)
    x = normal(rng, (7, 64), dtype)
    ids, shares = choices(rng, 7, 3, 5, 0)
    for kind in ("floats", "dynamic", "static", "w8a16", "w4a16"):
        kernels.experts(x, *experts_of(kernels, kind, 0, 5, 64, 32, dtype), ids, shares, "silu")
    for bits, group in ((8, 0), (4, 32)):
        kernels.linear(x, integer_weight(kernels, rng, Integers(bits, group, "float"), [48], 64, zeros=True))
    assert compared(recorder) >= 40
