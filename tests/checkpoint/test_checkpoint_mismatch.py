"""Every mismatch is found before anything is loaded; what fails later is named too."""

import errno
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoint.checkpoint_files import (
    Collector,
    assert_same,
    discard,
    fails,
    loaded,
    random,
    save,
    save_raw,
    wants,
)
from vllm_ms_models.checkpoint import CheckpointError, Slot, check, load, open_checkpoint, reading

SINGLE = "model.safetensors"


def check_bad(folder: Path, slots: list[Slot], *texts: str, **options: Any) -> None:
    """Refused, by `load` and by `check`, and before any slot is given anything."""
    given_to = []

    def spy(name: str) -> Any:
        return lambda array: given_to.append(name)

    slots = [Slot(slot.name, slot.shape, spy(slot.name), slot.index, slot.dtypes) for slot in slots]
    fails(lambda: loaded(folder, slots, **options), *texts)
    fails(lambda: check(open_checkpoint(folder), slots, **options), *texts)
    assert given_to == []


def test_missing_tensors(tmp_path: Path) -> None:
    save(tmp_path / SINGLE, {"w": random((2,))})
    check_bad(
        tmp_path,
        [wants("w", 2), *[wants(f"layer.{number}", 2) for number in range(8)]],
        f"The weights in {tmp_path} do not fit the model: 8 of 9 wanted tensors are missing: ",
        "'layer.0', 'layer.1', 'layer.2', 'layer.3', 'layer.4' and 3 more; check that config.json",
    )


def test_unexpected_tensors(tmp_path: Path) -> None:
    save(tmp_path / SINGLE, {name: random((2,)) for name in ("w", "x", "l.0.inv_freq", "l.1.inv_freq")})
    slots = [wants("w", 2)]
    known = ["*.inv_freq"]
    text = "of its 4 tensors are not known to the model"
    check_bad(tmp_path, slots, f"3 {text}: ", "'x'", "'l.0.inv_freq'", "'l.1.inv_freq'")
    check_bad(tmp_path, slots, f"1 {text}: 'x'", ignored=known)
    check_bad(tmp_path, slots, f"2 {text}", ignored=[re.compile(r"l\.0\..*")])
    check_bad(tmp_path, slots, f"3 {text}", ignored=["inv_freq", re.compile("inv_freq"), re.compile("l")])
    assert loaded(tmp_path, slots, ignored=[*known, re.compile("[xyz]")]).tensors == 1


def test_ignored_does_not_hide_what_is_wanted(tmp_path: Path) -> None:
    save(tmp_path / SINGLE, {"w": random((2,))})
    check_bad(tmp_path, [wants("w", 2), wants("x", 2)], "1 of 2 wanted tensors are missing: 'x'", ignored=["*"])
    assert loaded(tmp_path, [wants("w", 2)], ignored=["*"]).bytes_read == 8


def test_wrong_shapes_and_dtypes(tmp_path: Path) -> None:
    save(tmp_path / SINGLE, {"w": random((2, 3)), "v": random((4,), np.float16)})
    good = [wants("w", 2, 3), wants("v", 4, dtypes=("F32", "F16"))]
    loaded(tmp_path, good)
    check_bad(tmp_path, [wants("w", 3, 2), good[1]], "'w' has shape [2, 3] where [3, 2] is expected;")
    check_bad(tmp_path, [wants("w", 6), good[1]], "'w' has shape [2, 3] where [6] is expected;")
    check_bad(tmp_path, [good[0], wants("v", 4, dtypes=("F32", "BF16"))], "'v' has dtype F16 where F32 or BF16 is")
    check_bad(
        tmp_path,
        [wants("w", 1), wants("w", 1), wants("w", 2, 3, dtypes=("I8",)), wants("u", 1)],
        "1 of 2 wanted tensors are missing: 'u'; 1 of its 2 tensors are not known to the model: 'v'; 'w' has shape "
        "[2, 3] where [1] is expected; 'w' has dtype F32 where I8 is expected; check",
    )
    many = [wants("w", size) for size in range(10, 20)]
    check_bad(tmp_path, [*many, good[1]], "where [14] is expected; 5 more such tensors; check")


