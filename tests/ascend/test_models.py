"""Whole models in vLLM's engine on the Ascend back end's calls, of operators that do what they document.

Nothing here runs on the hardware. The yardstick is the model in float32: in bfloat16 the Ascend back end, which rounds
more often, may be twice as far from it as the reference kernels are.
"""

from typing import Any

import numpy as np
import pytest
import torch

from tests.ascend.standin import StandIn
from tests.checkpoints import DEEPSEEK, checkpoint, random_prompts
from tests.engines import engine
from vllm_ms_models import kernels
from vllm_ms_models.kernels.ascend import AscendKernels

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 32, "num_key_value_heads": 2},
    "qwen3": {"head_dim": 32, "num_key_value_heads": 2},
    "deepseek_v3": DEEPSEEK,
    "qwen3_moe": {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
TOKENS = 4
QUICK = ("llama", "deepseek_v3")


def logprobs(folder: Any, dtype: str, env: dict[str, str]) -> list[tuple[list[int], np.ndarray]]:
    """Of each prompt: the tokens generated, and the logarithms of all probabilities at each."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids in random_prompts([1, 7, 90, 33, 16])]
    # Prompts longer than a step's budget go in parts, which meet the first ones' decoding.
    with engine(folder, env, dtype=dtype, max_num_batched_tokens=48, async_scheduling=False) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=-1))
    found = []
    for output in outputs:
        rows = [[row[token].logprob for token in sorted(row)] for row in output.outputs[0].logprobs]
        found.append((list(output.outputs[0].token_ids), np.array(rows)))
    return found


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_a_model_is_as_near_to_float32_as_the_reference(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(family, dtype=torch.bfloat16, **FAMILIES[family])
    exact = logprobs(folder, "float32", {"VLLM_MS_KERNELS": "reference"})
    rounded = logprobs(folder, "bfloat16", {"VLLM_MS_KERNELS": "reference"})
    standin = StandIn()
    monkeypatch.setattr(kernels, "choose", lambda device: AscendKernels(standin))
    ascend = logprobs(folder, "bfloat16", {})
    assert isinstance(kernels.get(), AscendKernels)
    errors = []
    for other in (rounded, ascend):
        differences = []
        for (want, rows), (got, others) in zip(exact, other, strict=True):
            same = next((i for i, pair in enumerate(zip(want, got, strict=True)) if pair[0] != pair[1]), TOKENS - 1)
            differences.append((others - rows)[: same + 1].ravel())  # afterwards the sequences differ
        errors.append(float(np.sqrt(np.mean(np.concatenate(differences) ** 2))))
    print(f"\nAscend, {family}: logprobs off by {errors[1]:.2g} from float32 (rms); the reference by {errors[0]:.2g}")
    assert errors[1] <= 2 * errors[0]
    used = {"reshape_and_cache", "paged_attention", "apply_rotary_pos_emb", "add_rms_norm", "swiglu", "gather"}
    assert used <= set(standin.called)
    assert ("grouped_matmul" in standin.called) == (family in ("deepseek_v3", "qwen3_moe"))
    assert ("flash_attention" in standin.called) == (family != "deepseek_v3")
