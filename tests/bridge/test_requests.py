"""Requests that would end the engine, or that its process cannot be sent: refused, and the engine goes on."""

from typing import Any

import pytest

from tests.checkpoints import checkpoint, random_prompts
from tests.engines import engine, greedy, token_ids
from vllm_ms_models.bridge.requests import check_request

HALF = "a\ud800"


def params(**settings: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**settings)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"seed": 2**63}, "seed must be from -9223372036854775808 to 9223372036854775807, got 9223372036854775808"),
    ({"seed": -(2**63) - 1}, "seed must be from"),
    ({"logit_bias": {3: 10**400}}, "logit_bias must be a number that a float can hold, got 1000000"),
    ({"logit_bias": {3: float("nan")}}, "logit_bias must be a number that a float can hold, got nan for token 3"),
    ({"stop": ["b", HALF]}, r"stop must be Unicode text, got the half of a surrogate pair in 'a\\ud800'"),
    ({"bad_words": [HALF]}, "bad_words must be Unicode text"),
    ({"extra_args": {"x": [{HALF: 1}]}}, "extra_args must be Unicode text"),
]


@pytest.mark.parametrize(("settings", "sentence"), REFUSED)
def test_refused(settings: dict[str, Any], sentence: str) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=sentence):
        check_request(params(**settings))


def test_a_constraint_that_is_no_text() -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import StructuredOutputsParams

    with pytest.raises(VLLMValidationError, match="structured_outputs must be Unicode text"):
        check_request(params(structured_outputs=StructuredOutputsParams(choice=["a", HALF])))


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 2**63 - 1},
        {"seed": -(2**63)},
        {"logit_bias": {3: float("-inf"), 4: 1e308}},
        {"stop": ["😀", "é"], "extra_args": {"a": {"b": [1, None, "c"]}}},
        {},
    ],
)
def test_taken(settings: dict[str, Any]) -> None:
    check_request(params(**settings))


def test_the_engine_goes_on() -> None:
    """Without the check, the seed and the bias end it: they fail in a step of all requests."""
    from vllm.exceptions import VLLMValidationError

    (prompt,) = random_prompts([5])
    with engine(checkpoint("qwen2")) as llm:
        expected = token_ids(greedy(llm, [prompt], 5))
        for settings in ({"seed": 2**63}, {"logit_bias": {3: 10**400}}):
            with pytest.raises(VLLMValidationError):
                llm.generate([{"prompt_token_ids": prompt}], params(detokenize=False, **settings), use_tqdm=False)
        llm.generate([{"prompt_token_ids": prompt}], params(detokenize=False, seed=2**63 - 1), use_tqdm=False)
        assert token_ids(greedy(llm, [prompt], 5)) == expected
