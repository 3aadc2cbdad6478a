"""One file's header: nothing it says is believed before it is checked."""

import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tests.checkpoint.checkpoint_files import Collector, assert_same, fails, save, save_raw
from vllm_ms_models.checkpoint import CheckpointError, list_tensors, load, open_checkpoint
from vllm_ms_models.checkpoint.header import MAX_HEADER_BYTES

# Sizes all differ, so no small change of the header can swap two tensors.
TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.weight": np.arange(10, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(2, 5),
    "c.scale": np.arange(7, dtype=np.int8),
    "d.flag": np.arange(1, 3, dtype=np.int64),
    "e.empty": np.zeros((0, 3), np.float16),
}


def entry(dtype: str = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def check_bad(path: Path, *texts: str) -> None:
    fails(lambda: open_checkpoint(path.parent), str(path), *texts)


def test_lists_what_the_library_wrote(path: Path) -> None:
    save(path, TENSORS)
    found = list_tensors(path.parent)
    assert {name: info.shape for name, info in found.items()} == {name: a.shape for name, a in TENSORS.items()}
    assert [found[name].dtype for name in sorted(found)] == ["F32", "BF16", "I8", "I64", "F16"]
    assert {name: info.nbytes for name, info in found.items()} == {name: a.nbytes for name, a in TENSORS.items()}
    assert {info.path for info in found.values()} == {path}
    assert open_checkpoint(path.parent).nbytes == sum(array.nbytes for array in TENSORS.values())


def test_a_file_without_tensors_is_consistent(path: Path) -> None:
    save_raw(path, {"__metadata__": {"format": "pt"}})
    assert list_tensors(path.parent) == {}


def test_header_padded_with_spaces(path: Path) -> None:
    save_raw(path, json.dumps({"w": entry()}).encode() + b" " * 13, bytes(24))
    assert list_tensors(path.parent)["w"].offset == path.stat().st_size - 24


def test_truncated_anywhere(path: Path) -> None:
    save(path, TENSORS)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        check_bad(path, "is truncated", "download or save the file again")


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**62, 2**63, 2**64 - 1])
def test_overlong_header(path: Path, length: int) -> None:
    save_raw(path, {"w": entry()}, bytes(24), length)
    check_bad(path, f"claims a header of {length} bytes", f"{MAX_HEADER_BYTES} is the most allowed")


def test_header_longer_than_the_file(path: Path) -> None:
    save_raw(path, b"{}", length=3)
    check_bad(path, "truncated", "claims a header of 3 bytes, and only 2 bytes follow")


def test_git_lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    check_bad(path, "is a Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize(
    ("header", "text"),
    [
        (b"", "not valid JSON"),
        (b'{"w": ', "not valid JSON"),
        (b'{"\xff": 1}', "not valid JSON ('utf-8' codec"),
        (b'{"\\ud800": 1}', "not valid JSON"),
        (b'{"w": NaN}', "NaN is not a JSON number"),
        (b'{"w": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"w": {}, "w": {}}', "'w' appears twice"),
        (b"[]", "not a JSON object of tensors but a list"),
        (b"7", "not a JSON object of tensors but a int"),
        (b' {"a": 1}', "not a JSON object"),
        (b'{"__metadata__": {"a": 1}}', "does not map strings to strings"),
        (b'{"__metadata__": []}', "does not map strings to strings"),
    ],
)
def test_broken_json(path: Path, header: bytes, text: str) -> None:
    save_raw(path, header)
    check_bad(path, text, "download or save the file again")


