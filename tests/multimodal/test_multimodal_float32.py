"""Models that read images against transformers in float32: the same greedy tokens, the same log-probabilities."""

import numpy as np
import pytest
import torch

from tests.engines import distributions, engine
from tests.multimodal.models import CASES, VOCABULARY, Answer, greedy, prompts
from tests.reference.torch_reference import LEAST_MARGIN, LOGPROB_TOLERANCE

TOKENS = 24
NAMES = [pytest.param(name, marks=pytest.mark.slow if "," in name[6:] else ()) for name in CASES]


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_logprobs(name: str) -> None:
    from vllm import SamplingParams

    case = CASES[name]
    model = case.reference()
    given = prompts(case.image)
    answers = [greedy(case, model, prompt, TOKENS) for prompt in given]
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=-1)
    with engine(case.folder, skip_tokenizer_init=False, limit_mm_per_prompt={"image": 2}) as llm:
        outputs = llm.generate([prompt.for_vllm() for prompt in given], sampling, use_tqdm=False)
    for output, answer in zip(outputs, answers, strict=True):
        assert output.prompt_token_ids == answer.prompt
        print(answer.margin)
        found = distributions(output.outputs[0].logprobs, VOCABULARY)
        wanted = torch.log_softmax(answer.logits, -1).numpy()
        print(np.abs(found - wanted).max(-1))
        assert list(output.outputs[0].token_ids) == answer.tokens
