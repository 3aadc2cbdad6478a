"""What the tests of `vllm-ms quantize` share: running it, reading what it wrote, and torch models of what that means.

Files are read by the safetensors library, and integers are unpacked here: nothing comes from the package under test.
"""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from tests import checkpoints
from tests.quantization.models import Exact, linears, replace_module
from tests.quantization.writers import Multiply, of_floats, of_rounded_inputs, of_rounded_tokens
from vllm_ms_models.cli import main

# 64 and 96 inputs are groups of 32; head size 16.
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
CALIBRATION = checkpoints.random_prompts((40, 60), seed=7)


def prompts_file(folder: Path, prompts: list[list[int]] = CALIBRATION) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"token_ids": prompt}) + "\n" for prompt in prompts))
    return path


def quantize(source: Path, out: Path, *options: str, calibrated: bool = True) -> Path:
    """The folder written; a calibration file is made for it."""
    extra = ["--calibration", str(prompts_file(out.parent))] if calibrated else []
    assert main(["quantize", str(source), str(out), *options, *extra]) == 0
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """Floats of two bytes as float32."""
    return {name: (t.float() if t.is_floating_point() else t).numpy() for name, t in tensors(folder).items()}


def unpacked(words: np.ndarray) -> np.ndarray:
    """int32 `[rows, words]` -> eight signed numbers of 4 bits each, int64 `[rows, words * 8]`."""
    fields = (words.astype(np.int64)[..., None] >> (4 * np.arange(8))) & 15
    return fields.reshape(len(words), -1) - 8


def end(found: dict[str, np.ndarray], module: str) -> dict[str, np.ndarray]:
    """The tensors of `module` by the ends of their names."""
    return {name.removeprefix(f"{module}."): a for name, a in found.items() if name.rpartition(".")[0] == module}


def multiply_of(own: dict[str, np.ndarray]) -> Multiply:
    """The arithmetic that the tensors of one linear stand for, told from their names."""
    bias = own.get("bias")
    if "weight_packed" in own:
        integers, scales = unpacked(own["weight_packed"]), own["weight_scale"].astype(np.float64)
        return of_floats(integers * np.repeat(scales, integers.shape[1] // scales.shape[1], 1), bias)
    integers = own["weight"].astype(np.int64)
    if "deq_scale" in own:
        scale = own["deq_scale"]
        if scale.dtype == np.int64:
            scale = scale.astype(np.int32).view(np.float32)
        addend, offset = own["quant_bias"].astype(np.int64), int(own["input_offset"][0])
        return of_rounded_inputs(integers, addend, scale, own["input_scale"], offset, None)
    if "input_scale" in own:
        step = own["input_scale"]
        product = own["weight_scale"] * step
        return of_rounded_inputs(integers, np.zeros(len(integers), np.int64), product, step, 0, bias)
    return of_rounded_tokens(integers, own["weight_scale"].astype(np.float64), bias)


def as_torch(source: Path, out: Path) -> torch.nn.Module:
    """The model of `source` with every quantized linear of `out` computed as its tensors say, and out's norms."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    found = arrays(out)
    names = [*linears(model), "lm_head"]
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1 and name in found:  # smoothing changes norms
                value.copy_(torch.from_numpy(found[name]))
    for name in names:
        own = end(found, name)
        if any(a.dtype in (np.int8, np.int32) for a in own.values()):
            module = Exact(multiply_of(own))
            if "weight" in own:
                module.register_forward_pre_hook(functools.partial(_note_ties, own.get("input_scale")))
            replace_module(model, name, module)
    return model


def _note_ties(step: np.ndarray | None, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """Keeps in `module.nearest` how near, in steps, an input came to the middle between two integers."""
    x = inputs[0].detach().double()
    q = x * 127 / x.abs().amax(-1, keepdim=True) if step is None else x / float(step[0])
    nearest = (q - q.floor() - 0.5).abs().min().item()
    module.nearest = min(nearest, getattr(module, "nearest", 1.0))


def nearest_tie(model: torch.nn.Module, tokens: list[int]) -> float:
    """How near an input of an int8 linear comes to the middle between two integers, in steps; 1 if there are none."""
    modules = [module for module in model.modules() if isinstance(module, Exact)]
    for module in modules:
        module.nearest = 1.0
    with torch.inference_mode():
        model(torch.tensor([tokens]))
    return min(float(module.nearest) for module in modules)


def input_ranges(model: torch.nn.Module) -> dict[str, tuple[float, float]]:
    """The least and greatest input of each linear of the blocks, over CALIBRATION, prompt by prompt."""
    ranges: dict[str, tuple[float, float]] = {}

    def note(name: str, x: torch.Tensor) -> None:
        low, high = ranges.get(name, (0.0, 0.0))
        ranges[name] = min(low, x.min().item()), max(high, x.max().item())

    for name, module in linears(model).items():
        module.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]))
    with torch.inference_mode():
        for prompt in CALIBRATION:
            model(torch.tensor([prompt]))
    return ranges


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "quantization_report.json").read_text())
