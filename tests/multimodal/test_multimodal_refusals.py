"""What models that read images cannot do is refused in a sentence, before any weight is read."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import checkpoint
from tests.engines import engine
from tests.multimodal.models import CASES
from tests.multimodal.test_multimodal_float32 import OPTIONS

QWEN = "Qwen2_5_VLForConditionalGeneration"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "adapters": (
        {"enable_lora": True},
        f"--enable-lora is not supported for {QWEN}, which reads images; leave it out.",
    ),
    "drafts": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
        f"--speculative-config is not supported for {QWEN}, which reads images; leave it out.",
    ),
    "embeddings of images": ({"enable_mm_embeds": True}, "--enable-mm-embeds is not supported yet; leave it out."),
    "encoder alone": ({"mm_encoder_only": True}, "--mm-encoder-only is not supported yet; leave it out."),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "adapters" else pytest.mark.slow) for n in REFUSED])
def test_refused(name: str) -> None:
    options, sentence = REFUSED[name]
    with pytest.raises(ValueError) as caught, engine(CASES["qwen2_5_vl"].folder, **OPTIONS | options):
        pass
    assert sentence in str(caught.value)


def copied(folder: Path, target: Path, **entries: Any) -> Path:
    shutil.copytree(folder, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return target


@pytest.mark.slow
def test_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    folder = CASES["llava, CLIP and Llama"].folder
    with pytest.raises(ImportError, match=r"pip install 'vllm-ms-models\[vision\]'"), engine(folder, **OPTIONS):
        pass


@pytest.mark.slow
def test_sections_of_a_text_model(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    folder = copied(checkpoint("qwen2"), tmp_path / "model", rope_parameters=rope)
    with pytest.raises(ValueError) as caught, engine(folder):
        pass
    assert "mrope_section in config.json is not supported for Qwen2ForCausalLM" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({"vision_feature_layer": 9}, r"vision_feature_layer \[9\] in config.json must name some of the 3 layers"),
        ({"projector_hidden_act": "gulu"}, "Activation 'gulu' .* is not supported"),
    ],
)
def test_configs_that_cannot_be_built(tmp_path: Path, entries: dict[str, Any], sentence: str) -> None:
    folder = copied(CASES["llava, CLIP and Llama"].folder, tmp_path / "model", **entries)
    with pytest.raises(ValueError, match=sentence), engine(folder, **OPTIONS):
        pass


@pytest.mark.slow
def test_a_tensor_is_missing(tmp_path: Path) -> None:
    folder = copied(CASES["llava, CLIP and Llama"].folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["vision_tower.nonesuch"] = torch.zeros(1)
    del tensors["vision_tower.embeddings.class_embedding"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception) as caught, engine(folder, **OPTIONS):
        pass
    for name in ("vision_tower.embeddings.class_embedding", "vision_tower.nonesuch"):
        assert name in str(caught.value)
