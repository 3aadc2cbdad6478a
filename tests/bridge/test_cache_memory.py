"""Memory of the KV cache: zero, in nobody's way before it is used, and alive as long as a tensor over it."""

import gc

import psutil
import torch

from vllm_ms_models.bridge.cache_memory import CacheMemory


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def test_zeros_that_take_memory_when_they_are_written() -> None:
    size = 256 << 20
    before = resident()
    with CacheMemory():
        cache = torch.zeros(size, dtype=torch.int8, device=torch.device("cpu"))
    assert (cache.shape, cache.dtype, cache.data_ptr() % 64) == ((size,), torch.int8, 0)
    assert resident() - before < 64 << 20
    part = cache.view(torch.bfloat16).view(4, -1)[2]
    assert not part.any()
    part.fill_(3)
    assert resident() - before >= 64 << 20
    del cache
    gc.collect()
    assert (part == 3).all()
    del part
    assert resident() - before < 64 << 20


def test_other_ways_to_make_tensors_are_as_ever() -> None:
    with CacheMemory():
        assert torch.zeros((2, 3)).tolist() == [[0, 0, 0], [0, 0, 0]]
        assert torch.zeros(0, dtype=torch.int64).shape == (0,)
        assert torch.ones(3).sum().item() == 3
    assert torch.zeros(3).dtype == torch.float32
