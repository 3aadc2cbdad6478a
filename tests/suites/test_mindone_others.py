"""Architectures that this package has no model of and mindone has: their answers are those of transformers."""

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.checkpoints import _DEFAULTS, _root, randomized
from tests.suites.answers import check
from vllm_ms_models import suites

SOURCE = {"model_source": "mindone"}

# Config, options, seed of the weights.
CASES: dict[str, tuple[Any, dict[str, Any], int]] = {
    "ArceeForCausalLM": (transformers.ArceeConfig, {}, 0),
    "Ernie4_5ForCausalLM": (transformers.Ernie4_5Config, {"head_dim": 16}, 2),
    "Exaone4ForCausalLM": (
        transformers.Exaone4Config,
        {"sliding_window": 24, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
        0,
    ),
    "HeliumForCausalLM": (transformers.HeliumConfig, {"head_dim": 16}, 1),
    "HunYuanDenseV1ForCausalLM": (transformers.HunYuanDenseV1Config, {"head_dim": 16}, 0),
    "OlmoForCausalLM": (transformers.OlmoConfig, {}, 0),
    "SeedOssForCausalLM": (transformers.SeedOssConfig, {"head_dim": 16}, 0),
    "SmolLM3ForCausalLM": (transformers.SmolLM3Config, {}, 0),
    "Starcoder2ForCausalLM": (transformers.Starcoder2Config, {"sliding_window": 24}, 0),
}


@functools.cache
def folder_of(architecture: str) -> Path:
    make, options, seed = CASES[architecture]
    config = make(**(_DEFAULTS | options))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    folder = Path(tempfile.mkdtemp(dir=_root()))
    randomized(model, seed).save_pretrained(folder)
    return folder


def test_all_are_here() -> None:
    assert set(CASES) == set(suites.ADDED)


@pytest.mark.parametrize("architecture", CASES)
def test_as_transformers(architecture: str) -> None:
    check(folder_of(architecture), SOURCE, (1, 33, 100), 32)


def test_not_among_our_own() -> None:
    from vllm import EngineArgs

    folder = str(folder_of("OlmoForCausalLM"))
    with pytest.raises(ValueError, match=r"OlmoForCausalLM is not among this package's own models; .*\"mindone\""):
        EngineArgs(folder, skip_tokenizer_init=True, max_model_len=64).create_engine_config()


def test_doctor() -> None:
    """Before a model is loaded: who has it, and whether it would load."""
    options = ["--skip-tokenizer-init", "--additional-config", json.dumps(SOURCE)]
    command = [sys.executable, "-m", "vllm_ms_models.cli", "doctor", str(folder_of("ArceeForCausalLM")), *options]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "ArceeForCausalLM, by mindone" in run.stdout
    assert "It would load." in run.stdout
