"""Adapters against PEFT and transformers in float32: every family, batches over several adapters and none.

An adapter's products are sums of a few hundred more terms in float32; the bound is that of models without them
(torch_reference.py).
"""

import asyncio
from typing import Any

import pytest
import torch

from tests.checkpoints import random_prompts
from tests.engines import engine
from tests.lora.adapters import (
    FAMILIES,
    TOKENS,
    Request,
    adapt,
    ask,
    check,
    folder_of,
    lora,
    requests,
    three,
    torch_models,
)
from tests.reference import torch_reference

LENGTHS = (5, 40, 9, 1, 17, 33, 12, 3)  # tokens of prompts without an adapter, with the first, the second ...
QUICK = ("qwen2", "deepseek_v3")
ZOO = ("phi3", "granite", "olmo2", "gemma2", "gemma3", "glm4", "glm4_moe", "gpt_oss", "opt")  # not in docs/features.md
SERVED: dict[str, Any] = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}


def compare(family: str, **options: Any) -> None:
    folder, adapters = folder_of(family), three(family)
    wanted = requests(torch_models(folder, adapters), LENGTHS)
    with engine(folder, **(SERVED | options)) as llm:
        check(ask(llm, wanted, adapters), wanted)


@pytest.mark.feature("LoRA")
@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES if name not in ZOO],
)
def test_tokens_and_logprobs(family: str) -> None:
    """Prompts are read in chunks of 24 tokens, so that steps have parts of some and tokens of others."""
    compare(family, max_num_batched_tokens=24)


@pytest.mark.slow
@pytest.mark.parametrize("family", ZOO)
def test_other_families(family: str) -> None:
    """Matrices of several projections have one adapter for all of them (Phi-3, GLM-4)."""
    compare(family, max_num_batched_tokens=24)


def test_the_reference_without_peft() -> None:
    """It stands for PEFT where PEFT cannot: the same logits, up to float32."""
    folder, adapters = folder_of("qwen2"), three("qwen2")
    (prompt,) = random_prompts([20])
    for model, path in zip(torch_models(folder, adapters)[1:], adapters, strict=True):
        other = adapt(torch_reference.load(folder), path)
        torch.testing.assert_close(torch_reference.logits(other, prompt), torch_reference.logits(model, prompt))


def test_reference_kernels() -> None:
    compare("qwen3_moe", env={"VLLM_MS_KERNELS": "reference"})


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("qwen2", {"tensor_parallel_size": 2}),
        pytest.param("deepseek_v3", {"tensor_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", {"tensor_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param("qwen2", {"tensor_parallel_size": 4}, marks=pytest.mark.slow),
        pytest.param("llama", {"pipeline_parallel_size": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_several_ranks(family: str, sizes: dict[str, int]) -> None:
    """Each has its rows or columns of the adapters' matrices too; a stage of a pipeline those of its layers."""
    compare(family, **sizes)


@pytest.mark.slow
def test_data_parallel_ranks_with_experts() -> None:
    """All requests on both ranks at once; then one after another, while the other rank idles and serves experts."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    folder, adapters = folder_of("qwen3_moe"), three("qwen3_moe")
    wanted = requests(torch_models(folder, adapters), LENGTHS[:4])
    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "kv_cache_memory_bytes": 2**25, **SERVED}
    arguments = AsyncEngineArgs(str(folder), data_parallel_size=2, skip_tokenizer_init=True, **options)
    kind = RequestOutputKind.FINAL_ONLY
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, output_kind=kind)

    async def run() -> None:
        llm = AsyncLLM.from_engine_args(arguments)

        async def answer(request: Request, rank: int, name: str) -> None:
            chosen = lora(adapters[request.adapter - 1], request.adapter) if request.adapter else None
            given = {"prompt_token_ids": request.prompt}
            coming = llm.generate(given, sampling, name, lora_request=chosen, data_parallel_rank=rank)
            output = [output async for output in coming][-1]
            assert list(output.outputs[0].token_ids) == request.answer.tokens

        try:
            pairs = [(number, rank) for number in range(len(wanted)) for rank in range(2)]
            together = [answer(wanted[number], rank, f"{number} on {rank}") for number, rank in pairs]
            await asyncio.wait_for(asyncio.gather(*together), 120)
            for number, rank in pairs:
                await asyncio.wait_for(answer(wanted[number], rank, f"{number} alone on {rank}"), 120)
        finally:
            llm.shutdown()

    asyncio.run(run())
