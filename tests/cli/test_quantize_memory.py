"""Quantizing takes the memory of the embedding and of one linear, not that of the model."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import checkpoints
from tests.cli.quantizing import prompts_file, report

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import resource, sys
from vllm_ms_models.cli import main
assert main(sys.argv[1:]) == 0
print("peak:", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def peak(source: Path, out: Path, *options: str) -> int:
    """Bytes that a process had resident at most."""
    words = [sys.executable, "-c", RUN, "quantize", str(source), str(out), *options]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return int(run.stdout.split("peak:")[1])


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w8a8-static", "w4a16"])
def test_memory(tmp_path: Path, scheme: str) -> None:
    """A model of 395 MB in 16 layers (float32), against one of two layers.

    What grows with layers are statistics and samples: 67 float32 rows for each of four inputs, 4864 channels together,
    1.3 MB a layer. Three times that and 64 MiB for the allocator's own ways are allowed, of 344 MB more weights.
    """
    sizes = {"hidden_size": 512, "intermediate_size": 3328, "num_attention_heads": 8, "num_key_value_heads": 8}
    options = ["--scheme", scheme, "--calibration", str(prompts_file(tmp_path))]
    small, large = (checkpoints.checkpoint("llama", num_hidden_layers=layers, **sizes) for layers in (2, 16))
    least = peak(small, tmp_path / "small", *options)
    most = peak(large, tmp_path / "large", *options)
    assert most - least < 3 * 14 * 1.3e6 + 64 * 2**20
    before = [report(tmp_path / name)["total"][0] for name in ("small", "large")]
    assert before[1] - before[0] > 340e6
