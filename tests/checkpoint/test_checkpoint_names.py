"""Decoders that were saved without a head: their tensors get the names that they have in a whole model."""

from pathlib import Path

import numpy as np

from tests.checkpoint.checkpoint_files import save_shards
from vllm_ms_models.checkpoint import of_whole_model, open_checkpoint


def names(folder: Path, *stored: str) -> list[str]:
    save_shards(folder, {name: np.zeros(2, np.float32) for name in stored})
    return sorted(of_whole_model(open_checkpoint(folder)).tensors)


def test_a_decoder_alone_and_its_heads(tmp_path: Path) -> None:
    found = names(tmp_path, "layers.0.mlp.up_proj.weight", "norm.weight", "score.weight", "lm_head.weight")
    assert found == ["lm_head.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "score.weight"]


def test_a_whole_model_stays_as_it_is(tmp_path: Path) -> None:
    assert names(tmp_path, "model.norm.weight", "norm.weight") == ["model.norm.weight", "norm.weight"]
