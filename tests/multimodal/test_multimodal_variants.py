"""Models that read images in bfloat16, with a quantized language model, and under other names of their tensors."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import random_prompts
from tests.engines import distributions, engine
from tests.multimodal.models import (
    CASES,
    LARGE,
    VOCABULARY,
    Case,
    Prompt,
    check,
    decided,
    logprobs,
    new_folder,
    prompts,
)
from tests.multimodal.models import greedy as torch_greedy
from tests.multimodal.test_multimodal_float32 import OPTIONS, generate
from tests.quantization.comparison import UNIT_TOLERANCE
from tests.quantization.models import write_model
from tests.quantization.writers import Scheme
from tests.quantization.writers_compressed import SCHEMES
from tests.reference.torch_reference import LEAST_MARGIN, LOGPROB_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LARGE)
def test_16_bits_are_no_further_from_float32_than_torch(name: str, dtype: torch.dtype) -> None:
    case = replace(LARGE[name], dtype=dtype)
    given = prompts(case.image)
    with engine(case.folder, **OPTIONS | {"dtype": dtype}) as llm:
        outputs = generate(llm, given)
    exact, rounded = case.reference(), case.reference(dtype)
    ours, torches = [], []
    for prompt, output in zip(given, outputs, strict=True):
        found = distributions(output.outputs[0].logprobs, VOCABULARY)
        wanted, other = (logprobs(case, model, prompt, output.outputs[0].token_ids) for model in (exact, rounded))
        ours.append(np.abs(found - wanted).mean())
        torches.append(np.abs(other - wanted).mean())
    assert np.mean(torches) / 10 < np.mean(ours) <= np.mean(torches)


# What a description calls modules need not be what the tensors are called: exact names and patterns, older and newer.
FLOATS = {
    "llava, CLIP and Llama": [
        "re:.*vision_tower.*",
        "model.multi_modal_projector.linear_1",
        "multi_modal_projector.linear_2",
    ],
    "qwen2_5_vl": ["re:visual.*"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOATS)
def test_a_quantized_language_model(name: str) -> None:
    """W8A8; the tower and what connects it are in floats."""
    case = CASES[name]
    folder = new_folder()
    dynamic = SCHEMES["w8a8 dynamic"]
    assert dynamic.config is not None
    scheme: Scheme = replace(dynamic, config=dict(dynamic.config) | {"ignore": ["lm_head", *FLOATS[name]]})
    model = case.reference()
    write_model(folder, model, scheme, random_prompts((40,), seed=7), within="model.language_model.")
    case.processor.save_pretrained(folder)
    chosen = []
    for prompt in prompts(case.image):  # tokens that a unit of an activation cannot change
        answer = torch_greedy(case, model, prompt, 24)
        best = answer.logits.topk(2, -1).values
        sure = ((best[:, 0] - best[:, 1]) > 2 * UNIT_TOLERANCE).tolist()
        chosen.append((prompt, answer, [*sure, False].index(False)))
    assert sum(count for _, _, count in chosen) > len(chosen)
    with engine(folder, **OPTIONS) as llm:
        outputs = generate(llm, [prompt for prompt, _, _ in chosen])
    off = []
    for output, (_, answer, count) in zip(outputs, chosen, strict=True):
        assert list(output.outputs[0].token_ids)[:count] == answer.tokens[:count]
        found = distributions(output.outputs[0].logprobs, VOCABULARY)[: count + 1]
        off.append(np.abs(found - torch.log_softmax(answer.logits, -1).numpy()[: count + 1]).reshape(-1))
    together = np.concatenate(off)
    # Fifty times as many values as in comparison.py, over tokens of images too: now and then two units add up.
    assert together.max() < 2 * UNIT_TOLERANCE
    assert np.median(together) < LOGPROB_TOLERANCE


def renamed(case: Case, changes: dict[str, str]) -> Path:
    """A copy whose tensors' names begin otherwise."""
    folder = new_folder()
    for path in case.folder.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors: dict[str, Any] = {}
    for key, value in load_file(case.folder / "model.safetensors").items():
        old = next((old for old in changes if key.startswith(old)), "")
        tensors[changes.get(old, "") + key.removeprefix(old)] = value
    assert any(key.startswith(new) for new in changes.values() for key in tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


NAMES: dict[str, tuple[str, dict[str, str]]] = {
    "published LLaVA": ("llava, CLIP and Llama", {"vision_tower.": "vision_tower.vision_model."}),
    "newer LLaVA": (
        "llava, CLIP and Llama",
        {
            "language_model.model.": "model.language_model.",
            "language_model.lm_head.": "lm_head.",
            "vision_tower.": "model.vision_tower.",
            "multi_modal_projector.": "model.multi_modal_projector.",
        },
    ),
    "newer Qwen2.5-VL": ("qwen2_5_vl", {"model.": "model.language_model.", "visual.": "model.visual."}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_other_names_of_the_same_tensors(name: str) -> None:
    of, changes = NAMES[name]
    case = CASES[of]
    given: list[Prompt] = prompts(case.image)[:2]
    answers = decided(case, case.reference(), given, 24, LEAST_MARGIN)
    with engine(renamed(case, changes), **OPTIONS) as llm:
        check(generate(llm, given), answers, LOGPROB_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava, SigLIP and Qwen2", "qwen2_5_vl"])
def test_without_weights(name: str) -> None:
    """`--load-format dummy` makes up those of the tower too: the same ones each time."""
    case = CASES[name]
    given = prompts(case.image)
    runs = []
    for _ in range(2):
        with engine(case.folder, load_format="dummy", **OPTIONS) as llm:
            runs.append([list(output.outputs[0].token_ids) for output in generate(llm, given)])
    assert runs[0] == runs[1]
