"""Slots of quantized weights: tensors that may be absent, that are read first, or that have one of several shapes."""

from pathlib import Path

import numpy as np
import pytest

from tests.checkpoint.checkpoint_files import discard, fails, loaded, save, save_shards
from vllm_ms_models.checkpoint import Slot


def test_an_optional_tensor(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", {"a": np.zeros(3, np.float32)})
    absent = Slot("b", (3,), discard, optional=True)
    assert loaded(tmp_path, [Slot("a", (3,), discard), absent]).tensors == 1
    assert loaded(tmp_path, [Slot("a", (3,), discard, optional=True), absent]).tensors == 1


def test_an_optional_tensor_that_does_not_fit(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", {"a": np.zeros(3, np.float32)})
    fails(lambda: loaded(tmp_path, [Slot("a", (4,), discard, optional=True)]), "'a' has shape [3] where [4]")


def test_early_tensors_come_first(tmp_path: Path) -> None:
    """Whichever file they are in, and wherever in it."""
    names = ["a", "b", "c", "d", "e"]
    tensors = {name: np.zeros(2, np.float32) for name in names}
    save_shards(tmp_path, {name: tensors[name] for name in "abc"}, {name: tensors[name] for name in "de"})
    order: list[str] = []

    def slot(name: str) -> Slot:
        return Slot(name, (2,), lambda _: order.append(name), early=name in "be")

    report = loaded(tmp_path, [slot(name) for name in names])
    assert order == ["b", "e", "a", "c", "d"]
    assert (report.tensors, report.bytes_read) == (5, 40)


@pytest.mark.parametrize("shape", [(4, 1), (4,), ()])
def test_one_of_several_shapes(shape: tuple[int, ...], tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", {"a": np.zeros(shape, np.float32)})
    shapes: list[tuple[int, ...]] = []
    slot = Slot("a", (4, 1), lambda array: shapes.append(array.shape), (), shapes=((4,), ()))
    loaded(tmp_path, [slot])
    assert shapes == [shape]


def test_none_of_several_shapes(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", {"a": np.zeros(5, np.float32)})
    slot = Slot("a", (4, 1), discard, shapes=((4,), ()))
    fails(lambda: loaded(tmp_path, [slot]), "'a' has shape [5] where [4, 1] or [4] or [] is expected")


def test_the_shape_of_a_part() -> None:
    assert Slot("a", (8, 6), discard).part_shape == (8, 6)
    assert Slot("a", (8, 6), discard, (slice(2, 5),)).part_shape == (3, 6)
    assert Slot("a", (8, 6), discard, (slice(0, 8), slice(3, 6))).part_shape == (8, 3)
