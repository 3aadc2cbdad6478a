"""The header of one safetensors file, checked before any number in it is believed.

A file is: the header's length (8 bytes, little-endian), the header (JSON: tensor name -> dtype, shape and first and
last byte), the data. The tensors must cover the data exactly, in any order, without gap or overlap.
"""

import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from vllm_ms_models.checkpoint.errors import CheckpointError, quote

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSION = 2**63 - 1
MAX_DIMENSIONS = 64  # NumPy's limit; it also bounds the arithmetic on a hostile shape
PREFIX_BYTES = 8
LFS_POINTER = b"version "
SAVE_AGAIN = "download or save the file again"

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
"""safetensors dtype name -> what `Slot.load` gets."""

PACKED_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Bits of an element of the dtypes that may be in a file but cannot be loaded: NumPy has no such arrays."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is: `nbytes` bytes from byte `offset` of the file `path`; `dtype` is safetensors' name for it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


def strict_json(raw: bytes) -> Any:
    """UTF-8 JSON without duplicate keys, NaN or infinities. Raises `ValueError` for anything else."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"{quote(key)} appears twice")
            key.encode()  # a lone surrogate is a UnicodeEncodeError, which is a ValueError
            found[key] = value
        return found

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        return json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file; no data is read. Raises `CheckpointError` unless the file is consistent."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path} is not a regular file; replace it by a safetensors file.")
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = _read(file.fileno(), min(size, PREFIX_BYTES), 0)
            length = _header_length(path, prefix, size)
            raw = _read(file.fileno(), length, PREFIX_BYTES)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); check the file and its permissions."
        ) from error
    if len(raw) < length:
        raise CheckpointError(f"{path} became shorter while its header was read; {SAVE_AGAIN}.")
    header = _parse(path, raw)
    start = PREFIX_BYTES + length
    tensors = {name: _tensor(path, name, entry, start) for name, entry in header.items() if name != "__metadata__"}
    _check_coverage(path, list(tensors.values()), start, size)
    return tensors


def _read(fd: int, length: int, offset: int) -> bytes:
    """Up to `length` bytes; fewer at the end of the file."""
    parts = []
    while length > 0 and (part := os.pread(fd, length, offset)):
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return b"".join(parts)


def _header_length(path: Path, prefix: bytes, size: int) -> int:
    if prefix == LFS_POINTER and size < 1024:
        raise CheckpointError(f"{path} is a Git LFS pointer ({size} bytes), not the weights; run `git lfs pull`.")
    if len(prefix) < PREFIX_BYTES:
        raise CheckpointError(
            f"{path} is truncated: a safetensors file starts with {PREFIX_BYTES} bytes for the length of its header, "
            f"and this one has {size} in all; {SAVE_AGAIN}."
        )
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} is not a valid safetensors file: it claims a header of {length} bytes, "
            f"and {MAX_HEADER_BYTES} is the most allowed; {SAVE_AGAIN}."
        )
    if length > size - PREFIX_BYTES:
        raise CheckpointError(
            f"{path} is truncated: it claims a header of {length} bytes, and only {size - PREFIX_BYTES} bytes follow; "
            f"{SAVE_AGAIN}."
        )
    return length


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = strict_json(raw)
    except ValueError as error:
        raise CheckpointError(f"The header of {path} is not valid JSON ({error}); {SAVE_AGAIN}.") from error
    if not isinstance(header, dict) or not raw.startswith(b"{"):
        raise CheckpointError(
            f"The header of {path} is not a JSON object of tensors but a {type(header).__name__}; {SAVE_AGAIN}."
        )
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"__metadata__ in the header of {path} does not map strings to strings; {SAVE_AGAIN}.")
    return header


def _tensor(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    """A checked header entry. `start` is the first byte of the data in the file."""
    where = f"Tensor {quote(name)} of {path}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{where} is not described by dtype, shape and data_offsets; {SAVE_AGAIN}.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or (dtype not in DTYPES and dtype not in PACKED_BITS):
        known = ", ".join([*DTYPES, *PACKED_BITS])
        raise CheckpointError(f"{where} has the unknown dtype {quote(dtype)}, not one of {known}; convert it to one.")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{where} has shape {quote(shape)} and data_offsets {quote(offsets)}, where a list of sizes and a pair of "
            f"a first and a last byte are expected; {SAVE_AGAIN}."
        )
    begin, end = offsets
    bits = math.prod(shape) * (PACKED_BITS.get(dtype) or DTYPES[dtype].itemsize * 8)
    if bits != (end - begin) * 8:
        raise CheckpointError(
            f"{where} has shape {quote(shape)} and dtype {dtype}, which do not take the {end - begin} bytes that its "
            f"data_offsets span; {SAVE_AGAIN}."
        )
    return TensorInfo(name, dtype, tuple(shape), path, start + begin, end - begin)


def _is_sizes(value: object) -> bool:
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        return False
    return all(type(item) is int and 0 <= item <= MAX_DIMENSION for item in value)


def _check_coverage(path: Path, tensors: list[TensorInfo], start: int, size: int) -> None:
    """Raises unless the tensors fill the file from `start` to its end without gap or overlap."""
    position = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != position:
            what = "overlaps the tensor before it" if tensor.offset < position else "leaves a gap before it"
            raise CheckpointError(
                f"Tensor {quote(tensor.name)} of {path} {what}: it starts at byte {tensor.offset - start} of the data "
                f"where {position - start} is expected; {SAVE_AGAIN}."
            )
        position += tensor.nbytes
    if position > size:
        raise CheckpointError(
            f"{path} is truncated: its header describes {position} bytes, and the file has {size}; {SAVE_AGAIN}."
        )
    if position < size:
        raise CheckpointError(
            f"{path} has {size - position} bytes after the last tensor: its header describes {position} bytes, and "
            f"the file has {size}; {SAVE_AGAIN}."
        )
