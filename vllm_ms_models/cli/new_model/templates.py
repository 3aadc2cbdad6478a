"""What `vllm-ms new-model` writes besides the model."""

from pathlib import Path

from vllm_ms_models.cli.new_model.source import stem
from vllm_ms_models.registry import ENTRY_POINT_GROUP


def class_name(name: str) -> str:
    """`my_model` -> `MyModel`."""
    return "".join(part.capitalize() for part in name.split("_"))


def readme(architecture: str, like: str) -> str:
    """With the row that docs/models.md has of it."""
    return f"""# {stem(architecture)}

| architecture | checkpoints | dtypes | CPU | Ascend |
| --- | --- | --- | --- | --- |
| `{architecture}` | (which ones) | bfloat16, float16, float32 | yes | not run on hardware |

A decoder like {like}. What is different, what a config may vary, and what the tests vary of it.
"""


def project(name: str, architecture: str) -> str:
    """pyproject.toml of a package of its own."""
    return f"""[build-system]
requires = ["setuptools>=77.0.3"]
build-backend = "setuptools.build_meta"

[project]
name = "{name.replace("_", "-")}-ms"
version = "0.1"
description = "{architecture} in MindSpore, served by vLLM"
dependencies = ["vllm-ms-models"]

[project.entry-points."{ENTRY_POINT_GROUP}"]
{architecture} = "{name}.model:{architecture}"

[tool.setuptools]
packages = ["{name}"]

[tool.pytest.ini_options]
pythonpath = ["."]
"""


def tiny(architecture: str, config: str) -> str:
    """A program that makes checkpoints to test with."""
    return f'''"""Tiny checkpoints of {architecture} with random weights: `python tiny.py FOLDER` writes one."""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, {config}

SIZES: dict[str, Any] = {{
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}}


def write(folder: str | Path, **options: Any) -> None:
    """Norms are not one and biases not zero: tests would not see whether they are used."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config({config}(**(SIZES | options)), dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                noise = torch.randn(weight.shape)
                weight.copy_(noise * 0.5 if name.endswith(".bias") else 1 + noise * 0.2)
    model.save_pretrained(folder)


if __name__ == "__main__":
    write(sys.argv[1])
'''


def test(architecture: str) -> str:
    """The parity test of a package of its own."""
    return f'''"""{architecture} against transformers: the same tokens, and the same hidden states after each layer."""

from pathlib import Path
from typing import Any

import pytest

from tiny import write
from vllm_ms_models.cli import main

# Options of the config: at least one case for each thing that a config may vary and the model must follow.
CASES: dict[str, dict[str, Any]] = {{
    "as the class has it": {{}},
    "tied, one KV head": {{"tie_word_embeddings": True, "num_key_value_heads": 1}},
    "not tied": {{"tie_word_embeddings": False}},
}}


@pytest.mark.parametrize("case", CASES)
def test_it_agrees_with_transformers(case: str, tmp_path: Path) -> None:
    write(tmp_path, **CASES[case])
    assert main(["verify", str(tmp_path), "--max-tokens", "24"]) == 0
'''


def family(architecture: str, config: str) -> str:
    """The parity test within this repository: tests/zoo goes through it."""
    return f'''"""{stem(architecture)}: what is odd about it."""

from transformers import {config}

from tests.zoo.family import Family

FAMILY = Family(
    ("{architecture}",),
    {config},
    {{
        "grouped heads": {{}},
        "tied, one KV head": {{"tie_word_embeddings": True, "num_key_value_heads": 1}},
        "not tied": {{"tie_word_embeddings": False}},
    }},
)
'''


def next_steps(name: str, known: bool, inside: bool, root: Path) -> str:
    """What a person does now."""
    lines = []
    if not known:
        lines.append("transformers has no such model: correct the name of the config's class in the tests.")
    if inside:
        lines += [f'Next: change vllm_ms_models/{name}/model.py; `pytest -m "" tests/zoo -k {name}`; `make docs`.']
    else:
        lines += [f"Next, in {root}: `pip install -e .`; `python tiny.py checkpoint`; `vllm-ms doctor checkpoint`."]
    return "\n".join(lines)
