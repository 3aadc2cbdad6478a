"""From files into slots: every value in its place, nothing read that was not asked for."""

import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file as save_torch

from tests.checkpoint.checkpoint_files import (
    DTYPE_NAMES,
    Collector,
    assert_same,
    loaded,
    random,
    save,
    save_shards,
    wants,
)
from vllm_ms_models.checkpoint import Slot, load, reading

SINGLE = "model.safetensors"


@pytest.mark.parametrize("dtype", list(DTYPE_NAMES), ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (1,), (), (0, 4)], ids=str)
def test_dtypes(tmp_path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    array = random(shape, dtype.type)
    save(tmp_path / SINGLE, {"w": array})
    collector = Collector()
    report = loaded(tmp_path, collector.slots({"w": array}))
    assert_same(collector.arrays["w"], array)
    assert (report.tensors, report.bytes_read) == (1, array.nbytes)
    assert report.seconds > 0


def test_written_by_torch_and_numpy(tmp_path: Path) -> None:
    values = torch.linspace(-3, 3, 24).reshape(4, 6)
    tensors = {
        "bf16": values.bfloat16(),
        "fp8": values.to(torch.float8_e4m3fn),
        "f16": values.half(),
        "int8": values.to(torch.int8),
    }
    save_torch(tensors, tmp_path / "model-00001-of-00002.safetensors")
    save_numpy({"f32": values.numpy()}, tmp_path / "model-00002-of-00002.safetensors")
    expected = {
        "bf16": values.numpy().astype(ml_dtypes.bfloat16),
        "fp8": tensors["fp8"].view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn),
        "f16": values.numpy().astype(np.float16),
        "int8": values.numpy().astype(np.int8),
        "f32": values.numpy(),
    }
    collector = Collector()
    assert loaded(tmp_path, collector.slots(expected)).bytes_read == 24 * (2 + 1 + 2 + 1 + 4)
    for name, array in expected.items():
        assert_same(collector.arrays[name], array)


INDEXES: list[tuple[slice, ...]] = [
    (),
    (slice(None),),
    (slice(2, 5),),
    (slice(0, 7), slice(3, 9)),
    (slice(None), slice(3, 9)),
    (slice(2, 5), slice(3, 9)),
    (slice(2, 5), slice(9, None)),
    (slice(None, 1), slice(None, 1)),
    (slice(3, 3),),
    (slice(1, 2), slice(4, 4)),
]


@pytest.mark.parametrize("index", INDEXES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8])
def test_slices(tmp_path: Path, index: tuple[slice, ...], dtype: Any) -> None:
    array = random((7, 11), dtype)
    save(tmp_path / SINGLE, {"before": random((3,)), "w": array})
    collector = Collector()
    slots = [collector.slot("w", array, index), wants("before", 3)]
    assert loaded(tmp_path, slots).bytes_read == 12 + array[index].nbytes
    assert_same(collector.arrays["w"], array[index])


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=5)))
    bounds = [sorted(draw(st.tuples(*[st.integers(0, size)] * 2))) for size in shape]
    full = draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    index = [slice(None) if whole else slice(*ends) for whole, ends in zip(full, bounds, strict=True)]
    return shape, tuple(index[: draw(st.integers(0, len(shape)))])


@settings(max_examples=200, deadline=None)
@given(st.lists(boxes(), min_size=1, max_size=4), st.sampled_from([np.float32, ml_dtypes.bfloat16, np.int8]))
def test_any_part_of_any_tensor(parts: list[tuple[tuple[int, ...], tuple[slice, ...]]], dtype: Any) -> None:
    arrays = {str(number): random(shape, dtype) for number, (shape, _) in enumerate(parts)}
    indexes = {str(number): index for number, (_, index) in enumerate(parts)}
    collector = Collector()
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / SINGLE, arrays)
        slots = [collector.slot(name, array, indexes[name]) for name, array in arrays.items()]
        report = loaded(Path(folder), slots)
    assert report.bytes_read == sum(array[indexes[name]].nbytes for name, array in arrays.items())
    for name, array in arrays.items():
        assert_same(
            collector.arrays[name], np.ascontiguousarray(array[indexes[name]]).reshape(array[indexes[name]].shape)
        )


