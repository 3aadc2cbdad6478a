"""Mixtures of experts on the reference kernels, and without weights; test_float32.py has the parity of each model."""

import pytest

from tests.checkpoints import checkpoint, random_prompts
from tests.engines import engine, greedy, token_ids
from tests.reference import torch_reference
from tests.reference.torch_reference import LEAST_MARGIN

FAMILIES = {"qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}, "mixtral": {}}


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_kernels_give_the_tokens_of_transformers(family: str) -> None:
    folder = checkpoint(family, 0, **FAMILIES[family])
    model = torch_reference.load(folder)
    prompts = random_prompts([3, 40])
    answers = [torch_reference.greedy(model, prompt, 8) for prompt in prompts]
    assert all(answer.margin > LEAST_MARGIN for answer in answers), "a tie: choose another seed"
    with engine(folder, env={"VLLM_MS_KERNELS": "reference"}) as llm:
        assert token_ids(greedy(llm, prompts, 8)) == [answer.tokens for answer in answers]


@pytest.mark.parametrize("family", FAMILIES)
def test_load_format_dummy(family: str) -> None:
    with engine(checkpoint(family, 0, **FAMILIES[family]), load_format="dummy", dtype="bfloat16") as llm:
        assert [len(tokens) for tokens in token_ids(greedy(llm, random_prompts([3, 40]), 8))] == [8, 8]
