"""The cache that is chosen without being asked for holds a sequence of maximal length, and vLLM accepts it."""

from typing import Any

import pytest

from tests.checkpoints import checkpoint, random_prompts
from tests.engines import engine, greedy, token_ids
from vllm_ms_models import memory

MIXED: dict[str, Any] = {  # five full layers and three with a window: vLLM pads the groups
    "num_hidden_layers": 8,
    "use_sliding_window": True,
    "sliding_window": 40,
    "max_window_layers": 5,
}


@pytest.mark.parametrize("options", [{}, MIXED], ids=["full", "mixed"])
@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("default", [0, memory.DEFAULT_CACHE], ids=["more than the default", "less"])
def test_default_cache(options: dict[str, Any], sequences: int, default: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "DEFAULT_CACHE", default)
    settings: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": sequences, "kv_cache_memory_bytes": None}
    with engine(checkpoint("qwen2", **options), **settings) as llm:
        prompt = random_prompts([250])
        assert len(token_ids(greedy(llm, prompt, 6))[0]) == 6
        assert llm.llm_engine.vllm_config.cache_config.num_gpu_blocks * 32 < 1 << 16


def test_blocks_of_int8() -> None:
    """A head of 64 takes 68 bytes instead of 128: as many more blocks in the same memory, and nothing else changes."""
    settings: dict[str, Any] = {"dtype": "bfloat16", "kv_cache_memory_bytes": 32 << 20}
    blocks, lengths = {}, {}
    for kind in ("auto", "int8_per_token_head"):
        with engine(checkpoint("llama", head_dim=64), kv_cache_dtype=kind, **settings) as llm:
            config = llm.llm_engine.vllm_config
            blocks[kind] = config.cache_config.num_gpu_blocks
            lengths[kind] = config.model_config.max_model_len
            assert config.cache_config.cache_dtype == kind
            assert len(token_ids(greedy(llm, random_prompts([50]), 4))[0]) == 4
    layers, heads, tokens = 3, 2, 32
    assert blocks["auto"] == (32 << 20) // (layers * heads * tokens * 2 * 128)
    assert blocks["int8_per_token_head"] == (32 << 20) // (layers * heads * tokens * 2 * 68)
    assert lengths["auto"] == lengths["int8_per_token_head"]


def test_length_that_vllm_fits_to_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "DEFAULT_CACHE", 10 * 32 * 2 * 3 * 2 * 16 * 4)  # ten blocks of the tiny Llama
    with engine(checkpoint("llama"), max_model_len=-1, kv_cache_memory_bytes=None) as llm:
        assert 32 <= llm.llm_engine.vllm_config.model_config.max_model_len < 512


def test_dummy_weights_are_the_same_in_every_run_and_need_no_file() -> None:
    answers = []
    for _ in range(2):
        with engine(checkpoint("llama"), load_format="dummy") as llm:
            answers.append(token_ids(greedy(llm, random_prompts([5, 40]), 12)))
    assert answers[0] == answers[1]
    assert len({token for answer in answers[0] for token in answer}) > 1