@pytest.mark.parametrize(
    ("description", "text"),
    [
        ([], "not described by dtype, shape and data_offsets"),
        ({"dtype": "F32", "shape": [2, 3]}, "not described by"),
        (entry(dtype="F31"), "unknown dtype 'F31', not one of BOOL, U8"),
        (entry(dtype=[]), "unknown dtype []"),  # type: ignore[arg-type]
        (entry(shape=[2, -3]), "has shape [2, -3]"),
        (entry(shape=[2, 3.0]), "has shape [2, 3.0]"),
        (entry(shape=[True, 6]), "has shape [True, 6]"),
        (entry(shape=6), "has shape 6"),
        (entry(shape=None), "has shape None"),
        (entry(shape=[2**63 - 1] * 64), "do not take the 24 bytes"),
        (entry(shape=[2**63 - 1] * 100_000), "has shape [9223372036854775807, "),
        (entry(shape=[2**64]), "has shape [18446744073709551616]"),
        (entry(offsets=[24, 0]), "data_offsets [24, 0]"),
        (entry(offsets=[0]), "data_offsets [0]"),
        (entry(offsets=[0, 24, 24]), "data_offsets [0, 24, 24]"),
        (entry(offsets=[-1, 23]), "data_offsets [-1, 23]"),
        (entry(offsets=["0", "24"]), "data_offsets ['0', '24']"),
        (entry(offsets=[0, 23]), "do not take the 23 bytes"),
        (entry(dtype="F16"), "do not take the 24 bytes"),
        (entry(dtype="F4", shape=[3], offsets=[0, 1]), "do not take the 1 bytes"),
    ],
)
def test_wrong_description_of_a_tensor(path: Path, description: object, text: str) -> None:
    save_raw(path, {"w": description}, bytes(24))
    check_bad(path, "Tensor 'w' of", text)


def test_overlap_gap_and_rest(path: Path) -> None:
    save_raw(path, {"a": entry(), "b": entry(offsets=(12, 36))}, bytes(36))
    check_bad(path, "Tensor 'b'", "overlaps", "starts at byte 12 of the data where 24 is expected")
    save_raw(path, {"a": entry(), "b": entry(offsets=(28, 52))}, bytes(52))
    check_bad(path, "Tensor 'b'", "leaves a gap", "starts at byte 28 of the data where 24 is expected")
    save_raw(path, {"a": entry(offsets=(4, 28))}, bytes(28))
    check_bad(path, "Tensor 'a'", "leaves a gap", "byte 4 of the data where 0 is expected")
    save_raw(path, {"a": entry()}, bytes(25))
    check_bad(path, "1 bytes after the last tensor")
    save_raw(path, {"a": entry(shape=(2**40, 2**10), offsets=(0, 2**52))}, bytes(25))
    check_bad(path, "is truncated: its header describes 4503599627370")


def test_a_hostile_name_is_escaped_and_cut(path: Path) -> None:
    save_raw(path, {"\x1b[31m\n" * 5000: []})
    check_bad(path, "'\\x1b[31m\\n", "...")


@pytest.mark.parametrize("kind", ["directory", "fifo"])
def test_not_a_regular_file(path: Path, kind: str) -> None:
    path.mkdir() if kind == "directory" else os.mkfifo(path)
    check_bad(path, "is not a regular file")


def test_unreadable_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(path, TENSORS)

    def broken_disk(fd: int, length: int, offset: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", broken_disk)
    check_bad(path, "cannot be read (Input/output error)")


def loads_right_or_fails(content: bytes) -> bool:
    """Whether it loads. Then the values are right and the safetensors library accepts the file too."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(content)
        collector = Collector()
        try:
            load(folder, collector.slots(TENSORS), progress=False)
        except CheckpointError:
            return False
        for name, array in TENSORS.items():
            assert_same(collector.arrays[name], array)
        with safe_open(path, framework="np") as file:
            assert set(file.keys()) == set(TENSORS)
        return True


def valid_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "f", TENSORS)
        return (Path(folder) / "f").read_bytes()


VALID = valid_file()
HEADER_END = 8 + int.from_bytes(VALID[:8], "little")


def test_the_fuzzed_file_is_right() -> None:
    assert loads_right_or_fails(VALID)


@settings(max_examples=600, deadline=None)
@given(st.lists(st.tuples(st.integers(0, HEADER_END - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes(flips: list[tuple[int, int]]) -> None:
    content = bytearray(VALID)
    for position, value in flips:
        content[position] = value
    loads_right_or_fails(bytes(content))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 2**64 - 1) | st.integers(0, 250))
def test_random_files(content: bytes, length: int) -> None:
    loads_right_or_fails(content)
    assert not loads_right_or_fails(length.to_bytes(8, "little") + content)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.integers(0, 200),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(TENSORS)), st.sampled_from(["dtype", "shape", "data_offsets", "more", ""]), ANY_JSON)
def test_replaced_descriptions(name: str, key: str, value: object) -> None:
    header = json.loads(VALID[8:HEADER_END])
    if key:
        header[name][key] = value
    else:
        header[name] = value
    raw = json.dumps(header).encode()
    loads_right_or_fails(len(raw).to_bytes(8, "little") + raw + VALID[HEADER_END:])
