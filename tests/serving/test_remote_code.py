"""No code of a checkpoint is ever run: `trust_remote_code` is neither needed nor turned on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import checkpoint, random_prompts
from tests.engines import engine, greedy, token_ids

PACKAGE = Path(__file__).parents[2] / "vllm_ms_models"

CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
Path({marker!r}).touch()
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model
"""
AUTO_MAP = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}


def with_code(tmp_path: Path, **config: Any) -> tuple[Path, Path]:
    """A sound tiny Llama that brings code along; and what exists once the code has run."""
    folder, marker = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(checkpoint("llama"), folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": AUTO_MAP} | config))
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    return folder, marker


def test_the_package_never_turns_it_on() -> None:
    """Nothing in it says the word, so that vLLM's and transformers' default holds: no."""
    assert [path for path in PACKAGE.rglob("*.py") if "trust_remote_code" in path.read_text()] == []


def test_a_model_that_brings_code_is_served_without_it(tmp_path: Path) -> None:
    folder, marker = with_code(tmp_path)
    prompts = random_prompts([5, 9])
    with engine(checkpoint("llama")) as llm:
        expected = token_ids(greedy(llm, prompts, 8))
    with engine(folder) as llm:
        assert token_ids(greedy(llm, prompts, 8)) == expected
        assert not llm.llm_engine.model_config.trust_remote_code
    assert not marker.exists()


def test_a_model_that_needs_its_code_is_refused(tmp_path: Path) -> None:
    folder, marker = with_code(tmp_path, model_type="nobody_knows_this")
    with pytest.raises(Exception, match=r"trust_remote_code|trust-remote-code"), engine(folder):
        pass
    assert not marker.exists()
