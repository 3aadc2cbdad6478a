"""Checkpoints whose tensors have no `model.` before their names: the first OPT models, decoders without their head."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.checkpoints import random_prompts
from tests.engines import engine, greedy, token_ids
from tests.zoo.models import made


@pytest.mark.slow
def test_first_opt_checkpoints(tmp_path: Path) -> None:
    folder = made("opt", {}).folder
    prompts = random_prompts((5, 20))
    with engine(folder) as llm:
        wanted = token_ids(greedy(llm, prompts, 8))
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    assert all(name.startswith("model.decoder.") for name in tensors)
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    with engine(tmp_path) as llm:
        assert token_ids(greedy(llm, prompts, 8)) == wanted


def test_more_than_the_learned_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where vLLM is told to allow it."""
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    folder = made("opt", {}).folder
    with (
        pytest.raises(ValueError, match="--max-model-len 600 is beyond the 512 positions"),
        engine(folder, max_model_len=600),
    ):
        pass