def test_dtype_that_no_array_has(tmp_path: Path) -> None:
    save_raw(tmp_path / SINGLE, {"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, bytes(2))
    check_bad(tmp_path, [wants("w", 4, dtypes=("F4", "F16"))], "'w' has dtype F4 where F16 is expected")
    assert loaded(tmp_path, [], ignored=["w"]).tensors == 0


@pytest.mark.parametrize(
    ("index", "text"),
    [
        ((slice(0, 5),), "Dimension 0 of tensor 'w' is 4, and a slot selects 0:5:1"),
        ((slice(-1, None),), "selects -1:4:1"),
        ((slice(None), slice(2, 1)), "Dimension 1 of tensor 'w' is 6, and a slot selects 2:1:1"),
        ((slice(0, 4, 2),), "selects 0:4:2"),
        ((slice(None),) * 3, "has 2 dimensions and a slot selects 3"),
    ],
)
def test_impossible_slices(tmp_path: Path, index: tuple[slice, ...], text: str) -> None:
    save(tmp_path / SINGLE, {"w": random((4, 6))})
    check_bad(tmp_path, [Slot("w", (4, 6), discard, index)], text, "correct the model's slot")


def test_error_in_a_slot(tmp_path: Path) -> None:
    save(tmp_path / SINGLE, {"w": random((4, 6))})

    def fail(array: np.ndarray) -> None:
        raise KeyError("no room")

    with pytest.raises(CheckpointError) as info:
        loaded(tmp_path, [Slot("w", (4, 6), fail, (slice(1, 3),))])
    assert str(info.value) == (
        f"Tensor 'w' of {tmp_path / SINGLE} was read (shape [2, 6] of [4, 6], F32) but could not be stored in the "
        "model: KeyError: 'no room'"
    )
    assert isinstance(info.value.__cause__, KeyError)


def test_file_that_changes_after_the_check(tmp_path: Path) -> None:
    save(tmp_path / SINGLE, {"w": random((400, 60))})
    checkpoint = open_checkpoint(tmp_path)
    slots = [wants("w", 400, 60)]
    assert load(checkpoint, slots, progress=False).bytes_read == 96_000
    os.truncate(tmp_path / SINGLE, 5000)
    fails(lambda: load(checkpoint, slots, progress=False), "became shorter while it was loaded: nothing at byte 5000")
    os.unlink(tmp_path / SINGLE)
    fails(lambda: load(checkpoint, slots, progress=False), SINGLE, "cannot be read (No such file or directory)")


def test_broken_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / SINGLE, {"w": random((4, 6))})

    def broken(fd: int, buffers: list[Any], offset: int, flags: int = 0) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    fails(lambda: loaded(tmp_path, [wants("w", 4, 6)]), SINGLE, "cannot be read (Input/output error)")


def test_kernel_without_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {name: random((5, 3)) for name in "abc"}
    save(tmp_path / SINGLE, tensors)
    read = os.preadv

    def without_flags(fd: int, buffers: list[Any], offset: int, flags: int = 0) -> int:
        if flags:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", without_flags)
    collector = Collector()
    loaded(tmp_path, collector.slots(tensors))
    for name, array in tensors.items():
        assert_same(collector.arrays[name], array)


def test_cold_files_are_requested_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_is_cached", lambda fd, offset: False)
    tensors = {name: random((500, 30)) for name in "abc"}
    save(tmp_path / SINGLE, tensors)
    advice: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, length, kind: advice.append((offset, length)))
    loaded(tmp_path, [wants(name, 500, 30) for name in tensors])
    where = open_checkpoint(tmp_path).tensors
    assert advice == [(where[name].offset, 60_000) for name in "abc"]
