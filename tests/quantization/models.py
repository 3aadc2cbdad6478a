"""Small quantized models on disk, beside torch models that do the same arithmetic in NumPy."""

import functools
import json
import re
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests import checkpoints
from tests.checkpoint.checkpoint_files import save_shards
from tests.quantization.experts import take_apart
from tests.quantization.writers import Layer, Multiply, Scheme, Written

# No multiples of vectors: 80 and 144 inputs are 2.5 and 4.5 groups of 32; head size 20.
SIZES: dict[str, Any] = {"hidden_size": 80, "intermediate_size": 144, "num_hidden_layers": 2}
MIXTRAL_NAMES = {"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


class Exact(torch.nn.Module):
    """A linear that computes as the tensors of a quantized checkpoint say."""

    def __init__(self, multiply: Multiply) -> None:
        super().__init__()
        self.multiply = multiply

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.detach().numpy().reshape(-1, x.shape[-1])
        return torch.from_numpy(self.multiply(rows).astype(np.float32)).reshape(*x.shape[:-1], -1)


@dataclass(frozen=True)
class Quantized:
    """A folder, the torch model it stands for, and each linear's tensors and arithmetic by its name."""

    folder: Path
    model: torch.nn.Module
    linears: dict[str, Written]


def input_ranges(model: torch.nn.Module, prompts: Sequence[Sequence[int]]) -> dict[str, tuple[float, float]]:
    """The least and greatest input of each linear over some prompts."""
    ranges: dict[str, tuple[float, float]] = {}

    def note(name: str, x: torch.Tensor) -> None:
        low, high = ranges.get(name, (0.0, 0.0))
        ranges[name] = min(low, x.min().item()), max(high, x.max().item())

    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]))
        for name, module in linears(model).items()
    ]
    with torch.inference_mode():
        for prompt in prompts:
            model(torch.tensor([list(prompt)]))
    for hook in hooks:
        hook.remove()
    return ranges


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Those in the blocks: not the head."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and re.search(r"\.layers?\.", f".{name}")
    }


def layer_of(module: torch.nn.Linear, lowest: float, highest: float) -> Layer:
    bias = None if module.bias is None else module.bias.detach().numpy().astype(np.float64)
    return Layer(module.weight.detach().numpy().astype(np.float64), bias, lowest, highest)


def replace_module(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def write(
    folder: Path, family: str, scheme: Scheme, seed: int = 0, floats: tuple[str, ...] = (), **options: Any
) -> Quantized:
    """A random model in `scheme`."""
    model = take_apart(checkpoints.random_model(family, seed, **(SIZES | options)))
    return write_model(folder, model, scheme, checkpoints.random_prompts((40, 60), seed=7), seed, floats)


def write_model(
    folder: Path,
    model: torch.nn.Module,
    scheme: Scheme,
    prompts: Sequence[Sequence[int]],
    seed: int = 0,
    floats: tuple[str, ...] = (),
    within: str = "",
) -> Quantized:
    """Every linear of the blocks of a float32 model in `scheme`, which `model` then computes; two shards with an index.

    Static inputs are rounded as `prompts` demand. Linears whose names end in one of `floats`, or do not begin with
    `within`, stay as they are.
    """
    ranges = input_ranges(model, prompts)
    tensors = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    description = dict.fromkeys(tensors, "FLOAT")
    written = {}
    for name, module in linears(model).items():
        if name.endswith(floats) or not name.startswith(within):
            continue
        rng = np.random.default_rng(zlib.crc32(f"{seed} {shared_name(name)}".encode()))
        written[name] = scheme.write(layer_of(module, *ranges.get(name, (-1.0, 1.0))), rng)
        del tensors[f"{name}.weight"], description[f"{name}.weight"]
        quantized = {f"{name}.{end}": array for end, array in written[name].tensors.items()}
        description |= dict.fromkeys(quantized, scheme.kind)
        tensors |= quantized
        replace_module(model, name, Exact(written[name].multiply))
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "float32"}
    if scheme.config is not None:
        config["quantization_config"] = dict(scheme.config)
    stored = {stored_name(model.config.model_type, name): kind for name, kind in description.items()}
    if scheme.description is not None:
        (folder / scheme.description).write_text(json.dumps(dict(scheme.metadata) | stored))
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {stored_name(model.config.model_type, name): tensor for name, tensor in tensors.items()}
    names = sorted(tensors)
    save_shards(folder, *({name: tensors[name] for name in names[part::2]} for part in (0, 1)))
    return Quantized(folder, model.eval(), written)


def stored_name(family: str, name: str) -> str:
    """A tensor's name in a published checkpoint of the family."""
    if family == "mixtral":
        for ours, theirs in MIXTRAL_NAMES.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def shared_name(name: str) -> str:
    """The same for linears that share their input, which are ordered alike (GPTQ's activation order)."""
    for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        name = name.removesuffix(part)
    return name


@functools.cache
def _root() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="vllm_ms_models_quantized_")


def written(family: str, scheme: Scheme, seed: int = 0, floats: tuple[str, ...] = (), **options: Any) -> Quantized:
    """As `write`, in a folder of its own that is removed at the end of the process."""
    return write(Path(tempfile.mkdtemp(dir=_root().name)), family, scheme, seed, floats, **options)
