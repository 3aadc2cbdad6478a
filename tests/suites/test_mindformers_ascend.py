"""mindformers' networks as they run on Ascend, of operators that do what they document: nothing ran on the hardware.

vLLM's engine, our batches and mindformers' own modules are real; under these, each call of an operator that MindSpore
has for Ascend only is answered by its documented meaning in NumPy (tests/ascend/standin.py).
"""

from typing import Any

import numpy as np
import pytest
from mindspore import Tensor

from tests.ascend.standin import StandIn
from tests.checkpoints import DEEPSEEK, checkpoint, random_prompts
from tests.engines import distributions, engine, greedy, token_ids
from tests.suites.test_mindformers import SOURCE
from vllm_ms_models import kernels
from vllm_ms_models.kernels.ascend import AscendKernels

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3, dense": ("deepseek_v3", DEEPSEEK | {"first_k_dense_replace": 3, "qk_rope_head_dim": 16}),
    "qwen2": ("qwen2", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "qwen3, tied": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}
TOKENS = 6


def substitute(network: Any, operators: StandIn) -> None:
    """Answer for the operators of a network of mindformers, whose modules stay as they are."""
    for _, cell in network.model.cells_and_names():
        if hasattr(cell, "rotary_embedding_op"):
            cell.rotary_embedding_op = rotary(operators)
        kind = type(cell).__name__
        if kind == "RMSNorm":
            cell.norm = lambda x, weight, eps=cell.eps: (operators.rms_norm(x, weight, eps),)
        elif kind.endswith("SelfAttention"):
            attend(cell, operators)


def rotary(operators: StandIn) -> Any:
    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """With tables of all positions, each sequence begins at the first; with a row for each token, `lengths` say
        nothing (mindformers passes those of the whole sequences)."""
        if len(cos) != len(query):
            places = Tensor(np.concatenate([np.arange(length) for length in lengths.asnumpy()]).astype(np.int64))
            cos, sin = cos[places], sin[places]
        lengths = Tensor(np.ones(len(query), np.int32))
        return operators.apply_rotary_pos_emb(query, key, cos, sin, lengths)

    return rotate


def attend(block: Any, operators: StandIn) -> None:
    core = block.core_attention
    heads, scale = core.head_num, core.flash_attention.scale_value
    latent = block.config.multi_latent_attention
    kv_heads, values = (1, block.config.kv_lora_rank) if latent else (core.kv_head_num, 0)

    def flash(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Any, ...]:
        *_, mask, _, query_lens, key_lens = rest
        return None, None, None, operators.flash_attention(query, key, value, mask, query_lens, key_lens, heads, scale)

    def paged(query: Tensor, keys: Tensor, rows: Tensor, tables: Tensor, lengths: Tensor, *rest: Any) -> Tensor:
        *_, mask, query_lens = rest
        if mask.shape == (1, 1):  # a token each: nothing to mask
            mask = query_lens = None
        shapes = heads, kv_heads, scale, values
        return operators.paged_attention(query, keys, rows, tables, lengths, mask, query_lens, *shapes)

    def store(key: Tensor, value: Tensor | None, keys: Tensor, rows: Tensor | None, slots: Tensor) -> Tensor:
        operators.reshape_and_cache(key, value, keys, rows, slots)
        return key

    core.flash_attention, core.paged_attention, core.reshape_and_cache = flash, paged, store


def answers(case: str, source: dict[str, Any], dtype: str) -> tuple[list[list[int]], list[np.ndarray]]:
    """Tokens, and log-probabilities of the whole vocabulary, of prompts whose chunks meet the others' decoding."""
    family, options = CASES[case]
    prompts = random_prompts([1, 7, 90, 33, 16])
    settings: dict[str, Any] = {"max_num_batched_tokens": 48, "async_scheduling": False, "dtype": dtype}
    with engine(checkpoint(family, **options), additional_config=source, **settings) as llm:
        outputs = greedy(llm, prompts, TOKENS, logprobs=-1)
    return token_ids(outputs), [distributions(output.outputs[0].logprobs, 211) for output in outputs]


@pytest.mark.parametrize("case", CASES)
def test_as_near_to_float32_as_our_own(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ms_models.suites.mindformers import network

    tokens, exact = answers(case, {}, "float32")
    _, rounded = answers(case, {}, "float16")
    operators, make = StandIn(), network.make

    def made(*arguments: Any) -> Any:
        result = make(*arguments)
        substitute(result, operators)
        return result

    monkeypatch.setattr(kernels, "choose", lambda device: AscendKernels(operators))
    monkeypatch.setattr(network, "make", made)
    monkeypatch.setenv("ENFORCE_EAGER", "True")
    found, theirs = answers(case, SOURCE, "float16")
    same = [next((i for i in range(TOKENS) if a[i] != b[i]), TOKENS - 1) for a, b in zip(tokens, found, strict=True)]

    def error(of: list[np.ndarray]) -> float:
        """Root of the mean square, up to where the tokens part."""
        rows = zip(of, exact, same, strict=True)
        return float(np.sqrt(np.mean(np.concatenate([(a - b)[: n + 1].ravel() for a, b, n in rows]) ** 2)))

    print(
        f"\nAscend, {case}: off by {error(theirs):.2g} from float32 (rms); our own in float16 by {error(rounded):.2g}"
    )
    assert min(same) >= 1  # more than the first token is compared
    assert error(theirs) <= 2 * error(rounded)
    used = {"rms_norm", "apply_rotary_pos_emb", "reshape_and_cache", "flash_attention", "paged_attention"}
    assert used <= set(operators.called)
