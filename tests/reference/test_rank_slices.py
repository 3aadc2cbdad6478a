"""Whole models built for one of several ranks: each reads its own slices, together they read the checkpoint once."""

from typing import Any

import mindspore as ms
import pytest
from transformers import AutoConfig

from tests.checkpoints import checkpoint
from vllm_ms_models import kernels, registry
from vllm_ms_models.checkpoint import list_tensors, load
from vllm_ms_models.distributed.group import Group
from vllm_ms_models.kernels.reference import ReferenceKernels
from vllm_ms_models.layers.context import ModelContext

KV_HEADS = 2
OPTIONS: dict[str, Any] = {"num_key_value_heads": KV_HEADS, "vocab_size": 211, "tie_word_embeddings": False}


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_read_the_checkpoint_once(family: str, size: int) -> None:
    kernels.use(ReferenceKernels())
    folder = checkpoint(family, **OPTIONS)
    config = AutoConfig.from_pretrained(folder)
    read = 0
    for rank in range(size):
        model = registry.lookup(config.architectures[0])(config, ModelContext(ms.float32, 256, Group(rank, size)))
        cells = [cell for _, cell in model.cells_and_names() if hasattr(cell, "slots")]
        read += load(folder, [slot for cell in cells for slot in cell.slots()], progress=False).bytes_read
    tensors = list_tensors(folder)
    norms = sum(info.nbytes for name, info in tensors.items() if "norm" in name)
    keys_and_values = sum(info.nbytes for name, info in tensors.items() if ".k_proj." in name or ".v_proj." in name)
    copies = max(1, size // KV_HEADS)
    whole = sum(info.nbytes for info in tensors.values())
    assert read == whole + (size - 1) * norms + (copies - 1) * keys_and_values