@pytest.mark.parametrize(("chunk", "worth"), [(64, 16), (64, 1), (1200, 500), (1 << 20, 1 << 20)])
def test_buffers_smaller_than_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, worth: int) -> None:
    monkeypatch.setattr(reading, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(reading, "WORTH_SKIPPING_BYTES", worth)
    monkeypatch.setattr(reading, "ADVICE_BYTES", 10)
    array = random((6, 9, 10), np.float32)
    save(tmp_path / SINGLE, {"w": array})
    collector = Collector()
    indexes = {
        "all": (),
        "rows": (slice(1, 4), slice(2, 8)),
        "columns": (slice(None), slice(None), slice(3, 7)),
        "box": (slice(1, 5), slice(2, 7), slice(3, 9)),
    }
    loaded(tmp_path, [collector.slot("w", array, index, key) for key, index in indexes.items()])
    for key, index in indexes.items():
        assert_same(collector.arrays[key], np.ascontiguousarray(array[index]))


@pytest.mark.parametrize("columns", [slice(0, 512), slice(1024, 2048), slice(7, 200_000), slice(150_000, 400_000)])
def test_wide_matrix(tmp_path: Path, columns: slice) -> None:
    array = random((24, 400_000), np.int8)
    save(tmp_path / SINGLE, {"w": array})
    collector = Collector()
    report = loaded(tmp_path, [collector.slot("w", array, (slice(3, 20), columns))])
    assert_same(collector.arrays["w"], np.ascontiguousarray(array[3:20, columns]))
    assert report.bytes_read == array[3:20, columns].nbytes


def test_ranks_read_the_whole_once(tmp_path: Path) -> None:
    array = random((64, 48), ml_dtypes.bfloat16)
    save(tmp_path / SINGLE, {"w": array})
    for by_rows in (True, False):
        parts, total = [], 0
        for rank in range(4):
            collector = Collector()
            size = array.shape[0 if by_rows else 1] // 4
            part = slice(rank * size, (rank + 1) * size)
            report = loaded(tmp_path, [collector.slot("w", array, (part,) if by_rows else (slice(None), part))])
            total += report.bytes_read
            parts.append(collector.arrays["w"])
        assert total == array.nbytes
        assert_same(np.concatenate(parts, axis=0 if by_rows else 1), array)


def test_several_slots_for_one_tensor_and_the_order_of_bytes(tmp_path: Path) -> None:
    tensors = {name: random((4, 4)) for name in "zyx"}
    save_shards(tmp_path, {"z": tensors["z"]}, {"y": tensors["y"], "x": tensors["x"]})
    seen: list[tuple[str, float]] = []

    def slot(name: str, row: int) -> Slot:
        return Slot(name, (4, 4), lambda array: seen.append((name, array[0, 0])), (slice(row, row + 1),))

    report = loaded(tmp_path, [slot(name, row) for row in (3, 1) for name in "xyz"])
    expected = [("z", 1), ("z", 3), ("x", 1), ("x", 3), ("y", 1), ("y", 3)]
    assert [name for name, _ in seen] == [name for name, _ in expected]
    np.testing.assert_array_equal([value for _, value in seen], [tensors[name][row, 0] for name, row in expected])
    assert (report.tensors, report.bytes_read) == (3, 6 * 16)


def test_arrays_are_aligned_contiguous_and_writable(tmp_path: Path) -> None:
    save(tmp_path / SINGLE, {"a": random((3, 7)), "b": random((5,))})

    def look(array: np.ndarray) -> None:
        assert array.ctypes.data % 64 == 0
        assert array.flags.c_contiguous
        assert array.flags.writeable
        array[:] = 0

    before = (tmp_path / SINGLE).read_bytes()
    loaded(tmp_path, [Slot("a", (3, 7), look, (slice(None), slice(2, 5))), Slot("b", (5,), look)])
    assert (tmp_path / SINGLE).read_bytes() == before


def test_progress(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / SINGLE, {"a": random((256,)), "b": random((512,))})
    slots = [wants("a", 256), wants("b", 512)]
    calls: list[tuple[int, int]] = []
    load(tmp_path, slots, progress=lambda done, total: calls.append((done, total)))
    load(tmp_path, slots, progress=False)
    assert calls in ([(1024, 3072), (3072, 3072)], [(2048, 3072), (3072, 3072)])
    assert capfd.readouterr() == ("", "")
    load(tmp_path, slots)
    bar = capfd.readouterr().err
    assert "Loading weights: 100%" in bar
    assert "3.00k/3.00k" in bar


def test_nothing_wanted(tmp_path: Path) -> None:
    save(tmp_path / SINGLE, {"a": random((2,))})
    assert loaded(tmp_path, [], ignored=["a"]).bytes_read == 0
