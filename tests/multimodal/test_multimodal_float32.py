"""Models that read images against transformers in float32: the same greedy tokens, the same log-probabilities."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tests.engines import counter, engine
from tests.multimodal.models import CASES, Prompt, check, decided, prompts, video
from tests.reference.torch_reference import LEAST_MARGIN, LOGPROB_TOLERANCE
from vllm_ms_models import registry

TOKENS = 24
QUICK = ("llava, CLIP and Llama", "qwen2_5_vl")  # one of each architecture
OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": False,
    "limit_mm_per_prompt": {"image": 2, "video": 1},
    "block_size": 16,  # prompts are short
}


def generate(llm: Any, given: Sequence[Prompt]) -> list[Any]:
    """TOKENS most likely tokens after each prompt, with all log-probabilities."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=-1)
    return llm.generate([prompt.for_vllm() for prompt in given], sampling, use_tqdm=False)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES])
def test_tokens_and_logprobs(name: str) -> None:
    """Pictures of several sizes, two in a prompt, text without any in one batch; then all of it from the caches."""
    case = CASES[name]
    given = prompts(case.image)
    answers = decided(case, case.reference(), given, TOKENS, LEAST_MARGIN)
    with engine(case.folder, disable_log_stats=False, **OPTIONS) as llm:
        for _ in range(2):
            outputs = generate(llm, given)
            check(outputs, answers, LOGPROB_TOLERANCE)
        assert counter(llm, "vllm:prefix_cache_hits") > 0
        assert counter(llm, "vllm:mm_cache_hits") > 0


@pytest.mark.parametrize("name", [pytest.param(QUICK[0], marks=pytest.mark.slow), QUICK[1]])
def test_an_image_in_pieces(name: str) -> None:
    """Steps of a few tokens, fewer than an image has embeddings: these wait in the encoder cache, which holds few."""
    case = CASES[name]
    given = prompts(case.image)
    answers = decided(case, case.reference(), given, TOKENS, LEAST_MARGIN)
    options = OPTIONS | {"enable_prefix_caching": False, "max_num_batched_tokens": 13, "max_num_seqs": 2}
    with engine(case.folder, **options) as llm:
        core = llm.llm_engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        check(generate(llm, given), answers, LOGPROB_TOLERANCE)
        different = {image.tobytes() for prompt in given for image in prompt.images}
        kept = dict(runner.encoder_cache)  # LLaVA's larger items push others out, which are encoded again
        assert 1 <= len(kept) <= len(different)
        check(generate(llm, given), answers, LOGPROB_TOLERANCE)
        for name, embedding in runner.encoder_cache.items():
            assert name not in kept or torch.equal(embedding, kept[name])


VIDEOS = [
    Prompt("Watch <|vision_start|><|video_pad|><|vision_end|>this", videos=[video(4, 84, 112, 1)]),
    Prompt("<|vision_start|><|video_pad|><|vision_end|>What is the opposite of hot?", videos=[video(2, 140, 56, 2)]),
]


def test_video() -> None:
    """Beside images and text. Times are below rows or columns: beyond, transformers has positions of its own."""
    case = CASES["qwen2_5_vl"]
    given = [*VIDEOS, *prompts(case.image)[2:4]]
    answers = decided(case, case.reference(), given, TOKENS, LEAST_MARGIN)
    with engine(case.folder, **OPTIONS) as llm:
        outputs = generate(llm, given)
        check(outputs, answers, LOGPROB_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("size", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_ranks(name: str, size: str) -> None:
    case = CASES[name]
    given = prompts(case.image)
    answers = decided(case, case.reference(), given, TOKENS, LEAST_MARGIN)
    options: dict[str, Any] = OPTIONS | {size: 2}
    with engine(case.folder, **options) as llm:
        check(generate(llm, given), answers, LOGPROB_TOLERANCE)


def test_every_architecture_is_covered() -> None:
    assert {case.architecture for case in CASES.values()} == registry.MULTIMODAL


def test_pictures_differ() -> None:
    """What the tests show is told apart by the models: another picture, another answer."""
    case = CASES[QUICK[0]]
    model = case.reference()
    first, second = prompts(case.image)[:2]
    swapped = Prompt(first.text, second.images)
    shown = decided(case, model, [first, swapped], TOKENS, 0)
    assert not np.array_equal(shown[0].tokens, shown[1].tokens)
