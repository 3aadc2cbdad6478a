"""Safetensors shards that are filled piece by piece, in a folder that becomes the model only when all is done."""

import contextlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from vllm_ms_models.checkpoint.header import DTYPES

SHARD_BYTES = 2 * 10**9
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""safetensors' dtype name and shape by tensor name."""


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    return prod(shape) * DTYPES[dtype].itemsize


def into_shards(groups: Sequence[Tensors], limit: int) -> list[Tensors]:
    """Groups of tensors in their order, together at most `limit` bytes (or one group) in each shard."""
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = []
    room = 0
    for group in groups:
        size = sum(nbytes(*tensor) for tensor in group.values())
        if not shards or size > room:
            shards.append({})
            room = limit
        shards[-1].update(group)
        room -= size
    return list(shards)


class Shard:
    """One safetensors file of its final size; `write` may be called in any order and from several threads."""

    def __init__(self, path: Path, tensors: Tensors) -> None:
        self.tensors = tensors
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begin = 0
        # The widest first, so that all are aligned: torch takes views of the file's bytes.
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -DTYPES[item[1][0]].itemsize):
            end = begin + nbytes(dtype, shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
            begin = end
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        start = 8 + len(raw)
        self.offsets = {name: start + header[name]["data_offsets"][0] for name in tensors}
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        os.truncate(self.fd, start + begin)
        self._put(len(raw).to_bytes(8, "little") + raw, 0)

    def write(self, name: str, values: np.ndarray, first_row: int = 0) -> None:
        """Stores `values` as rows `first_row...` of tensor `name`; dtype and other sizes must be the tensor's."""
        dtype, shape = self.tensors[name]
        assert values.dtype == DTYPES[dtype] and values.shape[1:] == tuple(shape[1:]), name
        row = nbytes(dtype, shape[1:]) if shape else 0
        self._put(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, self.offsets[name] + first_row * row)

    def close(self) -> None:
        os.close(self.fd)

    def _put(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while len(view):
            written = os.pwrite(self.fd, view, offset)
            view, offset = view[written:], offset + written


class Weights:
    """All shards of a model, and the index that says which tensor is where."""

    def __init__(self, folder: Path, stem: str, shards: Sequence[Tensors]) -> None:
        names = [f"{stem}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        self.folder, self.stem = folder, stem
        self.shards = [Shard(folder / name, shard) for name, shard in zip(names, shards, strict=True)]
        self.place = {tensor: shard for shard in self.shards for tensor in shard.tensors}
        self.files = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}

    def write(self, name: str, values: np.ndarray, first_row: int = 0) -> None:
        self.place[name].write(name, values, first_row)

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, *error: object) -> None:
        for shard in self.shards:
            shard.close()

    def write_index(self) -> int:
        """Returns the bytes of all tensors."""
        total = sum(nbytes(*tensor) for shard in self.shards for tensor in shard.tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(self.files.items()))}
        write_json(self.folder / f"{self.stem}.safetensors.index.json", index)
        return total


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def require_absent(out: Path) -> None:
    """ValueError if there is anything at `out`."""
    if os.path.lexists(out):
        raise ValueError(f"{out} exists already and is left as it is; remove it or give another folder.")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent} is not a folder, so nothing can be written into it; create it first.")


@contextlib.contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that is renamed to `out` at the end, and removed if it does not come to that.

    SIGTERM ends the block as an exception does. After SIGKILL the hidden folder stays: without config.json, which is to
    be written last, nothing takes it for a model.
    """
    folder = out.parent / f".{out.name}.partial-{os.getpid()}"
    with _terminable():
        try:
            folder.mkdir()
            yield folder
            require_absent(out)
            os.rename(folder, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises SystemExit in the main thread, so that what is half done gets cleaned up."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
