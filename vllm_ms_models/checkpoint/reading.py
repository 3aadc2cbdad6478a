"""Reading parts of tensors from disk: only what was asked for, in bounded memory.

Plain reads into one reused buffer, not a memory map: cold pages come in faster, resident memory is what was
allocated, and a file that shrinks meanwhile is an error instead of a fatal signal.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_ms_models.checkpoint.errors import CheckpointError, quote
from vllm_ms_models.checkpoint.header import DTYPES, TensorInfo

ALIGNMENT = 64
CHUNK_BYTES = 4 << 20
"""The largest single read, and the size of the buffer for narrow columns."""
WORTH_SKIPPING_BYTES = 256 << 10
"""Runs or gaps from this size on are read one by one; below, reading through the gaps is faster."""
AHEAD_BYTES = 64 << 20
"""Beyond what is being read, the kernel is asked to bring in parts of this size together, and one more at most."""
ADVICE_BYTES = 1 << 20
"""Kernels cut one request for read-ahead to about this size."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Region:
    """A box of a tensor as bytes: runs of `run` contiguous bytes, `rows` of them each `stride` bytes apart, and such
    a block at each of `starts` (bytes from the beginning of the file)."""

    tensor: TensorInfo
    shape: tuple[int, ...]
    starts: tuple[int, ...]
    rows: int
    stride: int
    run: int

    @property
    def nbytes(self) -> int:
        return len(self.starts) * self.rows * self.run

    @property
    def begin(self) -> int:
        """The first byte in the file."""
        return self.starts[0] if self.starts else self.tensor.offset


def make_region(tensor: TensorInfo, index: tuple[slice, ...]) -> Region:
    """The part of `tensor` that `index` selects: plain ranges, or it raises `CheckpointError`."""
    bounds = _bounds(tensor, index)
    shape = tuple(stop - start for start, stop in bounds)
    itemsize = DTYPES[tensor.dtype].itemsize
    levels = [(itemsize, 0, itemsize)]  # size, start, stop in units of the level inside; outermost first
    for size, (start, stop) in zip(reversed(tensor.shape), reversed(bounds), strict=True):
        inner_size, inner_start, inner_stop = levels[0]
        if (inner_start, inner_stop) == (0, inner_size):
            levels[0] = (size * inner_size, start * inner_size, stop * inner_size)
        else:
            levels.insert(0, (size, start, stop))
    if 0 in shape:
        return Region(tensor, shape, (), 0, 0, 0)
    stride, run_start, run_stop = levels[-1]
    rows_size, rows_start, rows_stop = levels[-2] if len(levels) > 1 else (1, 0, 1)
    starts = [0]
    for size, start, stop in levels[:-2]:
        starts = [outer * size + number for outer in starts for number in range(start, stop)]
    first = tensor.offset + rows_start * stride + run_start
    starts = [first + number * rows_size * stride for number in starts]
    return Region(tensor, shape, tuple(starts), rows_stop - rows_start, stride, run_stop - run_start)


def _bounds(tensor: TensorInfo, index: tuple[slice, ...]) -> list[tuple[int, int]]:
    """First and last of each dimension, checked."""
    if len(index) > len(tensor.shape):
        raise CheckpointError(
            f"Tensor {quote(tensor.name)} has {len(tensor.shape)} dimensions and a slot selects {len(index)}; "
            "correct the model's slot."
        )
    bounds = [(0, size) for size in tensor.shape]
    for axis, (part, size) in enumerate(zip(index, tensor.shape, strict=False)):
        start = 0 if part.start is None else part.start
        stop = size if part.stop is None else part.stop
        if part.step not in (None, 1) or not 0 <= start <= stop <= size:
            raise CheckpointError(
                f"Dimension {axis} of tensor {quote(tensor.name)} is {size}, and a slot selects "
                f"{start}:{stop}:{part.step or 1} of it; only ranges inside are possible: correct the model's slot."
            )
        bounds[axis] = (start, stop)
    return bounds


def aligned_buffer(nbytes: int) -> Bytes:
    """Uninitialized bytes starting at a multiple of `ALIGNMENT`."""
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    return raw[-raw.ctypes.data % ALIGNMENT :][:nbytes]


class Reader:
    """One open weight file. A context manager; every method raises `CheckpointError`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = -1
        self._columns: Bytes | None = None

    def __enter__(self) -> "Reader":
        try:
            self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._unreadable(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.fd)

    def read(self, region: Region, buffer: Bytes) -> npt.NDArray[Any]:
        """The array of `region`, stored at the beginning of `buffer`."""
        data = buffer[: region.nbytes]
        blocks = data.reshape(len(region.starts), region.rows, region.run)
        for start, block in zip(region.starts, blocks, strict=True):
            self._read_block(start, region.stride, block)
        return data.view(DTYPES[region.tensor.dtype]).reshape(region.shape)

    def prefetch(self, region: Region) -> None:
        """Asks the kernel to bring in `region`, unless it is cached. Never fails."""
        for begin, length in _dense_parts(region):
            end = begin + length
            try:
                if _is_cached(self.fd, end - 1):
                    continue
                for position in range(begin, end, ADVICE_BYTES):
                    size = min(ADVICE_BYTES, end - position)
                    os.posix_fadvise(self.fd, position, size, os.POSIX_FADV_WILLNEED)
            except OSError:
                return

    def _read_block(self, start: int, stride: int, block: Bytes) -> None:
        rows, run = block.shape
        if rows == 1 or run == stride:
            self._read_bytes(start, block.reshape(-1))
        elif _is_worth_skipping(run, stride):
            for row in range(rows):
                self._read_bytes(start + row * stride, block[row])
        else:
            self._read_columns(start, stride, block)

    def _read_columns(self, start: int, stride: int, block: Bytes) -> None:
        """Narrow columns: whole rows are read, a buffer full at a time."""
        if self._columns is None:
            self._columns = aligned_buffer(CHUNK_BYTES)
        rows, run = block.shape
        step = CHUNK_BYTES // stride
        for row in range(0, rows, step):
            count = min(step, rows - row)
            self._read_bytes(start + row * stride, self._columns[: (count - 1) * stride + run])
            source = np.lib.stride_tricks.as_strided(self._columns, (count, run), (stride, 1))
            np.copyto(block[row : row + count], source)

    def _read_bytes(self, offset: int, target: Bytes) -> None:
        view = target.data
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self.fd, [view[done : done + CHUNK_BYTES]], offset + done)
            except OSError as error:
                raise self._unreadable(error) from error
            if count == 0:
                raise CheckpointError(
                    f"{self.path} became shorter while it was loaded: nothing at byte {offset + done}; let the "
                    "download finish, then start again."
                )
            done += count

    def _unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self.path} cannot be read ({error.strerror}); check the file, its disk and permissions."
        )


def _is_worth_skipping(run: int, stride: int) -> bool:
    return run >= WORTH_SKIPPING_BYTES or stride - run >= WORTH_SKIPPING_BYTES


def _dense_parts(region: Region) -> Iterator[tuple[int, int]]:
    """First byte and length of what reading `region` goes through without skipping, if that is in one piece."""
    one_piece = region.rows == 1 or not _is_worth_skipping(region.run, region.stride)
    if len(region.starts) == 1 and (one_piece or region.run == region.stride):
        yield region.starts[0], (region.rows - 1) * region.stride + region.run


def _is_cached(fd: int, offset: int) -> bool:
    """Whether the byte is in memory. Raises `OSError` where the kernel cannot tell."""
    try:
        return os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
