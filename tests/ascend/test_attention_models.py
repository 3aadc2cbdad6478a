"""Whole models whose attention is out of the ordinary, as test_models.py. Nothing here runs on the hardware."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.ascend.whole_models import Answers, check, logprobs
from tests.checkpoints import DEEPSEEK, checkpoint, random_prompts
from tests.engines import engine
from tests.pooling.encoders import encoder, prompts, save_encoder
from tests.pooling.models import OPTIONS, decoder, save, token_prompts
from tests.zoo.family import families

# Family, options of its config and of the engine, operators that must be called, and those that must not.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], set[str], set[str]]] = {
    "gemma2, caps and windows": (
        "gemma2",
        dict(families()["gemma2"].cases["caps and windows"]),
        {},
        {"tanh", "batch_matmul"},
        {"paged_attention", "flash_attention"},
    ),
    "mistral, a window": (
        "mistral",
        {"head_dim": 32, "sliding_window": 24},
        {},
        {"paged_attention"},
        {"batch_matmul"},
    ),
    "llama, heads of 20": (
        "llama",
        {"head_dim": 20},
        {},
        {"index_put", "batch_matmul"},
        {"reshape_and_cache", "paged_attention"},
    ),
    "llama, a cache of int8": (
        "llama",
        {"head_dim": 32},
        {"kv_cache_dtype": "int8_per_token_head"},
        {"index_put", "batch_matmul"},
        {"reshape_and_cache", "paged_attention"},
    ),
    "deepseek_v3, expanded": (
        "deepseek_v3",
        DEEPSEEK | {"first_k_dense_replace": 99},
        {"max_num_batched_tokens": 256},
        {"paged_attention", "flash_attention"},
        {"batch_matmul"},
    ),
}
QUICK = "gemma2, caps and windows"


@pytest.mark.parametrize("case", [pytest.param(x, marks=() if x == QUICK else pytest.mark.slow) for x in CASES])
def test_a_decoder_is_as_near_to_float32_as_the_reference(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, config, options, called, not_called = CASES[case]
    folder = checkpoint(family, dtype=torch.bfloat16, **config)
    lengths = [1, 7, 150, 33, 16] if "expanded" in case else [1, 7, 90, 33, 16]
    found = check(case, lambda dtype, env: logprobs(folder, dtype, env, lengths, **options), monkeypatch)
    assert called <= found and not not_called & found


def embedded(folder: Any, given: list[list[int]], dtype: str, env: dict[str, str], **options: Any) -> Answers:
    with engine(folder, env, dtype=dtype, **(OPTIONS | options)) as llm:
        outputs = llm.embed(token_prompts(given), use_tqdm=False)
    return [([0], np.array([output.outputs.embedding])) for output in outputs]


@pytest.mark.slow
@pytest.mark.parametrize("heads", [4, 3], ids=["heads of 16", "heads of 20"])
def test_an_encoder_is_as_near_to_float32_as_the_reference(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """BERT, which keeps no cache: FlashAttentionScore without a mask, or plain operators."""
    sizes = {"num_attention_heads": heads, "hidden_size": 16 * heads if heads == 4 else 60, "pad_token_id": 0}
    model = encoder("bert", dtype=torch.bfloat16, **sizes)
    folder, given = save_encoder(model), prompts(model)
    options = {"max_model_len": None}
    found = check("bert", lambda dtype, env: embedded(folder, given, dtype, env, **options), monkeypatch)
    assert ("flash_attention" in found) == (heads == 4) and ("batch_matmul" in found) == (heads == 3)


@pytest.mark.slow
def test_a_decoder_that_embeds_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(decoder("llama", dtype=torch.bfloat16, head_dim=32), is_causal=False)
    given = random_prompts([1, 7, 90, 33, 16])
    found = check("llama in both directions", lambda dtype, env: embedded(folder, given, dtype, env), monkeypatch)
    assert "flash_attention" in found and "paged_attention" not in found
