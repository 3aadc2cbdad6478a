"""Models split into stages by vLLM's own multiprocess executor, against torch models and against one process.

A stage computes exactly what those layers compute in one process, and what it hands on is not rounded: the bounds are
those of tensor parallelism (test_tensor_parallel.py), to which a pipeline of one rank a stage adds nothing. Prompts are
read in chunks of 16 tokens, so that several batches are under way at once.
"""

from typing import Any

import numpy as np
import pytest

from tests.checkpoints import checkpoint, random_prompts
from tests.distributed.rank_models import FAMILIES, KINDS, UNIT_TOLERANCE, answers_of, check, made
from tests.engines import counter, distributions, engine, greedy, token_ids
from tests.quantization.comparison import VOCABULARY, differences, without_ties
from tests.reference import torch_reference
from tests.reference.torch_reference import LEAST_MARGIN, LOGPROB_TOLERANCE

IN_CHUNKS: dict[str, Any] = {"max_num_batched_tokens": 16}
# Three layers: stages of two and one. Qwen2's last stage has the embedding too, as its head.
OPTIONS: dict[str, dict[str, Any]] = {
    family: {"num_hidden_layers": 3, "tie_word_embeddings": family == "qwen2"} for family in FAMILIES
}
QUICK = [("deepseek_v3", "w8a8 static", 1)]
CASES = [
    pytest.param(*case, id="-".join(map(str, case)), marks=() if case in QUICK else pytest.mark.slow)
    for case in ((family, kind, ranks) for family in FAMILIES for kind in KINDS for ranks in (1, 2))
]


@pytest.mark.feature("pipeline parallelism")
@pytest.mark.parametrize(("family", "kind", "ranks"), CASES)
def test_tokens_and_logprobs(family: str, kind: str, ranks: int) -> None:
    """Two stages, of one and of two tensor-parallel ranks."""
    model = made(family, kind, ranks, **OPTIONS[family])
    prompts, answers = without_ties(model.model, model.margin)
    sizes = {"tensor_parallel_size": ranks, "pipeline_parallel_size": 2}
    check(*answers_of(model.folder, prompts, **sizes, **IN_CHUNKS), answers, model.tolerance)


def test_chunks_preemption_and_prefix_caching() -> None:
    """With too few blocks for all sequences; then a prompt twice, read from the cache in part."""
    folder = checkpoint("qwen2", 0, tie_word_embeddings=True)
    model = torch_reference.load(folder)
    prompts = random_prompts([40, 20, 33, 28, 60], seed=1)
    answers = [torch_reference.greedy(model, prompt, 40) for prompt in prompts]
    assert all(answer.margin > LEAST_MARGIN for answer in answers), "a tie: choose another seed"
    options: dict[str, Any] = {"block_size": 16, "num_gpu_blocks_override": 14, "disable_log_stats": False, **IN_CHUNKS}
    with engine(folder, max_model_len=128, pipeline_parallel_size=2, **options) as llm:
        outputs = greedy(llm, prompts, 40, prompt_logprobs=-1)
        found = [distributions(output.prompt_logprobs, VOCABULARY) for output in outputs]
        assert counter(llm, "vllm:num_preemptions") > 0
        again = [*token_ids(greedy(llm, prompts[:1], 40)), *token_ids(greedy(llm, prompts[:1], 40))]
        assert counter(llm, "vllm:prefix_cache_hits") > 0
    assert differences(found, answers).max() < LOGPROB_TOLERANCE
    assert token_ids(outputs) == [answer.tokens for answer in answers]
    assert again == [answers[0].tokens] * 2


@pytest.mark.slow
def test_a_stage_without_full_attention() -> None:
    """vLLM makes groups of cache blocks for all stages: here the last has no layer of the first group."""
    types = ["full_attention", "full_attention", "sliding_attention"]
    folder = checkpoint("qwen2", 0, use_sliding_window=True, sliding_window=16, layer_types=types)
    model = torch_reference.load(folder)
    prompts = random_prompts([3, 40, 70, 25])
    answers = [torch_reference.greedy(model, prompt, 20) for prompt in prompts]
    assert all(answer.margin > LEAST_MARGIN for answer in answers), "a tie: choose another seed"
    with engine(folder, max_model_len=128, pipeline_parallel_size=2, **IN_CHUNKS) as llm:
        assert token_ids(greedy(llm, prompts, 20)) == [answer.tokens for answer in answers]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["float32", "w8a8 static"])
def test_as_one_process(family: str, kind: str) -> None:
    """Two and three stages, and two of two ranks, answer as one process does."""
    model = made(family, kind, 1, **OPTIONS[family])
    prompts, _ = without_ties(model.model, model.margin)
    tokens, found = answers_of(model.folder, prompts)
    for ranks, stages in ((1, 2), (1, 3), (2, 2)):
        sizes = {"tensor_parallel_size": ranks, "pipeline_parallel_size": stages}
        others, logprobs = answers_of(model.folder, prompts, **sizes)
        assert others == tokens
        off = np.concatenate([np.abs(a - b).reshape(-1) for a, b in zip(found, logprobs, strict=True)])
        assert off.max() < (1e-3 if kind == "float32" else UNIT_TOLERANCE)
        assert np.median(off) < LOGPROB_TOLERANCE
