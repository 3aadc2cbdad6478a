"""Weight files, right and wrong ones, and what the tests ask of every error."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import TensorSpec, serialize_file

from vllm_ms_models.checkpoint import CheckpointError, LoadReport, Slot, load

DTYPE_NAMES = {
    np.dtype(np.float64): ("F64", "float64"),
    np.dtype(np.float32): ("F32", "float32"),
    np.dtype(np.float16): ("F16", "float16"),
    np.dtype(ml_dtypes.bfloat16): ("BF16", "bfloat16"),
    np.dtype(ml_dtypes.float8_e4m3fn): ("F8_E4M3", "float8_e4m3fn"),
    np.dtype(ml_dtypes.float8_e5m2): ("F8_E5M2", "float8_e5m2"),
    np.dtype(np.int64): ("I64", "int64"),
    np.dtype(np.int32): ("I32", "int32"),
    np.dtype(np.int8): ("I8", "int8"),
    np.dtype(np.uint8): ("U8", "uint8"),
    np.dtype(np.bool_): ("BOOL", "bool"),
}


def save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Written by the safetensors library, whatever the dtype."""
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    specs = {
        name: TensorSpec(
            dtype=DTYPE_NAMES[array.dtype][1],
            shape=list(tensors[name].shape),
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for name, array in arrays.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    serialize_file(specs, path, {"format": "pt"})


def save_index(folder: Path, weight_map: dict[str, Any], name: str = "model.safetensors.index.json") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def save_shards(folder: Path, *shards: dict[str, np.ndarray], index: bool = True, stem: str = "model") -> list[str]:
    """The names of the files."""
    names = [f"{stem}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, tensors in zip(names, shards, strict=True):
        save(folder / name, tensors)
    if index:
        pairs = zip(names, shards, strict=True)
        save_index(folder, {tensor: name for name, tensors in pairs for tensor in tensors})
    return names


def save_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    """By hand: `header` as bytes or as what becomes JSON, and the length it claims."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


def random(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    count = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    high = 2 if dtype is np.bool_ else 256
    return np.random.default_rng(0).integers(0, high, count, np.uint8).view(dtype).reshape(shape)


def loaded(folder: Path, slots: list[Slot], **options: Any) -> LoadReport:
    return load(folder, slots, progress=False, **options)


def discard(array: np.ndarray) -> None:
    pass


def wants(name: str, *shape: int, dtypes: tuple[str, ...] = ("F32",)) -> Slot:
    return Slot(name, shape, discard, dtypes=dtypes)


class Collector:
    """Slots that keep a copy of what they are given."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}

    def slot(self, name: str, array: np.ndarray, index: tuple[slice, ...] = (), key: str | None = None) -> Slot:
        """For a tensor such as `array`; what is read of it is kept as `key`."""

        def keep(part: np.ndarray) -> None:
            self.arrays[key or name] = part.copy()

        return Slot(name, array.shape, keep, index, (DTYPE_NAMES[array.dtype][0],))

    def slots(self, tensors: dict[str, np.ndarray]) -> list[Slot]:
        return [self.slot(name, array) for name, array in tensors.items()]


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """The same dtype, shape and bytes (NaNs included)."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


def fails(call: Callable[[], object], *texts: str) -> CheckpointError:
    """`call` raises a `CheckpointError`: one sentence, on one line, with all of `texts`."""
    with pytest.raises(CheckpointError) as info:
        call()
    message = str(info.value)
    for text in texts:
        assert text in message
    assert "\n" not in message
    assert message.endswith(".")
    assert len(message) < 2000
    return info.value
