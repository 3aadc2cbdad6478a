"""`--kv-cache-dtype int8_per_token_head` through vLLM, against torch models whose keys and values are rounded alike.

All else is float32. As with activations rounded to int8 (tests/quantization/test_quantized_models.py), a difference in
the last bit of a key or a value now and then moves it across the middle between two integers: a unit of one feature of
one position, and no fault. `UNIT_TOLERANCE` allows for a few (largest differences of all: 0.04 with the reference
kernels, 0.005 with the C++ ones); the median of all differences must be as small as without.
"""

import itertools
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from tests.checkpoints import checkpoint, random_prompts
from tests.engines import distributions, engine, greedy, token_ids
from tests.reference import torch_reference
from tests.reference.torch_reference import LOGPROB_TOLERANCE, Answer

INT8 = "int8_per_token_head"
TOKENS = 6
LENGTHS = (1, 33, 90)
VOCABULARY = 211
UNIT_TOLERANCE = 0.05
MODELS: dict[str, tuple[str, int, Mapping[str, Any]]] = {
    "llama": ("llama", 10, {"num_attention_heads": 8}),
    "qwen2_half_with_window": (
        "qwen2",
        1,
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2, "num_hidden_layers": 4},
    ),
}


class RoundingCache(DynamicCache):
    """Keys and values come back as what int8 makes of them: each row of a head by its own scale, in float32."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **options: Any) -> Any:
        return super().update(self.rounded(keys), self.rounded(values), *args, **options)

    @staticmethod
    def rounded(x: torch.Tensor) -> torch.Tensor:
        largest = x.abs().amax(-1, keepdim=True)
        return torch.round(x * (127 / largest)) * (largest / 127)


@torch.inference_mode()
def answer_of(model: torch.nn.Module, prompt: Sequence[int]) -> Answer:
    """Greedy tokens; every position of a sequence is computed anew, from keys and values rounded in the same way."""
    sequence = list(prompt)
    for _ in range(TOKENS):
        cache = RoundingCache(config=model.config)
        rows = model(torch.tensor([sequence]), past_key_values=cache, use_cache=True).logits[0].float()
        sequence.append(int(rows[-1].argmax()))
    first = len(prompt)
    return Answer(sequence[first:], rows[: first - 1], rows[first - 1 :])


@cache
def expected(name: str) -> tuple[str, list[list[int]], list[Answer]]:
    """The model's folder, and a prompt of each length after which no token is decided by rounding."""
    family, seed, options = MODELS[name]
    folder = str(checkpoint(family, seed, **options))
    model = torch_reference.load(folder)
    prompts, answers = [], []
    for length in LENGTHS:
        for number in itertools.count():
            assert number < 200, "the model cannot decide"
            (prompt,) = random_prompts([length], seed=1000 * length + number)  # none is the beginning of another
            answer = answer_of(model, prompt)
            if answer.margin > 2 * UNIT_TOLERANCE:
                break
        prompts.append(prompt)
        answers.append(answer)
    return folder, prompts, answers


def differences(found: Sequence[np.ndarray], wanted: Sequence[torch.Tensor]) -> np.ndarray:
    rows = [torch.log_softmax(logits, -1).numpy() for logits in wanted]
    return np.concatenate([np.abs(a - b).reshape(-1) for a, b in zip(found, rows, strict=True)])


@pytest.mark.feature("KV cache of int8", families=["llama", "qwen2"])
@pytest.mark.parametrize("kernels", ["reference", "cpp"])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_and_logprobs(name: str, kernels: str) -> None:
    folder, prompts, answers = expected(name)
    with engine(folder, env={"VLLM_MS_KERNELS": kernels}, kv_cache_dtype=INT8, enable_prefix_caching=False) as llm:
        outputs = greedy(llm, prompts, TOKENS, logprobs=-1, prompt_logprobs=-1)
    assert token_ids(outputs) == [answer.tokens for answer in answers]
    of_prompts = [distributions(output.prompt_logprobs, VOCABULARY) for output in outputs]
    of_tokens = [distributions(output.outputs[0].logprobs, VOCABULARY) for output in outputs]
    prompt_off = differences(of_prompts, [answer.prompt_logits for answer in answers])
    token_off = differences(of_tokens, [answer.token_logits for answer in answers])
    for off in (prompt_off, token_off):
        assert off.max() < UNIT_TOLERANCE
        assert np.median(off) < LOGPROB_TOLERANCE
    # The rounding is there: a model of floats is further away.
    floats = torch_reference.load(folder)
    exact = [torch_reference.logits(floats, prompt)[:-1] for prompt in prompts]
    assert np.median(differences(of_prompts, exact)) > 2 * LOGPROB_TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_models_of_half_the_width(dtype: str) -> None:
    """As far from float32 as with a cache of floats, and at most as far again as rounding to int8 takes a model.

    The integers of a float16 or bfloat16 key are often not those of the float32 one: a unit, as the rounding itself.
    """
    folder, prompts, answers = expected("llama")
    floats = torch_reference.load(folder)
    exact = [torch_reference.logits(floats, prompt)[:-1] for prompt in prompts]
    off = {}
    for kind, wanted in (("auto", exact), (INT8, [answer.prompt_logits for answer in answers])):
        with engine(folder, dtype=dtype, kv_cache_dtype=kind) as llm:
            outputs = greedy(llm, prompts, 1, prompt_logprobs=-1)
        found = [distributions(output.prompt_logprobs, VOCABULARY) for output in outputs]
        off[kind] = np.median(differences(found, wanted))
    rounding = [torch.log_softmax(logits, -1).numpy() for logits in exact]
    own = np.median(differences(rounding, [answer.prompt_logits for answer in answers]))
    assert off[INT8] < off["auto"] + own


@pytest.mark.parametrize("name", MODELS)
def test_however_the_prompt_is_computed(name: str) -> None:
    """In chunks that divide a block or straddle its border, and from cached blocks."""
    folder, prompts, answers = expected(name)
    wanted = [answer.tokens for answer in answers]
    for chunk in (16, 40):
        with engine(folder, kv_cache_dtype=INT8, max_num_batched_tokens=chunk) as llm:
            assert token_ids(greedy(llm, prompts, TOKENS)) == wanted
    with engine(folder, kv_cache_dtype=INT8, enable_prefix_caching=True) as llm:
        miss, hit = greedy(llm, prompts, TOKENS), greedy(llm, prompts, TOKENS)
    assert [output.num_cached_tokens for output in miss] == [0] * len(prompts)
    assert [output.num_cached_tokens for output in hit] == [(length - 1) // 32 * 32 for length in LENGTHS]
    assert token_ids(miss) == token_ids(hit) == wanted
