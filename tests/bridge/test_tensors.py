"""torch and MindSpore tensors over the same memory."""

import gc
from typing import Any

import mindspore as ms
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ms_models.bridge.tensors import DTYPES, Staging, to_mindspore, to_torch

SHARED = {
    torch.float32: ms.float32,
    torch.float16: ms.float16,
    torch.bfloat16: ms.bfloat16,
    torch.int8: ms.int8,
    torch.uint8: ms.uint8,
    torch.int32: ms.int32,
    torch.int64: ms.int64,
}


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Different values, all of which every dtype holds."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) % 128).to(dtype).reshape(shape)


def values(tensor: ms.Tensor) -> list[Any]:
    """By MindSpore's own way out, not by DLPack."""
    return (tensor.astype(ms.float32) if tensor.dtype == ms.bfloat16 else tensor).asnumpy().tolist()


def test_model_dtypes() -> None:
    assert {torch.float32, torch.bfloat16, torch.float16} == set(DTYPES)
    assert all(to_mindspore(numbers(3, dtype=theirs)).dtype == ours for theirs, ours in DTYPES.items())


@pytest.mark.parametrize("dtype", SHARED)
def test_there_and_back_is_the_same_memory(dtype: torch.dtype) -> None:
    original = numbers(3, 5, dtype=dtype)
    tensor = to_mindspore(original)
    back = to_torch(tensor)
    assert (tensor.dtype, back.dtype) == (SHARED[dtype], dtype)
    assert original.data_ptr() == tensor.data_ptr() == back.data_ptr()
    assert values(tensor) == original.tolist() == back.tolist()


@pytest.mark.parametrize("dtype", SHARED)
def test_writes_are_seen_on_the_other_side(dtype: torch.dtype) -> None:
    original = numbers(4, 2, dtype=dtype)
    tensor = to_mindspore(original)
    original[1, 1] = 99
    assert values(tensor)[1] == [2, 99]
    to_torch(tensor)[3] = 7
    assert original[3].tolist() == [7, 7]


@pytest.mark.parametrize("dtype", SHARED)
def test_what_mindspore_computed(dtype: torch.dtype) -> None:
    """The way of logits and hidden states: memory that MindSpore allocated."""
    tensor = to_mindspore(numbers(3, 4, dtype=dtype)).astype(ms.float32) + 1
    result = to_torch(tensor)
    assert result.data_ptr() == tensor.data_ptr()
    assert torch.equal(result, numbers(3, 4) + 1)


@pytest.mark.parametrize("first", [to_mindspore, lambda tensor: to_torch(to_mindspore(tensor))])
def test_memory_lives_as_long_as_either_side(first: Any) -> None:
    shared = [first(numbers(1000, 10) + number) for number in range(20)]
    gc.collect()
    noise = [torch.full((1000, 10), -1.0) for _ in range(40)]
    for number, tensor in enumerate(shared):
        kept = tensor if isinstance(tensor, torch.Tensor) else to_torch(tensor)
        assert torch.equal(kept, numbers(1000, 10) + number)
    assert len(noise) == 40


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t(),
        lambda x: x[:, ::2],
        lambda x: x[:, 1:3],
        lambda x: x[::2],
        lambda x: x[:, :1],
        lambda x: x[0].expand(4, -1),
    ],
)
def test_what_is_not_contiguous_is_copied(view: Any) -> None:
    original = numbers(4, 6)
    strided = view(original)
    tensor = to_mindspore(strided)
    assert tensor.is_contiguous()
    assert values(tensor) == strided.tolist()
    tensor_memory = to_torch(tensor)
    tensor_memory.fill_(-1)
    assert torch.equal(original, numbers(4, 6))


@pytest.mark.parametrize("view", [lambda x: x[1:], lambda x: x[2], lambda x: x[1:2, :3], lambda x: x.view(3, 8)])
def test_contiguous_parts_are_shared(view: Any) -> None:
    original = numbers(4, 6)
    part = view(original)
    tensor = to_mindspore(part)
    assert tensor.is_contiguous()
    assert tensor.data_ptr() == part.data_ptr()
    assert values(tensor) == part.tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.sampled_from(list(SHARED)), st.data())
def test_any_slice(shape: list[int], dtype: torch.dtype, data: Any) -> None:
    """Whatever vLLM cuts out of its buffers, single rows and nothing at all included, arrives contiguous."""
    whole = numbers(*(size + 2 for size in shape), dtype=dtype)
    slices = tuple(slice(first := data.draw(st.integers(0, 2)), first + size) for size in shape)
    part = whole[slices]
    tensor = to_mindspore(part)
    assert tensor.shape == tuple(shape)
    assert tensor.is_contiguous()
    back = to_torch(tensor)
    assert back.dtype == dtype
    assert torch.equal(back, part)


def test_booleans_are_shared_and_not_misread() -> None:
    original = torch.tensor([True, False])
    tensor = to_mindspore(original)
    assert tensor.data_ptr() == original.data_ptr()
    assert values(tensor) == [True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_staging(dtype: torch.dtype) -> None:
    """Any number of rows, the same one again, and more than are staged."""
    staging = Staging(5, dtype)
    for number, rows in enumerate((3, 1, 3, 0, Staging.ROWS, Staging.ROWS + 1, 2)):
        original = numbers(2 * rows, 5, dtype=dtype)[::2] + number
        tensor = staging.to_mindspore(original)
        assert tensor.shape == (rows, 5) and tensor.dtype == DTYPES[dtype]
        assert torch.equal(to_torch(tensor), original)
