"""From a model folder into the slots of a model: everything is checked first, then the wanted bytes are streamed."""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby

from vllm_ms_models.checkpoint.errors import CheckpointError, enumerate_names, quote
from vllm_ms_models.checkpoint.header import DTYPES
from vllm_ms_models.checkpoint.index import Checkpoint, open_checkpoint
from vllm_ms_models.checkpoint.reading import AHEAD_BYTES, Bytes, Reader, Region, aligned_buffer, make_region
from vllm_ms_models.checkpoint.slots import Slot

Pattern = str | re.Pattern[str]
"""A glob such as `*.rotary_emb.inv_freq`, or a compiled regular expression; either must match the whole name."""

Progress = bool | Callable[[int, int], None]
"""True for a bar on stderr, False for none, or a function of bytes done and bytes in all."""


@dataclass(frozen=True)
class LoadReport:
    """What a load did: different tensors read, bytes of the parts that were read, time from opening to the end."""

    tensors: int
    bytes_read: int
    seconds: float


Plan = list[tuple[Slot, Region]]
"""What to read for which slot: early ones first, then in the order of files and bytes."""


def load(
    checkpoint: str | os.PathLike[str] | Checkpoint,
    slots: Iterable[Slot],
    *,
    ignored: Sequence[Pattern] = (),
    progress: Progress = True,
) -> LoadReport:
    """Gives each slot its part of the checkpoint: early ones first, then in the order of files and bytes.

    `ignored` are tensors that may be present without being wanted. Before any weight is read, everything is checked
    (see `check`); nothing has been loaded if that raises. Host memory: the largest part that one slot reads, and
    4 MiB. Raises `CheckpointError`; an exception of `Slot.load` is its cause.
    """
    begin = time.perf_counter()
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    plan = check(checkpoint, slots, ignored=ignored)
    total = sum(region.nbytes for _, region in plan)
    buffer = aligned_buffer(max((region.nbytes for _, region in plan), default=0))
    with _reporting(progress, total) as report:
        for path, group in groupby(plan, key=lambda item: item[1].tensor.path):
            with Reader(path) as reader:
                _load_file(reader, list(group), buffer, report)
    return LoadReport(len({slot.name for slot, _ in plan}), total, time.perf_counter() - begin)


def check(checkpoint: Checkpoint, slots: Iterable[Slot], *, ignored: Sequence[Pattern] = ()) -> Plan:
    """Compares what the slots want with what the checkpoint has, without reading weights: names, shapes, dtypes.

    Raises one `CheckpointError` with all that is wrong: tensors missing, unexpected, of another shape or dtype.
    """
    slots = list(slots)
    have = checkpoint.tensors
    wanted = {slot.name for slot in slots}
    problems = []
    needed = dict.fromkeys(slot.name for slot in slots if not slot.optional)
    if missing := [name for name in needed if name not in have]:
        problems.append(f"{len(missing)} of {len(wanted)} wanted tensors are missing: {enumerate_names(missing)}")
    extra = [name for name in have if name not in wanted and not _matches(name, ignored)]
    if extra:
        problems.append(f"{len(extra)} of its {len(have)} tensors are not known to the model: {enumerate_names(extra)}")
    present = [slot for slot in slots if slot.name in have]
    problems += _limit([text for slot in present for text in _misfits(slot, checkpoint)])
    if problems:
        raise CheckpointError(
            f"The weights in {checkpoint.folder} do not fit the model: {'; '.join(problems)}; check that config.json "
            "belongs to these weights and that the download is complete."
        )
    plan = [(slot, make_region(have[slot.name], slot.index)) for slot in present]
    position = {path: number for number, path in enumerate(checkpoint.files)}
    return sorted(
        plan, key=lambda item: (not item[0].early, position[item[1].tensor.path], item[1].tensor.offset, item[1].begin)
    )


def _misfits(slot: Slot, checkpoint: Checkpoint) -> Iterator[str]:
    found = checkpoint.tensors[slot.name]
    shapes = [tuple(shape) for shape in (slot.shape, *slot.shapes)]
    if found.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        yield f"{quote(slot.name)} has shape {list(found.shape)} where {wanted} is expected"
    accepted = [dtype for dtype in slot.dtypes if dtype in DTYPES]
    if found.dtype not in accepted:
        yield f"{quote(slot.name)} has dtype {found.dtype} where {' or '.join(accepted)} is expected"


def _limit(problems: list[str], most: int = 5) -> list[str]:
    """The first few different problems, and how many more there are."""
    problems = list(dict.fromkeys(problems))
    more = len(problems) - most
    return problems[:most] + ([f"{more} more such tensors"] if more > 0 else [])


def _matches(name: str, patterns: Sequence[Pattern]) -> bool:
    return any(
        fnmatchcase(name, pattern) if isinstance(pattern, str) else pattern.fullmatch(name) is not None
        for pattern in patterns
    )


def _load_file(reader: Reader, plan: Plan, buffer: Bytes, report: Callable[[int], object]) -> None:
    """Loads what is wanted of one file. While a slot works on its part, the kernel reads the next ones."""
    requested = ahead = 0  # the parts before number `requested` were asked for; `ahead` bytes of them are to be read
    for slot, region in plan:
        while requested < len(plan) and ahead < AHEAD_BYTES + region.nbytes:
            reader.prefetch(plan[requested][1])
            ahead += plan[requested][1].nbytes
            requested += 1
        array = reader.read(region, buffer)
        ahead -= region.nbytes
        try:
            slot.load(array)
        except Exception as error:
            raise CheckpointError(
                f"Tensor {quote(slot.name)} of {reader.path} was read (shape {list(region.shape)} of "
                f"{list(region.tensor.shape)}, {region.tensor.dtype}) but could not be stored in the model: "
                f"{type(error).__name__}: {error}"
            ) from error
        report(region.nbytes)


@contextlib.contextmanager
def _reporting(progress: Progress, total: int) -> Iterator[Callable[[int], object]]:
    """A function to call with the bytes of each part that was loaded."""
    if progress is False:
        yield lambda nbytes: None
    elif progress is True:
        from tqdm import tqdm

        with tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, unit_divisor=1024) as bar:
            yield bar.update
    else:
        done = 0

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress(done, total)

        yield advance
