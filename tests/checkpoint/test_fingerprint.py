"""When two folders count as the same weights."""

from pathlib import Path

import numpy as np
import pytest

from tests.checkpoint.checkpoint_files import save_shards
from vllm_ms_models.checkpoint import fingerprint, open_checkpoint

Tensors = dict[str, np.ndarray]


def tensors() -> Tensors:
    rng = np.random.default_rng(0)
    result = {f"layer.{i}": rng.standard_normal((5, i), dtype=np.float32) for i in range(1, 9)}
    return result | {"empty": np.zeros((0, 4), np.float32), "large": rng.standard_normal((300, 300), dtype=np.float32)}


def of(folder: Path, *shards: Tensors) -> str:
    folder.mkdir()
    save_shards(folder, *shards)
    return fingerprint(open_checkpoint(folder))


def test_files_do_not_count(tmp_path: Path) -> None:
    items = list(tensors().items())
    assert of(tmp_path / "one", dict(items)) == of(tmp_path / "two", dict(items[6:]), dict(items[:6]))


@pytest.mark.parametrize("change", ["value", "name", "dtype", "shape", "one more"])
def test_other_weights(change: str, tmp_path: Path) -> None:
    other = tensors()
    if change == "value":
        other["layer.3"] = other["layer.3"] + np.float32(0.001)
    elif change == "name":
        other["layer.9"] = other.pop("layer.8")
    elif change == "dtype":
        other["empty"] = np.zeros((0, 4), np.float16)
    elif change == "shape":
        other["layer.3"] = other["layer.3"].reshape(3, 5)
    else:
        other["layer.0"] = np.zeros((1,), np.float32)
    assert of(tmp_path / "one", tensors()) != of(tmp_path / "other", other)
