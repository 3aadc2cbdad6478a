"""Adapters of InternLM2, whose one matrix has the queries, key and value of each KV head one after another.

transformers does not have it: torch runs the Llama that it is by other names, with the same adapter by Llama's names.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engines import engine
from tests.lora.adapters import adapter, ask, check, requests, torch_models
from tests.zoo.families.internlm2 import NAMES, PARTS, by_heads
from tests.zoo.models import made

FILE = "adapter_model.safetensors"
CONFIG = {"num_key_value_heads": 2}


def sharing(adapted: Path, target: Path) -> dict[str, torch.Tensor]:
    """A copy of a Llama's adapter in which q, k and v have one A, as an adapter of one matrix has."""
    shutil.copytree(adapted, target)
    tensors = load_file(adapted / FILE)
    for name in tensors:
        if ".lora_A." in name:
            for part in PARTS[1:]:
                name = name.replace(f".{part}.", ".q_proj.")
            if ".q_proj." in name:
                for part in PARTS[1:]:
                    tensors[name.replace(".q_proj.", f".{part}.")] = tensors[name].clone()
    save_file(tensors, target / FILE)
    return tensors


def published(tensors: dict[str, torch.Tensor], source: Path, target: Path) -> None:
    """That adapter by InternLM2's names."""
    found = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            parts = [tensors[name.replace(".q_proj.", f".{part}.")] for part in PARTS]
            joined = tensor if ".lora_A." in name else by_heads(parts, CONFIG["num_key_value_heads"])
            found[name.replace(".self_attn.q_proj.", ".attention.wqkv.")] = joined
        elif not any(f".{part}." in name for part in PARTS):
            for ours, theirs in NAMES.items():
                name = name.replace(ours, theirs)
            found[name] = tensor
    target.mkdir()
    save_file(found, target / FILE)
    settings = json.loads((source / "adapter_config.json").read_text())
    modules = ["wqkv", "wo", "w1", "w2", "w3"]
    (target / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": modules}))


@pytest.mark.slow
def test_one_matrix_of_all_heads(tmp_path: Path) -> None:
    model = made("internlm2", CONFIG)
    of_llama = tmp_path / "llama"
    tensors = sharing(adapter("llama", 1, CONFIG), of_llama)
    published(tensors, of_llama, tmp_path / "internlm2")
    wanted = requests(torch_models(model.source, [of_llama]), (5, 40, 9, 1))
    with engine(model.folder, enable_lora=True, max_lora_rank=8, max_num_batched_tokens=24) as llm:
        check(ask(llm, wanted, [tmp_path / "internlm2"]), wanted)
