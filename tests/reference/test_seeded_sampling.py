"""Sampling with seeds in float32: the same tokens however the prompt is read, whoever else is in the batch, after a
preemption, from the prefix cache, and while adapters come and go. Speculation: tests/speculation."""

from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from tests.checkpoints import checkpoint, random_prompts
from tests.engines import counter, engine, token_ids
from tests.lora.adapters import three

PROMPTS = random_prompts([100, 3, 70, 33, 120, 64])
SAMPLING = [
    SamplingParams(temperature=1.0, seed=seed, max_tokens=48, ignore_eos=True, detokenize=False)
    for seed in range(len(PROMPTS))
]


def sample(llm: LLM, numbers: list[int], adapters: list[LoRARequest | None] | None = None) -> list[list[int]]:
    prompts = [{"prompt_token_ids": PROMPTS[number]} for number in numbers]
    chosen = None if adapters is None else [adapters[number] for number in numbers]
    return token_ids(
        llm.generate(prompts, [SAMPLING[number] for number in numbers], lora_request=chosen, use_tqdm=False)
    )


def alone(llm: LLM, adapters: list[LoRARequest | None] | None = None) -> list[list[int]]:
    return [sample(llm, [number], adapters)[0] for number in range(len(PROMPTS))]


ALL = list(range(len(PROMPTS)))


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """Each by itself, its prompt read at once and not from the cache."""
    with engine(checkpoint("qwen2"), enable_prefix_caching=False) as llm:
        tokens = alone(llm)
        assert sample(llm, ALL) == tokens, "in a batch"
    return tokens


def test_chunked_and_whole_prefill(expected: list[list[int]]) -> None:
    """No random number is spent on a prompt that is read in parts."""
    with engine(checkpoint("qwen2"), max_num_batched_tokens=16, max_num_seqs=8) as llm:
        assert sample(llm, ALL) == expected


def test_prefix_cache(expected: list[list[int]]) -> None:
    with engine(checkpoint("qwen2"), disable_log_stats=False) as llm:
        assert sample(llm, ALL) == expected
        before = counter(llm, "vllm:prefix_cache_hits")
        assert sample(llm, ALL) == expected
        assert counter(llm, "vllm:prefix_cache_hits") > before


def test_preempted(expected: list[list[int]]) -> None:
    """No random number is drawn twice for a token, nor left out."""
    options: dict[str, Any] = {
        "num_gpu_blocks_override": 10,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }
    with engine(checkpoint("qwen2"), **options) as llm:
        before = counter(llm, "vllm:num_preemptions")
        assert sample(llm, ALL) == expected
        assert counter(llm, "vllm:num_preemptions") > before


def test_adapters_that_come_and_go(expected: list[list[int]]) -> None:
    """Three of which two may be in a step and two are kept, beside requests without one."""
    loaded = [LoRARequest(path.name, number + 1, str(path)) for number, path in enumerate(three("qwen2"))]
    adapters = [None, *loaded, loaded[0], None]
    with engine(checkpoint("qwen2"), enable_lora=True, max_loras=2, max_cpu_loras=2, max_lora_rank=8) as llm:
        one_by_one = alone(llm, adapters)
        assert sample(llm, ALL, adapters) == one_by_one
    assert [one_by_one[0], one_by_one[5]] == [expected[0], expected[5]]
    assert all(one_by_one[number] != expected[number] for number in (1, 2, 3, 4))
