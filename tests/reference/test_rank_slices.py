"""Whole models built for one of several ranks or stages: each reads its own part, together the checkpoint once."""

import shutil
from pathlib import Path
from typing import Any

import mindspore as ms
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tests.checkpoints import DEEPSEEK, checkpoint
from tests.reference.test_mixtures import FAMILIES as MIXTURES
from vllm_ms_models import kernels, registry
from vllm_ms_models.checkpoint import CheckpointError, list_tensors, load
from vllm_ms_models.checkpoint.loader import LoadReport
from vllm_ms_models.distributed.group import Group
from vllm_ms_models.distributed.rows import DataParallel
from vllm_ms_models.distributed.stage import Stage
from vllm_ms_models.kernels.reference import ReferenceKernels
from vllm_ms_models.layers.context import ModelContext

KV_HEADS = 2
OPTIONS: dict[str, Any] = {"vocab_size": 211, "tie_word_embeddings": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"num_key_value_heads": KV_HEADS},
    "llama": {"num_key_value_heads": KV_HEADS},
    "qwen3_moe": {"num_key_value_heads": KV_HEADS} | MIXTURES["qwen3_moe"],
    "deepseek_v3": DEEPSEEK,
}
# What every rank has: norms, the latent projections of DeepSeek, routers.
WHOLE = ("norm", ".q_a_proj.", ".kv_a_proj_with_mqa.", ".gate.")
ALONE, ALL_LAYERS = Group(), Stage()


def read_part(folder: Path, group: Group = ALONE, stage: Stage = ALL_LAYERS, **options: Any) -> LoadReport:
    """What a process of `group` and `stage` reads; `options` are others of ModelContext."""
    kernels.use(ReferenceKernels())
    config = AutoConfig.from_pretrained(folder)
    context = ModelContext(ms.float32, 256, group, pipeline=stage, **options)
    model = registry.lookup(config.architectures[0])(config, context)
    cells = [cell for _, cell in model.cells_and_names() if hasattr(cell, "slots")]
    return load(folder, [slot for cell in cells for slot in cell.slots()], ignored=model.elsewhere, progress=False)


def stages_of(size: int, layers: int = 3) -> list[Stage]:
    """Uneven shares of three layers."""
    first = [*range(size), layers]
    return [Stage(rank, size, range(first[rank], first[rank + 1])) for rank in range(size)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_read_the_checkpoint_once(family: str, size: int) -> None:
    folder = checkpoint(family, **OPTIONS, **FAMILIES[family])
    read = sum(read_part(folder, Group(rank, size)).bytes_read for rank in range(size))
    tensors = list_tensors(folder)
    replicated = sum(info.nbytes for name, info in tensors.items() if any(part in name for part in WHOLE))
    keys_and_values = sum(info.nbytes for name, info in tensors.items() if ".k_proj." in name or ".v_proj." in name)
    copies = max(1, size // KV_HEADS)
    whole = sum(info.nbytes for info in tensors.values())
    assert read == whole + (size - 1) * replicated + (copies - 1) * keys_and_values


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_stages_read_the_checkpoint_once(family: str, size: int, tied: bool) -> None:
    """And, where the embedding is also the head, its matrix twice."""
    folder = checkpoint(family, **OPTIONS | FAMILIES[family] | {"tie_word_embeddings": tied})
    tensors = list_tensors(folder)
    whole = sum(info.nbytes for info in tensors.values())
    parts = [read_part(folder, stage=stage) for stage in stages_of(size)]
    assert sum(part.bytes_read for part in parts) == whole + tied * tensors["model.embed_tokens.weight"].nbytes
    assert sum(part.tensors for part in parts) == len(tensors) + tied


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("whole_experts", [False, True])
def test_experts_are_read_once(family: str, size: int, whole_experts: bool) -> None:
    """By two data-parallel ranks of `size` tensor-parallel ones each; they read all else as one data-parallel rank."""
    folder = checkpoint(family, **OPTIONS, **FAMILIES[family])
    experts = sum(info.nbytes for name, info in list_tensors(folder).items() if ".experts." in name)
    alone = sum(read_part(folder, Group(rank, size)).bytes_read for rank in range(size))
    for data in range(2):
        options: dict[str, Any] = {"data_parallel": DataParallel(Group(data, 2)), "expert_parallel": whole_experts}
        read = sum(read_part(folder, Group(rank, size), **options).bytes_read for rank in range(size))
        assert read == alone - experts / 2


@pytest.mark.parametrize(
    ("change", "refusing"),
    [
        (("model.layers.0.mlp.gate_proj.weight", None), [0]),
        (("model.layers.2.mlp.gate_proj.weight", None), [1]),
        (("model.norm.weight", None), [1]),
        (("lm_head.weight", None), [1]),
        (("model.embed_tokens.weight", None), [0]),
        (("model.norm.weight", "model.layers.0.norm.weight"), [0, 1]),
        (("model.norm.weight", "model.more.weight"), [0, 1]),
        (("model.norm.weight", "model.layers.3.norm.weight"), [0, 1]),
    ],
)
def test_missing_and_unknown_tensors_are_refused(
    change: tuple[str, str | None], refusing: list[int], tmp_path: Path
) -> None:
    """By the stage that a layer belongs to; what belongs to none, by all of them."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama", **OPTIONS), folder)
    (file,) = folder.glob("*.safetensors")
    tensors, (name, other) = load_file(file), change
    moved = tensors.pop(name)
    save_file(tensors | ({} if other is None else {other: moved}), file, {"format": "pt"})
    for rank, stage in enumerate(stages_of(2)):
        if rank in refusing:
            with pytest.raises(CheckpointError, match=r"tensors are missing|not known to the model"):
                read_part(folder, stage=stage)
        else:
            read_part(folder, stage=stage)
