"""Prompts of ragged lengths, some with beginnings in common, and the right greedy answers by torch in float32."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch

from benchmarks.models import write_tokenizer
from tests.checkpoints import checkpoint
from tests.lora.adapters import adapter
from tests.reference import torch_reference as reference

VOCABULARY = 211
LENGTH = 512  # of a sequence, at most
BASE = "tiny"  # the model's name without an adapter


@dataclass(frozen=True)
class Question:
    """`model` is the name that the server has for it: the model itself, or one of its adapters."""

    model: str
    prompt: list[int]
    answer: list[int]


def model() -> Path:
    """A tiny Qwen2 in float32, with a tokenizer."""
    folder = checkpoint("qwen2", max_position_embeddings=LENGTH)
    write_tokenizer(folder, VOCABULARY)
    return folder


def random_adapters(count: int) -> dict[str, Path]:
    """Folders of adapters (LoRA) of `model`, by the names that they are served by."""
    options = {"max_position_embeddings": LENGTH}
    return {f"adapter-{number}": adapter("qwen2", number, options) for number in range(count)}


def references(folder: Path, adapters: Mapping[str, Path]) -> dict[str, torch.nn.Module]:
    """The torch model behind each name; adapters are folders as peft writes them."""
    found = {BASE: reference.load(folder)}
    for name, path in adapters.items():
        from peft import PeftModel

        found[name] = PeftModel.from_pretrained(reference.load(folder), path).merge_and_unload().eval()
    return found


def questions(models: Mapping[str, torch.nn.Module], count: int, seed: int = 0) -> list[Question]:
    """`count` for each of `models`, of 1 to 300 tokens with answers of 1 to 48.

    None whose closest decision could fall otherwise with other roundings: see `LEAST_MARGIN`.
    """
    torch.set_num_threads(1)  # quicker for so small a model, above all beside others
    rng = Random(seed)
    beginnings = [[rng.randrange(VOCABULARY) for _ in range(length)] for length in (0, 0, 17, 64, 130, 240)]
    found = []
    for name, torch_model in models.items():
        chosen: list[Question] = []
        while len(chosen) < count:
            rest = [rng.randrange(VOCABULARY) for _ in range(rng.choice((1, 2, 7, 31, 32, 33, 60)))]
            prompt = rng.choice(beginnings) + rest
            answer = reference.greedy(torch_model, prompt, rng.choice((1, 2, 5, 16, 33, 48)))
            if answer.margin >= reference.LEAST_MARGIN:
                chosen.append(Question(name, prompt, answer.tokens))
        found += chosen
    return found
