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


def most_taken(process: psutil.Process) -> int:
    """Bytes that were resident at once, at the most."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.slow
def test_two_ranks_take_half_of_the_weights_each() -> None:
    """At most 0.55 of them and 1 GiB, of which the imported packages take two thirds; the cache is small here."""
    folder = checkpoint("qwen2", dtype=torch.bfloat16, **SIZES)
    weights = open_checkpoint(folder).nbytes
    assert weights > 0.8 * GIB
    before = set(psutil.Process().children(recursive=True))
    with engine(folder, dtype="bfloat16", tensor_parallel_size=2) as llm:
        greedy(llm, random_prompts([200, 3], SIZES["vocab_size"]), 4)
        workers = [p for p in psutil.Process().children(recursive=True) if p not in before and "Worker" in p.name()]
        taken = [most_taken(worker) for worker in workers]
    print(f"weights {weights / GIB:.2f} GiB, ranks {', '.join(f'{size / GIB:.2f} GiB' for size in taken)}")
    assert len(taken) == 2
    assert max(taken) <= 0.55 * weights + GIB
