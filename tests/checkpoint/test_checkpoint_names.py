"""Tensors of other names: of decoders saved without a head, of encoders, and of models that read images."""

from pathlib import Path

import numpy as np
import pytest

from tests.checkpoint.checkpoint_files import save_shards
from vllm_ms_models.checkpoint import of_encoder, of_whole_model, open_checkpoint, renamed, with_wanted_names


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


@pytest.mark.parametrize("stored", ["", "bert.", "roberta.", "model."])
@pytest.mark.parametrize("wanted", ["", "bert."])
def test_an_encoder_by_any_prefix(tmp_path: Path, stored: str, wanted: str) -> None:
    """Its norms may have TensorFlow's names; the heads keep theirs."""
    inner = ("embeddings.LayerNorm.gamma", "encoder.layer.0.output.LayerNorm.beta", "pooler.dense.bias")
    heads = {"classifier.dense.weight": np.zeros(2, np.float32), "cls.predictions.bias": np.zeros(2, np.float32)}
    save_shards(tmp_path, heads | {stored + name: np.zeros(2, np.float32) for name in inner})
    found = set(of_encoder(open_checkpoint(tmp_path), wanted).tensors)
    outer = {"embeddings.LayerNorm.weight", "encoder.layer.0.output.LayerNorm.bias", "pooler.dense.bias"}
    assert found == {wanted + name for name in outer} | set(heads)


def test_prefixes_one_pair_after_another(tmp_path: Path) -> None:
    stored = ["model.vision_tower.vision_model.x", "vision_tower.y", "model.language_model.z", "lm_head.w"]
    save_shards(tmp_path, {name: np.zeros(2, np.float32) for name in stored})
    prefixes = (
        ("model.language_model.", "model."),
        ("model.vision_tower.", "vision_tower."),
        ("vision_tower.vision_model.", "vision_tower."),
    )
    found = renamed(open_checkpoint(tmp_path), prefixes)
    assert sorted(found.tensors) == ["lm_head.w", "model.z", "vision_tower.x", "vision_tower.y"]
    assert sorted(renamed(found, ()).tensors) == sorted(found.tensors)
