"""Adapters against PEFT and transformers in float32: every family, batches over several adapters and none.

An adapter's products are sums of a few hundred more terms in float32; the bound is that of models without them
(torch_reference.py).
"""

from typing import Any

import pytest
import torch

from tests.checkpoints import random_prompts
from tests.engines import engine
from tests.lora.adapters import FAMILIES, adapt, ask, check, folder_of, requests, three, torch_models
from tests.reference import torch_reference

LENGTHS = (5, 40, 9, 1, 17, 33, 12, 3)  # tokens of prompts without an adapter, with the first, the second ...
QUICK = ("qwen2", "deepseek_v3")
SERVED: dict[str, Any] = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}


def compare(family: str, **options: Any) -> None:
    folder, adapters = folder_of(family), three(family)
    wanted = requests(torch_models(folder, adapters), LENGTHS)
    with engine(folder, **(SERVED | options)) as llm:
        check(ask(llm, wanted, adapters), wanted)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_tokens_and_logprobs(family: str) -> None:
    """Prompts are read in chunks of 24 tokens, so that steps have parts of some and tokens of others."""
    compare(family, max_num_batched_tokens=24)


def test_the_reference_without_peft() -> None:
    """It stands for PEFT where PEFT cannot: the same logits, up to float32."""
    folder, adapters = folder_of("qwen2"), three("qwen2")
    (prompt,) = random_prompts([20])
    for model, path in zip(torch_models(folder, adapters)[1:], adapters, strict=True):
        other = adapt(torch_reference.load(folder), path)
        torch.testing.assert_close(torch_reference.logits(other, prompt), torch_reference.logits(model, prompt))


def test_reference_kernels() -> None:
    compare("qwen3_moe", env={"VLLM_MS_KERNELS": "reference"})


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("qwen2", {"tensor_parallel_size": 2}),
        pytest.param("deepseek_v3", {"tensor_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", {"tensor_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param("qwen2", {"tensor_parallel_size": 4}, marks=pytest.mark.slow),
        pytest.param("llama", {"pipeline_parallel_size": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_several_ranks(family: str, sizes: dict[str, int]) -> None:
    """Each has its rows or columns of the adapters' matrices too; a stage of a pipeline those of its layers."""
    compare(family, **sizes)
