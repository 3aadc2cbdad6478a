"""However the scheduler cuts the work, and whichever kernels do it, the tokens are the same (float32).

In float32 only: sums are taken in an order that depends on how many rows a step has and into how many pieces a long
context is cut, so that log-probabilities agree to rounding (`LOGPROB_TOLERANCE`), not to the bit.
float32 rounding decides nothing at the margins checked here; bfloat16's does, so nothing of the kind holds there.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest

from tests.checkpoints import DEEPSEEK, checkpoint, random_prompts
from tests.engines import counter, engine, greedy, token_ids
from tests.reference import torch_reference
from tests.reference.torch_reference import LEAST_MARGIN
from vllm_ms_models.layers.mla import EXPAND_FROM

TOKENS = 32

# Full attention only; full and sliding layers (two KV cache groups); a window everywhere; latent attention
# and experts. The seeds are such that no
# token below is decided by less than LEAST_MARGIN.
MODELS: dict[str, tuple[str, int, Mapping[str, Any]]] = {
    "llama": ("llama", 10, {"num_attention_heads": 8}),
    "qwen2_half_with_window": (
        "qwen2",
        1,
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2, "num_hidden_layers": 4},
    ),
    "mistral_window": ("mistral", 1, {"sliding_window": 40}),
    "deepseek_v3": ("deepseek_v3", 1, DEEPSEEK | {"n_group": 2, "n_routed_experts": 16, "num_experts_per_tok": 4}),
}
LENGTHS = (1, 7, 31, 32, 33, 64, 90, 150)
assert 90 < EXPAND_FROM <= 150, "latent attention of prompts is both absorbed and expanded here"

pytestmark = pytest.mark.parametrize("model", MODELS)


def folder(model: str) -> str:
    family, seed, options = MODELS[model]
    return str(checkpoint(family, seed, **options))


@cache
def expected(model: str, lengths: tuple[int, ...] = LENGTHS, tokens: int = TOKENS) -> list[list[int]]:
    """What torch generates after `random_prompts(lengths)`; every token decided by more than rounding."""
    torch_model = torch_reference.load(folder(model))
    answers = [torch_reference.greedy(torch_model, prompt, tokens) for prompt in random_prompts(lengths)]
    assert min(answer.margin for answer in answers) > LEAST_MARGIN, "a tie: choose another seed"
    return [answer.tokens for answer in answers]


def test_prefix_cache_hit_and_miss(model: str) -> None:
    prompts = random_prompts(LENGTHS)
    with engine(folder(model), enable_prefix_caching=True) as llm:
        miss, hit = greedy(llm, prompts, TOKENS), greedy(llm, prompts, TOKENS)
    assert [output.num_cached_tokens for output in miss] == [0] * len(prompts)
    # Whole blocks of 32 but never the last token, whose logits are wanted.
    assert [output.num_cached_tokens for output in hit] == [(length - 1) // 32 * 32 for length in LENGTHS]
    assert token_ids(miss) == expected(model)
    assert token_ids(hit) == token_ids(miss)


def test_shared_prefix_with_another_ending(model: str) -> None:
    """A cached prefix serves a prompt that goes on differently."""
    (prompt,) = random_prompts([150])
    others = [prompt[:100] + ending for ending in random_prompts([1, 20, 50], seed=1)]
    with engine(folder(model), enable_prefix_caching=False) as llm:
        alone = token_ids(greedy(llm, others, TOKENS))
    with engine(folder(model), enable_prefix_caching=True) as llm:
        greedy(llm, [prompt], 1)
        outputs = greedy(llm, others, TOKENS)
    # Layers with a window keep the blocks of the last window only, so that the first of these may find nothing.
    assert [output.num_cached_tokens for output in outputs][1:] == [96, 96]
    assert token_ids(outputs) == alone


@pytest.mark.parametrize("chunk", [16, 40])
def test_chunked_and_whole_prefill(model: str, chunk: int) -> None:
    """Chunks that divide a block and chunks that straddle its border."""
    prompts = random_prompts(LENGTHS)
    with engine(folder(model), max_num_batched_tokens=chunk, max_num_seqs=8) as llm:
        assert llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens == chunk < max(LENGTHS)
        chunked = token_ids(greedy(llm, prompts, TOKENS))
    assert chunked == expected(model)


def test_batch_of_one_and_batch_of_32(model: str) -> None:
    lengths, tokens = tuple(1 + 5 * i + i % 3 for i in range(32)), 16
    prompts = random_prompts(lengths)
    with engine(folder(model), max_num_seqs=32, enable_prefix_caching=False) as llm:
        together = token_ids(greedy(llm, prompts, tokens))
        alone = [token_ids(greedy(llm, [prompt], tokens))[0] for prompt in prompts]
    assert together == expected(model, lengths, tokens)
    assert alone == together


def test_preempted_and_not(model: str) -> None:
    """A cache for barely more than one sequence: others are thrown out midway and computed anew."""
    groups = 2 if model == "qwen2_half_with_window" else 1
    prompts = random_prompts(LENGTHS)
    with engine(
        folder(model),
        num_gpu_blocks_override=1 + groups * 9,  # vLLM keeps one for itself; a sequence of 256 tokens takes 8
        enable_prefix_caching=False,
        disable_log_stats=False,
    ) as llm:
        before = counter(llm, "vllm:num_preemptions")
        outputs = token_ids(greedy(llm, prompts, TOKENS))
        preemptions = counter(llm, "vllm:num_preemptions") - before
    assert preemptions > 0
    assert outputs == expected(model)


def test_reference_and_compiled_kernels(model: str) -> None:
    prompts = random_prompts(LENGTHS)
    tokens = {}
    for kernels in ("reference", "cpp"):
        with engine(folder(model), env={"VLLM_MS_KERNELS": kernels}) as llm:
            tokens[kernels] = token_ids(greedy(llm, prompts, TOKENS))
    assert tokens["reference"] == expected(model)
    assert tokens["cpp"] == tokens["reference"]


@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512_vnni", "avx512", "avx2", "portable"])
def test_each_instruction_set(model: str, isa: str) -> None:
    from vllm_ms_models.kernels.cpu.backend import load_module

    if isa not in load_module().isas():
        pytest.skip(f"this CPU does not run {isa}")
    with engine(folder(model), env={"VLLM_MS_KERNELS": "cpp", "VLLM_MS_ISA": isa}) as llm:
        assert token_ids(greedy(llm, random_prompts(LENGTHS), TOKENS)) == expected(model)
