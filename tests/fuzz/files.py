"""Headers of safetensors files, and index files: either right, or a CheckpointError in one sentence."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from safetensors import safe_open

from tests.checkpoint.checkpoint_files import save
from tests.fuzz import mutation
from tests.fuzz.mutation import Check
from vllm_ms_models.checkpoint import CheckpointError, open_checkpoint
from vllm_ms_models.checkpoint.header import DTYPES, PACKED_BITS

TENSORS: dict[str, np.ndarray] = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.weight": np.arange(10, dtype=np.float16).reshape(2, 5),
    "c.scale": np.arange(7, dtype=np.int8),
    "e.empty": np.zeros((0, 3), np.float32),
}
HEADER_WORDS: list[Any] = [
    *(*DTYPES, *PACKED_BITS, "dtype", "shape", "data_offsets", "__metadata__", *TENSORS),
    *([0, 48], [48, 68], [68, 75], [0, 0], [75, 75], [1, 47], [3, 4], [2, 5], [7], [12], [2**62, 2], [2**63] * 9),
]
FILE_WORDS: list[Any] = [
    *("x.safetensors", "y.safetensors", "z.safetensors", "sub/x.safetensors", "sub/../x.safetensors", "weight_map"),
    *("../outside.safetensors", "link.safetensors", "away.safetensors", "loop.safetensors", "/dev/zero", "metadata"),
    *("./x.safetensors", "x.safetensors/", "sub", ".safetensors", "x.safetensors\0", "pytorch_model.bin", *TENSORS),
]


MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Files that are written 100,000 times are better not on a disk."""


def sentence(error: CheckpointError) -> str:
    """Its words, which are one sentence on one line that can be printed."""
    text = str(error)
    assert text.endswith(".") and "\n" not in text and len(text) < 4000, f"not a sentence: {text[:300]!r}"
    text.encode()
    return text


@contextmanager
def headers() -> Iterator[Check]:
    """Damaged safetensors files; what is taken is taken by the safetensors library, too, with the same shapes."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        path = Path(name) / "model.safetensors"
        save(path, TENSORS)
        valid = path.read_bytes()
        end = 8 + int.from_bytes(valid[:8], "little")
        header = json.loads(valid[8:end])

        def check(rng: Random) -> str:
            path.write_bytes(_damaged_file(rng, valid, header, end))
            try:
                found = open_checkpoint(name).tensors
            except CheckpointError as error:
                sentence(error)
                return "refused"
            size = path.stat().st_size
            assert all(0 <= tensor.offset <= tensor.offset + tensor.nbytes <= size for tensor in found.values())
            with safe_open(path, framework="np") as file:
                assert set(file.keys()) == set(found)
                assert all(tuple(file.get_slice(key).get_shape()) == found[key].shape for key in found)
            return "taken"

        yield check


def _damaged_file(rng: Random, valid: bytes, header: Any, end: int) -> bytes:
    kind = rng.randrange(8)
    if kind == 0:
        return rng.randbytes(rng.randint(0, 64))
    if kind == 1:
        return mutation.damaged(rng, valid[:end]) + valid[end:]
    if kind == 2:
        length = rng.choice((rng.getrandbits(64), rng.getrandbits(12), 10**8, 10**8 + 1))
        return length.to_bytes(8, "little") + valid[8:]
    if kind == 3:
        raw = mutation.damaged(rng, valid[8:end])
    elif kind == 4 and rng.random() < 0.02:
        raw = rng.choice((b"[", b'{"a":')) * rng.choice((10, 1000, 50_000))
    else:
        raw = mutation.written(mutation.tree(rng, header, HEADER_WORDS))
    return len(raw).to_bytes(8, "little") + raw + valid[end : len(valid) + rng.choice((0, 0, 0, -1))]


@contextmanager
def indexes() -> Iterator[Check]:
    """Damaged index files, in a folder with links; no file that is taken lies outside of it."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        folder = Path(name) / "model"
        names = list(TENSORS)
        shards = {"x": names[:1], "y": names[1:3], "z": names[3:]}
        for stem, tensors in shards.items():
            save(folder / f"{stem}.safetensors", {tensor: TENSORS[tensor] for tensor in tensors})
        save(folder / "sub" / "x.safetensors", {names[0]: TENSORS[names[0]]})
        save(folder.parent / "outside.safetensors", TENSORS)
        (folder / "link.safetensors").symlink_to("x.safetensors")
        (folder / "away.safetensors").symlink_to("../outside.safetensors")
        (folder / "loop.safetensors").symlink_to("loop.safetensors")
        index = folder / "model.safetensors.index.json"
        weight_map = {tensor: f"{stem}.safetensors" for stem, tensors in shards.items() for tensor in tensors}
        base = {"metadata": {"total_size": 75}, "weight_map": weight_map}
        root = os.path.realpath(folder) + "/"

        def check(rng: Random) -> str:
            raw = mutation.written(mutation.tree(rng, base, FILE_WORDS, 3))
            index.write_bytes(mutation.damaged(rng, raw) if rng.random() < 0.2 else raw)
            try:
                found = open_checkpoint(folder)
            except CheckpointError as error:
                sentence(error)
                return "refused"
            assert all(os.path.realpath(path).startswith(root) for path in found.files), found.files
            return "taken"

        yield check
