"""Whole models built for one of several ranks: each reads its own slices, together they read the checkpoint once."""

from typing import Any

import mindspore as ms
import pytest
from transformers import AutoConfig

from tests.checkpoints import checkpoint
from tests.reference.test_deepseek import SIZES as LATENT
from tests.reference.test_mixtures import FAMILIES as MIXTURES
from vllm_ms_models import kernels, registry
from vllm_ms_models.checkpoint import list_tensors, load
from vllm_ms_models.distributed.group import Group
from vllm_ms_models.kernels.reference import ReferenceKernels
from vllm_ms_models.layers.context import ModelContext

KV_HEADS = 2
OPTIONS: dict[str, Any] = {"vocab_size": 211, "tie_word_embeddings": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"num_key_value_heads": KV_HEADS},
    "llama": {"num_key_value_heads": KV_HEADS},
    "qwen3_moe": {"num_key_value_heads": KV_HEADS} | MIXTURES["qwen3_moe"],
    "deepseek_v3": LATENT,
}
# What every rank has: norms, the latent projections of DeepSeek, routers.
WHOLE = ("norm", ".q_a_proj.", ".kv_a_proj_with_mqa.", ".gate.")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_read_the_checkpoint_once(family: str, size: int) -> None:
    kernels.use(ReferenceKernels())
    folder = checkpoint(family, **OPTIONS, **FAMILIES[family])
    config = AutoConfig.from_pretrained(folder)
    read = 0
    for rank in range(size):
        model = registry.lookup(config.architectures[0])(config, ModelContext(ms.float32, 256, Group(rank, size)))
        cells = [cell for _, cell in model.cells_and_names() if hasattr(cell, "slots")]
        read += load(folder, [slot for cell in cells for slot in cell.slots()], progress=False).bytes_read
    tensors = list_tensors(folder)
    replicated = sum(info.nbytes for name, info in tensors.items() if any(part in name for part in WHOLE))
    keys_and_values = sum(info.nbytes for name, info in tensors.items() if ".k_proj." in name or ".v_proj." in name)
    copies = max(1, size // KV_HEADS)
    whole = sum(info.nbytes for info in tensors.values())
    assert read == whole + (size - 1) * replicated + (copies - 1) * keys_and_values
