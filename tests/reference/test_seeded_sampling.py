"""Sampling with seeds: the same tokens however the prompt is read and whoever else is in the batch."""

from vllm import LLM, SamplingParams

from tests.checkpoints import checkpoint, random_prompts
from tests.engines import engine, token_ids

PROMPTS = random_prompts([100, 3, 70, 33])
SAMPLING = [
    SamplingParams(temperature=1.0, seed=seed, max_tokens=24, ignore_eos=True, detokenize=False)
    for seed in range(len(PROMPTS))
]


def sample(llm: LLM) -> list[list[int]]:
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    return token_ids(llm.generate(prompts, SAMPLING, use_tqdm=False))


def test_chunked_and_whole_prefill() -> None:
    """No random number is spent on a prompt that is read in parts."""
    with engine(checkpoint("qwen2"), enable_prefix_caching=False) as llm:
        whole = sample(llm)
    with engine(checkpoint("qwen2"), max_num_batched_tokens=16, max_num_seqs=8) as llm:
        assert sample(llm) == whole
