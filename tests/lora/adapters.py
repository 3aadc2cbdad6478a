"""Random adapters (LoRA), written by PEFT, and what PEFT and transformers say of a model that has one."""

import functools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch

from tests.checkpoints import _root, random_model

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DENSE = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def adapted_model(family: str, model_options: dict[str, Any], seed: int, **options: Any) -> peft.PeftModel:
    """`random_model(family, ...)` in float32 with a random adapter; `options` are those of PEFT's LoraConfig.

    Both matrices are random (PEFT starts with B = 0), and large enough to change most tokens.
    """
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": list(DENSE)} | options))
    model = peft.get_peft_model(random_model(family, **model_options), config)
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * (0.3 if "lora_A" in name else 0.1))
    return model.eval()


def adapter(family: str, model_options: dict[str, Any] | None = None, seed: int = 0, **options: Any) -> Path:
    """Folder of the adapter of `adapted_model`, written once in this process by PEFT and removed at its end."""
    return _write(family, json.dumps(model_options or {}, sort_keys=True), seed, json.dumps(options, sort_keys=True))


@functools.cache
def _write(family: str, model_options: str, seed: int, options: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"{family}_adapter_", dir=_root()))
    adapted_model(family, json.loads(model_options), seed, **json.loads(options)).save_pretrained(folder)
    return folder


@torch.inference_mode()
def greedy_reference(model: torch.nn.Module, prompt: Sequence[int], tokens: int) -> tuple[list[int], torch.Tensor]:
    """The most likely tokens after `prompt` and, for each, the log-probabilities of the whole vocabulary."""
    ids = torch.tensor([list(prompt)])
    result, rows = [], []
    for _ in range(tokens):
        logits = model(input_ids=ids).logits[0, -1].float()
        rows.append(torch.log_softmax(logits, -1))
        result.append(int(logits.argmax()))
        ids = torch.cat([ids, torch.tensor([[result[-1]]])], 1)
    return result, torch.stack(rows)
