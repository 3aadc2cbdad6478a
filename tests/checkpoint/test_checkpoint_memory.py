"""Loading takes the memory of the largest part that is read, however large the file is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TENSORS, ROWS, COLUMNS = 24, 4096, 4096  # float32: 64 MiB each, 1.5 GiB in all

# Prints the bytes read, and how far the peak of the resident memory rose while loading.
PROGRAM = f"""
import sys
from vllm_ms_models.checkpoint import Slot, load

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

index = {{"whole": (), "rows": (slice(1024, 2048),), "columns": (slice(None), slice(1024, 2048))}}[sys.argv[2]]
slots = [Slot(f"layer.{{n}}", ({ROWS}, {COLUMNS}), lambda array: None, index) for n in range({TENSORS})]
before = status("VmRSS")
report = load(sys.argv[1], slots, progress=False)
heavy = [name for name in ("mindspore", "torch", "vllm") if name in sys.modules]
print(report.bytes_read, status("VmHWM") - before, heavy)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of zeros that takes no room on the disk."""
    folder = tmp_path_factory.mktemp("sparse")
    size = ROWS * COLUMNS * 4
    header = json.dumps(
        {
            f"layer.{n}": {"dtype": "F32", "shape": [ROWS, COLUMNS], "data_offsets": [n * size, (n + 1) * size]}
            for n in range(TENSORS)
        }
    ).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + TENSORS * size)
    return folder


@pytest.mark.parametrize(("part", "share"), [("whole", 1), ("rows", 4), ("columns", 4)])
def test_peak_memory(folder: Path, part: str, share: int) -> None:
    program = [sys.executable, "-c", PROGRAM, str(folder), part]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    output = subprocess.run(program, check=True, capture_output=True, text=True, env=environment).stdout
    bytes_read, peak, heavy = output.split(maxsplit=2)
    slice_bytes = ROWS * COLUMNS * 4 // share
    assert int(bytes_read) == TENSORS * slice_bytes
    assert int(peak) < slice_bytes + (16 << 20)
    assert heavy.strip() == "[]"
