"""Writing a checkpoint of a model that transformers has as one of a model that it does not have."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def write(
    folder: Path, tensors: Mapping[str, Tensor], architecture: str, model_type: str, entries: Mapping[str, Any]
) -> None:
    """The tensors, and a config.json as published: `entries` over what is there, and the code that would read it."""
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text())
    code = {"AutoConfig": f"configuration_{model_type}.Config", "AutoModelForCausalLM": f"modeling_{model_type}.Model"}
    config |= {"architectures": [architecture], "model_type": model_type, "auto_map": code} | dict(entries)
    path.write_text(json.dumps(config))


def source_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())
