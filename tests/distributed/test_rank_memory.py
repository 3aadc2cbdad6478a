"""How much memory each of two ranks takes at most."""

import re
from pathlib import Path

import psutil
import pytest
import torch

from tests.checkpoints import checkpoint, random_prompts
from tests.engines import engine, greedy
from vllm_ms_models.checkpoint import open_checkpoint

GIB = 2**30
# Some 460 million parameters, a fifth of them in the embedding, which is split too.
SIZES = {
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 10,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 40009,
    "tie_word_embeddings": False,
}


def most_taken(process: psutil.Process) -> tuple[int, int]:
    """Bytes that were resident at once, at the most; and how many of them are pages of files.

    Those are of libraries: the same memory in all processes, which the kernel maps in pieces as large as it likes and
    may take back (0.4 to 0.6 GiB were seen).
    """
    status = Path(f"/proc/{process.pid}/status").read_text()
    most, files = (re.search(rf"{name}:\s+(\d+) kB", status) for name in ("VmHWM", "RssFile"))
    assert most is not None and files is not None
    return int(most[1]) * 1024, int(files[1]) * 1024


@pytest.mark.slow
def test_two_ranks_take_half_of_the_weights_each() -> None:
    """At most 0.55 of them and 1 GiB, of which the imported packages take half; the cache is small here."""
    folder = checkpoint("qwen2", dtype=torch.bfloat16, **SIZES)
    weights = open_checkpoint(folder).nbytes
    assert weights > 0.8 * GIB
    before = set(psutil.Process().children(recursive=True))
    with engine(folder, dtype="bfloat16", tensor_parallel_size=2) as llm:
        greedy(llm, random_prompts([200, 3], SIZES["vocab_size"]), 4)
        workers = [p for p in psutil.Process().children(recursive=True) if p not in before and "Worker" in p.name()]
        taken = [most_taken(worker) for worker in workers]
    for most, files in taken:
        print(f"weights {weights / GIB:.2f} GiB, a rank {most / GIB:.2f} GiB, of files {files / GIB:.2f} GiB")
    assert len(taken) == 2
    assert max(most - files for most, files in taken) <= 0.55 * weights + GIB
