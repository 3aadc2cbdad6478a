"""Decoders that were saved without a head: their tensors get the names that they have in a whole model."""

from pathlib import Path

import numpy as np

from tests.checkpoint.checkpoint_files import save_shards
from vllm_ms_models.checkpoint import of_whole_model, open_checkpoint, with_wanted_names


def names(folder: Path, *stored: str) -> list[str]:
    save_shards(folder, {name: np.zeros(2, np.float32) for name in stored})
    return sorted(of_whole_model(open_checkpoint(folder)).tensors)


def test_a_decoder_alone_and_its_heads(tmp_path: Path) -> None:
    found = names(tmp_path, "layers.0.mlp.up_proj.weight", "norm.weight", "score.weight", "lm_head.weight")
    assert found == ["lm_head.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "score.weight"]


def test_a_whole_model_stays_as_it_is(tmp_path: Path) -> None:
    assert names(tmp_path, "model.norm.weight", "norm.weight") == ["model.norm.weight", "norm.weight"]


def test_names_that_are_wanted(tmp_path: Path) -> None:
    """A decoder without a head is recognised by what the model wants; anything else stays as it is."""
    save_shards(tmp_path, {name: np.zeros(2, np.float32) for name in ("decoder.norm.weight", "lm_head.weight")})
    stored = open_checkpoint(tmp_path)
    for wanted, found in (
        (["model.decoder.norm.weight"], ["lm_head.weight", "model.decoder.norm.weight"]),
        (["decoder.norm.weight"], ["decoder.norm.weight", "lm_head.weight"]),
        (["transformer.norm.weight"], ["decoder.norm.weight", "lm_head.weight"]),
    ):
        assert sorted(with_wanted_names(stored, wanted).tensors) == found
